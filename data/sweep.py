"""Fill in the table of runs behind the verdict, data/results.csv: one row a run, only what is missing.

    python data/sweep.py                       all runs of the plan, on this machine's cores
    python data/sweep.py --scheduler ADDRESS   the same, on a dask cluster (pip install distributed)
    python data/sweep.py --plan small          a small plan, to try it out in a minute

Interrupt and call again at any moment: finished runs stay, the others are taken up again. Two calls at once share the
work. A run that diverges or fails is a row that says so; delete the row to have it tried again. Rules that are compared
must have been trained by one code: where the table has rows of a group (task, method, attention, steps) that are not by
the code as it is now, nothing is added to this group; delete its rows to have all of it trained anew, or fill in
another table (--results).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import joblib
import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from helpers import (
    COLUMNS,
    FIRST_TUNING_SEED,
    GROUP,
    KEY,
    REGISTRIES,
    RESULTS,
    TASKS,
    Settings,
    best_settings,
    load_corpus,
    load_results,
    made_by,
    row_code,
    save_atomically,
    symptoms,
    train,
)
from model_local import LocalGPTConfig

# what determines one run; those that the model's config has too are for it
Cell = dataclasses.make_dataclass("Cell", KEY.items(), frozen=True)

# ---- the plan ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which runs are wanted. ``groups`` are (task, method, softmax_backward, attn_mode, steps).

    Every group has the same grid of learning rates, ``lrs``, tried on seeds of their own; where the best lies at an end
    of it, the next one of ``more_lrs`` beyond. The best by mean validation loss is then run on the test seeds. So is
    the scale of random feedback, chosen for the exact softmax and used for every rule.

    >>> plan = Plan((("recall", "bp", "full", "softmax", 10),), (1e-3, 3e-3), (1e-4, 1e-2), (1.0,), (100,), (0, 1))
    >>> def wanted(**losses):
    ...     done = [Cell("recall", "bp", "full", "softmax", 1.0, float(lr), 10, 100) for lr in losses]
    ...     results = pd.DataFrame(done, columns=[*KEY]).astype(KEY).assign(status="ok", val_loss=list(losses.values()))
    ...     return [(cell.lr, cell.seed) for cell in plan.wanted(results) if cell not in done]
    >>> wanted(), wanted(**{"1e-3": 2.0, "3e-3": 3.0}), wanted(**{"1e-3": 3.0, "3e-3": 2.0})
    ([(0.001, 100), (0.003, 100)], [(0.0001, 100)], [(0.01, 100)])
    >>> wanted(**{"1e-3": 2.0, "3e-3": 3.0, "1e-4": 3.0})
    [(0.001, 0), (0.001, 1)]
    """

    groups: tuple[tuple[str, str, str, str, int], ...]
    lrs: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    more_lrs: tuple[float, ...] = (1e-5, 1e-2)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    tuning_seeds: tuple[int, ...] = (100, 101)
    test_seeds: tuple[int, ...] = tuple(range(5))

    def __post_init__(self) -> None:
        if not (self.lrs and self.scales and self.tuning_seeds and self.test_seeds):
            raise ValueError(f"{self} has an empty grid or no seeds")
        if not max(self.test_seeds) < FIRST_TUNING_SEED <= min(self.tuning_seeds):
            raise ValueError(f"tuning seeds start at {FIRST_TUNING_SEED} and test seeds end below: {self}")

    def wanted(self, results: pd.DataFrame, guess: bool = False) -> list[Cell]:
        """The cells that can be named by now: test runs only once the tuning runs before them are there.

        To ``guess`` is to name the others too, with any setting in place of the best: as many as there will be, or
        a few less, since which rates will be tried beyond ``lrs`` is not known before.
        """
        cells: list[Cell] = []
        for task, method, rule, attn_mode, steps in self.groups:
            cell = Cell(task, method, rule, attn_mode, 1.0, 0, steps, 0)
            if method == "fa":
                exact, best = self._tune(dataclasses.replace(cell, softmax_backward="full"), self.scales, results)
                cells += exact
                if not best and not guess:
                    continue
                cell = dataclasses.replace(cell, feedback_scale=best.feedback_scale if best else self.scales[0])
            tuning, best = self._tune(cell, (cell.feedback_scale,), results)
            cells += tuning
            if best or guess:
                lr = best.lr if best else self.lrs[0]
                cells += [dataclasses.replace(cell, lr=lr, seed=seed) for seed in self.test_seeds]
        return list(dict.fromkeys(cells))

    def _tune(self, cell: Cell, scales: Iterable[float], results: pd.DataFrame) -> tuple[list[Cell], Settings | None]:
        """The tuning cells to run, and the best settings once they are all there; until then None."""
        lrs = sorted(self.lrs)
        while True:
            cells = [
                dataclasses.replace(cell, feedback_scale=scale, lr=lr, seed=seed)
                for scale in scales
                for lr in lrs
                for seed in self.tuning_seeds
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


CORE = ("full", "none", "diagonal", "ste")
SURROGATES = ("zero", "mean", "running", "diagonal_mean", "diagonal_running", "diagonal_lateral")


def _groups(task: str, methods: Iterable[str], rules: Iterable[str], attn_mode: str = "softmax", steps: int = 0):
    return tuple((task, m, rule, attn_mode, steps or TASKS[task]["steps"]) for m in methods for rule in rules)


# first what the verdict needs, then what goes beyond it
TIERS = {
    "core": _groups("shakespeare", ("bp", "fa"), CORE) + _groups("recall", ("bp", "fa"), CORE),
    "surrogates": _groups("shakespeare", ("bp",), SURROGATES) + _groups("recall", ("bp",), SURROGATES),
    "long": _groups("shakespeare", ("bp", "fa"), CORE, steps=2000),
    "methods": _groups("shakespeare", ("sign_sym", "dfa"), CORE) + _groups("recall", ("sign_sym", "dfa"), CORE),
    "sigmoid": _groups("shakespeare", ("bp",), ("full", "none"), "sigmoid")
    + _groups("recall", ("bp",), ("full", "none"), "sigmoid"),
}
PLANS = {name: Plan(groups) for name, groups in TIERS.items()}
PLANS["full"] = Plan(sum(TIERS.values(), ()))
TRIAL = _groups("recall", ("bp",), ("full", "none"), steps=20)
PLANS["small"] = Plan(TRIAL, lrs=(1e-3,), more_lrs=(), tuning_seeds=(100,), test_seeds=(0, 1, 2))

# ---- one run -------------------------------------------------------------------------------------------------------


def run(cell: Cell, device: str = "cpu", results: Path = RESULTS, parent: int | None = None) -> dict | None:
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
            eval_every=max(1, cell.steps // 10),
            measure=symptoms,
            device=device,
            directory=None,
            progress=False,
        )
    except FloatingPointError:
        row["status"] = "diverged"
    except Exception as error:  # out of memory, for instance: the sweep goes on
        row["status"] = f"failed: {type(error).__name__}"
        traceback.print_exc()
    else:
        at_end = {metric: done.series(metric) for metric in done.history["metric"].unique()}
        row |= {metric: at_end[metric].iloc[-1] for metric in COLUMNS if metric in at_end}
        for cosine in ("cos_scores", "cos_q", "cos_k", "row_sum"):  # over training, not its last moment
            if cosine in at_end:
                row[cosine] = at_end[cosine].mean()
        row["curve"] = " ".join(f"{loss:.4f}" for loss in at_end["val_loss"])
        row["status"] = "ok"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


# ---- the table -----------------------------------------------------------------------------------------------------


def cells_of(table: pd.DataFrame) -> set[Cell]:
    return {Cell(*values) for values in table[[*KEY]].itertuples(index=False)}


def code_of(cell: Cell) -> str:
    return row_code(cell.task, **{name: getattr(cell, name) for name in REGISTRIES})


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


def sweep(plan: Plan, results: Path = RESULTS, jobs: int = -1, device: str = "cpu") -> None:
    """Run what is missing, stage by stage (tuning, then tests), through joblib's back end of the moment."""
    results = results.resolve()  # a worker may be elsewhere
    results.parent.mkdir(parents=True, exist_ok=True)
    if not results.exists():
        save_atomically(results, lambda file: file.write(f"{','.join(COLUMNS)}\n".encode()))
    table = load_results(results)
    others = set(table.loc[made_by(table) != "this", GROUP].itertuples(index=False, name=None))
    for group in sorted(others.intersection(map(group_of, plan.wanted(table, guess=True)))):
        print(f"left as other code made it: {', '.join(map(str, group))} (see --help)", file=sys.stderr)

    def wanted(table: pd.DataFrame, guess: bool = False) -> list[Cell]:
        return [cell for cell in plan.wanted(table, guess) if group_of(cell) not in others]

    deaths, start = 0, len(cells_of(table).intersection(wanted(table, guess=True)))
    with tqdm(desc="sweep", unit="run", smoothing=0, initial=start) as bar:
        while True:
            table = load_results(results)
            done, everything = cells_of(table), wanted(table, guess=True)
            bar.total = len(everything)
            bar.update(len(done.intersection(everything)) - bar.n)  # by others as well
            cells = [cell for cell in wanted(table) if cell not in done]
            if not cells:
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
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the table to fill in")
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
            sweep(PLANS[args.plan], args.results, args.jobs, args.device)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are in the table, call again to go on")
    table = load_results(args.results)
    failed = int(table["status"].str.startswith("failed").sum())
    print(f"{args.results}: {len(table)} runs, {f'{failed} of them failed' if failed else 'nothing missing'}")


if __name__ == "__main__":
    main()
