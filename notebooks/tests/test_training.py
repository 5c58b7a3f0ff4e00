"""Training: one step by hand, what a checkpoint promises, and what is refused."""

import dataclasses
import errno
import functools
import math
import os
import pathlib
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import helpers
import model_local
from helpers import OPTIMIZERS, Corpus, RecallTask, evaluate, save_atomically, train, twin
from model_local import LocalGPT, LocalGPTConfig

TINY = LocalGPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=2, n_embd=8, method="bp")


@pytest.fixture(scope="module")
def corpus():
    ids = np.random.default_rng(0).integers(0, 5, 600).astype(np.uint16)
    itos = dict(enumerate("abcde"))
    return Corpus("letters", ids[:500], ids[500:], {c: i for i, c in itos.items()}, itos, "sha of letters")


@pytest.fixture
def short(corpus, tmp_path):
    """``train`` on the letters, four steps in two intervals, each argument replaceable."""
    settings = {"config": TINY, "steps": 4, "eval_every": 2, "batch_size": 3, "data": corpus, "directory": tmp_path}
    return lambda **changes: train(**settings | changes)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_mean_loss_with_weight_decay(short, corpus):
    run = short(steps=2, eval_every=1, lr=0.01, seed=3)
    torch.manual_seed(3)
    model = LocalGPT(TINY)
    assert equal(weights(model), weights(run.at(0)))
    batches, moments = torch.Generator().manual_seed(3), {}
    for step in (1, 2):
        starts = torch.randint(496, (3, 1), generator=batches).numpy()
        window = torch.from_numpy(corpus.train[starts + np.arange(5)].astype(np.int64))
        loss = -F.log_softmax(model(window[:, :-1])[0], -1).gather(-1, window[:, 1:, None]).sum() / (3 * 4)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
                moments[p] = m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                p *= 1 - 0.01 * 0.01  # torch's default decay, 0.01, times the rate
                p -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        for name, value in run.at(step).named_parameters():
            torch.testing.assert_close(model.get_parameter(name).data, value.data, rtol=1e-5, atol=1e-6)
        assert run.series("train_loss")[step] == pytest.approx(loss.item(), rel=1e-5)


def test_sgd_is_steps_along_a_momentum(short, corpus):
    run = short(steps=3, eval_every=1, lr=0.5, seed=3, optimizer="sgd")
    torch.manual_seed(3)
    model = LocalGPT(TINY)
    batches, momenta = torch.Generator().manual_seed(3), {}
    for step in (1, 2, 3):
        model.zero_grad()
        model(*corpus.batch(4, 3, batches, "cpu"))[1].backward()
        with torch.no_grad():
            for p in model.parameters():
                momenta[p] = 0.9 * momenta.get(p, 0) + p.grad
                p -= 0.5 * momenta[p]
        for name, value in run.at(step).named_parameters():
            torch.testing.assert_close(model.get_parameter(name).data, value.data, rtol=1e-5, atol=1e-6)
    assert not equal(weights(run.model), weights(short(steps=3, lr=0.5, seed=3).model))


FACTORS = {"qk_rate_0.3": 0.3, "qk_rate_0.1": 0.1, "qk_rate_0.03": 0.03}  # of the rate of W_q and W_k
PULLS = {"qk_fixed": 1.0, "qk_slow": 0.01}  # the share of the way back to the norm, in logarithms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_its_steps_by_hand(name):
    """On made-up gradients, now of a norm far above 1 and now below it, for 20 steps, of which 2 are a tenth."""
    torch.manual_seed(0)
    model = LocalGPT(dataclasses.replace(TINY, n_layer=2)).double()
    optimizer, random = OPTIMIZERS[name](model, 0.01, 20), torch.Generator().manual_seed(1)
    hand = {part: p.detach().clone() for part, p in model.named_parameters()}
    start = {part: p.clone() for part, p in hand.items()}
    moments, own = {}, [part for part in hand if "q_proj" in part or "k_proj" in part]
    assert len(own) == 4
    for step in range(1, 21):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64) * (3 if step % 2 else 0.01)
        grads = {part: p.grad.clone() for part, p in model.named_parameters()}
        norm = math.sqrt(sum((grad**2).sum().item() for grad in grads.values()))
        assert (norm > 1) == (step % 2 == 1)
        optimizer.step()
        for part, p in hand.items():
            grad = grads[part] / max(1, norm) if name == "clip" else grads[part]
            rate, decay = 0.01, 0.01
            if name == "schedule":
                rate *= step / 2 if step <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 18)) / 2
            if part in own:
                rate, decay = rate * FACTORS.get(name, 1), 1.0 if name == "qk_decay" else 0.01
            m, v = moments.get(part, (0, 0))
            if name == "sgd":
                moments[part] = m, v = 0.9 * m + grad, 0
                p -= rate * m
            else:
                moments[part] = m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
                p *= 1 - rate * decay
                p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            if part in own and name in PULLS:
                p *= torch.exp(PULLS[name] * (torch.log(start[part].norm()) - torch.log(p.norm())))
            torch.testing.assert_close(model.get_parameter(part).data, p, rtol=1e-6, atol=1e-9, msg=f"{part}, {step}")
    for part in own:
        weight, norm = model.get_parameter(part).data, start[part].norm().item()
        assert (weight - start[part]).norm() > 0.01 * norm
        assert (weight.norm().item() == pytest.approx(norm, rel=1e-12)) == (name == "qk_fixed")


def test_the_schedule_s_rate_rises_for_a_tenth_and_falls_to_a_tenth():
    model = LocalGPT(TINY)
    optimizer, rates = OPTIMIZERS["schedule"](model, 2.0, 40), []
    for _ in range(40):
        optimizer.step()  # without gradients no weight moves
        (group,) = optimizer.param_groups
        rates.append(group["lr"])
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and rates[4] == 2.0 == max(rates)
    assert rates[22] == pytest.approx(1.1) and rates[39] == pytest.approx(0.2, abs=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_train_gives_its_optimizer_the_model_the_rate_and_the_number_of_steps(short, monkeypatch):
    def halved(model, lr, steps):
        assert isinstance(model, LocalGPT)
        return torch.optim.SGD(model.parameters(), lr / steps)

    monkeypatch.setitem(OPTIMIZERS, "mine", halved)
    one, other = short(optimizer="mine", lr=0.4, steps=4), short(optimizer="mine", lr=0.2, steps=2)
    assert equal(weights(one.at(2)), weights(other.at(2))) and not equal(weights(one.at(0)), weights(one.at(2)))


def code_of_ids(model, x, y):
    """The ids of a batch as digits of one number."""
    return {("ids", ""): (x.flatten() * 5 ** torch.arange(x.numel())).sum().item()}


def test_the_batch_that_is_measured_is_the_same_in_every_run_and_no_run_s_first(short, corpus):
    measured, first = [], []
    for seed in range(4):
        measured += short(seed=seed, measure=code_of_ids).series("ids").tolist()
        x, y = corpus.batch(4, 3, torch.Generator().manual_seed(seed), "cpu")
        first.append(code_of_ids(None, x, y)["ids", ""])
    assert len({*measured}) == 1 and len({*first}) == 4 and not {*measured} & {*first}


def test_the_training_loss_is_the_mean_over_its_interval(short):
    each = short(steps=5, eval_every=1).series("train_loss")
    intervals = short(steps=5, eval_every=3).series("train_loss")
    assert intervals.index.tolist() == [3, 5]
    assert intervals.tolist() == pytest.approx([each[:3].mean(), each[3:].mean()], rel=1e-6)
    assert each[:3].mean() != pytest.approx(each[3], rel=1e-4)


class Uniform(LocalGPT):
    """Predicts the same everywhere: probability 1/2 for token 0."""

    def forward(self, idx, targets=None):
        logits = torch.zeros(*idx.shape, 5)
        logits[..., 0] = math.log(4)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluation_is_a_mean_over_tokens_of_the_whole_text_however_it_is_batched(batch_size):
    text = np.ones(41, dtype=np.uint16)
    text[31:] = 0  # the last ten of forty targets
    model = Uniform(TINY)
    every = evaluate(model, text, n_windows=10, batch_size=batch_size)  # ten windows of four, side by side
    starts = np.unique(np.linspace(0, 36, 10).astype(int))
    targets = np.concatenate([text[s + 1 : s + 5] for s in starts])
    assert every == pytest.approx(np.where(targets == 0, math.log(2), math.log(8)).mean(), rel=1e-6)
    assert starts[0] == 0 and starts[-1] + 5 == len(text)
    for end in (slice(1, 5), slice(-4, None)):  # the first and the last target of the text count
        changed = np.ones(41, dtype=np.uint16)
        changed[end] = 0
        assert evaluate(model, changed, 10, batch_size) < evaluate(model, np.ones(41, np.uint16), 10, batch_size)


def test_evaluation_leaves_modes_gradients_and_random_numbers_alone():
    model = LocalGPT(dataclasses.replace(TINY, dropout=0.5))
    text = np.random.default_rng(0).integers(0, 5, 200).astype(np.uint16)
    random_numbers = torch.get_rng_state()
    for training in (True, False):
        assert evaluate(model.train(training), text) == evaluate(model, text)
        assert all(module.training is training for module in model.modules())
    assert torch.equal(random_numbers, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="too few"):
        evaluate(model, text[:4])


def test_a_history_has_a_value_for_every_metric_at_every_step(short):
    run = short(steps=5, eval_every=2, measure=helpers.alignment)
    assert list(run.history.columns) == ["step", "metric", "part", "value"]
    for metric, steps in {"val_loss": [0, 2, 4, 5], "alignment": [0, 2, 4, 5], "train_loss": [2, 4, 5]}.items():
        assert run.series(metric).index.tolist() == steps
    assert sorted(run.snapshots) == [0, 2, 4, 5]
    assert not run.history.duplicated(["step", "metric", "part"]).any()
    assert equal(weights(run.at(5)), weights(run.model)) and not run.model.training
    for step in (0, 2, 4):
        assert not equal(weights(run.at(step)), weights(run.model))
        assert evaluate(run.at(step), short.__closure__[0].cell_contents["data"].val) == pytest.approx(
            run.series("val_loss")[step], rel=1e-6
        )
    with pytest.raises(KeyError, match="not kept"):
        run.at(1)


def test_a_measure_sees_a_copy_and_changes_nothing(short, tmp_path):
    def vandal(model, x, y):
        assert not model.training and x.shape == y.shape == (3, 4)
        torch.manual_seed(0)
        for p in model.parameters():
            p.data.zero_()
        return {}

    def quiet(model, x, y):
        return {}

    dropout = dataclasses.replace(TINY, dropout=0.3)
    one, other = (short(config=dropout, measure=m, directory=None) for m in (quiet, quiet))
    assert equal(weights(one.model), weights(other.model))
    assert equal(weights(short(measure=vandal).model), weights(short(measure=quiet).model))


def test_the_callers_random_numbers_stay_where_they_are(short):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    short()
    assert torch.equal(before, torch.get_rng_state())


# ---- twins and gradients -------------------------------------------------------------------------------------------


def test_a_twin_has_the_same_weights_and_feedback_under_other_settings():
    model = LocalGPT(dataclasses.replace(TINY, method="fa")).eval()
    random_numbers = torch.get_rng_state()
    same, bp = twin(model), twin(model, method="bp", softmax_backward="ste")
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert equal(weights(same), weights(model)) and not same.training and twin(model.train()).training
    assert equal(weights(bp), {name: v for name, v in weights(model).items() if "feedback" not in name})
    assert (bp.config.method, bp.config.softmax_backward, model.config.method) == ("bp", "ste", "fa")
    same.token_embedding.weight.data.zero_()
    assert model.token_embedding.weight.any()


def test_cosines_of_gradients_are_by_parameter_and_leave_grad_alone():
    torch.manual_seed(0)
    model = LocalGPT(dataclasses.replace(TINY, method="fa"))
    reference = twin(model, method="bp")
    x = torch.randint(5, (3, 4))
    marker = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = marker[name]
    found = helpers.gradient_cosines(model, reference, x, x)
    assert all(p.grad is marker[name] and (p.grad == 7).all() for name, p in model.named_parameters())
    for m in (copied := twin(model)), reference:
        m.zero_grad()
        m(x, x)[1].backward()
    for name, p in copied.named_parameters():
        q = reference.get_parameter(name)
        cosine = (p.grad * q.grad).sum() / p.grad.norm() / q.grad.norm()
        assert found[name] == pytest.approx(cosine.item(), abs=1e-5)
    assert -1 <= min(found.values()) < 0.9 and found["lm_head.weight"] == pytest.approx(1)
    silent = helpers.gradient_cosines(twin(model, softmax_backward="none"), reference, x, x)
    assert set(found) - set(silent) == {"blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight"}


def test_an_alignment_is_with_exact_backpropagation_through_the_norms_too():
    x = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(0))
    found = {}
    for arm in model_local.QK_NORM:
        torch.manual_seed(0)
        model = LocalGPT(dataclasses.replace(TINY, qk_norm=arm))
        cosines = {name.split(".")[-2]: cosine for (_, name), cosine in helpers.alignment(model, x, x).items()}
        assert cosines["v_proj"] == pytest.approx(1) == cosines["lm_head"], arm
        found[arm] = [name for name in "qk" if cosines[f"{name}_proj"] < 0.99]
    assert found == {
        **{"off": [], "exact": [], "cut": ["q", "k"], "cut_q": ["q"], "cut_k": ["k"]},
        **{"tangent": ["q", "k"], "tangent_q": ["q"], "tangent_k": ["k"]},
    }


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_finished_run_is_loaded_and_not_trained_again(short, tmp_path):
    first = short()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = short()
    assert equal(weights(first.model), weights(again.model))
    pd.testing.assert_frame_equal(first.history, again.history)  # also the time it took
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"lr": 2e-3}, {"batch_size": 4}, {"steps": 3}, {"eval_every": 1},
        {"config": dataclasses.replace(TINY, softmax_backward="ste")},
        {"config": dataclasses.replace(TINY, dropout=0.1)},
        {"config": dataclasses.replace(TINY, qk_norm="cut")},
        {"config": dataclasses.replace(TINY, score_scale=2.0)},
        {"optimizer": "sgd"},
        {"measure": helpers.symptoms},
        {"measure": functools.partial(helpers.alignment)},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_is_changed_is_another_run(short, tmp_path, change):
    first = short(), short(**change)
    assert len(files(tmp_path)) == 2
    assert first[1].model.config == change.get("config", TINY)


def test_other_data_is_another_run(short, corpus, tmp_path):
    short()
    short(data=dataclasses.replace(corpus, train=corpus.train[::-1], sha256="another"))
    assert len(files(tmp_path)) == 2


def test_a_rule_of_ones_own_under_one_name_is_trained_each_time_it_changes(short, tmp_path, monkeypatch):
    config, ends = [], []
    for rule in (
        model_local.BaselineRule(True, model_local.zero),
        model_local.BaselineRule(False, model_local.mean),
        functools.partial(model_local.ste),
    ):
        monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "mine", rule)
        config = dataclasses.replace(TINY, softmax_backward="mine")
        ends.append(weights(short(config=config, lr=0.1).model))
    assert len(files(tmp_path)) == 3
    assert not equal(ends[0], ends[1]) and not equal(ends[1], ends[2])


def interrupt_after(count, monkeypatch):
    saves = iter(range(100))

    def write(path, content):
        if next(saves) == count:
            raise KeyboardInterrupt
        save_atomically(path, content)

    monkeypatch.setattr(helpers, "save_atomically", write)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "optimizer, method, rule",
    [("adamw", "fa", "running"), ("adamw", "dfa", "full")] + [(name, "bp", "full") for name in OPTIMIZERS],
)
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    short, tmp_path, monkeypatch, count, optimizer, method, rule
):
    settings = {"config": dataclasses.replace(TINY, method=method, softmax_backward=rule, dropout=0.3), "steps": 5}
    settings |= {"optimizer": optimizer, "lr": 0.01}
    whole = short(**settings, directory=None)
    interrupt_after(count, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        short(**settings)
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert torch.load(path, weights_only=True)["step"] == 2 * (count - 1)
    resumed = short(**settings)
    assert equal(weights(resumed.model), weights(whole.model))
    for metric in ("val_loss", "train_loss", "alignment"):
        pd.testing.assert_series_equal(resumed.series(metric), whole.series(metric))
    assert (
        sorted(resumed.snapshots) == [0, 2, 4, 5] and not resumed.history.duplicated(["step", "metric", "part"]).any()
    )


def retrained(short, words):
    with pytest.warns(UserWarning, match=words) as warned:
        run = short()
    assert {warning.filename for warning in warned} == {__file__}, "who called train is to see it"
    return run


def test_no_flipped_bit_gets_through(short, tmp_path):
    whole = short(measure=float_measure)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    settings = torch.load(path, weights_only=True)["settings"]
    caught = 0
    for position in range(5, len(content), len(content) // 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(helpers.warnings, "warn", lambda *args, **kwargs: None)
            saved = helpers._load_checkpoint(path, settings)
        caught += saved is None
        if saved:  # that bit carries nothing, such as a date
            assert equal(saved["model"], weights(whole.model)) and saved["history"][-1][0] == 4
    assert caught > 50


def float_measure(model, x, y):
    return {("mine", "a"): np.float64(0.5), ("mine", np.str_("b")): torch.tensor(2.0)}


def test_numpys_numbers_from_a_measure_do_not_damage_its_checkpoint(short, recwarn):
    first, again = short(measure=float_measure), short(measure=float_measure)
    assert not [w for w in recwarn if "damaged" in str(w.message)]
    pd.testing.assert_frame_equal(first.history, again.history)
    assert first.series("mine").tolist() == [1.25] * 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "lacks a key", "no dict"])
def test_a_damaged_checkpoint_is_reported_and_trained_again(short, tmp_path, damage):
    whole = short()
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)
    if damage == "lacks a key":
        torch.save({name: value for name, value in saved.items() if name != "optimizer"}, path)
    elif damage == "no dict":
        torch.save(saved["step"], path)
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"not a model"}[damage])
    assert equal(weights(retrained(short, "damaged").model), weights(whole.model))
    short()  # and it is whole again, without a warning


def test_a_checkpoint_under_anothers_name_is_not_taken_for_it(short, tmp_path):
    short(seed=1)
    (other,) = tmp_path.iterdir()
    whole = short()
    (path,) = set(tmp_path.iterdir()) - {other}
    path.write_bytes(other.read_bytes())
    assert equal(weights(retrained(short, "other settings").model), weights(whole.model))


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_checkpoint_never_runs_code(short, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "owned"))
    short()
    (path,) = tmp_path.iterdir()
    torch.save(torch.load(path, weights_only=True) | {"rng": Hostile()}, path)
    retrained(short, "damaged")
    assert not (tmp_path / "owned").exists()


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"the disk is full, a\.txt stays as it was") as caught:
        save_atomically(path, fail)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(KeyError):
        save_atomically(path, lambda file: {}["missing"])
    assert path.read_bytes() == b"old" and files(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_told_as_such_by_the_real_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda path, mode, opener=open: opener("/dev/full", "wb"))
    with pytest.raises(OSError, match="the disk is full"):
        save_atomically(tmp_path / "a.pt", lambda file: file.write(b"x" * 100_000))


def test_others_may_read_what_is_written_as_the_umask_and_the_old_file_say(tmp_path):
    umask = os.umask(0o022)
    try:
        save_atomically(tmp_path / "new", lambda file: file.write(b"1"))
        (tmp_path / "old").write_bytes(b"0")
        (tmp_path / "old").chmod(0o664)
        save_atomically(tmp_path / "old", lambda file: file.write(b"1"))
    finally:
        os.umask(umask)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("new", "old")] == ["0o644", "0o664"]
    assert (tmp_path / "old").read_bytes() == b"1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_a_kill_leaves_is_removed_once_it_is_old(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def die(file):
        file.write(b"half")
        file.flush()
        os._exit(9)

    if (child := os.fork()) == 0:
        save_atomically(path, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert path.read_bytes() == b"old" and len(files(tmp_path)) == 2
    foreign = tmp_path / "film.avi.part"
    foreign.write_bytes(b"")
    save_atomically(path, lambda file: file.write(b"new"))
    assert len(files(tmp_path)) == 3, "it may belong to another process that is writing now"
    for left in tmp_path.iterdir():
        os.utime(left, (time.time() - 7200,) * 2)
    save_atomically(path, lambda file: file.write(b"newer"))
    assert files(tmp_path) == ["a.pt", "film.avi.part"] and path.read_bytes() == b"newer"


# ---- what is accepted, what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"seed": np.int64(1337)}, {"lr": np.float64(1e-3)}, {"steps": np.int32(4)}, {"steps": 4.0},
        {"eval_every": np.float32(2)}, {"batch_size": np.uint8(3)}, {"seed": 1337.0},
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_of_other_kinds_are_the_same_run(short, tmp_path, change):
    assert equal(weights(short(**change).model), weights(short().model)) and len(files(tmp_path)) == 1


def test_a_directory_may_be_a_string_and_absent(short, tmp_path):
    short(directory=str(tmp_path / "a" / "b"))
    assert len(files(tmp_path / "a" / "b")) == 1
    short(directory=None)
    assert files(tmp_path) == ["a"]


def not_a_dict(model, x, y):
    return [1.0]


def not_numbers(model, x, y):
    return {("a", "b"): "many"}


def not_pairs(model, x, y):
    return {"a": 1.0}


@pytest.mark.parametrize(
    "change, words",
    [
        *[({"steps": bad}, "steps=.* whole number from 1 up") for bad in (math.nan, 0, -1, 1.5, "4", math.inf, True)],
        *[({"batch_size": bad}, "batch_size=.* whole number") for bad in (0, 2.5)],
        ({"eval_every": 0}, "eval_every=0 is not a whole number from 1 up"),
        *[({"seed": bad}, "seed=.* whole number from 0 up") for bad in (-1, 0.5, 2**64, "1")],
        *[({"lr": bad}, "lr=.* positive number") for bad in (0, -1e-3, math.nan, math.inf, "fast", [1e-3])],
        *[({"data": bad}, "neither a corpus nor a task") for bad in ([], "shakespeare_char", 0, False)],
        ({"data": RecallTask()}, "vocab_size"),
        *[({"device": bad}, "device=.* unknown to PyTorch") for bad in ("gpu", 1.5)],
        *[({"optimizer": bad}, "optimizer=.* one of adamw, sgd, ") for bad in ("adam", None, ["sgd"], helpers.sgd)],
        *[({"measure": bad}, "no fingerprint|no function") for bad in (lambda m, x, y: {}, None)],
        *[({"measure": bad}, "a dict of numbers by") for bad in (not_a_dict, not_numbers, not_pairs)],
    ],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(short, tmp_path, change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        short(**change)
    assert files(tmp_path) == []


def test_settings_that_are_no_config_are_refused():
    with pytest.raises(TypeError, match="no LocalGPTConfig"):
        train({"vocab_size": 65})


def test_a_measure_may_be_a_nested_function_or_a_partial_and_its_settings_count(short, tmp_path):
    def make(factor):
        def scaled(model, x, y, power=1):
            return {("mine", ""): factor**power}

        return scaled

    measures = make(2), make(3), functools.partial(make(3), power=2)
    assert [short(measure=m).series("mine")[4] for m in (*measures, make(2))] == [2, 3, 9, 2]
    assert len(files(tmp_path)) == 3


def test_a_run_that_diverges_says_so(short):
    with pytest.raises(FloatingPointError, match="try a smaller lr"):
        short(lr=1e30, steps=6)


def test_a_task_is_trained_like_a_corpus(tmp_path):
    task = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
    config = dataclasses.replace(TINY, vocab_size=5, block_size=task.block_size)
    run = train(config, 2, eval_every=1, batch_size=4, data=task, directory=tmp_path, progress=False)
    assert 0 <= run.series("accuracy")[2] <= 1 and run.series("val_loss").index.tolist() == [0, 1, 2]
    assert pathlib.Path(tmp_path, files(tmp_path)[0]).name.startswith("bp-full-")
