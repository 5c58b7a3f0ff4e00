"""From a task to a model's symptoms, and from the table of runs to a verdict."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, ttest_1samp

from data.experiment import (COLUMNS, CURVES, EXPERIMENT, SYMPTOMS, TASKS, USUAL, RecallTask, arms,
                             load_runs, of_arms, share_interval, symptoms, window_widths,
                             windows)
from figures import plot_windows
from helpers import SHAKESPEARE_SHA256, twin
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig

# ---- the task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs, values", [(1, 2), (2, 2), (2, 5), (3, 3), (5, 2), (4, 8)])
def test_guesses_are_as_good_as_counted_over_all_sequences(pairs, values):
    task = RecallTask(n_keys=pairs + 1, n_values=values, n_pairs=pairs, n_queries=1)
    shown = list(itertools.product(range(values), repeat=pairs))
    most = [max(map(row.count, row)) / pairs for row in shown]
    assert task.best_guess == pytest.approx(np.mean(most), rel=1e-12)
    assert task.chance == pytest.approx(np.mean([row.count(row[0]) / pairs for row in shown]))


@pytest.mark.parametrize("name", ["recall", "recall_8", "recall_16"])
def test_who_looks_a_key_up_is_always_right(name):
    task, generator = TASKS[name].data, torch.Generator().manual_seed(0)
    x, y = task.batch(task.block_size, 200, generator, "cpu")
    again, _ = task.batch(task.block_size, 200, torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(x, again) and x.shape == y.shape == (200, task.block_size)
    P, seen = task.n_pairs, set()
    assert (y[:, : 2 * P] == -100).all()
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        keys, values, asked = row[0 : 2 * P : 2], row[1 : 2 * P : 2], row[2 * P :]
        assert len({*keys}) == P and len({*asked}) == len(asked) == task.n_queries
        assert max(keys) < task.n_keys <= min(values) and max(values) < task.vocab_size
        assert [dict(zip(keys, values, strict=True))[key] for key in asked] == targets[2 * P :]
        seen |= {*keys, *values}
    assert seen == {*range(task.vocab_size)}


def test_the_score_of_an_oracle_is_1_and_of_one_who_names_a_value_its_chance():
    task = TASKS["recall"].data

    class Oracle(LocalGPT):
        def forward(self, idx, targets=None):
            right = targets.clamp(min=0) if self.knows else torch.full_like(targets, 9)
            logits = 50 * torch.nn.functional.one_hot(right, 16).double()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return logits, loss

    model = Oracle(LocalGPTConfig(12, 16, 1, 1, 8)).train()
    for model.knows, accuracy in ((True, 1), (False, 1 / 8)):
        score = task.score(model)
        assert score["accuracy"] == pytest.approx(accuracy, abs=0.02) and model.training
        assert score == task.score(model) and (score["val_loss"] < 1e-9) == model.knows
    with pytest.raises(ValueError, match="block_size=5"):
        task.batch(5, 1, torch.Generator(), "cpu")
    with pytest.raises(ValueError, match="n_queries <= n_pairs"):
        RecallTask(n_queries=5)


# ---- symptoms, by hand, where layers, heads, batch, positions and channels all differ ------------

SHAPE = LocalGPTConfig(block_size=6, vocab_size=7, n_layer=3, n_head=2, n_embd=8)
B, T, H, D = 5, 6, 2, 4
VISIBLE = torch.ones(T, T).tril().bool()


def unequal_model(**changes) -> LocalGPT:
    """Queries, keys and layers of different sizes: no two numbers agree by chance."""
    torch.manual_seed(0)
    model = LocalGPT(dataclasses.replace(SHAPE, **{"method": "bp", **changes}))
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.attn.q_proj.weight.mul_(20 + 10 * i)
            block.attn.k_proj.weight.mul_(50 + 5 * i).add_(0.1)
            block.attn.v_proj.weight.mul_(30)
    return model


def batch():
    return torch.randint(7, (2, B, T), generator=torch.Generator().manual_seed(1))


def by_hand(model, rule):
    """From the inputs of attention and the gradient at its output; not the cosines at W."""
    seen, found = [], {}
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0].detach())))
        block.attn.o_proj.register_full_backward_hook(
            lambda m, g_in, g_out: found.update({m: g_in[0].detach()}))
    model(*batch())[1].backward()
    numbers = {name: [] for name in SYMPTOMS}
    for attention, h in seen:
        q, k, v = ((h @ weight.detach().T).view(B, T, H, D).transpose(1, 2).double()
                   for weight in (attention.q_proj.weight, attention.k_proj.weight,
                                  attention.v_proj.weight))
        numbers["q_norm"].append((q**2).mean())
        numbers["k_norm"].append((k**2).mean())
        if model.config.qk_norm != "off":
            q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        raw = scores = q @ k.mT / 2 * model.config.score_scale  # the root of D
        if model.config.score_cap < math.inf:
            scores = model.config.score_cap * torch.tanh(raw / model.config.score_cap)
        a = scores.masked_fill(~VISIBLE, -math.inf).softmax(-1)
        g = found[attention.o_proj].view(B, T, H, D).transpose(1, 2).double() @ v.mT
        f, sent = a * (g - (a * g).sum(-1, keepdim=True)), rule(a, g, VISIBLE)
        heads = [*itertools.product(range(B), range(H))]
        cosines = [torch.cosine_similarity(sent[i].ravel(), f[i].ravel(), dim=0) for i in heads]
        numbers["cos_scores"].append(np.mean(cosines))
        rows = [(*i, t) for i in heads for t in range(T)]
        sums = sum(abs(sent[row].sum()) for row in rows)
        numbers["row_sum"].append(sums / sent.abs().sum())
        means = [scores[row][: row[2] + 1].mean() for row in rows]
        numbers["common_mode"].append(np.sqrt(np.mean(np.square(means))))
        push = sent * scores.masked_fill(~VISIBLE, 0)
        for name, part in (("radial_q", push), ("radial_k", push.mT)):
            numbers[name].append(sum(abs(part[row].sum()) for row in rows) / push.abs().sum())
        later = [(a[row][: row[2] + 1], raw[row][: row[2] + 1]) for row in rows if row[2]]
        numbers["entropy"].append(np.mean([-(w * w.log()).sum() / math.log(len(w))
                                           for w, _ in later]))
        numbers["score_max"].append(np.mean([s.max() - s.mean() for _, s in later]))
    numbers = {name: float(np.mean(values)) for name, values in numbers.items() if values}
    return numbers | {name: math.sqrt(numbers[name]) for name in ("q_norm", "k_norm")}


@pytest.mark.parametrize("rule, changes", [
    ("full", {}), ("ste", {"qk_norm": "exact"}), ("mean", {"method": "fa"}),
    ("zero", {"qk_norm": "cut_k"}), ("diagonal", {"score_cap": 0.5}),
    ("full", {"score_cap": 0.5, "cap_backward": "cut"})], ids=str)
def test_symptoms_are_what_their_formulas_say(rule, changes):
    changes = {"softmax_backward": rule, "score_scale": 0.5} | changes
    model = unequal_model(**changes)
    random_numbers = torch.get_rng_state()
    got = {metric: value for (metric, _), value in symptoms(model, *batch()).items()}
    assert all(p.grad is None for p in model.parameters()), "it leaves the model as it was"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random_numbers, torch.get_rng_state())
    expected = by_hand(unequal_model(**changes), SOFTMAX_BACKWARD[rule])
    assert list(got) == SYMPTOMS and {*got} - {*expected} == {"cos_q", "cos_k"}
    for metric, value in expected.items():
        assert got[metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric
    # At the weights: beside exact softmax, norm and cap, with the same random feedback.
    norm = "exact" if changes.get("qk_norm", "off") != "off" else "off"
    exact = twin(model, softmax_backward="full", qk_norm=norm, cap_backward="exact")
    for trained in (model, exact):
        trained(*batch())[1].backward()
    for name in "qk":
        pairs = [[getattr(b.attn, f"{name}_proj").weight.grad.ravel() for b in m.blocks]
                 for m in (model, exact)]
        cosines = [torch.cosine_similarity(*pair, dim=0) for pair in zip(*pairs, strict=True)]
        assert got[f"cos_{name}"] == pytest.approx(np.mean(cosines), abs=1e-5)
    exactly = rule == "full" and not {"qk_norm", "cap_backward"} & {*changes}
    assert (min(got["cos_q"], got["cos_k"]) > 0.9999) == exactly
    distinct = np.diff(sorted(value for value in expected.values()))
    assert distinct.min() > 1e-4 or rule == "full", "no two of them could be exchanged unseen"


def test_a_rule_that_sends_nothing_has_no_cosine_and_a_sigmoid_its_own_derivative():
    exact = symptoms(unequal_model(softmax_backward="full"), *batch())
    nothing = symptoms(unequal_model(softmax_backward="none"), *batch())
    assert {name for name, _ in nothing} == {"common_mode", "q_norm", "k_norm", "entropy",
                                             "score_max"}
    assert all(value == exact[name] for name, value in nothing.items())
    x, y = batch()
    y[0] = -100  # a sequence that nothing is asked of has no cosine, and the others keep theirs
    model = unequal_model(softmax_backward="zero")
    assert symptoms(model, x, y)["cos_scores", ""] == pytest.approx(
        symptoms(model, x[1:], y[1:])["cos_scores", ""], rel=1e-6)
    sigmoid = symptoms(unequal_model(attn_mode="sigmoid"), *batch())
    assert sigmoid["cos_scores", ""] == pytest.approx(1) and sigmoid["row_sum", ""] > 0.1


# ---- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solved, n", [(56, 70), (0, 8), (24, 24), (14, 24), (0, 1), (5, 9)])
def test_shares_have_wilson_s_interval(solved, n):
    """Its ends are the roots of ``(share - p)^2 = z^2 p (1 - p) / n``."""
    z, share = norm.ppf(0.975), solved / n
    ends = np.roots([1 + z**2 / n, -2 * share - z**2 / n, share**2]).real
    assert share_interval(solved, n) == pytest.approx(sorted(ends), abs=1e-9)


# ---- the table -----------------------------------------------------------------------------------


def runs(rule="full", losses=(2.0, 2.0), seeds=(0, 1), lr=1e-3, **changes) -> pd.DataFrame:
    fixed = USUAL | {"task": "recall", "rule": rule, "lr": lr, "steps": 10, "status": "ok"}
    fixed |= dict.fromkeys(CURVES, "")
    fixed |= {"data": "d", "experiment": EXPERIMENT, "seconds": 1.0, "machine": "m", "torch": "t"}
    fixed |= dict.fromkeys(["accuracy", *SYMPTOMS], 0.5) | changes
    return pd.DataFrame({"seed": seeds, "val_loss": losses}).assign(**fixed)[COLUMNS]


COMPLETE = pd.concat([runs("full", (2.0, 2.1)), runs("none", (3.0, 3.1)), runs("ste", (2.5, 2.61))],
                     ignore_index=True)


def failed(results, rule, seed, status="failed: OutOfMemoryError", loss=math.nan):
    where = (results["rule"] == rule) & (results["seed"] == seed)
    return results.assign(status=results["status"].mask(where, status),
                          val_loss=results["val_loss"].mask(where, loss))


@pytest.mark.parametrize("results, words", [
    (pd.concat([COMPLETE, COMPLETE.iloc[[1]]]), "there twice.*'full'.*'seed': 1"),
    (COMPLETE.assign(data=["d"] * 5 + ["e"]), "other data.*'ste'.*'seed': 1"),
    *[(failed(COMPLETE, "ste", 1, status, loss), "status and a loss that cannot.*'ste'.*'seed': 1")
      for status, loss in (("ok", math.inf), ("failed: OSError", 2.0))]],
    ids=["twice", "data", "ok", "failed"])
def test_rows_that_cannot_be_are_refused_by_name(results, words):
    with pytest.raises(ValueError, match=words):
        windows(results)


def test_a_table_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path):
    path, written = tmp_path / "runs.csv", failed(COMPLETE, "none", 1)
    with pytest.raises(FileNotFoundError, match="make sweep"):
        load_runs(path=path)
    pd.concat([failed(written, "ste", 0, "diverged"), written.assign(experiment=1)]).to_csv(
        path, index=False)
    expected = failed(written, "ste", 0, "diverged", math.inf)
    pd.testing.assert_frame_equal(load_runs(path=path), expected, check_dtype=False)
    assert len(load_runs(1, path)) == 6 and len(load_runs(None, path)) == 12
    text = written.to_csv(index=False)
    for damaged in ("", text.replace(",rule,", ",rules,"), text.replace("2.61", "2.6l")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"runs.csv is damaged: .*take it from git again"):
            load_runs(path=path)


def test_the_stored_rows_end_as_their_curves_do_and_are_of_the_data_that_is_here():
    rows = load_runs(experiment=None).query("status == 'ok'")
    assert (rows["losses"] != "").all()
    for name, metric in CURVES.items():
        part = rows[rows[name] != ""]
        ends = part[name].str.split().str[-1].astype(float)
        np.testing.assert_allclose(ends, part[metric], rtol=1e-3, atol=6e-5, err_msg=name)
    for task, part in rows.groupby("task"):
        data, _, _, every, _ = TASKS[task]
        sha256 = SHAKESPEARE_SHA256 if data == "shakespeare_char" else data.sha256
        assert {*part["data"]} == {sha256[:12]}, task
        later = part.query("experiment > 1")  # the first edition was scored more seldom
        lengths = later["losses"].str.split().str.len()
        assert (lengths == 1 + later["steps"] // every).all(), task


# ---- the window of learning rates ----------------------------------------------------------------


def on_recall(rule, lr, solved, n, first=200) -> pd.DataFrame:
    accuracy = [1.0] * solved + [0.4] * (n - solved)
    return runs(rule, 1.0, range(first, first + n), lr, accuracy=accuracy)


def on_text(rule, lr, losses, **changes) -> pd.DataFrame:
    status = ["ok" if loss < math.inf else "diverged" for loss in losses]
    changes = {"task": "shakespeare", "accuracy": math.nan, "status": status} | changes
    return runs(rule, losses, range(200, 200 + len(losses)), lr, **changes)


def cells(*parts) -> pd.DataFrame:
    return windows(pd.concat(parts, ignore_index=True)).set_index(["rule", "lr"])


@pytest.mark.parametrize("solved, n, inside", [
    (4, 4, True), (3, 4, False), (7, 8, True), (6, 8, False), (0, 8, False)])
def test_a_rate_is_inside_on_recall_if_wilson_s_lower_end_is_above_one_half(solved, n, inside):
    row = cells(on_recall("zero", 1e-3, solved, n)).loc["zero", 1e-3]
    assert (row["solved"], row["runs"], row["inside"]) == (solved, n, inside)
    assert row["share"] == solved / n and (row["low"], row["high"]) == share_interval(solved, n)


def test_every_run_counts_once_but_those_that_failed_or_chose_a_setting():
    old, new = on_recall("zero", 1e-3, 2, 4, first=100), on_recall("zero", 1e-3, 4, 4, first=400)
    chose = on_recall("zero", 1e-3, 2, 2, first=300)
    diverged = failed(new, "zero", 400, "diverged", math.inf)
    diverged["accuracy"] = diverged["accuracy"].where(diverged["status"] == "ok")
    for parts, counts in (((old, new, chose), (6, 8)), ((old, failed(new, "zero", 400)), (5, 7)),
                          ((old, diverged), (5, 8))):
        row = cells(*parts).loc["zero", 1e-3]
        assert (row["solved"], row["runs"]) == counts
    assert [*cells(old, on_recall("zero", 1e-4, 3, 3)).index] == [("zero", 1e-3)], "three are few"
    with pytest.raises(ValueError, match="there twice"):
        windows(pd.concat([old, old]))


SEEDS = np.array([0.0, 0.3, -0.3, 0.1])  # what differs from seed to seed, in all rules alike
TEXT = [on_text("full", 1e-3, 2 + SEEDS), on_text("full", 1e-4, 2.2 + SEEDS),
        on_text("none", 1e-3, 3.5 + SEEDS), on_text("none", 1e-4, 3 + SEEDS)]
NOISE = np.array([0.1, -0.1, 0.1, -0.1])


@pytest.mark.parametrize("losses, share, low", [
    (2.24 + SEEDS, 0.76, 0.76), (2.26 + SEEDS, 0.74, 0.74),
    (2.1 + SEEDS + NOISE, 0.9, 0.9 - ttest_1samp(NOISE, 0).confidence_interval().high),
    ([math.inf, 2, 2, 2], -math.inf, -math.inf)], ids=["less", "more", "noisy", "diverged"])
def test_on_text_a_rate_is_inside_if_it_keeps_three_quarters_of_attention_s_worth(
        losses, share, low):
    found = cells(*TEXT, on_text("ste", 3e-4, losses))
    row = found.loc["ste", 3e-4]
    assert row["share"] == pytest.approx(share) and row["low"] == pytest.approx(low)
    assert row["inside"] == (low > 0.75)
    assert found.loc["full", "share"].tolist() == pytest.approx([1, 0.8])


def test_where_attention_is_worth_nothing_on_text_nothing_can_be_told():
    none = on_text("none", 1e-3, 2 + SEEDS + NOISE)
    table = windows(pd.concat([*TEXT[:2], none]))
    assert table["share"].isna().all() and not table["inside"].any()
    assert window_widths(table)["width"].isna().all()
    assert windows(pd.concat(TEXT[:2]))["share"].isna().all(), "no control"


@pytest.mark.parametrize("own, shared", [
    ({"qk_norm": "cut_k"}, {"qk_norm": "exact"}), ({"qk_norm": "tangent"}, {"qk_norm": "off"}),
    ({"score_cap": 2.0, "cap_backward": "cut"}, {"score_cap": 2.0})], ids=str)
def test_what_differs_only_backwards_shares_the_none(own, shared):
    parts = [part.assign(**own) for part in TEXT[:2]] + [part.assign(**shared) for part in TEXT[2:]]
    others = [on_text("none", 1e-3, 9 + SEEDS, **shared | other)
              for other in ({"method": "fa"}, {"steps": 20}, {"optimizer": "sgd"})]
    table = windows(pd.concat([*parts, *others, on_text("ste", 1e-3, 2.5 + SEEDS, **own)]))
    assert table.set_index("rule").loc["ste", "share"] == pytest.approx(0.5)


def test_a_window_is_the_longest_run_of_neighbouring_rates():
    rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    def widths(*solved):  # of four runs at each rate; None: not run
        parts = [on_recall("zero", lr, *counts) for lr, counts in zip(rates, solved, strict=False)
                 if counts]
        row = window_widths(windows(pd.concat(parts))).iloc[0]
        return row["width"], row["from_lr"], row["to_lr"]

    yes, no = (4, 4), (3, 4)
    assert widths(no, yes, yes, no, yes) == (2, 1e-4, 3e-4)
    assert widths(yes, None, yes, yes, yes) == (3, 3e-4, 3e-3), "a gap is no neighbour"
    assert widths(yes, yes, yes, yes, yes, yes)[0] == 6
    assert widths(no, no)[0] == 0


def test_beside_a_window_stands_the_loss_at_the_best_rate_and_rules_are_apart():
    parts = [runs(rule, loss, range(4), lr, dose=dose) for rule, loss, lr, dose in (
        ("full", 1.0, 1e-3, 1.0), ("full", 0.5, 1e-4, 1.0), ("dosed", 0.8, 1e-4, 0.2),
        ("dosed", 0.7, 1e-4, 0.4))]
    rows = window_widths(windows(pd.concat(parts))).set_index(["rule", "dose"])
    assert rows["loss"].to_dict() == {("full", 1.0): 0.5, ("dosed", 0.2): 0.8, ("dosed", 0.4): 0.7}
    assert rows.loc[("full", 1.0), "lr"] == 1e-4 and rows.loc[("full", 1.0), "runs"] == 8


@pytest.mark.parametrize("task", ["recall", "shakespeare"])
def test_arms_are_told_apart_and_probes_and_other_methods_left_out(task):
    settings = {arm: {"task": task, "steps": TASKS[task].steps} | change
                for arm, change in arms(task).items()}
    table = pd.concat([runs(seeds=[i, 9], **change) for i, change in enumerate(settings.values())]
                      + [runs(**settings["off"] | other) for other in (
                          {"method": "fa"}, {"steps": 7}, {"dose": 0.5}, {"score_cap": 7.0})])
    found = of_arms(table, task)
    assert found.groupby("arm", sort=False)["seed"].first().to_dict() == {
        arm: i for i, arm in enumerate(settings)}
    assert len(found) == 2 * len(settings) and len(of_arms(table, task, method="fa")) == 2


def test_the_figure_of_windows_frames_them_and_writes_what_was_run():
    table = windows(pd.concat([on_recall("zero", 1e-3, 8, 8), on_recall("zero", 1e-4, 2, 8),
                               on_recall("full", 1e-3, 4, 4)])).assign(name=lambda t: t["rule"])
    ax = plot_windows(table)
    words = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert words == {(1, 0): "8/8", (0, 0): "2/8", (1, 1): "4/4"}
    assert sorted(round(frame.get_x() + 0.46) for frame in ax.patches) == [1, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1e-4", "1e-3"]
    ax.clear()
    plot_windows(table, ax, names=["full", "not run", "zero"])
    words = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert words == {(1, 2): "8/8", (0, 2): "2/8", (1, 0): "4/4"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "not run", "zero"]
