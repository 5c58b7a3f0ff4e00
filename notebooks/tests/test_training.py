"""Training: one step by hand, what a stored run promises, and what is refused."""

import dataclasses
import functools
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import helpers
import model_local
from data.experiment import RecallTask
from data.sweep import OPTIMIZERS
from helpers import Corpus, evaluate, save_atomically, train, twin
from model_local import SOFTMAX_BACKWARD, BaselineRule, LocalGPT, LocalGPTConfig

TINY = LocalGPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=8, method="bp")


@pytest.fixture(scope="module")
def corpus():
    ids = np.random.default_rng(0).integers(0, 5, 600).astype(np.uint16)
    itos = dict(enumerate("abcde"))
    stoi = {character: i for i, character in itos.items()}
    return Corpus("letters", ids[:500], ids[500:], stoi, itos, "sha of letters")


@pytest.fixture
def short(corpus, tmp_path):
    """``train`` on the letters, four steps in two intervals, each argument replaceable."""
    settings = {"config": TINY, "steps": 4, "eval_every": 2, "batch_size": 3, "data": corpus,
                "directory": tmp_path, "progress": False}
    return lambda **changes: train(**settings | changes)


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is computed ----------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_mean_loss(short, corpus):
    """What AdamW is, with its weight decay, is in test_sweep."""
    run = short(steps=2, eval_every=1, lr=0.01, seed=3)
    torch.manual_seed(3)
    model = LocalGPT(TINY)
    assert equal(model, run.at(0))
    batches, optimizer = torch.Generator().manual_seed(3), helpers.adamw(model, 0.01, 2)
    for step in (1, 2):
        starts = torch.randint(496, (3, 1), generator=batches).numpy()
        window = torch.from_numpy(corpus.train[starts + np.arange(5)].astype(np.int64))
        logits, _ = model(window[:, :-1])
        loss = -F.log_softmax(logits, -1).gather(-1, window[:, 1:, None]).sum() / (3 * 4)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in run.at(step).named_parameters():
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-5, atol=1e-6)
        assert run.series("train_loss")[step] == pytest.approx(loss.item(), rel=1e-5)


def test_an_optimizer_is_made_of_the_model_the_rate_and_the_number_of_steps(short):
    def halved(model, lr, steps):
        return torch.optim.SGD(model.parameters(), lr / steps)

    one, other = short(optimizer=halved, lr=0.4), short(optimizer=halved, lr=0.2, steps=2)
    assert equal(one.at(2), other.at(2)) and not equal(one.at(0), one.at(2))


def test_a_history_has_a_value_for_every_metric_at_every_step(short, corpus):
    run = short(steps=5)
    for metric, steps in (("val_loss", [0, 2, 4, 5]), ("alignment", [0, 2, 4, 5]),
                          ("train_loss", [2, 4, 5]), ("tokens_per_s", [2, 4, 5])):
        assert run.series(metric).index.tolist() == steps, metric
    for step in (0, 5):
        assert equal(run.at(step), run.model) == (step == 5)
        loss = evaluate(run.at(step), corpus.val)
        assert loss == pytest.approx(run.series("val_loss")[step], rel=1e-6)
    with pytest.raises(KeyError, match="not kept"):
        run.at(1)
    each = short(steps=5, eval_every=1).series("train_loss")
    means = [each.loc[1:2].mean(), each.loc[3:4].mean(), each[5]]
    assert run.series("train_loss").tolist() == pytest.approx(means, rel=1e-6), "over its interval"


def test_to_measure_changes_nothing(short):
    def vandal(model, x, y):
        assert not model.training and x.shape == y.shape == (3, 4)
        torch.manual_seed(0)
        for p in model.parameters():
            p.data.zero_()
        return {}

    settings = {"config": dataclasses.replace(TINY, dropout=0.3), "directory": None}
    before = torch.get_rng_state()
    quiet = short(measure=lambda model, x, y: {}, **settings)
    assert equal(short(measure=vandal, eval_every=4, **settings).model, quiet.model)
    assert torch.equal(before, torch.get_rng_state()), "whoever calls keeps their random numbers"


class Uniform(LocalGPT):
    """Predicts the same everywhere: probability 1/2 for token 0."""

    def forward(self, idx, targets=None):
        logits = torch.zeros(*idx.shape, 5)
        logits[..., 0] = math.log(4)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("batch_size", [1, 15, 64])
def test_evaluation_is_a_mean_over_tokens_of_the_whole_text_however_it_is_batched(batch_size):
    # windows that overlap, 37 of the 60 that are asked for: 3 batches that are not of one size
    text, model = (np.arange(41) ** 2 % 7 % 2).astype(np.uint16), Uniform(TINY)
    zeros = [(text[start + 1 : start + 5] == 0).mean() for start in range(37)]
    expected = math.log(8) - np.mean(zeros) * math.log(4)
    assert evaluate(model, text, 60, batch_size) == pytest.approx(expected, rel=1e-7)
    assert evaluate(model, text, 2) == pytest.approx(  # the first and the last
        math.log(8) - (zeros[0] + zeros[-1]) / 2 * math.log(4), rel=1e-7)
    real = LocalGPT(dataclasses.replace(TINY, dropout=0.5)).train()
    assert evaluate(real, text) == evaluate(real, text) and real.training
    with pytest.raises(ValueError, match="too few"):
        evaluate(real, text[:4])


# ---- twins and gradients -------------------------------------------------------------------------


def test_a_twin_has_the_same_weights_and_feedback_under_other_settings():
    model = LocalGPT(dataclasses.replace(TINY, method="fa")).eval()
    random_numbers = torch.get_rng_state()
    same, bp = twin(model), twin(model, method="bp", softmax_backward="ste")
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert equal(same, model) and not same.training and twin(model.train()).training
    assert all(torch.equal(value, model.state_dict()[name])
               for name, value in bp.state_dict().items())
    assert (bp.config.method, bp.config.softmax_backward) == ("bp", "ste")
    same.token_embedding.weight.data.zero_()
    assert model.token_embedding.weight.any()


def test_cosines_of_gradients_are_by_parameter_and_leave_grad_alone():
    torch.manual_seed(0)
    model = LocalGPT(dataclasses.replace(TINY, method="fa"))
    reference, x = twin(model, method="bp"), torch.randint(5, (3, 4))
    found = helpers.gradient_cosines(model, reference, x, x)
    assert all(p.grad is None for p in model.parameters())
    for m in model, reference:
        m(x, x)[1].backward()
    for name, p in model.named_parameters():
        q = reference.get_parameter(name)
        cosine = (p.grad * q.grad).sum() / p.grad.norm() / q.grad.norm()
        assert found[name] == pytest.approx(cosine.item(), abs=1e-5)
    silent = helpers.gradient_cosines(twin(model, softmax_backward="none"), reference, x, x)
    assert {name.split(".")[-2] for name in set(found) - set(silent)} == {"q_proj", "k_proj"}
    # zeros, not None: by bp nothing gets past an output projection of zeros
    reference.blocks[0].attn.o_proj.weight.data.zero_()
    for pair in ((model, reference), (reference, model)):
        lost = {*found} - {*helpers.gradient_cosines(*pair, x, x)}
        assert lost == {f"blocks.0.{part}.weight" for part in (
            "ln_1", "attn.q_proj", "attn.k_proj", "attn.v_proj")}


@pytest.mark.parametrize("changes, turned", [
    ({"qk_norm": "exact"}, ""), ({"qk_norm": "cut_k"}, "k"), ({"qk_norm": "tangent_q"}, "q"),
    ({"softmax_backward": "zero"}, "qk"),
    ({"score_cap": 0.02, "qk_start": "lecun", "cap_backward": "cut"}, "qk")], ids=str)
def test_an_alignment_is_with_exact_backpropagation_through_norms_and_caps_too(changes, turned):
    torch.manual_seed(0)
    model, x = LocalGPT(dataclasses.replace(TINY, **changes)), torch.arange(12).view(3, 4) % 5
    cosines = {name.split(".")[-2]: value
               for (_, name), value in helpers.alignment(model, x, x).items()}
    assert cosines["v_proj"] == pytest.approx(1) == cosines["lm_head"]
    assert [name for name in "qk" if cosines[f"{name}_proj"] < 0.99] == [*turned]


# ---- stored runs ---------------------------------------------------------------------------------


def test_a_finished_run_is_stored_once_at_its_end_and_found_again(short, tmp_path, monkeypatch):
    def measure(model, x, y):
        return {("mine", "a"): np.float64(0.5), ("mine", np.str_("b")): torch.tensor(2.0)}

    first = short(measure=measure)
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing is trained any more
    again = short(measure=measure)
    assert equal(first.model, again.model) and equal(first.at(2), again.at(2))
    pd.testing.assert_frame_equal(first.history, again.history)  # also the time it took
    assert len(files(tmp_path)) == 1 and first.series("mine").tolist() == [1.25] * 3


def test_an_interrupted_run_leaves_nothing_behind(short, tmp_path):
    calls = iter([{}])  # the second measurement finds none
    with pytest.raises(StopIteration):
        short(measure=lambda model, x, y: next(calls))
    assert files(tmp_path) == []


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"lr": 2e-3}, {"batch_size": 4}, {"steps": 3}, {"eval_every": 1},
    {"config": dataclasses.replace(TINY, softmax_backward="ste")},
    {"config": dataclasses.replace(TINY, score_cap=5.0)},
    {"optimizer": OPTIMIZERS["sgd"]}, {"measure": lambda model, x, y: {("a", ""): 1.0}},
    {"measure": functools.partial(helpers.alignment)}], ids=str)
def test_whatever_is_changed_is_another_run(short, tmp_path, change):
    short(), short(**change)
    assert len(files(tmp_path)) == 2


def test_other_data_a_changed_rule_and_a_changed_model_are_another_run(
        short, corpus, tmp_path, monkeypatch):
    short(data=dataclasses.replace(corpus, sha256="another"))
    for rule in (BaselineRule(True, model_local.no_baseline), model_local.full,
                 BaselineRule(False, model_local.no_baseline)):
        monkeypatch.setitem(SOFTMAX_BACKWARD, "mine", rule)
        short(config=dataclasses.replace(TINY, softmax_backward="mine"))
    source = helpers._source
    monkeypatch.setattr(helpers, "_source", lambda part: source(part) + (
        "# changed" if part is model_local else ""))
    short(config=dataclasses.replace(TINY, softmax_backward="mine"))
    assert len(files(tmp_path)) == 5


@pytest.mark.parametrize("damage", ["truncated", "lacks a key", "hostile"])
def test_a_damaged_checkpoint_is_reported_and_trained_again(short, tmp_path, damage, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "owned"))
    whole = short()
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "lacks a key":
        torch.save({name: saved[name] for name in saved if name != "model"}, path)
    else:
        torch.save(saved | {"extra": Hostile()}, path)
    with pytest.warns(UserWarning, match="damaged") as warned:
        again = short()
    assert equal(again.model, whole.model)
    assert {warning.filename for warning in warned} == {__file__}, "who called is to see it"
    assert not (tmp_path / "owned").exists()
    short()  # and it is whole again, without a warning


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    save_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomically(path, fail)
    assert path.read_bytes() == b"old" and files(path.parent) == ["a.txt"]


@pytest.mark.parametrize("change, words", [
    ({"steps": 1.5}, "steps=1.5 is not a whole number from 1 up"),
    ({"seed": -1}, "seed=-1 is not a whole number from 0 up"),
    ({"lr": math.nan}, "lr=nan is not a positive number"),
    ({"data": "shakespeare_char"}, "is no corpus: write data="),
    ({"data": RecallTask()}, "config.vocab_size=5 and the data have 16"),
    ({"device": "gpu"}, "device type .* gpu"), ({"device": 1.5}, "device.* got \\(float\\)"),
    ({"optimizer": "adamw"}, "optimizer='adamw' is no function"),
    ({"config": {"vocab_size": 5}}, "no LocalGPTConfig"),
    ({"measure": lambda model, x, y: {("a", "b"): "many"}}, "to float: 'many'"),
    ({"measure": print}, "cannot be read"),
], ids=str)
def test_what_cannot_be_is_refused_before_anything_is_written(short, tmp_path, change, words):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        short(**change)
    assert files(tmp_path) == []
