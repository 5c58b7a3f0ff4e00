"""The experiment: what is learnt and measured, the table of runs, how rules are judged by it.

In this order: tasks, symptoms, the table ``data/runs.csv``, harm, windows of learning rates, the
verdict. Rows are made by ``data/sweep.py``; rules that only probe are in ``data/probes.py``, and
what is drawn of all this is in ``notebooks/figures.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from helpers import DATA, CapturedAttention, capture_batch, gradient_cosines, twin
from model_local import LocalGPT, LocalGPTConfig, full

# --------------------------------------------------------------------------------------------------
# Tasks: what is learnt, by which shape of model, for how long
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecallTask:
    """Associative recall (Arora et al. 2023, "Zoology"): pairs of key and value, then some keys.

    Only attention can carry a value from its pair to the query. Tokens are ``n_keys`` keys, then
    ``n_values`` values; a sequence has ``n_pairs`` pairs of different keys, then ``n_queries`` of
    these keys in random order. A generator makes endlessly many, so that unseen ones are the rule;
    only queries have a target (other positions have -100, which the loss leaves out).

    >>> task = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
    >>> x, y = task.batch(task.block_size, 1, torch.Generator().manual_seed(0), "cpu")
    >>> x.tolist(), y.tolist()
    ([[2, 3, 0, 4, 0, 2]], [[-100, -100, -100, -100, 4, 3]])
    """

    n_keys: int = 8
    n_values: int = 8
    n_pairs: int = 4
    n_queries: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n_queries <= self.n_pairs <= self.n_keys or self.n_values < 2:
            raise ValueError(f"{self} cannot be: 1 <= n_queries <= n_pairs <= n_keys "
                             "and n_values >= 2 must hold")

    @property
    def vocab_size(self) -> int:
        return self.n_keys + self.n_values

    @property
    def block_size(self) -> int:
        return 2 * self.n_pairs + self.n_queries

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def chance(self) -> float:
        """Accuracy of one who names any of the values that occur in the sequence."""
        return 1 / self.n_pairs + (1 - 1 / self.n_pairs) / self.n_values

    @property
    def best_guess(self) -> float:
        """Accuracy of one who names the most frequent value: the best without any lookup."""
        total = 0
        for shown in itertools.combinations_with_replacement(range(self.n_values), self.n_pairs):
            counts = Counter(shown).values()
            orders = math.factorial(self.n_pairs) // math.prod(map(math.factorial, counts))
            total += orders * max(counts)
        return total / self.n_values**self.n_pairs / self.n_pairs

    def batch(self, block_size: int, batch_size: int, generator: torch.Generator,
              device: str) -> tuple[Tensor, Tensor]:
        """``batch_size`` sequences and their targets, both (batch_size, block_size), int64."""
        if block_size != self.block_size:
            raise ValueError(f"block_size={block_size}, and {self} has sequences of "
                             f"{self.block_size} tokens")
        B, P = batch_size, self.n_pairs
        keys = torch.rand(B, self.n_keys, generator=generator).argsort(dim=1)[:, :P]  # all differ
        values = self.n_keys + torch.randint(self.n_values, (B, P), generator=generator)
        asked = torch.rand(B, P, generator=generator).argsort(dim=1)[:, : self.n_queries]
        pairs = torch.stack([keys, values], dim=2).flatten(1)
        x = torch.cat([pairs, keys.gather(1, asked)], dim=1)
        y = torch.full_like(x, -100)
        y[:, 2 * P :] = values.gather(1, asked)
        return x.to(device), y.to(device)

    @torch.no_grad()
    def score(self, model: LocalGPT) -> dict[str, float]:
        """``val_loss`` (nats) and ``accuracy`` in [0, 1] on the same 2,048 sequences every time."""
        device = next(model.parameters()).device
        unseen = torch.Generator().manual_seed(2**31)  # no run's seed
        x, y = self.batch(model.config.block_size, 2048, unseen, device)
        was_training = model.training
        logits, loss = model.eval()(x, y)
        model.train(was_training)
        right = (logits.argmax(-1) == y)[y != -100]
        return {"val_loss": loss.item(), "accuracy": right.double().mean().item()}


class Task(NamedTuple):
    """What is learnt (the name of a corpus, or a task), and the setting in which it is."""

    data: str | RecallTask
    batch_size: int
    steps: int
    eval_every: int
    shape: dict[str, int]  # of the model, where it is not the default


def _recall(data: RecallTask) -> Task:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": data.block_size}
    return Task(data, batch_size=64, steps=3000, eval_every=150, shape=shape)


TASKS = {
    "shakespeare": Task("shakespeare_char", batch_size=32, steps=500, eval_every=100, shape={}),
    "recall": _recall(RecallTask()),
    "recall_8": _recall(RecallTask(n_keys=16, n_pairs=8, n_queries=8)),
    "recall_16": _recall(RecallTask(n_keys=32, n_pairs=16, n_queries=16)),
}
SOLVED = 0.99  # the accuracy from which on a run has solved recall

# --------------------------------------------------------------------------------------------------
# Symptoms: what could make a rule fail
# --------------------------------------------------------------------------------------------------

# means over training of what is sent, and what the scores are like at the end
SENT = ["cos_scores", "cos_q", "cos_k", "row_sum", "radial_q", "radial_k"]
SYMPTOMS = [*SENT, "common_mode", "q_norm", "k_norm", "entropy", "score_max"]


def symptoms(model: LocalGPT, x: Tensor, y: Tensor) -> dict[tuple[str, str], float]:
    """What could make a rule fail, as means over layers, heads and sequences; for ``train``.

    ``cos_scores, cos_q, cos_k``: cosine in [-1, 1] of what the rule sends with the exact pass, at
    the scores and at the gradients of W_q and W_k (missing where nothing is sent).
    ``row_sum``: of what a query's keys receive, |sum| over sum of sizes, in [0, 1].
    ``radial_q, radial_k``: the same of its products with the scores, over a query's keys and a
    key's queries: what makes queries and keys longer.
    ``common_mode``: root mean square of a query's mean score, unseen by the softmax.
    ``q_norm, k_norm``: root mean square of the entries of Q and K, before any norm.
    ``entropy``: of a row, over the log of its number of keys, in [0, 1].
    ``score_max``: a row's largest score before any cap, less the row's mean.
    """
    # Queries and keys before any norm, and scores before any cap, are seen by hooks.
    seen = {"q_proj": [], "k_proj": [], "score_cap": []}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if (part := name.rpartition(".")[2]) in seen:
                hooks.enter_context(module.register_forward_hook(
                    lambda module, inputs, output, passes=seen[part]: passes.append(
                        (inputs[0].detach(), output.detach()))))
        layers = capture_batch(model, x, y)
    raw = [before for before, _ in seen["score_cap"]] or [layer.scores for layer in layers]
    parts = [_layer_symptoms(model, *part) for part in zip(layers, raw, strict=True)]
    found = {name: np.mean([part[name] for part in parts]) for name in parts[0]}

    # At the weights: beside a model whose softmax, norms and caps have their exact pass.
    exact = dataclasses.asdict(model.config.exact) | {"method": model.config.method}
    cosines = gradient_cosines(model, twin(model, **exact), x, y)
    for name in "qk":
        squares = [output.square().mean().item() for _, output in seen[f"{name}_proj"]]
        found[f"{name}_norm"] = math.sqrt(np.mean(squares))
        sent = [cosines[part] for part in cosines if part.endswith(f"{name}_proj.weight")]
        if sent:
            found[f"cos_{name}"] = np.mean(sent)
    return {(metric, ""): float(found[metric]) for metric in SYMPTOMS if metric in found}


def _layer_symptoms(model: LocalGPT, layer: CapturedAttention, raw: Tensor) -> dict[str, float]:
    """Those of one layer's scores, ``raw`` before any cap, and of what its rule sends back."""
    visible = layer.scores[0, 0].isfinite()
    n_visible = visible.sum(-1)
    # What the scores are like. The first query sees one key, and carries nothing.
    scores, raw = layer.scores.masked_fill(~visible, 0), raw.view_as(layer.scores)
    mean_score = scores.sum(-1) / n_visible
    entropy = torch.special.entr(layer.attn).sum(-1)[..., 1:] / n_visible[1:].log()
    largest = raw.masked_fill(~visible, -math.inf).amax(-1)
    above = largest - raw.masked_fill(~visible, 0).sum(-1) / n_visible
    found = {"common_mode": mean_score.square().mean().sqrt().item(),
             "entropy": entropy.mean().item(), "score_max": above[..., 1:].mean().item()}

    # What the rule sends, beside what the exact pass would.
    sent = model.get_submodule(layer.name).send_back(layer.attn, layer.grad, visible)
    if sent is None:
        return found
    softmax = model.config.attn_mode == "softmax"
    exact = full(layer.attn, layer.grad, visible) if softmax else sent
    maps = sent.double().flatten(2), exact.double().flatten(2)
    found["cos_scores"] = F.cosine_similarity(*maps, dim=-1, eps=0).nanmean().item()
    radial = sent * scores
    sums = ("row_sum", sent, -1), ("radial_q", radial, -1), ("radial_k", radial, -2)
    for name, part, dim in sums:
        found[name] = (part.sum(dim).abs().sum() / part.abs().sum()).item()
    return found


# --------------------------------------------------------------------------------------------------
# The table of runs
# --------------------------------------------------------------------------------------------------

RUNS = DATA / "runs.csv"
# Raised by hand when numbers change: rows with an older number are not shown, and are run anew.
# notebooks/tests/test_golden.py sees such changes. (Rows with a 1 are of the first edition.)
EXPERIMENT = 2

# what determines a run; the rule is named by four columns, see data/probes.py
RULE = ["rule", "base", "dose", "after"]
KEY = {
    "task": str, "method": str, "rule": str, "base": str, "dose": float, "after": int,
    "attn_mode": str, "qk_norm": str, "qk_start": str, "score_cap": float, "cap_backward": str,
    "score_scale": float, "optimizer": str, "feedback_scale": float, "lr": float, "steps": int,
    "seed": int,
}
# rules are compared within a setting: all that determines a run but rule, rate and seed
SETTING = [name for name in KEY if name not in (*RULE, "lr", "seed")]
USUAL = {"method": "bp", "base": "", "dose": 1.0, "after": 0, "attn_mode": "softmax",
         "qk_norm": "off", "qk_start": "gpt2", "score_cap": math.inf, "cap_backward": "exact",
         "score_scale": 1.0, "optimizer": "adamw", "feedback_scale": 1.0}
OUTCOMES = ["val_loss", "accuracy", *SYMPTOMS]
# over training, as numbers between blanks, one for each evaluation
CURVES = {"losses": "val_loss", "accuracies": "accuracy", "common_modes": "common_mode",
          "q_norms": "q_norm", "k_norms": "k_norm", "score_maxes": "score_max"}
COLUMNS = [*KEY, "status", *OUTCOMES, *CURVES, "data", "experiment", "seconds", "machine", "torch"]
CHOICE_SEEDS = (300, 301)  # they chose the cap, and judge nothing
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # each about half a power of ten above the last


def arms(task: str) -> dict[str, dict]:
    """The settings of attention that are compared, by name: what is not as usual in each."""
    start = {"qk_start": "lecun"}
    cap = {"score_cap": 2.0 if task == "shakespeare" else 32**0.5}  # chosen, see protocol.md
    return {
        "off": {}, "start": start, "held": start | {"optimizer": "qk_fixed"},
        "cap": cap, "cap, slope 1": cap | {"cap_backward": "cut"}, "cap and start": cap | start,
        "exact": {"qk_norm": "exact"}, "cut": {"qk_norm": "cut"}, "tangent": {"qk_norm": "tangent"},
    }


def load_runs(experiment: int | None = EXPERIMENT, path: Path = RUNS) -> pd.DataFrame:
    """The table that data/sweep.py fills in, one row per run; ``experiment``: None for all of them.

    ``status`` is ok, diverged (``val_loss`` is inf) or failed (and why; ``val_loss`` is NaN).
    Raises FileNotFoundError where there is no table, and ValueError on what is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.name}: take it from git again, "
                                "or make it with 'make sweep' (hours)")
    kinds = KEY | dict.fromkeys([*OUTCOMES, "seconds"], float) | {"experiment": int}
    kinds |= dict.fromkeys([*CURVES, "status", "data", "machine", "torch"], str)
    blank = {name: [""] for name, kind in kinds.items() if kind is not str}  # of numbers: missing
    try:
        runs = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=blank)[COLUMNS]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {error}; correct it, take it from git again, "
                         "or delete it") from error
    runs["val_loss"] = runs["val_loss"].where(runs["status"] != "diverged", math.inf)
    if experiment is not None:
        runs = runs[runs["experiment"] == experiment].reset_index(drop=True)
    return check_runs(runs)


def check_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The table as it is; ValueError names a run that cannot be as the table says."""
    loss, failed = runs["val_loss"], runs["status"].str.startswith("failed")
    ok, diverged = runs["status"] == "ok", runs["status"] == "diverged"
    fits = (ok & np.isfinite(loss)) | (diverged & np.isposinf(loss)) | (failed & loss.isna())
    usual = runs.groupby("task")["data"].transform(lambda data: data.mode().iloc[0])
    faults = {"is there twice": runs.duplicated([*KEY, "experiment"]),
              "is of other data than the other runs of its task": runs["data"] != usual,
              "has a status and a loss that cannot be": ~fits}
    for fault, wrong in faults.items():
        if wrong.any():
            run = runs[wrong].iloc[0][[*KEY]].to_dict()
            raise ValueError(f"the table holds a run that {fault}: {run}; delete that row")
    return runs


def curve(values: str) -> np.ndarray:
    """A curve of the table as an array: one number for each evaluation, the first before training.

    >>> curve("2.5 1.25")
    array([2.5 , 1.25])
    """
    return np.array(values.split(), dtype=float)


# --------------------------------------------------------------------------------------------------
# Shares
# --------------------------------------------------------------------------------------------------

def share_interval(solved: int, runs: int) -> tuple[float, float]:
    """Wilson's (1927) 95 % interval for a share: it stays near its level also near 0 and 1."""
    interval = stats.binomtest(solved, runs).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


# --------------------------------------------------------------------------------------------------
# The window of learning rates, as notebooks/protocol.md fixes it
# --------------------------------------------------------------------------------------------------

FEWEST = 4  # runs at a rate: of three, all of which solved, Wilson's lower end is 0.44
SOLVES = 0.5  # on recall a share's lower end is above it where a rate is in the window
KEEPS = 0.75  # on text it is this or more


def mean_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean of two numbers or more, and Student's 95 % interval; infinite where one of them is."""
    mean = values.mean()
    if not math.isfinite(mean):
        return mean, mean, mean
    reach = stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def shared_control(qk_norm: str) -> str:
    """The norm that shares its ``none``: no gradient at Q and K, so none to change on its way."""
    return LocalGPTConfig(qk_norm=qk_norm).exact.qk_norm


def windows(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, rule and learning rate: is that rate in the rule's window?

    ``share``, with its 95 % interval ``low`` to ``high``, is on recall that of the runs that solved
    it (Wilson's interval). On text it is how much of what learnt attention is worth the rule keeps:
    1 as good as ``full`` at its best rate, 0 as bad as ``none`` at its own; the interval is of the
    mean difference from ``full``, seed by seed. A rate is ``inside`` if ``low`` is above one half,
    on text three quarters or more. Where attention's worth cannot be told from zero, ``share`` is
    NaN. ``solved`` and ``runs`` are counts, ``loss`` is a mean. Rates with fewer than ``FEWEST``
    runs are left out; runs that failed, and seeds that chose a setting, count nowhere.
    """
    counts = ~check_runs(runs)["seed"].isin(CHOICE_SEEDS) & runs["val_loss"].notna()
    names = [*SETTING, *RULE, "lr"]
    cases = runs[counts].groupby(names, sort=False).filter(lambda case: len(case) >= FEWEST)
    worths = {}  # on text, by setting: losses of full at its best rate, and what attention is worth
    rows = []
    for key, case in cases.groupby(names, sort=False):
        row = dict(zip(names, key, strict=True))
        row |= {"runs": len(case), "solved": int((case["accuracy"] >= SOLVED).sum()),
                "loss": case["val_loss"].mean()}
        if isinstance(TASKS[row["task"]].data, RecallTask):
            row["share"] = row["solved"] / row["runs"]
            row["low"], row["high"] = share_interval(row["solved"], row["runs"])
            row["inside"] = row["low"] > SOLVES
        else:
            setting = key[: len(SETTING)]
            if setting not in worths:
                worths[setting] = _worth(cases, dict(zip(SETTING, setting, strict=True)))
            full_losses, worth = worths[setting]
            behind = mean_interval((_by_seed(case) - full_losses).dropna())
            row["share"], row["high"], row["low"] = (1 - loss / worth for loss in behind)
            row["inside"] = row["low"] >= KEEPS
        rows.append(row)
    return pd.DataFrame(rows)


def _by_seed(case: pd.DataFrame) -> pd.Series:
    return case.set_index("seed")["val_loss"]


def _worth(cases: pd.DataFrame, setting: dict) -> tuple[pd.Series, float]:
    """Losses of ``full`` at its best rate, by seed, and how much worse the best ``none`` is (NaN:
    their difference cannot be told from zero)."""
    # Norms and caps that differ only backwards share the control: no gradient passes them.
    shared = setting | {"qk_norm": shared_control(setting["qk_norm"]), "cap_backward": "exact"}
    best = {}
    for rule, where in (("full", setting), ("none", shared)):
        part = cases[(cases[[*where, "rule"]] == pd.Series(where | {"rule": rule})).all(axis=1)]
        losses = [_by_seed(case) for _, case in part.groupby("lr")]
        best[rule] = min(losses, key=pd.Series.mean, default=pd.Series(dtype=float))
    worth, low, _ = mean_interval((best["none"] - best["full"]).dropna())
    return best["full"], worth if low > 0 else math.nan


def window_widths(table: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and rule of ``windows``: the longest run of neighbouring rates inside.

    ``width`` is how many rates it has, ``from_lr`` and ``to_lr`` are its ends; width is NaN where
    nothing can be told. ``loss`` is that at the rule's own best rate, ``lr``: an optimistic number.
    """
    rows = []
    for key, part in table.groupby([*SETTING, *RULE], sort=False):
        row = dict(zip([*SETTING, *RULE], key, strict=True))
        part = part.sort_values("lr")
        # neighbours are half a power of ten apart
        inside = part.loc[part["inside"], "lr"]
        position = (2 * np.log10(inside)).round()
        runs = [run for _, run in inside.groupby((position.diff() != 1).cumsum())]
        longest = max(runs, key=len, default=inside)
        row["width"] = len(longest) if part["share"].notna().any() else math.nan
        row["from_lr"], row["to_lr"] = longest.min(), longest.max()
        best = part.loc[part["loss"].idxmin()]
        rows.append(row | {"runs": part["runs"].sum(), "loss": best["loss"], "lr": best["lr"]})
    return pd.DataFrame(rows)


def window_verdict(on_recall: float, on_text: float) -> str:
    """The word for a rule's two widths: what was asked is whether dropping the sum ruins learning.

    >>> [window_verdict(3, on_text) for on_text in (2, 1, math.nan)], window_verdict(0, 0)
    (['tolerable', 'costly', 'cannot tell'], 'catastrophic')
    """
    if math.isnan(on_recall) or math.isnan(on_text):
        return "cannot tell"
    if min(on_recall, on_text) >= 2:
        return "tolerable"
    return "costly" if max(on_recall, on_text) else "catastrophic"


def of_arms(table: pd.DataFrame, task: str, **changes) -> pd.DataFrame:
    """Those rows of a table of runs, or of ``windows``, that are of a task's ``arms``, by arm.

    They are of the task's usual number of steps, by backpropagation, and of no probe, but for
    ``changes``; a column ``arm`` names the setting.
    """
    usual = USUAL | {"task": task, "steps": TASKS[task].steps} | changes
    parts = []
    for arm, setting in arms(task).items():
        setting = usual | setting
        parts.append(table[(table[[*setting]] == pd.Series(setting)).all(axis=1)].assign(arm=arm))
    return pd.concat(parts, ignore_index=True)
