"""The sweep: which runs it makes, what it writes, and how it ends."""

import dataclasses
import itertools
import os
import re
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
from model_local import QK_NORM, LocalGPTConfig

sys.path.append(str(helpers.ROOT / "data"))
import sweep
from sweep import Cell, Plan, Seeds

SMALL = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": SMALL.block_size}
SEEDS = {"recall": Seeds((100,), (200, 201), 2)}
PLAN = Plan(sweep._rules("recall", ("full", "none", "diagonal"), steps=1), (1e-3, 1e-2), (), (1.0,), SEEDS)
TWO = dataclasses.replace(PLAN, rules=PLAN.rules[:2])
ONE = dataclasses.replace(PLAN, rules=PLAN.rules[:1])
CELL = dataclasses.replace(PLAN.rules[2], lr=1e-2, seed=200)


@pytest.fixture(autouse=True)
def small_task(monkeypatch):
    monkeypatch.setitem(TASKS, "recall", {"data": SMALL, "batch_size": 4, "steps": 3, "eval_every": 3, "shape": SHAPE})
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


# ---- the plan, by hand: a formula answers its runs ------------------------------------------------------------------

BEST = {"full": -3, "none": -4, "diagonal": -2}  # the log of the rate that suits each rule
FEW, ALL = {200, 201}, {200, 201, 202, 203}
KNOWN = [*KEY, "val_loss", "accuracy", "status"]


def plan_of(task, rules=tuple(BEST), scales=(1.0,), **changes) -> Plan:
    seeds = {task: Seeds((100, 101), tuple(sorted(ALL)), len(FEW))}
    return Plan(sweep._rules(task, rules, **changes), (1e-4, 1e-3, 1e-2), (), scales, seeds)


def distance(cell) -> float:
    return abs(np.log10(cell.lr) - BEST[cell.softmax_backward])


def solves_all(cell) -> bool:
    return True


def answered(plan, solves=solves_all, loss=distance) -> tuple[set[Cell], list[set[Cell]]]:
    """All runs of a plan in the end, and those of each round of a sweep."""
    table, rounds = pd.DataFrame(columns=KNOWN).astype(KEY), []
    while True:
        done = sweep.cells_of(table)
        missing = [left for stage in plan.stages(table) if (left := {*stage} - done)]
        if not missing:
            wanted = plan.wanted(table)
            assert {*wanted} == done and len(wanted) == len(done), "no run is made that is not wanted in the end"
            return done, rounds
        rounds.append(missing[0])
        rows = []
        for cell in missing[0]:
            accuracy = np.nan if cell.task == "shakespeare" else 1.0 if solves(cell) else 0.98
            rows.append((*dataclasses.astuple(cell), loss(cell), accuracy, "ok"))
        table = pd.DataFrame([*table.itertuples(index=False), *rows], columns=KNOWN).astype(KEY)


def seeds_of(cells) -> dict[tuple[str, float], set[int]]:
    """The test seeds by rule and rate."""
    found = {}
    for cell in cells:
        if cell.seed >= 200:
            found.setdefault((cell.softmax_backward, cell.lr), set()).add(cell.seed)
    return found


OTHERS = {("full", 1e-4): FEW, ("full", 1e-2): FEW, ("none", 1e-4): FEW, ("none", 1e-2): FEW, ("diagonal", 1e-2): FEW}


def test_rules_are_tuned_on_the_grid_and_tested_at_the_rate_of_full_and_at_their_own():
    cells, _ = answered(plan_of("recall"))
    assert seeds_of(cells) == OTHERS | {("full", 1e-3): ALL, ("none", 1e-3): ALL, ("diagonal", 1e-3): ALL}
    tuning = {(cell.softmax_backward, cell.lr, cell.seed) for cell in cells if cell.seed < 200}
    assert tuning == {*itertools.product(BEST, (1e-4, 1e-3, 1e-2), (100, 101))}


@pytest.mark.parametrize("task", ["recall", "shakespeare"])
def test_what_decides_is_run_first_and_of_recall_a_few_before_the_others(task):
    _, rounds = answered(plan_of(task))
    tuning = {rule: {*itertools.product([rule], (1e-4, 1e-3, 1e-2), (100, 101))} for rule in BEST}
    first, rest = ({*itertools.product(BEST, [1e-3], seeds)} for seeds in (FEW, ALL - FEW))
    own = {(rule, lr, seed) for (rule, lr), seeds in OTHERS.items() for seed in seeds}
    expected = [tuning["full"], first, rest, tuning["none"] | tuning["diagonal"], own]
    if task == "shakespeare":
        expected[1:3] = [first | rest]
    assert [{(cell.softmax_backward, cell.lr, cell.seed) for cell in cells} for cells in rounds] == expected


def test_where_all_have_one_best_rate_all_seeds_are_run_at_it_and_none_elsewhere():
    cells, _ = answered(plan_of("recall"), loss=lambda cell: cell.lr)
    assert seeds_of(cells) == {(rule, 1e-4): ALL for rule in BEST}


@pytest.mark.parametrize("unsolved", [{"diagonal"}, {"none", "diagonal"}, {"full", "none", "diagonal"}])
@pytest.mark.parametrize("loss", [distance, lambda cell: distance(cell) if cell.seed < 200 else np.inf])
def test_a_rule_whose_first_few_have_not_solved_recall_is_tested_no_further(unsolved, loss):
    """Whether they diverged or not, and whatever seeds of tuning or runs at other rates have solved."""
    cells, _ = answered(
        plan_of("recall"),
        lambda cell: cell.seed < 200 or cell.lr != 1e-3 or cell.softmax_backward not in unsolved,
        loss,
    )
    assert seeds_of(cells) == OTHERS | {(rule, 1e-3): FEW if rule in unsolved else ALL for rule in BEST}


def test_one_of_the_first_few_that_solved_it_is_enough_to_go_on():
    cells, _ = answered(plan_of("recall"), lambda cell: cell.seed in (100, 101, 201))
    assert seeds_of(cells) == OTHERS | {(rule, 1e-3): ALL for rule in BEST}


def test_on_shakespeare_nothing_can_be_solved_and_all_are_tested():
    cells, _ = answered(plan_of("shakespeare"))
    assert seeds_of(cells) == OTHERS | {(rule, 1e-3): ALL for rule in BEST}


@pytest.mark.parametrize("arm", QK_NORM)
def test_a_rule_is_compared_with_full_of_its_own_setting_and_with_none_of_the_exact_norms(arm):
    plan = plan_of("recall", qk_norm=arm, score_scale=2.0)
    shared = "off" if arm == "off" or arm.startswith("tangent") else "exact"
    assert [cell.qk_norm for cell in plan.rules] == [arm, shared, arm]  # full, none, diagonal
    full, none, diagonal = plan.rules
    for rule in (full, diagonal):
        assert (sweep.reference(rule, "full"), sweep.reference(rule, "none")) == (full, none)
    assert sweep.reference(none, "none") == none
    assert sweep.reference(none, "full") == dataclasses.replace(full, qk_norm=shared)


@pytest.mark.parametrize("arm", sweep.ARMS)
def test_in_every_arm_all_rules_have_all_seeds_at_the_rate_of_full(arm):
    cells, _ = answered(plan_of("shakespeare", qk_norm=arm))
    found = seeds_of(cells)
    assert [found[rule, 1e-3] for rule in BEST] == [ALL] * 3 and found["none", 1e-2] == found["full", 1e-2] == FEW


def test_checks_are_run_by_the_few_seeds_at_the_rate_of_full_and_not_tuned():
    plan = plan_of("recall", ("full",), scales=(2.0,), method="fa")
    checks = sweep._rules("recall", ("diagonal", "none"), "fa", steps=12_000, qk_norm="exact")
    cells, rounds = answered(dataclasses.replace(plan, checks=checks))
    wanted = {dataclasses.replace(c, lr=1e-3, feedback_scale=2.0, seed=seed) for c in checks for seed in FEW}
    assert {cell for cell in cells if cell.steps == 12_000} == wanted
    assert seeds_of(cells) == {("full", 1e-3): ALL, ("diagonal", 1e-3): FEW, ("none", 1e-3): FEW}
    assert rounds[-1] == wanted, "they come last"


@pytest.mark.parametrize(
    "solves, promising",
    [
        (lambda cell: True, True),
        (lambda cell: cell.softmax_backward == "diagonal" and cell.lr == 1e-3, True),
        (lambda cell: cell.softmax_backward == "diagonal" and (cell.lr == 1e-2 or cell.seed == 100), False),
        (lambda cell: cell.softmax_backward != "diagonal", False),
    ],
)
def test_a_screen_goes_on_where_a_rule_has_solved_all_its_tuning_at_the_rate_of_full(solves, promising):
    plan = dataclasses.replace(plan_of("recall"), screen=True)
    cells, _ = answered(plan, solves, distance)
    tested = {cell.softmax_backward for cell in cells if cell.seed >= 200}
    assert tested == ({*BEST} if promising else set())
    assert len({cell for cell in cells if cell.seed < 200}) == 3 * 3 * 2


def test_the_scale_of_random_feedback_is_that_of_full_for_every_rule():
    plan = plan_of("recall", scales=(0.5, 2.0), method="fa")
    cells, rounds = answered(
        plan,
        loss=lambda cell: distance(cell) + (cell.feedback_scale == (0.5 if cell.softmax_backward == "full" else 2.0)),
    )
    assert {cell.feedback_scale for cell in rounds[0]} == {0.5, 2.0}
    tried = {rule: {cell.feedback_scale for cell in cells if cell.softmax_backward == rule} for rule in BEST}
    assert tried == {"full": {0.5, 2.0}, "none": {2.0}, "diagonal": {2.0}}
    assert {cell.feedback_scale for cell in cells if cell.seed >= 200} == {2.0}
    assert seeds_of(cells) == OTHERS | {(rule, 1e-3): ALL for rule in BEST}


@pytest.mark.parametrize(
    "best, tried", [(-4, {-5, -4, -3, -2}), (-5, {-6, -5, -4, -3, -2}), (-9, {-6, -5, -4, -3, -2})]
)
def test_the_grid_goes_on_where_the_best_rate_lies_at_its_end(best, tried):
    plan = dataclasses.replace(plan_of("recall", ("full",)), more_lrs=(1e-6, 1e-1, 1e-5))
    cells, _ = answered(plan, loss=lambda cell: abs(np.log10(cell.lr) - best))
    assert {round(np.log10(cell.lr)) for cell in cells if cell.seed < 200} == tried
    assert {round(np.log10(cell.lr)) for cell in cells if cell.seed >= 200} == {max(best, -6)}


def test_where_full_has_no_rate_the_others_are_tested_at_their_own():
    cells, _ = answered(
        plan_of("recall"), loss=lambda cell: distance(cell) if cell.softmax_backward != "full" else np.nan
    )
    assert seeds_of(cells) == OTHERS


def test_the_plans_are_those_of_the_protocol():
    """Notebook 08, section 3."""
    plans = [
        plan
        for name, plan in sweep.PLANS.items()
        if re.fullmatch("(recall|shakespeare)-(exact|off|cut|cut_[qk])", name)
    ]
    assert len(plans) == 10
    for plan in plans:
        assert (sorted(plan.lrs), sorted(plan.more_lrs)) == ([3e-5, 1e-4, 3e-4, 1e-3, 3e-3], [1e-5, 1e-2])
        assert plan.seeds["recall"] == ((100, 101, 102, 103), tuple(range(200, 224)), 8)
        assert plan.seeds["shakespeare"] == ((100, 101), tuple(range(200, 208)), 5)
        (task,) = {cell.task for cell in plan.rules}
        assert [cell.softmax_backward for cell in plan.rules] == ["full", "none", "diagonal", "zero"]
        usual = {"method": "bp", "attn_mode": "softmax", "score_scale": 1.0, "optimizer": "adamw"}
        usual |= {"steps": {"recall": 3000, "shakespeare": 500}[task]}
        assert all(getattr(cell, name) == value for cell in plan.rules for name, value in usual.items())
    arms = [{cell.qk_norm for cell in plan.rules if cell.softmax_backward != "none"} for plan in plans]
    assert sorted(arms, key=str) == sorted([{arm} for arm in ("exact", "off", "cut", "cut_k", "cut_q")] * 2, key=str)


SECOND = helpers.DATA / "second_edition.csv"


@pytest.mark.skipif(not SECOND.exists(), reason="has become a part of the table of results")
def test_the_stored_runs_are_at_the_rates_and_seeds_of_the_plan():
    results = load_results(SECOND)
    for plan in sweep.PLANS.values():
        for cell in (*plan.rules, *plan.checks):
            same = dataclasses.replace(cell, feedback_scale=1.0, lr=0.0, seed=0)
            names = [name for name in KEY if name not in ("feedback_scale", "lr", "seed")]
            runs = results[(results[names] == pd.Series({name: getattr(same, name) for name in names})).all(axis=1)]
            tuning = runs["seed"].isin(helpers.TUNING_SEEDS)
            assert set(runs["lr"]) <= {*plan.lrs, *plan.more_lrs}
            assert set(runs["seed"][tuning]) <= set(plan.seeds[cell.task].tuning)
            assert set(runs["seed"][~tuning]) <= set(plan.seeds[cell.task].tests)
            results = results.drop(runs.index)
    assert results.empty, "rows of no plan"


# ---- the sweep: few steps on a small task --------------------------------------------------------------------------


def test_the_same_plan_twice_writes_the_same_bytes_but_for_the_times(tmp_path):
    first, second = tmp_path / "a" / "results.csv", tmp_path / "b" / "results.csv"
    for path in (first, second):
        swept(path, TWO)
    assert without_times(first) == without_times(second)
    before = first.read_bytes()
    swept(first, TWO)
    assert first.read_bytes() == before, "there was nothing left to do"


def test_every_rule_gets_the_whole_grid_and_then_its_test_seeds_at_its_best_rate(path):
    results = swept(path, dataclasses.replace(TWO, seeds={"recall": Seeds((100, 101), (200, 201), 2)}))
    assert not results.duplicated([*KEY]).any()
    chosen = {}
    for rule, runs in results.groupby("softmax_backward"):
        tuning, tests = runs[runs["seed"] < 200], runs[runs["seed"] >= 200]
        assert {*zip(tuning["lr"], tuning["seed"], strict=True)} == {*itertools.product((1e-3, 1e-2), (100, 101))}
        solved = tuning.assign(solved=tuning["accuracy"] >= 0.99).groupby("lr")[["solved", "val_loss"]].mean()
        chosen[rule] = min(solved.index, key=lambda lr, solved=solved: (-solved["solved"][lr], solved["val_loss"][lr]))
        assert set(tests["seed"]) == {200, 201}
    for _, tests in results[results["seed"] >= 200].groupby("softmax_backward"):
        assert {*zip(tests["lr"], tests["seed"], strict=True)} == {*itertools.product(chosen.values(), (200, 201))}
    assert helpers.provenance(results) == f"{len(results)} runs: {len(results)} by this code"
    assert set(helpers.harm_table(results)["verdict"]) <= {"reference", "undecided"}


def test_a_row_is_what_train_gives(path):
    choices = {"method": "fa", "qk_norm": "cut_k", "score_scale": 2.0, "optimizer": "sgd"}
    plan = Plan(
        sweep._rules("recall", ("full", "ste"), steps=20, **choices),
        (1e-2,),
        (),
        (2.0,),
        {"recall": Seeds((100,), (200,), 1)},
    )
    row = swept(path, plan).set_index(["softmax_backward", "seed"]).loc["ste", 200]
    optimizer = choices.pop("optimizer")
    config = LocalGPTConfig(vocab_size=5, **SHAPE, softmax_backward="ste", feedback_scale=2.0, **choices)
    settings = {"eval_every": 3, "measure": symptoms, "directory": None, "progress": False, "optimizer": optimizer}
    run = train(config, 20, 1e-2, 4, 200, SMALL, **settings)
    at_end = ("val_loss", "accuracy", "common_mode", "q_norm", "k_norm", "entropy", "score_max")
    whole = ("cos_scores", "cos_q", "cos_k", "row_sum", "radial_q", "radial_k")
    assert {*at_end, *whole} == {"val_loss", "accuracy", *helpers.SYMPTOMS}
    for name in at_end:
        assert row[name] == pytest.approx(run.series(name).iloc[-1], rel=1e-5), name
    for name in whole:
        assert row[name] == pytest.approx(run.series(name).mean(), rel=1e-5), name
    for name, metric in (("losses", "val_loss"), ("accuracies", "accuracy")):
        stored = [float(value) for value in row[name].split()]
        assert stored == pytest.approx(run.series(metric).tolist(), abs=1e-4) and len(stored) == 8, name
    code = row_code("recall", "sgd", method="fa", softmax_backward="ste", attn_mode="softmax", qk_norm="cut_k")
    assert (row["status"], row["data"], row["code"]) == ("ok", SMALL.sha256[:12], code)
    assert row["torch"] == str(torch.__version__) and row["machine"].startswith("CPU")


def test_a_row_on_text_has_losses_and_no_accuracies(monkeypatch):
    ids = np.random.default_rng(0).integers(0, 5, 600).astype(np.uint16)
    itos = dict(enumerate("abcde"))
    corpus = helpers.Corpus("letters", ids[:500], ids[500:], {c: i for i, c in itos.items()}, itos, "sha of letters")
    monkeypatch.setattr(sweep, "load_corpus", {"letters": corpus}.get)
    task = {"data": "letters", "batch_size": 4, "steps": 3, "eval_every": 2, "shape": SHAPE}
    monkeypatch.setitem(TASKS, "shakespeare", task)
    row = sweep._run(dataclasses.replace(CELL, task="shakespeare", steps=3), "cpu")
    assert len(row["losses"].split()) == 3 and row["accuracies"] == "" and "accuracy" not in row


def test_the_scale_of_random_feedback_is_chosen_for_the_exact_softmax_alone(path):
    rules = sweep._rules("recall", ("full", "ste"), "fa", steps=2)
    results = swept(path, Plan(rules, (1e-2,), (), (0.5, 2.0), {"recall": Seeds((100,), (200,), 1)}))
    full, ste = (results[results["softmax_backward"] == rule] for rule in ("full", "ste"))
    best = full[full["seed"] == 100].set_index("feedback_scale")["val_loss"].idxmin()
    assert set(full["feedback_scale"]) == {0.5, 2.0} and len(full) == 3
    assert set(ste["feedback_scale"]) == {best} == set(results.loc[results["seed"] == 200, "feedback_scale"])


def test_a_run_that_diverges_is_a_row_and_the_grid_goes_on(path):
    rules = sweep._rules("recall", ("full", "diagonal"), steps=3)
    results = swept(path, dataclasses.replace(PLAN, rules=rules, lrs=(1e-2, 1e30)))
    diverged = results[results["lr"] == 1e30]
    assert set(diverged["status"]) == {"diverged"} and np.isposinf(diverged["val_loss"]).all() and len(diverged) == 2
    assert set(results.loc[results["seed"] >= 200, "lr"]) == {1e-2}


def test_a_run_that_fails_is_a_row_that_decides_nothing(path, monkeypatch, capsys):
    def short_of_memory(config, *args, **kwargs):
        if config.softmax_backward == "diagonal":
            raise MemoryError
        return train(config, *args, **kwargs)

    monkeypatch.setattr(sweep, "train", short_of_memory)
    results = swept(path)
    failed = results[results["softmax_backward"] == "diagonal"]
    assert set(failed["status"]) == {"failed: MemoryError"} and failed["val_loss"].isna().all()
    full = results[(results["softmax_backward"] == "full") & (results["seed"] == 100)].set_index("lr")
    assert set(failed["lr"][failed["seed"] >= 200]) == {full["val_loss"].idxmin()}, "it has no rate of its own"
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

    monkeypatch.setattr(sweep, "SMALL", TWO)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--plan", "small", "--results", str(path), "--jobs", "1"])
    sweep.main()
    runs = load_results(path)
    assert capsys.readouterr().out == f"{path}: {len(runs)} runs, nothing missing\n"
    assert sweep.cells_of(runs) == {*TWO.wanted(runs)}
    path.unlink()
    monkeypatch.setattr(sweep, "train", fails)
    sweep.main()
    assert capsys.readouterr().out == f"{path}: 4 runs, 4 of them failed\n"
    monkeypatch.undo()


def test_the_command_without_a_plan_runs_all_but_the_small_one_and_first_what_decides(path, monkeypatch):
    names = []
    monkeypatch.setattr(sweep, "sweep", lambda plan, results, jobs, device, *named: names.append((*named, plan)))
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--results", str(path)])
    path.write_text(f"{','.join(helpers.COLUMNS)}\n")
    sweep.main()
    assert names == [(name, until, plan) for until in (2, None) for name, plan in sweep.PLANS.items()]
    assert "small" not in sweep.PLANS


def test_a_sweep_until_a_stage_leaves_the_later_ones(path):
    rules = sweep._rules("recall", ("full", "zero"), steps=1)
    plan = Plan(rules, lrs=(1e-3,), more_lrs=(), seeds={"recall": sweep.Seeds((100,), (200,), 1)})
    for until, runs in ((1, {("full", 100)}), (2, {("full", 200), ("zero", 200)}), (None, {("zero", 100)})):
        before = sweep.cells_of(load_results(path)) if path.exists() else set()
        sweep.sweep(plan, path, jobs=1, until=until)
        added = sweep.cells_of(load_results(path)) - before
        assert {(cell.softmax_backward, cell.seed) for cell in added} == runs


def test_a_group_that_other_code_has_made_is_left_as_it_is(path, capsys):
    swept(path, TWO)
    text = path.read_text()
    code = row_code("recall", method="bp", softmax_backward="full", attn_mode="softmax")
    for other in ("0123456789ab", ""):
        path.write_text(text.replace(code, other))
        before = path.read_bytes()
        swept(path, dataclasses.replace(PLAN, rules=TWO.rules + sweep._rules("recall", ("full",), steps=2)))
        after = path.read_bytes()
        assert after.startswith(before) and all(b",2," in line for line in after[len(before) :].splitlines())
        assert len(after) > len(before), "other groups are made"
        assert "left as other code made it: recall, bp, softmax, off, 1.0, adamw, 1 (" in capsys.readouterr().err


def test_a_row_is_added_once_and_only_by_this_code(path):
    swept(path, ONE)
    row = sweep._run(CELL, "cpu")
    path.chmod(0o664)
    before = path.read_text()
    sweep.append(row, path)
    sweep.append(row, path)
    assert path.read_text().startswith(before) and path.read_text().count("\n") == before.count("\n") + 1
    assert oct(path.stat().st_mode & 0o777) == "0o664"
    assert not [p for p in path.parent.iterdir() if p.name.endswith(helpers.PART)]
    with pytest.raises(RuntimeError, match="start the sweep again"):
        sweep.append(row | {"seed": 201, "code": "0123456789ab"}, path)
    assert path.read_text().count("\n") == before.count("\n") + 1


def test_a_rate_comes_back_from_the_file_as_it_was(path):
    results = swept(path, dataclasses.replace(ONE, lrs=(1 / 3,)))
    assert set(results["lr"]) == {1 / 3} and len(results) == 3


def test_a_run_that_another_process_is_at_or_has_made_is_passed_over(path):
    swept(path, ONE)
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
        ({"seeds": {"recall": Seeds((99,), (200,), 1)}}, "seeds that tune"),
        ({"seeds": {"recall": Seeds((200,), (201,), 1)}}, "seeds that tune"),
        ({"seeds": {"recall": Seeds((100,), (0, 100), 1)}}, "no test is"),
        ({"seeds": SEEDS | {"shakespeare": Seeds((100,), (199,), 1)}}, "no test is"),
        ({"seeds": {"recall": Seeds((), (200,), 1)}}, "no seeds"),
        ({"seeds": {"recall": Seeds((100,), (), 1)}}, "no seeds"),
        ({"lrs": ()}, "empty grid"),
        ({"scales": ()}, "empty grid"),
    ],
)
def test_seeds_that_choose_are_never_those_that_judge(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAN, **change)


def test_all_plans_name_runs_that_the_model_can_make():
    nothing = pd.DataFrame(columns=KNOWN).astype(KEY)
    names = {field.name for field in dataclasses.fields(LocalGPTConfig)}.intersection(KEY)
    for name, plan in (sweep.PLANS | {"small": sweep.SMALL}).items():
        cells = plan.wanted(nothing, guess=True)
        assert {cell.seed in helpers.TUNING_SEEDS for cell in cells} == {True, False}, name
        for cell in cells:
            assert LocalGPTConfig(**{choice: getattr(cell, choice) for choice in names}), name
            assert cell.task in TASKS and cell.optimizer in helpers.OPTIMIZERS, name


def test_a_worker_watches_the_process_that_started_it_and_no_other(path, monkeypatch):
    swept(path, ONE)
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
