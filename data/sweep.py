"""Fill in the table of runs, data/runs.csv: one row per run, only what is missing.

    python data/sweep.py                       every plan, on this machine's cores
    python data/sweep.py --plan small          a small plan, to try it out in a minute
    python data/sweep.py --scheduler ADDRESS   on a dask cluster (pip install distributed)

Interrupt and call again at any moment: finished runs stay, the others start anew. A run that
diverges or fails is a row that says so; delete the row to have it tried again. Where ``EXPERIMENT``
was raised, runs with an older number are made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import joblib
import pandas as pd
import torch
from tqdm import tqdm

from data.experiment import (COLUMNS, CURVES, EXPERIMENT, KEY, OUTCOMES, RATES, RUNS, SENT, TASKS,
                             USUAL, arms, load_runs, symptoms)
from data.probes import probe_name
from helpers import adamw, load_corpus, save_atomically, train
from model_local import LocalGPT, LocalGPTConfig

# --------------------------------------------------------------------------------------------------
# Optimizers: how gradients change the weights, a function of the model, the rate and the steps
# --------------------------------------------------------------------------------------------------

Optimizer = torch.optim.Optimizer


def sgd(model: LocalGPT, lr: float, steps: int) -> Optimizer:
    """Stochastic gradient descent with momentum 0.9: no weight's step is rescaled."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def queries_and_keys(model: LocalGPT) -> list[torch.nn.Parameter]:
    """All W_q and W_k."""
    return [weight for name, weight in model.named_parameters()
            if name.endswith(("q_proj.weight", "k_proj.weight"))]


def adamw_for_qk(model: LocalGPT, lr: float, steps: int, factor: float = 1.0,
                 decay: float = 0.01) -> Optimizer:
    """AdamW by which W_q and W_k have a rate of their own, ``factor * lr``, and a weight decay."""
    qk = queries_and_keys(model)
    others = [weight for weight in model.parameters() if not any(weight is own for own in qk)]
    groups = [{"params": others}, {"params": qk, "lr": factor * lr, "weight_decay": decay}]
    return torch.optim.AdamW(groups, lr, fused=True)


def adamw_held(model: LocalGPT, lr: float, steps: int, pull: float) -> Optimizer:
    """AdamW; after each step every W_q and W_k is pulled to the Frobenius norm it began with.

    ``pull`` is the share of the way, of the logarithm, in (0, 1]: 1 holds the norm.
    """
    optimizer, qk = adamw(model, lr, steps), queries_and_keys(model)
    norms = [weight.norm().item() for weight in qk]

    @torch.no_grad()
    def hold(*_) -> None:
        for weight, norm in zip(qk, norms, strict=True):
            weight.mul_((norm / weight.norm()) ** pull)

    optimizer.register_step_post_hook(hold)
    return optimizer


def adamw_clipped(model: LocalGPT, lr: float, steps: int) -> Optimizer:
    """AdamW on gradients whose norm, over all weights together, is at most 1."""
    optimizer = adamw(model, lr, steps)

    def clip(*_) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def adamw_scheduled(model: LocalGPT, lr: float, steps: int) -> Optimizer:
    """AdamW whose rate rises over a tenth of ``steps``, then falls to ``lr / 10`` as a cosine."""
    optimizer, warm = adamw(model, lr, steps), max(1, steps // 10)
    taken = itertools.count()

    def schedule(optimizer: Optimizer, *_) -> None:
        step = next(taken)
        done = min(1.0, max(0.0, (step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * done))

    optimizer.register_step_pre_hook(schedule)
    return optimizer


OPTIMIZERS: dict[str, Callable[[LocalGPT, float, int], Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "qk_rate_0.3": functools.partial(adamw_for_qk, factor=0.3),
    "qk_rate_0.1": functools.partial(adamw_for_qk, factor=0.1),
    "qk_rate_0.03": functools.partial(adamw_for_qk, factor=0.03),
    "qk_decay": functools.partial(adamw_for_qk, decay=1.0),
    "qk_fixed": functools.partial(adamw_held, pull=1.0),
    "qk_slow": functools.partial(adamw_held, pull=0.01),
    "clip": adamw_clipped,
    "schedule": adamw_scheduled,
}

# --------------------------------------------------------------------------------------------------
# Plans: lists of cells, in the order in which they are run
# --------------------------------------------------------------------------------------------------

Cell = dataclasses.make_dataclass("Cell", KEY.items(), frozen=True)  # what determines one run


def grid(task: str, rules: Iterable[str], lrs: Iterable[float], seeds: Iterable[int],
         **changes) -> list[Cell]:
    """A cell for each seed, rate and rule; ``changes`` are to what is usual, or to the steps.

    >>> [(cell.rule, cell.seed) for cell in grid("recall", ("full", "none"), [1e-3], [0, 1])]
    [('full', 0), ('none', 0), ('full', 1), ('none', 1)]
    """
    settings = USUAL | {"task": task, "steps": TASKS[task].steps} | changes
    return [Cell(rule=rule, lr=lr, seed=seed, **settings)
            for seed in seeds for lr in lrs for rule in rules]


# the protocol of notebooks/protocol.md
SEEDS = (*range(100, 104), *range(200, 204))  # on recall; the first four for the exact pass
TEXT_SEEDS = range(200, 205)
OF_TEXT = ("full", "none", "diagonal", "zero", "diagonal_mean")
SURROGATES = ("mean", "running", "diagonal_mean", "diagonal_running", "diagonal_lateral",
              "balanced_evenly", "balanced_by_attention", "ste")


def window(arm: str, lrs: Iterable[float] = RATES[1:], task: str = "recall",
           seeds: Sequence[int] = SEEDS, **changes) -> list[Cell]:
    """The two local rules at several rates, beside the exact pass on the first four seeds."""
    changes = arms(task)[arm] | changes
    exact = grid(task, ("full",), lrs, seeds[:4], **changes)
    return exact + grid(task, ("diagonal", "zero"), lrs, seeds, **changes)


def on_text(arm: str, rules: Iterable[str], lrs: Iterable[float] = RATES[2:],
            seeds: Iterable[int] = TEXT_SEEDS, **changes) -> list[Cell]:
    return grid("shakespeare", rules, lrs, seeds, **arms("shakespeare")[arm], **changes)


FA = {"method": "fa", "feedback_scale": 0.5}

PLANS: dict[str, list[Cell]] = {
    "cap-choice": [cell for task in ("recall", "shakespeare") for cap in (1.0, 2.0, 32**0.5, 20.0)
                   for cell in grid(task, ("diagonal",), [1e-3], (300, 301), score_cap=cap)],
    "recall-off": window("off", RATES),
    "recall-start": window("start"),
    "recall-cap": window("cap", RATES),  # open at 1e-4
    "recall-exact": window("exact", RATES),
    "recall-cut": window("cut", RATES),
    "recall-cap-start": window("cap and start", RATES),  # open at 1e-4
    "drift": [cell for arm in ("off", "exact")
              for cell in grid("recall", ("diagonal", "zero"), [1e-3], range(400, 408),
                               **arms("recall")[arm])],
    "recall-held": window("held", RATES[2:4]),
    "recall-cap-cut": window("cap, slope 1", RATES[2:4]),
    "recall-tangent": grid("recall", ("balanced_evenly",), RATES[1:], SEEDS,
                           **arms("recall")["tangent"]),
    **{f"fa-{arm}": on_text(arm, (*OF_TEXT, "ste"), **FA) for arm in ("off", "exact", "cap")},
    **{f"fa-long-{arm}": on_text(arm, ("full", "none", "diagonal"), [1e-3], range(200, 204),
                                 steps=2000, **FA) for arm in ("off", "exact", "cap")},
    "text-off": on_text("off", OF_TEXT),
    "text-cap": on_text("cap", OF_TEXT),
    "text-cap-start": on_text("cap and start", OF_TEXT),
    "text-exact": on_text("exact", OF_TEXT, RATES[1:]),  # open at 3e-4
    "surrogates": grid("recall", SURROGATES, RATES[1:], SEEDS),
    "sigmoid": grid("recall", ("full",), RATES[1:], SEEDS, attn_mode="sigmoid"),
    "own-rates": [cell for arm in ("off", "cap") for factor in ("0.3", "0.1", "0.03")
                  for cell in on_text(arm, ("diagonal", "zero"), [1e-3],
                                      optimizer=f"qk_rate_{factor}")],
    "sgd": [cell for arm in ("exact", "cap")
            for cell in window(arm, (0.03, 0.1, 0.3, 1.0), seeds=SEEDS[:4], optimizer="sgd")],
    "eight-pairs": [cell for arm in ("off", "exact", "cap")
                    for cell in window(arm, task="recall_8", seeds=SEEDS[4:])],
}
SMALL = grid("recall", ("full", "none"), [1e-3], (100, 200, 201), steps=20)


def cells_of(runs: pd.DataFrame) -> list[Cell]:
    return [Cell(*values) for values in runs[[*KEY]].itertuples(index=False)]


def missing(plan: Iterable[Cell], path: Path = RUNS) -> list[Cell]:
    """The cells of a plan of which the table has no row, or one that is out of date."""
    done = set(cells_of(load_runs(path=path))) if path.exists() else set()
    return [cell for cell in dict.fromkeys(plan) if cell not in done]


def outdated(path: Path = RUNS) -> list[Cell]:
    """The cells that an earlier experiment has run, but for those of the first edition."""
    runs = load_runs(experiment=None, path=path)
    return cells_of(runs[runs["experiment"].between(2, EXPERIMENT - 1)])


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def config_of(cell: Cell, vocab_size: int) -> LocalGPTConfig:
    """The model that a cell asks for."""
    return LocalGPTConfig(
        vocab_size=vocab_size, method=cell.method, attn_mode=cell.attn_mode,
        softmax_backward=probe_name(cell.rule, cell.base, cell.dose, cell.after),
        feedback_scale=cell.feedback_scale, qk_norm=cell.qk_norm, qk_start=cell.qk_start,
        score_cap=cell.score_cap, cap_backward=cell.cap_backward, score_scale=cell.score_scale,
        **TASKS[cell.task].shape)


def run(cell: Cell, device: str = "cpu") -> dict:
    """Train one cell and return its row of the table."""
    torch.set_num_threads(1)  # the cores are shared out to runs
    task = TASKS[cell.task]
    data = load_corpus(task.data) if isinstance(task.data, str) else task.data
    config = config_of(cell, data.vocab_size)
    row = dataclasses.asdict(cell)
    row |= {"data": data.sha256[:12], "experiment": EXPERIMENT, "torch": torch.__version__}
    cpu = f"CPU {platform.machine()}"
    row["machine"] = cpu if device == "cpu" else torch.cuda.get_device_name()
    start = time.process_time()  # of this process: what else runs beside it does not count
    try:
        done = train(config, cell.steps, cell.lr, task.batch_size, cell.seed, data,
                     eval_every=min(cell.steps, task.eval_every), measure=symptoms, device=device,
                     directory=None, progress=False, optimizer=OPTIMIZERS[cell.optimizer])
    except FloatingPointError:
        row["status"] = "diverged"
    except Exception as error:  # out of memory, for instance: the sweep goes on
        row["status"] = f"failed: {type(error).__name__}"
        traceback.print_exc()
    else:
        row |= outcomes(done.history)
    return row | {"seconds": round(time.process_time() - start, 1)}


def outcomes(history: pd.DataFrame) -> dict[str, object]:
    """What the table says of a finished run: at its end, over training, and as curves."""
    series = {metric: rows.set_index("step")["value"] for metric, rows in history.groupby("metric")}
    row: dict[str, object] = {"status": "ok"}
    for metric in OUTCOMES:
        if metric in series:
            over_training = metric in SENT
            row[metric] = series[metric].mean() if over_training else series[metric].iloc[-1]
    for name, metric in CURVES.items():
        if metric in series:
            digits = ".4f" if metric in ("val_loss", "accuracy") else ".4g"
            row[name] = " ".join(format(value, digits) for value in series[metric])
    return row


# --------------------------------------------------------------------------------------------------
# The sweep
# --------------------------------------------------------------------------------------------------


def append(row: dict, path: Path = RUNS) -> None:
    """Add a row, all of it or nothing."""
    text = path.read_text() if path.exists() else f"{','.join(COLUMNS)}\n"
    # the key must come back as it was, of outcomes six digits are enough
    values = {name: f"{value:.6g}" if isinstance(value, float) and name not in KEY else value
              for name, value in row.items()}
    line = io.StringIO()
    csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(values)
    save_atomically(path, lambda file: file.write((text + line.getvalue()).encode()))


def sweep(cells: list[Cell], path: Path = RUNS, jobs: int = -1, device: str = "cpu") -> None:
    """Run the cells through joblib's back end of the moment; this process alone writes rows."""
    work = (joblib.delayed(run)(cell, device) for cell in cells)
    rows = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(work)
    for row in tqdm(rows, total=len(cells), unit="run", smoothing=0):
        append(row, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=["all", *PLANS, "small"], default="all")
    parser.add_argument("--results", type=Path, default=RUNS, help="the table to fill in")
    parser.add_argument("--jobs", type=int, default=-1, help="runs side by side (one a core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of dask: tcp://10.0.0.1:8786")
    args = parser.parse_args()
    if args.plan == "all":
        plan = [cell for cells in PLANS.values() for cell in cells]
        plan += outdated(args.results) if args.results.exists() else []
    else:
        plan = (PLANS | {"small": SMALL})[args.plan]
    where = contextlib.nullcontext()
    if args.scheduler:
        from distributed import Client  # not a requirement of the report

        Client(args.scheduler).run(load_corpus)  # a worker that lacks this project says so here
        where = joblib.parallel_config(backend="dask")
    try:
        with where:
            sweep(missing(plan, args.results), args.results, args.jobs, args.device)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are in the table, call again to go on")
    status = load_runs(path=args.results)["status"]
    failed = int(status.str.startswith("failed").sum())
    left = f"{failed} of them failed" if failed else "nothing missing"
    print(f"{args.results.name}: {len(status)} runs, {left}")


if __name__ == "__main__":
    main()
