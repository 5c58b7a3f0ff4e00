"""The sweep: which runs it makes, what it writes, and how it ends."""

import dataclasses
import itertools
import os
import select
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from joblib.externals.loky.process_executor import TerminatedWorkerError

import helpers
from helpers import KEY, TASKS, RecallTask, load_results, row_code, symptoms, train
from model_local import LocalGPTConfig

sys.path.append(str(helpers.ROOT / "data"))
import sweep
from sweep import Cell, Plan

SMALL = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": SMALL.block_size}
RULES = ("full", "none", "diagonal")
PLAN = Plan(sweep._groups("recall", ("bp",), RULES, steps=1), (1e-3, 1e-2), (), (1.0,), (100,), (0, 1))
TWO = dataclasses.replace(PLAN, groups=PLAN.groups[:2])
CELL = Cell("recall", "bp", "diagonal", "softmax", 1.0, 1e-2, 1, 0)


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    monkeypatch.setitem(TASKS, "recall", {"data": SMALL, "batch_size": 4, "steps": 3, "shape": SHAPE})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.csv"


def swept(path, plan=PLAN):
    sweep.sweep(plan, path, jobs=1)
    return load_results(path)


def without_times(path) -> bytes:
    return pd.read_csv(path, dtype=str).drop(columns="seconds").to_csv(index=False).encode()


def test_the_stored_runs_are_at_the_rates_and_scales_of_the_plan():
    plan, results = sweep.PLANS["full"], load_results()
    tuning = results[results["seed"] >= helpers.FIRST_TUNING_SEED]
    assert set(tuning["lr"]) == {*plan.lrs, *plan.more_lrs} and set(tuning["feedback_scale"]) == set(plan.scales)
    assert set(tuning["seed"]) == set(plan.tuning_seeds)
    assert set(results["seed"]) - set(tuning["seed"]) == set(plan.test_seeds)


def test_the_same_plan_twice_writes_the_same_bytes_but_for_the_times(tmp_path):
    first, second = tmp_path / "a" / "results.csv", tmp_path / "b" / "results.csv"
    for path in (first, second):
        swept(path, TWO)
    assert without_times(first) == without_times(second)
    before = first.read_bytes()
    swept(first, TWO)
    assert first.read_bytes() == before, "there was nothing left to do"


def test_every_rule_gets_the_whole_grid_and_then_its_test_seeds_at_its_best_rate(path):
    results = swept(path, dataclasses.replace(TWO, tuning_seeds=(100, 101)))
    assert not results.duplicated([*KEY]).any() and len(results) == 2 * (2 * 2 + 2)
    for _, runs in results.groupby("softmax_backward"):
        tuning, tests = runs[runs["seed"] >= 100], runs[runs["seed"] < 100]
        assert {*zip(tuning["lr"], tuning["seed"], strict=True)} == {*itertools.product((1e-3, 1e-2), (100, 101))}
        assert set(tests["lr"]) == {tuning.groupby("lr")["val_loss"].mean().idxmin()} and set(tests["seed"]) == {0, 1}
    assert helpers.provenance(results) == "12 runs: 12 by this code"
    assert set(helpers.harm_table(results)["verdict"]) <= {"reference", "undecided"}


def test_a_row_is_what_train_gives(path):
    plan = Plan(sweep._groups("recall", ("fa",), ("ste",), steps=20), (1e-2,), (), (2.0,), (100,), (0,))
    row = swept(path, plan).set_index("seed").loc[0]
    config = LocalGPTConfig(vocab_size=5, **SHAPE, method="fa", softmax_backward="ste", feedback_scale=2.0)
    run = train(config, 20, 1e-2, 4, 0, SMALL, eval_every=2, measure=symptoms, directory=None, progress=False)
    at_end = {name: run.series(name).iloc[-1] for name in ("val_loss", "accuracy", "common_mode", "q_norm", "k_norm")}
    whole = {name: run.series(name).mean() for name in ("cos_scores", "cos_q", "cos_k", "row_sum")}
    for name, value in (at_end | whole).items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    assert [float(loss) for loss in row["curve"].split()] == pytest.approx(run.series("val_loss").tolist(), abs=1e-4)
    choices = {"method": "fa", "softmax_backward": "ste", "attn_mode": "softmax"}
    assert (row["status"], row["data"], row["code"]) == ("ok", SMALL.sha256[:12], row_code("recall", **choices))
    assert row["torch"] == str(torch.__version__) and row["machine"].startswith("CPU")


def test_the_scale_of_random_feedback_is_chosen_for_the_exact_softmax_alone(path):
    plan = Plan(sweep._groups("recall", ("fa",), ("full", "ste"), steps=2), (1e-2,), (), (0.5, 2.0), (100,), (0,))
    results = swept(path, plan)
    full, ste = (results[results["softmax_backward"] == rule] for rule in ("full", "ste"))
    best = full[full["seed"] == 100].set_index("feedback_scale")["val_loss"].idxmin()
    assert set(full["feedback_scale"]) == {0.5, 2.0} and len(full) == 3
    assert set(ste["feedback_scale"]) == {best} == set(results.loc[results["seed"] == 0, "feedback_scale"])


def test_a_run_that_diverges_is_a_row_and_the_grid_goes_on(path):
    groups = sweep._groups("recall", ("bp",), ("full", "diagonal"), steps=3)
    results = swept(path, dataclasses.replace(PLAN, groups=groups, lrs=(1e-2, 1e30)))
    diverged = results[results["lr"] == 1e30]
    assert set(diverged["status"]) == {"diverged"} and np.isposinf(diverged["val_loss"]).all() and len(diverged) == 2
    assert set(results.loc[results["seed"] < 100, "lr"]) == {1e-2}


def test_a_run_that_fails_is_a_row_that_decides_nothing(path, monkeypatch, capsys):
    def short_of_memory(config, *args, **kwargs):
        if config.softmax_backward == "diagonal":
            raise MemoryError
        return train(config, *args, **kwargs)

    monkeypatch.setattr(sweep, "train", short_of_memory)
    results = swept(path)
    failed = results[results["softmax_backward"] == "diagonal"]
    assert set(failed["status"]) == {"failed: MemoryError"} and failed["val_loss"].isna().all()
    assert (failed["seed"] >= 100).all(), "without a rate there is nothing to test at"
    verdicts = helpers.harm_table(results).set_index("rule")["verdict"]
    assert verdicts["diagonal"] == "missing" and verdicts["none"] in ("reference", "undecided")
    assert "MemoryError" in capsys.readouterr().err
    monkeypatch.undo()


def test_an_interrupted_sweep_keeps_its_rows_and_is_taken_up_again(tmp_path, monkeypatch):
    whole, path = tmp_path / "whole.csv", tmp_path / "results.csv"
    swept(whole, TWO)
    made = []

    def interrupted(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(args)
        return run(*args)

    run = sweep.run
    monkeypatch.setattr(sweep, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(path, TWO)
    assert len(load_results(path)) == 3
    monkeypatch.setattr(sweep, "run", run)
    swept(path, TWO)
    assert sorted(without_times(path).splitlines()) == sorted(without_times(whole).splitlines())


def test_three_deaths_of_workers_in_a_row_end_a_sweep(path, monkeypatch, capsys):
    starts = []

    def dies(work):
        starts.append(next(work))
        assert len(starts) < 4
        raise TerminatedWorkerError
        yield

    monkeypatch.setattr(sweep.joblib, "Parallel", lambda **settings: dies)
    with pytest.raises(TerminatedWorkerError):
        swept(path, TWO)
    assert len(starts) == 3 and capsys.readouterr().err.count("a worker died") == 2


def test_the_command_runs_its_plan_into_its_table_and_says_how_many_failed(path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setitem(sweep.PLANS, "small", TWO)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--plan", "small", "--results", str(path), "--jobs", "1"])
    sweep.main()
    assert capsys.readouterr().out == f"{path}: 8 runs, nothing missing\n" and len(load_results(path)) == 8
    path.unlink()
    monkeypatch.setattr(sweep, "train", fails)
    sweep.main()
    assert capsys.readouterr().out == f"{path}: 4 runs, 4 of them failed\n"
    monkeypatch.undo()


def test_a_group_that_other_code_has_made_is_left_as_it_is(path, capsys):
    swept(path, TWO)
    text = path.read_text()
    code = row_code("recall", method="bp", softmax_backward="full", attn_mode="softmax")
    for other in ("0123456789ab", ""):
        path.write_text(text.replace(code, other))
        before = path.read_bytes()
        both = TWO.groups + sweep._groups("recall", ("bp",), ("full",), steps=2)
        swept(path, dataclasses.replace(PLAN, groups=both))
        after = path.read_bytes()
        assert after.startswith(before) and all(b",2," in line for line in after[len(before) :].splitlines())
        assert len(after) > len(before), "other groups are made"
        assert "left as other code made it: recall, bp, softmax, 1" in capsys.readouterr().err


def test_a_row_is_added_once_and_only_by_this_code(path):
    swept(path, dataclasses.replace(PLAN, groups=PLAN.groups[:1]))
    row = sweep._run(CELL, "cpu")
    path.chmod(0o664)
    before = path.read_text()
    sweep.append(row, path)
    sweep.append(row, path)
    assert path.read_text().startswith(before) and path.read_text().count("\n") == before.count("\n") + 1
    assert oct(path.stat().st_mode & 0o777) == "0o664"
    assert not [p for p in path.parent.iterdir() if p.name.endswith(helpers.PART)]
    with pytest.raises(RuntimeError, match="start the sweep again"):
        sweep.append(row | {"seed": 1, "code": "0123456789ab"}, path)
    assert path.read_text().count("\n") == before.count("\n") + 1


def test_a_rate_comes_back_from_the_file_as_it_was(path):
    results = swept(path, dataclasses.replace(PLAN, groups=PLAN.groups[:1], lrs=(1 / 3,)))
    assert set(results["lr"]) == {1 / 3} and len(results) == 3


def test_a_run_that_another_process_is_at_or_has_made_is_passed_over(path):
    swept(path, dataclasses.replace(PLAN, groups=PLAN.groups[:1]))
    done = next(iter(sweep.cells_of(load_results(path))))
    assert sweep.run(done, "cpu", path) is None
    before = {*(path.parent / ".locks").iterdir()}
    assert sweep.run(CELL, "cpu", path)["status"] == "ok"
    (lock,) = {*(path.parent / ".locks").iterdir()} - before
    with FileLock(lock):
        assert sweep.run(CELL, "cpu", path) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tuning_seeds": (99,)}, "tuning seeds start at 100"),
        ({"test_seeds": (0, 100)}, "test seeds end below"),
        ({"tuning_seeds": ()}, "no seeds"),
        ({"test_seeds": ()}, "no seeds"),
        ({"lrs": ()}, "empty grid"),
    ],
)
def test_seeds_that_choose_are_never_those_that_judge(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAN, **change)


def test_all_plans_name_runs_that_the_model_can_make():
    nothing = pd.DataFrame(columns=[*KEY, "val_loss"]).astype(KEY)
    for name, plan in sweep.PLANS.items():
        for cell in plan.wanted(nothing, guess=True):
            choices = {registry: getattr(cell, registry) for registry in helpers.REGISTRIES}
            assert LocalGPTConfig(**choices) and cell.task in TASKS, name


def test_a_worker_watches_the_process_that_started_it_and_no_other(path, monkeypatch):
    swept(path, dataclasses.replace(PLAN, groups=PLAN.groups[:1]))
    done, watched = next(iter(sweep.cells_of(load_results(path)))), []
    monkeypatch.setattr(sweep, "_end_with", watched.append)
    for parent in (None, os.getpid(), os.getppid()):
        sweep.run(done, "cpu", path, parent)
    assert watched == [os.getppid()]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_worker_ends_with_a_sweep_that_is_killed(tmp_path):
    work = f"import os, sys, time; sys.path.append({str(helpers.ROOT / 'data')!r}); import sweep; "
    work += "sweep._end_with(os.getppid()); print(os.getpid(), flush=True); time.sleep(600)"
    shell = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, work]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
        readable, _, _ = select.select([parent.stdout], [], [], 60)
        assert readable and parent.stdout.read() == "", "its end of the pipe closes when the worker ends"
