"""Plant faults at random, one at a time, and count those that the tests see: make mutants.

    python notebooks/tests/mutants.py                                 200 faults, about an hour on two cores
    python notebooks/tests/mutants.py --number 40 --seed 1            another sample
    python notebooks/tests/mutants.py helpers.py model_local.py       of these files only

What a fault can be is mutmut's list (a sign, a comparison, a number, a string, an argument dropped, ...). Its own
runner is not used: it passes over module level and decorated functions, and hides all faults in one file, whose text
the names of checkpoints are made from. Here each fault is a text of its own, in a copy of the project, tried by
doctests and properties first, by the quick notebooks where these stay green. Annotations and the words of errors are
left alone.

Interrupt and call again at any moment: what was tried on this very project, tests included, is in build/mutants.jsonl.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from mutmut.mutation.mutators import mutation_operators
from scipy.stats import binomtest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "mutants.jsonl"
FILES = ("helpers.py", "model_local.py", "data/prepare.py", "data/sweep.py")
QUICK_NOTEBOOKS = ("01_softmax_jacobian", "90_contracts")  # they train next to nothing
LEFT_OUT = (".git", ".venv", ".locks", ".hypothesis", "__pycache__", "build", "report", "runs")
FORK = multiprocessing.get_context("fork")  # a child inherits the imports, which take longer than most tests


class Mutant(NamedTuple):
    """One fault: ``new`` in place of ``old``, in the function or class ``name``."""

    name: str
    old: cst.CSTNode
    new: cst.CSTNode


def mutants(module: cst.Module) -> list[Mutant]:
    """All faults of one kind or another that can be planted in ``module``.

    >>> module = cst.parse_module("def f(a: int | None):\\n    return a + 1")
    >>> [module.deep_replace(mutant.old, mutant.new).code.split("\\n")[1].strip() for mutant in mutants(module)]
    ['return a - 1', 'return a + 2']
    """

    def walk(node: cst.CSTNode, name: str, raises: bool) -> Iterator[Mutant]:
        if isinstance(node, cst.Annotation):
            return
        if isinstance(node, cst.FunctionDef | cst.ClassDef) and not node.name.value.startswith("__"):
            name = node.name.value
        raises = raises or isinstance(node, cst.Raise)
        if not (raises and isinstance(node, cst.BaseString)):
            for kind, operator in mutation_operators:
                if isinstance(node, kind):
                    yield from (Mutant(name, node, new) for new in operator(node))
        for child in node.children:
            yield from walk(child, name, raises)

    return list(walk(module, "", False))


def run_pytest(copy: Path, arguments: list[str], limit: float) -> str:
    """``passed``, ``failed`` or ``timeout`` of pytest in a process of its own; nothing that it started outlives it."""

    def child() -> None:
        os.setsid()
        os.chdir(copy)
        with open(copy / "output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        import pytest

        # before the place where the project is installed, for this process and for the kernels
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))

    process = FORK.Process(target=child)
    process.start()
    try:
        process.join(limit)
        return "timeout" if process.is_alive() else "failed" if process.exitcode else "passed"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def layers(copy: Path, name: str) -> dict[str, list[str]]:
    """pytest's arguments, the fast layer first; in each, what speaks most of ``name`` comes first."""

    def most_first(paths: list[Path]) -> list[str]:
        return [str(path) for path in sorted(paths, key=lambda path: -path.read_text().count(name or "\0"))]

    modules = [copy / file for file in FILES] + sorted((copy / "notebooks/tests").glob("test_*.py"))
    modules = [
        path for path in modules if path.name not in ("test_report.py", "test_explorer.py")
    ]  # they need a report and a browser
    notebooks = [copy / f"notebooks/{notebook}.ipynb" for notebook in QUICK_NOTEBOOKS]
    nbval = ["-o", "addopts=--nbval --nbval-current-env"]
    return {
        "tests": ["-o", "addopts=--doctest-modules", *most_first(modules)],
        "notebooks": nbval + most_first([path for path in notebooks if path.exists()]),
    }


def work(copy: Path, todo: list[tuple[str, int]], limits: dict[str, float], state: str) -> None:
    """Try the mutants of ``todo`` (file, number in that file), and add a line for each to ``RESULTS``."""
    for file, number in todo:
        text = (copy / file).read_text()  # who edits the project meanwhile changes nothing here
        module = cst.parse_module(text)
        name, old, new = mutants(module)[number]
        changed = module.deep_replace(old, new).code
        (copy / file).write_text(changed)
        start, outcome = time.perf_counter(), "survived"
        for layer, arguments in layers(copy, name).items():
            result = run_pytest(copy, arguments, limits[layer])
            if result != "passed":
                outcome = f"killed by {layer if result == 'failed' else 'timeout'}"
                break
        (copy / file).write_text(text)
        diff = difflib.unified_diff(text.splitlines(), changed.splitlines(), file, name, n=0, lineterm="")
        row = {"state": state, "file": file, "number": number, "outcome": outcome, "diff": "\n".join(diff)}
        with open(RESULTS, "a") as results:
            results.write(json.dumps(row) + "\n")
        print(f"{outcome:20} {time.perf_counter() - start:4.0f} s  {file}, {name}, {number}", flush=True)


def tried(state: str) -> dict[tuple[str, int], dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["file"], row["number"]): row for row in map(json.loads, lines) if row["state"] == state}


def report(rows: list[dict]) -> None:
    """The survivors, then a row a file."""
    for row in rows:
        if row["outcome"] == "survived":
            print(f"\n[{row['number']}] {row['diff']}")
    outcomes = ("killed by tests", "killed by notebooks", "killed by timeout", "survived")
    print("\n" + " | ".join(f"{title:>19}" for title in ("file", *outcomes, "killed", "95 % interval")))
    for file in (*FILES, "all"):
        part = [row["outcome"] for row in rows if file in (row["file"], "all")]
        if not part:
            continue
        counts = [part.count(outcome) for outcome in outcomes]
        share = binomtest(len(part) - counts[-1], len(part))
        low, high = share.proportion_ci(method="wilson")
        cells = (file, *counts, f"{share.statistic:.0%}", f"{low:.0%} to {high:.0%}")
        print(" | ".join(f"{cell:>19}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE", help=f"of {', '.join(FILES)}")
    parser.add_argument("--number", type=int, default=200, help="how many faults (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="which of all that there are (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="side by side (default: one a core)")
    args = parser.parse_args()
    everything = [(f, i) for f in args.files for i in range(len(mutants(cst.parse_module((ROOT / f).read_text()))))]
    sample = random.Random(args.seed).sample(everything, min(args.number, len(everything)))
    print(f"{len(sample)} of {len(everything)} faults, seed {args.seed}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else nothing is cleaned up
    # Two mutants of one second look the same to a bytecode cache.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    for module in ("torch", "pandas", "seaborn", "scipy.stats", "IPython", "joblib", "hypothesis", "pytest"):
        __import__(module)  # once, and not once a mutant
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies = [Path(scratch, str(i)) for i in range(args.jobs)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        texts = sorted(path for end in ("py", "ipynb", "csv", "toml") for path in copies[0].rglob(f"*.{end}"))
        state = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:16]
        limits = {}
        for layer, arguments in layers(copies[0], "").items():
            start = time.perf_counter()
            if run_pytest(copies[0], arguments, 3600) != "passed":
                sys.exit((copies[0] / "output.txt").read_text() + f"\nwithout any fault, {layer} are not green")
            limits[layer] = 60 + 5 * (time.perf_counter() - start)  # an endless loop is a fault that was seen
            print(f"{layer} without a fault: {time.perf_counter() - start:.0f} s", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        todo = [key for key in sample if key not in tried(state)]
        workers = [
            FORK.Process(target=work, args=(copy, todo[i :: args.jobs], limits, state)) for i, copy in enumerate(copies)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            print("interrupted: call again to go on")
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()
    done = tried(state)
    report([done[key] for key in sample if key in done])


if __name__ == "__main__":
    main()
