"""Fill in the table of runs of the second edition, data/second_edition.csv: one row a run, only what is missing.

    python data/sweep.py                       all runs of the plan, on this machine's cores
    python data/sweep.py --scheduler ADDRESS   the same, on a dask cluster (pip install distributed)
    python data/sweep.py --plan small          a small plan, to try it out in a minute

Interrupt and call again at any moment: finished runs stay, the others are taken up again. Two calls at once share the
work. A run that diverges or fails is a row that says so; delete the row to have it tried again. Rules that are compared
must have been trained by one code: where the table has rows of a group (task, method, norms, optimizer, steps and the
like) that are not by the code as it is now, nothing is added to this group; delete its rows to have all of it trained
anew, or fill in another table (--results).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from helpers import (
    COLUMNS,
    GROUP,
    KEY,
    MAKERS,
    OPTIMIZERS,
    OUTCOMES,
    SECOND_EDITION,
    SOLVED,
    TASKS,
    TOLERABLE,
    TUNING_SEEDS,
    Judged,
    RecallTask,
    Settings,
    best_settings,
    harm,
    judged,
    load_corpus,
    load_results,
    made_by,
    row_code,
    save_atomically,
    share_interval,
    shared_control,
    symptoms,
    train,
)
from model_local import PROBES, LocalGPTConfig

# what determines one run; those that the model's config has too are for it
Cell = dataclasses.make_dataclass("Cell", KEY.items(), frozen=True)

# ---- the plan ------------------------------------------------------------------------------------------------------


class Seeds(NamedTuple):
    """Which seeds choose the learning rate, and which are tests: at the rate of ``full``, and a few at other rates."""

    tuning: tuple[int, ...]
    tests: tuple[int, ...]
    few: int

    @property
    def first(self) -> tuple[int, ...]:
        """The few."""
        return self.tests[: self.few]


SEEDS = {
    "recall": Seeds(tuple(range(100, 104)), tuple(range(200, 224)), 8),
    "shakespeare": Seeds(tuple(range(100, 102)), tuple(range(200, 208)), 5),
}


@dataclass(frozen=True)
class Plan:
    """Which runs are wanted. ``rules`` are cells of which all is given but feedback scale, learning rate and seed.

    Every rule has the same grid of learning rates, ``lrs``, tried on seeds of their own; where the best lies at an end
    of it, the next one of ``more_lrs`` beyond. So is the scale of random feedback, chosen for the exact softmax and
    used for every rule. Test seeds then run each rule at the best rate of ``full`` in its ``GROUP``, which decides, and
    a few of them at its own best rate; ``full`` and ``none`` also at the best rate of every rule that they are compared
    with. Where the first few at the rate of ``full`` are runs of a task that can be solved and none has solved it, the
    others are not run: eight of eight unsolved put the share solved below one half.

    ``checks`` are cells, given as ``rules`` are, that are not tuned: the few seeds run them at the rate of the first
    rule, which is then a ``full``. A ``screen`` is a plan that ends with its tuning, unless a rule has solved all
    tuning runs at the rate of ``full``: only there could a test turn out otherwise than without the setting.

    >>> full = Cell("shakespeare", "bp", "full", "softmax", "off", 1.0, "adamw", 1.0, 0.0, 10, 0)
    >>> rules = full, dataclasses.replace(full, softmax_backward="zero")
    >>> plan = Plan(rules, (1e-3, 3e-3), (1e-4, 1e-2), (1.0,), {"shakespeare": Seeds((100,), (200, 201), 1)})
    >>> def wanted(*losses):
    ...     done = [dataclasses.replace(rules[rule], lr=lr, seed=100) for rule, lr, _ in losses]
    ...     results = pd.DataFrame(done, columns=[*KEY]).astype(KEY).assign(status="ok", accuracy=float("nan"))
    ...     results["val_loss"] = [loss for _, _, loss in losses]
    ...     cells = [cell for cell in plan.wanted(results) if cell not in done]
    ...     return [(cell.softmax_backward, cell.lr, cell.seed) for cell in cells if cell.softmax_backward == "full"]
    >>> wanted(), wanted((0, 1e-3, 2.0), (0, 3e-3, 3.0)), wanted((0, 1e-3, 3.0), (0, 3e-3, 2.0))
    ([('full', 0.001, 100), ('full', 0.003, 100)], [('full', 0.0001, 100)], [('full', 0.01, 100)])
    >>> done = (0, 1e-3, 2.0), (0, 3e-3, 3.0), (0, 1e-4, 3.0)
    >>> wanted(*done), wanted(*done, (1, 1e-3, 3.0), (1, 3e-3, 2.0), (1, 1e-2, 4.0))
    ([('full', 0.001, 200), ('full', 0.001, 201)], [('full', 0.001, 200), ('full', 0.001, 201), ('full', 0.003, 200)])
    """

    rules: tuple[Cell, ...]
    lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    more_lrs: tuple[float, ...] = (1e-5, 1e-2)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: Mapping[str, Seeds] = field(default_factory=lambda: SEEDS)
    checks: tuple[Cell, ...] = ()
    screen: bool = False

    def __post_init__(self) -> None:
        if not (self.lrs and self.scales and all(seeds.tuning and seeds.tests for seeds in self.seeds.values())):
            raise ValueError(f"{self} has an empty grid or no seeds")
        for seeds in self.seeds.values():
            if not set(seeds.tuning) <= set(TUNING_SEEDS) or set(seeds.tests) & set(TUNING_SEEDS):
                raise ValueError(f"seeds that tune are those of {TUNING_SEEDS}, and no test is: {seeds}")

    def wanted(self, results: pd.DataFrame, guess: bool = False) -> list[Cell]:
        """The cells of all ``stages``, each once."""
        return list(dict.fromkeys(cell for stage in self.stages(results, guess) for cell in stage))

    def stages(self, results: pd.DataFrame, guess: bool = False) -> tuple[list[Cell], ...]:
        """The cells that can be named by now, in the order in which they are to be run.

        First the tuning of ``full``, then what decides, then the tuning of the others, then tests at their own rates.
        To ``guess`` is to name those of which the rate is not known yet too, at any: about as many as there will be,
        since which rates will be tried beyond ``lrs``, and which tests will not be needed, is not known before.
        """
        first: list[Cell] = []
        deciding: list[Cell] = []
        others: list[Cell] = []
        few: list[Cell] = []
        best: dict[Cell, Settings] = {}  # by rule, for those that are tuned
        for rule in sorted(self.rules, key=lambda rule: rule.softmax_backward != "full"):
            full = reference(rule, "full")
            if rule.method != "fa":
                scales: tuple[float, ...] = (1.0,)
            elif rule == full:
                scales = self.scales
            elif full in best:
                scales = (best[full].feedback_scale,)
            else:
                continue
            tuning, settings = self._tune(rule, scales, results)
            (first if rule == full else others).extend(tuning)
            if settings or guess:
                best[rule] = settings or Settings(scales[0], self.lrs[0], math.nan)
        if self.screen and not guess and not self._promising(best, results):
            return first, [], others, []
        for rule in self.rules:
            full, none = reference(rule, "full"), reference(rule, "none")
            for at in {full, rule} & best.keys():
                for other in (rule, full, none):
                    if other not in self.rules:
                        continue
                    if at == full:
                        deciding += self._deciding(other, best[at], results, guess)
                    else:
                        few += _with(other, best[at], self.seeds[other.task].first)
        for check in self.checks if self.rules[0] in best else ():
            few += _with(check, best[self.rules[0]], self.seeds[check.task].first)
        return first, deciding, others, few

    def _promising(self, best: Mapping[Cell, Settings], results: pd.DataFrame) -> bool:
        """Whether a rule beside the references has solved all its tuning runs at the rate of ``full``."""
        for rule in best.keys() - {reference(rule, name) for rule in self.rules for name in ("full", "none")}:
            if (full := reference(rule, "full")) in best:
                tuning = _with(rule, best[full], self.seeds[rule.task].tuning)
                if (pd.DataFrame(tuning).merge(results, on=list(KEY), how="left")["accuracy"] >= SOLVED).all():
                    return True
        return False

    def _deciding(self, rule: Cell, settings: Settings, results: pd.DataFrame, guess: bool) -> list[Cell]:
        """The tests of a rule at the rate of ``full``: the first few, then all unless these have settled it."""
        seeds = self.seeds[rule.task]
        few = _with(rule, settings, seeds.first)
        first = pd.DataFrame(few).merge(results, on=list(KEY), how="left")
        settles = isinstance(TASKS[rule.task]["data"], RecallTask) and not (first["accuracy"] >= SOLVED).any()
        open_yet = guess and first["status"].isna().any()
        return few if settles and not open_yet else _with(rule, settings, seeds.tests)

    def _tune(self, cell: Cell, scales: Iterable[float], results: pd.DataFrame) -> tuple[list[Cell], Settings | None]:
        """The tuning cells to run, and the best settings once they are all there; until then None."""
        lrs = sorted(self.lrs)
        while True:
            cells = [
                dataclasses.replace(cell, feedback_scale=scale, lr=lr, seed=seed)
                for scale in scales
                for lr in lrs
                for seed in self.seeds[cell.task].tuning
            ]
            rows = pd.DataFrame(cells).merge(results, on=list(KEY), how="left")
            if rows["val_loss"].isna().any():  # not there yet, or failed: then no choice can be made
                return cells, None
            best = best_settings(rows)
            if best.lr == lrs[0] and any(lr < lrs[0] for lr in self.more_lrs):
                lrs.insert(0, max(lr for lr in self.more_lrs if lr < lrs[0]))
            elif best.lr == lrs[-1] and any(lr > lrs[-1] for lr in self.more_lrs):
                lrs.append(min(lr for lr in self.more_lrs if lr > lrs[-1]))
            else:
                return cells, best


def _with(rule: Cell, settings: Settings, seeds: Iterable[int]) -> list[Cell]:
    """The cells of a rule at one learning rate and feedback scale."""
    rule = dataclasses.replace(rule, feedback_scale=settings.feedback_scale, lr=settings.lr)
    return [dataclasses.replace(rule, seed=seed) for seed in seeds]


def reference(rule: Cell, name: str) -> Cell:
    """The ``full`` or ``none`` that a rule is compared with: of the same setting, see also ``shared_control``."""
    qk_norm = shared_control(rule.qk_norm) if name == "none" else rule.qk_norm
    return dataclasses.replace(rule, softmax_backward=name, qk_norm=qk_norm)


def _rules(task: str, rules: Iterable[str], method: str = "bp", **changes) -> tuple[Cell, ...]:
    """The cells of a group of rules, in the report's setting but for what is said to be different."""
    settings = {"task": task, "method": method, "attn_mode": "softmax", "qk_norm": "off", "score_scale": 1.0}
    settings |= {"optimizer": "adamw", "feedback_scale": 1.0, "lr": 0.0, "steps": TASKS[task]["steps"], "seed": 0}
    cells = (Cell(softmax_backward=rule, **settings | changes) for rule in rules)
    return tuple(reference(cell, "none") if cell.softmax_backward == "none" else cell for cell in cells)


DECIDING = ("full", "none", "diagonal", "zero")
ARMS = ("exact", "off", "cut", "cut_k", "cut_q")
TANGENTS = ("tangent", "tangent_k", "tangent_q")
OTHERS = ("ste", "mean", "diagonal_mean", "diagonal_lateral", "balanced_evenly", "balanced_by_attention")
STABILISERS = tuple(name for name in OPTIMIZERS if name != "adamw")
OWN_RATES = {"sgd": (0.03, 0.1, 0.3, 1.0, 3.0)}  # and where queries and keys take smaller steps, the others take larger
OWN_RATES |= dict.fromkeys((name for name in STABILISERS if name.startswith("qk_rate")), (3e-4, 1e-3, 3e-3))
FEWER = {task: seeds._replace(tests=seeds.first) for task, seeds in SEEDS.items()}
SCALES = {"recall": 2.0, "shakespeare": 0.5}  # of random feedback, as the first edition has chosen them
FOUR = {task: seeds._replace(few=4) for task, seeds in FEWER.items()}


def _beside(
    task: str, arm: str, rules: Iterable[str], method: str = "bp", seeds: Mapping[str, Seeds] = FEWER, **changes
) -> Plan:
    """Rules at the rate of ``full`` in the same arm, and at no other. ``changes`` are not made to that ``full``."""
    checks = _rules(task, rules, method, qk_norm=arm, **changes)
    return Plan(_rules(task, ("full",), method, qk_norm=arm), scales=(SCALES[task],), seeds=seeds, checks=checks)


# in the order in which they are run; notebook 08 says what each is to decide
PLANS = {
    f"{task}-{arm}": Plan(_rules(task, DECIDING, qk_norm=arm)) for task in ("recall", "shakespeare") for arm in ARMS
}
PLANS["messages"] = _beside("recall", "off", [name for name in PROBES if "_as_" in name])
PLANS["transplants"] = _beside("recall", "off", [name for name in PROBES if "_then_" in name], seeds=FOUR)
PLANS |= {
    f"transplants-{arm}": _beside("recall", arm, [f"full_{after}_then_zero" for after in (500, 2000)], seeds=FOUR)
    for arm in ("tangent", "cut", "exact")
}
PLANS |= {f"tangents-{arm}": _beside("recall", arm, ("diagonal", "zero")) for arm in TANGENTS}
PLANS |= {
    f"long-{arm}": _beside("recall", arm, ("diagonal", "zero"), seeds=FOUR, steps=12_000) for arm in ("exact", "off")
}
PLANS |= {f"others-{task}-{arm}": _beside(task, arm, OTHERS) for task in SEEDS for arm in ("off", "exact")}
PLANS |= {
    f"stabilisers-{name}": Plan(
        _rules("recall", ("full", "diagonal", "zero"), optimizer=name),
        lrs=OWN_RATES.get(name, (3e-5, 1e-4, 3e-4, 1e-3)),
        more_lrs=(0.01, 10.0) if name == "sgd" else (),
        seeds={"recall": FEWER["recall"]._replace(tuning=(100, 101))},
        screen=True,
    )
    for name in STABILISERS
}
PLANS["held"] = dataclasses.replace(PLANS["stabilisers-qk_fixed"], lrs=(3e-4,), screen=False)
PLANS |= {
    f"doses-{arm}": _beside("recall", arm, [name for name in PROBES if name.endswith("b")], seeds=FOUR)
    for arm in ("off", "exact")
}
PLANS["errors"] = _beside("recall", "off", [name for name in PROBES if name.startswith(("error_", "row_"))], seeds=FOUR)
PLANS |= {
    f"scores-times-{scale:g}": _beside("recall", "exact", ("full", "diagonal", "zero"), seeds=FOUR, score_scale=scale)
    for scale in (0.5, 2.0)
}
PLANS |= {f"fa-{task}-{arm}": _beside(task, arm, DECIDING, "fa") for task in SEEDS for arm in ("off", "exact")}
PLANS |= {
    f"{method}-recall-exact": _beside("recall", "exact", DECIDING, method, seeds=FOUR) for method in ("sign_sym", "dfa")
}
PAIRS = {"recall_8": (("full", "diagonal", "zero"), (1e-4, 3e-4, 1e-3)), "recall_16": (("full",), (1e-3,))}
PLANS |= {  # with sixteen the exact pass alone, notebook 08 says why
    f"pairs-{task}": Plan(
        _rules(task, rules, qk_norm="exact"),
        lrs=lrs,
        more_lrs=(),
        seeds={task: Seeds((100,), SEEDS["recall"].tests[:4], 4)},
    )
    for task, (rules, lrs) in PAIRS.items()
}
PLANS["text-2000"] = _beside("shakespeare", "exact", DECIDING, seeds=FOUR, steps=2000)
TRIAL = {"recall": Seeds((100,), (200, 201, 202), 3)}
SMALL = Plan(_rules("recall", ("full", "none"), steps=20), lrs=(1e-3,), more_lrs=(), seeds=TRIAL)

# ---- the decision, by the protocol of notebook 08 ------------------------------------------------------------------

MOST, BEHIND = 0.5, -0.25  # bounds on the share solved, and on how far it may be behind full's; fixed before the runs


def share_difference(
    solved: int, runs: int, other_solved: int, other_runs: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Newcombe's (1998, method 10) interval for the first share less the second, from Wilson's for each.

    >>> [round(end, 3) for end in share_difference(56, 70, 48, 80)]
    [0.052, 0.334]
    """
    p, q = solved / runs, other_solved / other_runs
    p_low, p_high = share_interval(solved, runs, confidence)
    q_low, q_high = share_interval(other_solved, other_runs, confidence)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def mending(results: pd.DataFrame, rules: Iterable[str] = ("diagonal", "zero")) -> pd.DataFrame:
    """Which ``rules`` a setting mends, by the protocol of notebook 08: one row a rule within its setting.

    All are judged at the rate of ``full``. A rule is *mended* if the interval of its share of recall solved lies above
    ``MOST``, that of the difference from the share of ``full`` above ``BEHIND``, and that of its harm on Shakespeare
    ends at or below ``TOLERABLE``; *not mended* if one of the three lies wholly on the other side; *missing* where
    there are no runs, or one of them failed; else *undetermined*. ``recall`` is this verdict without the harm, ``both``
    with it. Intervals are of 95 %; the verdicts hold for all ``rules`` of a setting together, by Holm's (1979) method,
    see ``_level``.
    """
    rules = tuple(rules)
    setting = [name for name in GROUP if name not in ("task", "steps")]
    cases: dict[tuple, dict[str, Judged]] = {}
    for case in judged(results, at="full"):
        if case.rule in rules and case.group["steps"] == TASKS[case.group["task"]]["steps"]:
            key = *(case.group[name] for name in setting), case.rule
            cases.setdefault(key, {})[case.group["task"]] = case
    rows = []
    for key, tasks in cases.items():
        row = dict(zip([*setting, "rule"], key, strict=True))
        recall, losses = tasks.get("recall"), tasks["shakespeare"].losses() if "shakespeare" in tasks else None
        parts = [recall.runs, recall.full] if recall else []
        known = parts and all(len(part) and part["val_loss"].notna().all() for part in parts)
        if known:
            row |= dict(zip(("solved", "seeds", "full_solved", "full_seeds"), recall.solved, strict=True))
            row["low"], row["high"] = share_interval(*recall.solved[:2])
            row["behind_low"], row["behind_high"] = share_difference(*recall.solved)
        if losses:
            row |= dict(zip(("harm", "harm_low", "harm_high"), harm(*losses), strict=False))  # without its verdict
        row |= {"recall": "missing", "level_recall": 1.0, "both": "missing", "level_both": 1.0}
        if known:
            row["recall"], row["level_recall"] = _level(recall.solved, None)
        if known and losses:
            row["both"], row["level_both"] = _level(recall.solved, losses)
        rows.append(row)
    table = pd.DataFrame(rows)
    for verdict in ("recall", "both") if rows else ():
        held = table.groupby(setting, sort=False)[f"level_{verdict}"].transform(_holm)
        table[verdict] = table[verdict].where(held | (table[verdict] == "missing"), "undetermined")
    return table


def _level(solved: tuple[int, int, int, int], losses: list[pd.Series] | None) -> tuple[str, float]:
    """Mended or not mended, and the smallest error level at which the intervals say so; undetermined at 1.

    One of three ways to be not mended is enough, so each has a third of the level; to be mended takes all three.
    """

    def decided(level: float) -> str:
        for verdict, confidence in (("mended", 1 - level), ("not mended", 1 - level / 3)):
            share, behind = share_interval(*solved[:2], confidence), share_difference(*solved, confidence)
            cost = harm(*losses, confidence) if losses else None
            ends = [(share[0] - MOST, share[1] - MOST), (behind[0] - BEHIND, behind[1] - BEHIND)]
            ends += [(TOLERABLE - cost.high, TOLERABLE - cost.low)] if cost else []
            if verdict == "mended" and all(low >= 0 for low, _ in ends):
                return verdict
            if verdict == "not mended" and any(high < 0 for _, high in ends):
                return verdict
        return "undetermined"

    low, high = math.log(1e-12), math.log(0.05)
    verdict = decided(math.exp(high))
    if verdict == "undetermined":
        return verdict, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if decided(math.exp(middle)) == verdict else (middle, high)
    return verdict, math.exp(high)


def _holm(levels: pd.Series) -> pd.Series:
    """Which of several verdicts hold together at the level 0.05: the smallest against 0.05 / n, the next / (n - 1)."""
    order = levels.sort_values()
    holds = order <= 0.05 / np.arange(len(order), 0, -1)
    return holds.cummin().reindex(levels.index)


# ---- one run -------------------------------------------------------------------------------------------------------


def run(cell: Cell, device: str = "cpu", results: Path = SECOND_EDITION, parent: int | None = None) -> dict | None:
    """Train one cell and return its row; None where another process is at it, or was since the list was made.

    ``parent`` is the process that asks: where it is the one that started this one, they end together.
    """
    if os.getppid() == parent:
        _end_with(parent)
    locks = results.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(repr((cell, results.name)).encode()).hexdigest()[:16]
    try:
        with FileLock(locks / name, blocking=False):  # ends with the process that holds it, however that ends
            return None if cell in cells_of(load_results(results)) else _run(cell, device)
    except Timeout:
        return None


def _end_with(parent: int) -> None:
    """A worker whose sweep was killed would train on for nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if "watch" not in {thread.name for thread in threading.enumerate()}:
        threading.Thread(target=watch, name="watch", daemon=True).start()


def _run(cell: Cell, device: str) -> dict:
    torch.set_num_threads(1)  # the cores are shared out to runs
    task = TASKS[cell.task]
    data = load_corpus(task["data"]) if isinstance(task["data"], str) else task["data"]
    names = {field.name for field in dataclasses.fields(LocalGPTConfig)}.intersection(KEY)
    choices = {name: getattr(cell, name) for name in names}
    config = LocalGPTConfig(vocab_size=data.vocab_size, **task["shape"], **choices)
    start = time.perf_counter()
    row = dataclasses.asdict(cell) | {"data": data.sha256[:12], "code": code_of(cell)}
    row["torch"] = str(torch.__version__)
    row["machine"] = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    try:
        done = train(
            config,
            cell.steps,
            cell.lr,
            task["batch_size"],
            cell.seed,
            data,
            eval_every=min(cell.steps, task["eval_every"]),
            measure=symptoms,
            device=device,
            directory=None,
            progress=False,
            optimizer=cell.optimizer,
        )
    except FloatingPointError:
        row["status"] = "diverged"
    except Exception as error:  # out of memory, for instance: the sweep goes on
        row["status"] = f"failed: {type(error).__name__}"
        traceback.print_exc()
    else:
        at_end = {metric: done.series(metric) for metric in done.history["metric"].unique()}
        row |= {metric: at_end[metric].iloc[-1] for metric in OUTCOMES if metric in at_end}
        for name in ("cos_scores", "cos_q", "cos_k", "row_sum", "radial_q", "radial_k"):
            if name in at_end:  # over training, not its last moment
                row[name] = at_end[name].mean()
        for name, metric in (("losses", "val_loss"), ("accuracies", "accuracy")):
            row[name] = " ".join(f"{value:.4f}" for value in at_end.get(metric, ()))
        row["status"] = "ok"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


# ---- the table -----------------------------------------------------------------------------------------------------


def cells_of(table: pd.DataFrame) -> set[Cell]:
    return {Cell(*values) for values in table[[*KEY]].itertuples(index=False)}


def code_of(cell: Cell) -> str:
    return row_code(**{name: getattr(cell, name) for name in MAKERS})


def group_of(cell: Cell) -> tuple:
    return tuple(getattr(cell, name) for name in GROUP)


def append(row: dict, results: Path) -> None:
    """Add a row, all of it or nothing, unless its cell is there already; RuntimeError if other code made it."""
    cell = Cell(*(row[name] for name in KEY))
    if row["code"] != code_of(cell):
        raise RuntimeError(f"a worker's code is not this process's: start the sweep again, everywhere ({cell})")
    with FileLock(results.with_suffix(".lock")):
        if cell in cells_of(load_results(results)):
            return
        text, line = results.read_text(), io.StringIO()
        # the key must come back as it was, of the outcomes six digits are enough
        values = {name: f"{v:.6g}" if isinstance(v, float) and name not in KEY else v for name, v in row.items()}
        csv.DictWriter(line, text.partition("\n")[0].split(","), lineterminator="\n").writerow(values)
        save_atomically(results, lambda file: file.write(f"{text}{line.getvalue()}".encode()))


def sweep(
    plan: Plan,
    results: Path = SECOND_EDITION,
    jobs: int = -1,
    device: str = "cpu",
    name: str = "sweep",
    until: int | None = None,
) -> None:
    """Run what is missing, stage by stage (``until`` which? all), through joblib's back end of the moment."""
    results = results.resolve()  # a worker may be elsewhere
    results.parent.mkdir(parents=True, exist_ok=True)
    if not results.exists():
        save_atomically(results, lambda file: file.write(f"{','.join(COLUMNS)}\n".encode()))
    table = load_results(results)
    others = set(table.loc[made_by(table) != "this", GROUP].itertuples(index=False, name=None))
    for group in sorted(others.intersection(map(group_of, plan.wanted(table, guess=True)))):
        print(f"left as other code made it: {', '.join(map(str, group))} (see --help)", file=sys.stderr)

    def guess(table: pd.DataFrame) -> set[Cell]:
        return {cell for cell in plan.wanted(table, guess=True) if group_of(cell) not in others}

    deaths, start = 0, len(cells_of(table) & guess(table))
    with tqdm(desc=name, unit="run", smoothing=0, initial=start) as bar:
        while True:
            table = load_results(results)
            done, everything = cells_of(table), guess(table)
            bar.total = len(everything)
            bar.update(len(done & everything) - bar.n)  # by others as well
            for stage in plan.stages(table)[:until]:
                cells = [cell for cell in dict.fromkeys(stage) if cell not in done and group_of(cell) not in others]
                if cells:
                    break
            else:
                bar.total = bar.n  # what was guessed may not have been needed
                bar.refresh()
                return
            finished = 0
            work = (joblib.delayed(run)(cell, device, results, os.getpid()) for cell in cells)
            try:
                for row in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(work):
                    if row:
                        append(row, results)
                        bar.update()
                        finished += 1
            except TerminatedWorkerError:
                deaths = 0 if finished else deaths + 1
                if deaths == 3:
                    raise  # it is no accident
                bar.write("a worker died: its run is taken up again", file=sys.stderr)
            else:
                if not finished:
                    time.sleep(5)  # another process is at all that is left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plan",
        choices=["all", *PLANS, "small"],
        default="all",
        metavar="PLAN",
        help=f"all, small, {', '.join(PLANS)}",
    )
    parser.add_argument("--results", type=Path, default=SECOND_EDITION, help="the table to fill in")
    parser.add_argument("--jobs", type=int, default=-1, help="runs side by side (default: one a core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, for instance tcp://10.0.0.1:8786")
    args = parser.parse_args()
    where = nullcontext()
    if args.scheduler:
        from distributed import Client  # not a requirement of the report

        Client(args.scheduler).run(load_corpus)  # a worker without this project says so here, and later would hang
        where = joblib.parallel_config(backend="dask")
    try:
        with where:
            plans = PLANS if args.plan == "all" else {args.plan: (PLANS | {"small": SMALL})[args.plan]}
            for until in (2, None):  # what decides comes first, in every plan
                for name, plan in plans.items():
                    sweep(plan, args.results, args.jobs, args.device, name, until)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are in the table, call again to go on")
    table = load_results(args.results)
    failed = int(table["status"].str.startswith("failed").sum())
    print(f"{args.results}: {len(table)} runs, {f'{failed} of them failed' if failed else 'nothing missing'}")


if __name__ == "__main__":
    main()
