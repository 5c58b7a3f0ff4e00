"""The sweep: what a run writes, which runs are left to do, and what its optimizers do."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from data import sweep
from data.experiment import (COLUMNS, CURVES, EXPERIMENT, KEY, SENT, SYMPTOMS, TASKS, RecallTask,
                             Task, load_runs, symptoms)
from data.sweep import OPTIMIZERS, PLANS, SMALL, grid, missing, outdated
from helpers import ROOT, Corpus, train
from model_local import LocalGPT, LocalGPTConfig

TASK = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": TASK.block_size}


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Both tasks in a size that takes no time, the text too."""
    ids = np.random.default_rng(0).integers(0, 5, 600).astype(np.uint16)
    itos = dict(enumerate("abcde"))
    stoi = {character: i for i, character in itos.items()}
    text = Corpus("letters", ids[:500], ids[500:], stoi, itos, "sha of letters")
    monkeypatch.setattr(sweep, "load_corpus", {"letters": text}.get)
    monkeypatch.setitem(TASKS, "recall", Task(TASK, 4, 3, 2, SHAPE))
    monkeypatch.setitem(TASKS, "shakespeare", Task("letters", 4, 3, 2, SHAPE))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.csv"


def swept(cells, path):
    sweep.sweep(cells, path, jobs=1)
    return load_runs(path=path)


# ---- a row ---------------------------------------------------------------------------------------

OTHER = {
    "task": "shakespeare", "method": "fa", "rule": "ste", "base": "diagonal", "dose": 0.8,
    "after": 500, "attn_mode": "sigmoid", "qk_norm": "cut_k", "qk_start": "lecun",
    "score_cap": 0.01, "cap_backward": "cut", "score_scale": 2.0, "optimizer": "sgd",
    "feedback_scale": 2.0, "lr": 1 / 30, "steps": 5, "seed": 201}


def changed(name):
    """A usual cell, and one that differs by ``name`` alone."""
    usual = {"base": {"rule": "dosed", "base": "zero", "dose": 0.8},
             "dose": {"rule": "dosed", "base": "zero", "dose": 0.2},
             "after": {"rule": "zero", "after": 2000}, "feedback_scale": {"method": "fa"},
             "cap_backward": {"score_cap": 0.01, "qk_start": "lecun"}}
    fixed = {"task": "recall", "rule": "full", "lr": 0.3, "seed": 200} | usual.get(name, {})
    task, rule, lr, seed = (fixed.pop(key) for key in ("task", "rule", "lr", "seed"))
    (cell,) = grid(task, [rule], [lr], [seed], **fixed)
    return cell, dataclasses.replace(cell, **{name: OTHER[name]})


def by_train(cell):
    """What the model, the data and ``train`` make of a cell, in the plainest words."""
    rule = {"dosed": f"dosed {cell.base} {cell.dose}"}.get(cell.rule, cell.rule)
    config = LocalGPTConfig(
        vocab_size=5, method=cell.method, attn_mode=cell.attn_mode, qk_norm=cell.qk_norm,
        softmax_backward=rule + (f" after {cell.after}" if cell.after else ""),
        score_scale=cell.score_scale, qk_start=cell.qk_start, score_cap=cell.score_cap,
        cap_backward=cell.cap_backward, feedback_scale=cell.feedback_scale, **SHAPE)
    data = TASK if cell.task == "recall" else sweep.load_corpus("letters")
    return train(config, cell.steps, cell.lr, 4, cell.seed, data, 2, symptoms, directory=None,
                 optimizer=OPTIMIZERS[cell.optimizer])


@pytest.mark.parametrize("name", KEY)
def test_a_row_is_what_train_gives_for_every_column_that_determines_it(name, path):
    usual, cell = changed(name)
    rows = swept([usual, cell], path)
    assert sweep.cells_of(rows) == [usual, cell]
    run, row = by_train(cell), rows.iloc[1]
    assert (row["status"], row["experiment"], row["data"]) == ("ok", EXPERIMENT, (
        TASK.sha256[:12] if cell.task == "recall" else "sha of lette"))
    assert row["torch"] == torch.__version__ and row["machine"].startswith("CPU")
    for metric in ("val_loss", *SYMPTOMS):
        values = run.series(metric)
        expected = values.mean() if metric in SENT else values.iloc[-1]
        assert row[metric] == pytest.approx(expected, rel=1e-4, abs=1e-9), metric
    for column, metric in CURVES.items():
        stored = [float(value) for value in row[column].split()]
        digits = {"abs": 1e-4} if metric in ("val_loss", "accuracy") else {"rel": 1e-3}
        assert stored == pytest.approx(run.series(metric).tolist(), **digits), column
    assert math.isnan(row["accuracy"]) == (cell.task == "shakespeare")
    # and the column matters: the other cell's run is another one
    names = ["val_loss", *SYMPTOMS]
    if name != "after":  # of which the first three iterations know nothing
        assert (rows.loc[0, names].astype(float) != row[names].astype(float)).any()


def test_runs_that_diverge_or_fail_are_rows_and_the_others_go_on(path, monkeypatch, capsys):
    def short_of_memory(config, *args, **kwargs):
        if config.softmax_backward == "diagonal":
            raise MemoryError
        return train(config, *args, **kwargs)

    monkeypatch.setattr(sweep, "train", short_of_memory)
    runs = swept(grid("recall", ["diagonal", "full"], [1e30, 1e-3], [100]), path)
    assert runs["status"].tolist() == [
        "failed: MemoryError", "diverged", "failed: MemoryError", "ok"]
    assert np.isposinf(runs["val_loss"][1]) and runs["val_loss"].isna().tolist()[::2] == [True] * 2
    assert "MemoryError" in capsys.readouterr().err and missing(sweep.cells_of(runs), path) == []


# ---- what is left to do --------------------------------------------------------------------------


def test_an_interrupted_sweep_keeps_its_rows_and_is_taken_up_again(tmp_path, monkeypatch):
    plan = grid("recall", ["full", "none"], [1e-3], [100, 200]) * 2  # a cell twice is one run
    whole, path = tmp_path / "whole.csv", tmp_path / "runs.csv"
    expected = swept(missing(plan, whole), whole)
    cells, run = iter(range(10)), sweep.run

    def interrupted(*args):
        if next(cells) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(sweep, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(missing(plan, path), path)
    assert len(load_runs(path=path)) == 3 and len(missing(plan, path)) == 1
    monkeypatch.setattr(sweep, "run", run)
    found = swept(missing(plan, path), path)
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert missing(plan, path) == [] and outdated(path) == []


def test_rows_of_an_older_experiment_are_run_anew_beside_the_old_ones(path, monkeypatch):
    plan = grid("recall", ["full", "none"], [1e-3], [100])
    swept(plan, path)
    for edition in (1, 2, 3, 4):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table.assign(experiment=edition).to_csv(path, index=False)
        monkeypatch.setattr(sweep, "EXPERIMENT", 4)
        assert outdated(path) == (plan if edition in (2, 3) else []), edition
    monkeypatch.setattr(sweep, "EXPERIMENT", EXPERIMENT)
    assert missing(plan, path) == plan, "those of another experiment do not count"
    assert len(swept(plan, path)) == 2 and len(load_runs(None, path)) == 4


def test_all_plans_name_runs_that_can_be_made():
    names = {field.name for field in dataclasses.fields(LocalGPTConfig)}.intersection(KEY)
    for name, plan in (PLANS | {"small": SMALL}).items():
        assert len(set(plan)) == len(plan), name
        for cell in plan:
            rule = sweep.probe_name(cell.rule, cell.base, cell.dose, cell.after)
            settings = {choice: getattr(cell, choice) for choice in names}
            assert LocalGPTConfig(softmax_backward=rule, **settings), name
            assert cell.task in TASKS and cell.optimizer in OPTIMIZERS, name


def test_the_command_runs_its_plan_into_its_table_and_says_so(path):
    command = [sys.executable, ROOT / "data" / "sweep.py", "--plan", "small", "--results", path]
    done = subprocess.run([*command, "--jobs", "1"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"runs.csv: {len(SMALL)} runs, nothing missing\n"
    table = pd.read_csv(path)
    assert list(table) == COLUMNS and table["seed"].tolist() == [cell.seed for cell in SMALL]


# ---- optimizers ----------------------------------------------------------------------------------

FACTORS = {"qk_rate_0.3": 0.3, "qk_rate_0.1": 0.1, "qk_rate_0.03": 0.03}  # of W_q's and W_k's rate
PULLS = {"qk_fixed": 1.0, "qk_slow": 0.01}  # the share of the way back to the norm, in logarithms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_its_steps_by_hand(name):
    """On gradients of norms far above 1 and below, for 20 steps, of which 2 are a tenth."""
    torch.manual_seed(0)
    model = LocalGPT(LocalGPTConfig(4, 5, 2, 2, 8, method="bp")).double()
    optimizer, random = OPTIMIZERS[name](model, 0.01, 20), torch.Generator().manual_seed(1)
    hand = {part: p.detach().clone() for part, p in model.named_parameters()}
    start = {part: p.norm() for part, p in hand.items()}
    moments, own = {}, [part for part in hand if "q_proj" in part or "k_proj" in part]
    for step in range(1, 21):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64)
            p.grad *= 3 if step % 2 else 0.01
        grads = {part: p.grad.clone() for part, p in model.named_parameters()}
        norm = math.sqrt(sum((grad**2).sum().item() for grad in grads.values()))
        assert (norm > 1) == (step % 2 == 1)
        optimizer.step()
        for part, p in hand.items():
            grad = grads[part] / max(1, norm) if name == "clip" else grads[part]
            rate, decay = 0.01, 0.01
            if name == "schedule":
                falling = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 18)) / 2
                rate *= step / 2 if step <= 2 else falling
            if part in own:
                rate *= FACTORS.get(name, 1)
                decay = 1.0 if name == "qk_decay" else 0.01
            m, v = moments.get(part, (0, 0))
            if name == "sgd":
                moments[part] = m, v = 0.9 * m + grad, 0
                p -= rate * m
            else:
                moments[part] = m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
                p *= 1 - rate * decay
                p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            if part in own and name in PULLS:
                p *= torch.exp(PULLS[name] * torch.log(start[part] / p.norm()))
            torch.testing.assert_close(model.get_parameter(part).data, p, rtol=1e-6, atol=1e-9,
                                       msg=f"{part}, step {step}")
    for part in own:
        same = model.get_parameter(part).norm().item() == pytest.approx(start[part].item(), 1e-12)
        assert same == (name == "qk_fixed"), "held, and only there"
