"""Does a model that others trained survive fine-tuning without the lateral sum? For notebook 08.

    python data/finetune.py     adds the rows that data/finetuning.csv still misses

What is run and how it is judged stands in the docstring of ``finetune``. Before the first run it
stood in data/others.py, as the history of that file shows; of five rates that were planned three
have been run. Interrupt it whenever you like: finished runs stay.
"""

import sys
import time

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from data import others
from helpers import DATA, save_atomically, softmax_rule

FINETUNING = DATA / "finetuning.csv"
RULES = ("full", "diagonal", "none")
RATES = (1e-5, 1e-4, 1e-3, 3e-5, 3e-4)  # of the optimizer; the wide grid first
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE = 200, 4
N_SCORED = 128  # of the measured reactions


def tuned(trained: others.Trained, texts: list[str], rule: str, lr: float, seed: int) -> nn.Module:
    """``trained``'s model after ``STEPS`` of Adam at a constant rate on ``texts``, under a rule."""
    model, vocabulary = trained
    generator = torch.Generator().manual_seed(seed)
    sequences = [vocabulary.encode(text) for text in texts]
    batches = []
    optimizer = torch.optim.Adam(model.parameters(), lr)
    with softmax_rule(model, rule):
        for _ in range(STEPS):
            # through all texts, then through them again in another order, behind other masks
            if not batches:
                batches = others.masked(sequences, vocabulary.mask, BATCH_SIZE, generator)
            batch = batches.pop(0)
            optimizer.zero_grad()
            (others.nats(model, batch) / (batch.targets != -100).sum()).backward()
            optimizer.step()
    return model


def scored(trained: others.Trained, measured: pd.DataFrame) -> dict[str, float]:
    """``masked_scores`` in both forms of a reaction, behind the same masks at every call."""
    (model, vocabulary), row = trained, {}
    for writing in ("rewritten", "reaction"):
        sequences = [vocabulary.encode(text) for text in measured[writing][:N_SCORED]]
        batches = others.masked(sequences, vocabulary.mask, 16, torch.Generator().manual_seed(0))
        for name, value in others.masked_scores(model, batches).items():
            row[f"{writing}_{name}"] = value
    return row


def finetune() -> None:
    """Fine-tune the chemists' model under each rule, at each rate, with each seed: a row each.

    Fixed before the first run. The model knows reactions in RDKit's canonical form only; it is
    tuned on reactions that are *rewritten*, every molecule begun at another atom: something to
    learn that is near to what it knows. Masked tokens, Adam without decay, no dropout, batches of
    up to 4 reactions of one length. Rules: ``full``, ``diagonal``, and ``none`` as the control,
    under which queries and keys get no error. The same seed shows every rule the same reactions
    with the same masks. Outcomes, on 128 other reactions behind fixed masks: the loss in nats on
    their rewritten form (was it learnt?) and on their canonical form (was it kept?).

    A rule *holds* at a rate where every seed ends with less loss on the rewritten reactions than
    the model had before; it *breaks* where every seed ends with more; otherwise that rate is
    *undecided*. What it costs, of what training queries and keys is worth, is told by the same
    loss, each rule at its own best rate and all at the best rate of ``full``. With three seeds, and
    rates chosen on the seeds that are shown, these are first results, and are to be called so. The
    row of the rule ``before`` is the model as it came.
    """
    torch.set_num_threads(1)
    table = others.reactions()
    tuning, measured = (table[table["part"] == part] for part in ("tuning", "measured"))
    plan = [("before", 0.0, 0)]
    for grid in (RATES[:3], RATES[3:]):
        plan += [(rule, lr, seed) for seed in SEEDS for lr in grid for rule in RULES]
    rows = pd.read_csv(FINETUNING).to_dict("records") if FINETUNING.exists() else []
    made = {(row["rule"], row["lr"], row["seed"]) for row in rows}
    for rule, lr, seed in tqdm([run for run in plan if run not in made], desc="runs"):
        start, trained = time.time(), others.chemistry()
        if rule != "before":
            tuned(trained, [*tuning["rewritten"]], rule, lr, seed)
        row = {"rule": rule, "lr": lr, "seed": seed} | scored(trained, measured)
        rows.append(row | {"seconds": round(time.time() - start)})
        text = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n")
        save_atomically(FINETUNING, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    try:
        finetune()
    except others.WheelError as error:
        sys.exit(f"finetune.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune.py: interrupted; finished runs stay, call again to go on")
