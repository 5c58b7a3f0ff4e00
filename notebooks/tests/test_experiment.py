"""From a task to a model's symptoms, and from the table of runs to a verdict."""

import dataclasses
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import norm, ttest_1samp

from data.experiment import (COLUMNS, CURVES, EXPERIMENT, GROUP, KEY, SOLVED, SYMPTOMS, TASKS,
                             USUAL, RecallTask, arms, best_settings, harm, harm_table,
                             headline_table, judged, load_runs, mending, of_arms,
                             runs_without_norms, share_difference, share_interval, symptoms,
                             usual_runs, window_widths, windows)
from figures import plot_harm, plot_windows
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
    got = {metric: value for (metric, _), value in symptoms(model, *batch()).items()}
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


def test_symptoms_leave_the_model_as_it_was():
    model = unequal_model(softmax_backward="running", score_cap=0.5)
    model(*batch())[1].backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    random_numbers = torch.get_rng_state()
    symptoms(model.eval(), *batch())
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())
    assert torch.equal(random_numbers, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- harm ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(1, 4), min_size=3, max_size=12), st.floats(-0.5, 2),
       st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_fieller_s_interval_ends_where_the_paired_t_test_begins_to_reject(full, cost, seed, level):
    noise = np.random.default_rng(seed).normal(0, 0.1, (2, len(full)))
    full = np.array(full)
    none, rule = full + 1 + noise[0], full + cost + noise[1]
    result = harm(rule, full, none, level)
    assume(result.verdict != "undecided")
    for end in (result.low, result.high):  # there mean(excess - end * gain) is just significant
        test = ttest_1samp(rule - full - end * (none - full), 0)
        assert test.pvalue == pytest.approx(1 - level, rel=1e-6)
    assert result.low <= result.harm <= result.high
    assert result.harm == pytest.approx((rule - full).mean() / (none - full).mean())
    unit = harm(3 * rule - 1, 3 * full - 1, 3 * none - 1, level)
    np.testing.assert_allclose(unit[:3], result[:3], rtol=1e-6, atol=1e-6)


def around(center, spread=0.0):
    return center + spread * np.linspace(-1, 1, 5)


FULL, NONE = around(2.0), around(3.0)  # harm is then the rule's loss - 2, with its t interval
T95 = 2.7764451 / math.sqrt(5) * np.std(around(0, 1), ddof=1)  # half its width, of around(x, 1)


@pytest.mark.parametrize("low, high, verdict", [
    (0.2, 0.2499, "tolerable"), (-3.0, 0.2499, "tolerable"), (0.2, 0.2501, "costly"),
    (0.2501, 1.5, "costly"), (0.2499, 0.9999, "costly"), (0.2499, 1.0001, "undetermined"),
    (0.9999, 2.0, "costly"), (1.0001, 2.0, "catastrophic")])
def test_each_verdict_is_decided_by_the_ends_of_the_interval(low, high, verdict):
    result = harm(around(2 + (low + high) / 2, (high - low) / 2 / T95), FULL, NONE)
    assert result[1:] == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6), verdict)


def test_without_a_gain_from_attention_nothing_is_decided_and_divergence_is_infinitely_bad():
    gain = around(3, 1 / T95)  # its interval is [0, 2]
    assert harm(FULL, FULL, gain + 0.001).verdict != "undecided"
    for none in (gain - 0.001, FULL, FULL - 1, [3, 3, 3, 3, math.inf]):
        assert harm(FULL + 5, FULL, none).verdict == "undecided"
    assert harm(FULL, [2, 2, 2, 2, math.inf], NONE).verdict == "undecided"
    diverged = harm([2, 2, 2, 2, math.inf], FULL, NONE)
    assert diverged == (math.inf, math.inf, math.inf, "catastrophic")


@pytest.mark.parametrize("change, words", [
    ({"rule": [2, 2, 2, 2, math.nan]}, "NaN"),
    ({"rule": FULL[:4]}, "same seeds")])
def test_harm_refuses_what_it_cannot_judge(change, words):
    with pytest.raises(ValueError, match=words):
        harm(**{"rule": FULL, "full": FULL, "none": NONE} | change)


def wilson(solved, runs, confidence):
    """The ends, as roots of ``(share - p)^2 = z^2 p (1 - p) / runs``."""
    z, share = norm.ppf((1 + confidence) / 2), solved / runs
    return sorted(np.roots([1 + z**2 / runs, -2 * share - z**2 / runs, share**2]).real)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 1 - 0.05 / 3])
@pytest.mark.parametrize("one, other", [
    ((56, 70), (48, 80)), ((0, 8), (24, 24)), ((14, 24), (24, 24)), ((0, 1), (5, 9))])
def test_shares_have_wilson_s_interval_and_differences_newcombe_s(one, other, confidence):
    (p, q), (l1, u1), (l2, u2) = ((one[0] / one[1], other[0] / other[1]),
                                  wilson(*one, confidence), wilson(*other, confidence))
    assert share_interval(*one, confidence) == pytest.approx((l1, u1), abs=1e-9)
    low = p - q - math.hypot(p - l1, u2 - q)
    high = p - q + math.hypot(u1 - p, q - l2)
    assert share_difference(*one, *other, confidence) == pytest.approx((low, high), abs=1e-9)


# ---- the table -----------------------------------------------------------------------------------


def runs(rule="full", losses=(2.0, 2.0), seeds=(0, 1), lr=1e-3, **changes) -> pd.DataFrame:
    fixed = USUAL | {"task": "recall", "rule": rule, "lr": lr, "steps": 10, "status": "ok"}
    fixed |= dict.fromkeys(CURVES, "")
    fixed |= {"data": "d", "experiment": EXPERIMENT, "seconds": 1.0, "machine": "m", "torch": "t"}
    fixed |= dict.fromkeys(["accuracy", *SYMPTOMS], 0.5) | changes
    return pd.DataFrame({"seed": seeds, "val_loss": losses}).assign(**fixed)[COLUMNS]


def table(*parts) -> pd.DataFrame:
    tuned = [runs(rule, (loss,), (100,)) for rule, loss in (("full", 2), ("none", 3), ("ste", 2.5))]
    return pd.concat([*tuned, *parts], ignore_index=True)


COMPLETE = table(runs("full", (2.0, 2.1)), runs("none", (3.0, 3.1)), runs("ste", (2.5, 2.61)))


def failed(results, rule, seed, status="failed: OutOfMemoryError", loss=math.nan):
    where = (results["rule"] == rule) & (results["seed"] == seed)
    return results.assign(status=results["status"].mask(where, status),
                          val_loss=results["val_loss"].mask(where, loss))


def verdict(results, rule="ste", at="own"):
    return harm_table(results, at).set_index("rule").loc[rule]


def test_a_rule_is_judged_by_its_test_seeds_paired_with_those_of_full_and_none():
    results = table(runs("full", (2.0, 2.1, 2.2, 9.0), (0, 1, 2, 3)),
                    runs("none", (3.22, 3.1, 3.1), (2, 1, 5)),
                    runs("ste", (9.0, 2.5, 2.8, 2.9), (0, 2, 1, 7)))
    row, expected = verdict(results), harm([2.8, 2.5], [2.1, 2.2], [3.1, 3.22])
    assert tuple(row[["harm", "low", "high", "verdict"]]) == expected
    assert row["seeds"] == 4 and row["loss"] == pytest.approx(np.mean([9.0, 2.5, 2.8, 2.9]))
    assert row["loss_sd"] == pytest.approx(np.std([9.0, 2.5, 2.8, 2.9], ddof=1))
    assert verdict(results, "full")["verdict"] == verdict(results, "none")["verdict"] == "reference"
    assert verdict(results[results["seed"] != 1])["verdict"] == "missing", "one seed is too few"
    assert verdict(failed(results, "none", 5))["harm"] == row["harm"], "it is not one of theirs"
    for rule, seed in (("none", 1), ("ste", 2), ("full", 100)):
        assert verdict(failed(results, rule, seed))["verdict"] == "missing"
    diverged = verdict(failed(COMPLETE, "ste", 0, "diverged", math.inf))
    assert (diverged["verdict"], diverged["harm"]) == ("catastrophic", math.inf)


RATES = pd.concat([
    *[runs(rule, (loss,), (100,), lr) for rule, losses in (
        ("full", (2.5, 2.0, 2.7)), ("none", (3.3, 3.0, 2.9)), ("ste", (2.6, 2.9, 3.5)))
      for loss, lr in zip(losses, (1e-4, 1e-3, 1e-2), strict=True)],
    *[runs("full", losses, lr=lr) for losses, lr in (((2.0, 2.1), 1e-3), ((2.4, 2.5), 1e-4))],
    *[runs("none", losses, lr=lr) for losses, lr in (
        ((3.0, 3.1), 1e-3), ((3.3, 3.5), 1e-4), ((2.9, 3.05), 1e-2))],
    *[runs("ste", losses, lr=lr) for losses, lr in (((2.9, 2.91), 1e-3), ((2.6, 2.61), 1e-4))],
], ignore_index=True)


@pytest.mark.parametrize("at, lr, expected", [
    ("own", 1e-4, [[2.6, 2.61], [2.0, 2.1], [2.9, 3.05]]),
    ("full", 1e-3, [[2.9, 2.91], [2.0, 2.1], [3.0, 3.1]]),
    ("rule", 1e-4, [[2.6, 2.61], [2.4, 2.5], [3.3, 3.5]])])
def test_a_rule_is_judged_at_the_rate_that_is_asked_for(at, lr, expected):
    (case,) = (case for case in judged(RATES, at) if case.rule == ("ste", "", 1.0, 0))
    assert [losses.tolist() for losses in case.losses()] == expected and case.lr == lr
    row = verdict(RATES, "ste", at)
    assert row["harm"] == harm(*expected).harm and row["lr_tried"] == "0.0001 to 0.01"
    assert row["lr_at_end"] == (lr == 1e-4) and row["loss"] == pytest.approx(np.mean(expected[0]))
    assert verdict(RATES, "none", at)["lr_at_end"] == (at != "full"), "its own is the largest"


def test_a_rule_that_is_not_tuned_is_judged_at_the_rate_of_full():
    results = RATES[(RATES["rule"] != "ste") | (RATES["seed"] < 100)]
    row = verdict(results, "ste", "full")
    assert row["harm"] == harm([2.9, 2.91], [2.0, 2.1], [3.0, 3.1]).harm and row["lr_tried"] == ""
    assert verdict(results, "ste", "own")["verdict"] == "missing"
    assert headline_table(results).set_index("rule").loc["ste"].equals(row)
    pd.testing.assert_frame_equal(headline_table(RATES), harm_table(RATES))
    with pytest.raises(ValueError, match=r"at='none' is not whose.*'own', 'full' or 'rule'"):
        harm_table(RATES, at="none")


def test_probes_of_one_name_are_rules_of_their_own():
    dosed = [runs("dosed", (loss, loss), dose=dose) for loss, dose in ((2.1, 0.8), (2.9, 0.2))]
    rows = harm_table(pd.concat([COMPLETE, *dosed]), "full").set_index(["rule", "dose"])["harm"]
    assert rows["dosed", 0.8] == pytest.approx(0.05) and rows["dosed", 0.2] == pytest.approx(0.85)


@pytest.mark.parametrize("own, shared", [
    ({"qk_norm": "cut_k"}, {"qk_norm": "exact"}), ({"qk_norm": "tangent"}, {"qk_norm": "off"}),
    ({"cap_backward": "cut"}, {"cap_backward": "exact"})], ids=str)
def test_norms_and_caps_that_differ_only_backwards_share_the_none(own, shared):
    trained = COMPLETE[COMPLETE["rule"] != "none"].assign(**own)
    none = COMPLETE[COMPLETE["rule"] == "none"].assign(**shared)
    others = [COMPLETE.assign(**shared | {"val_loss": 9.0} | other)
              for other in ({"optimizer": "sgd"}, {"steps": 20}, {"score_cap": 5.0})]
    group = trained.iloc[0][GROUP]
    mine = none.assign(**group, val_loss=[4.0, 4.0, 4.1])  # a none of its own goes first
    for parts, loss in (([trained, none], 3.05), ([trained, mine, none], 4.05)):
        rows = harm_table(pd.concat([*parts, *others], ignore_index=True))
        rows = rows[(rows[GROUP] == group).all(axis=1)].set_index("rule")
        assert rows.loc["none", "loss"] == pytest.approx(loss) and rows.loc["none", "seeds"] == 2
        assert (rows.loc["ste", "harm"] == verdict(COMPLETE)["harm"]) == (loss == 3.05)


def test_the_scale_of_the_feedback_is_that_which_suits_full_whatever_suits_the_rule():
    parts = [runs(rule, (loss,) * 3, (100, 0, 1), lr, feedback_scale=2.0)
             for rule, loss, lr in (("full", 1.5, 1e-3), ("none", 3.0, 1e-2), ("ste", 2.9, 1e-4))]
    row = verdict(pd.concat([COMPLETE, *parts]))
    assert (row["feedback_scale"], row["lr"], row["seeds"]) == (2.0, 1e-4, 2)
    assert row["loss"] == pytest.approx(2.9)


def test_the_best_settings_solve_most_and_among_equals_have_the_lowest_mean_loss():
    half = runs(losses=(0.01, 1.2), accuracy=[SOLVED, 0.4], lr=1e-3)
    none = runs(losses=(0.1, 0.1), accuracy=[SOLVED - 1e-3] * 2, lr=1e-4, feedback_scale=0.5)
    lower = runs(losses=(1.1, 0.02), accuracy=[0.3, 1.0], lr=3e-4)
    diverged = runs(losses=(0.01, math.inf), accuracy=[1.0, math.nan], lr=3e-4)
    more = runs(losses=(0.02,) * 3, seeds=(0, 1, 2), accuracy=[1.0, 1.0, 0.4], lr=1e-2)
    for parts, lr in (([none, half], 1e-3), ([none, half, lower], 3e-4), ([none, diverged], 3e-4),
                      ([half, diverged], 1e-3), ([more, half], 1e-2)):
        assert best_settings(pd.concat(parts))[1] == lr
    text = pd.concat([half, none]).assign(accuracy=math.nan)
    assert best_settings(text) == (0.5, 1e-4)
    for nothing in (text.iloc[:0], text.assign(val_loss=[1.0, math.nan, 2.0, 2.2])):
        assert all(map(math.isnan, best_settings(nothing)))


@pytest.mark.parametrize("results, words", [
    (pd.concat([COMPLETE, COMPLETE.iloc[[4]]]), "there twice.*'full'.*'seed': 1"),
    (COMPLETE.assign(data=["d"] * 8 + ["e"]), "other data.*'ste'.*'seed': 1"),
    *[(failed(COMPLETE, "ste", 1, status, loss), "status and a loss that cannot.*'ste'.*'seed': 1")
      for status, loss in (("ok", math.inf), ("failed: OSError", 2.0))]],
    ids=["twice", "data", "ok", "failed"])
def test_rows_that_cannot_be_are_refused_by_name(results, words):
    with pytest.raises(ValueError, match=words):
        harm_table(results)


def test_a_table_is_read_as_it_was_written_and_a_damaged_one_refused(tmp_path):
    path, written = tmp_path / "runs.csv", failed(COMPLETE, "none", 1)
    with pytest.raises(FileNotFoundError, match="make sweep"):
        load_runs(path=path)
    pd.concat([failed(written, "ste", 0, "diverged"), written.assign(experiment=1)]).to_csv(
        path, index=False)
    expected = failed(written, "ste", 0, "diverged", math.inf)
    pd.testing.assert_frame_equal(load_runs(path=path), expected, check_dtype=False)
    assert len(load_runs(1, path)) == 9 and len(load_runs(None, path)) == 18
    text = written.to_csv(index=False)
    for damaged in ("", text.replace(",rule,", ",rules,"), text.replace("2.61", "2.6l")):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"runs.csv is damaged: .*take it from git again"):
            load_runs(path=path)


def test_what_05_and_06_judge_are_usual_runs_without_norms():
    whole, kept = load_runs(experiment=None), runs_without_norms()
    changed = {"attn_mode": "sigmoid", "qk_start": "lecun", "score_cap": 5.0, "steps": 1000,
               "cap_backward": "cut", "score_scale": 2.0, "optimizer": "sgd"}
    usual = runs().assign(task="shakespeare", steps=500)
    assert len(usual_runs(usual)) == 2
    assert not any(len(usual_runs(usual.assign(**{name: to}))) for name, to in changed.items())
    text = whole.query("experiment == 2 and task == 'shakespeare' and qk_norm == 'off'")
    assert len(kept) == (whole["experiment"] == 1).sum() + len(usual_runs(text)) > len(text) / 2
    assert {*kept["qk_norm"]} == {"off"} and not kept.duplicated([*KEY]).any()


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


# ---- what is mended ------------------------------------------------------------------------------


def arm(rules, full=(24, 24), **changes) -> pd.DataFrame:
    """A setting of ``rules`` (solved, runs, harm), None without runs, and 8 seeds of text."""
    parts = []
    for rule, (solved, n, cost) in {"full": (*full, 0.0), "none": (0, 8, 1.0), **rules}.items():
        if solved is not None:
            accuracy = [1.0] * (1 + solved) + [0.4] * (n - solved)
            seeds = (100, *range(200, 200 + n))
            parts += [runs(rule, 1.0, seeds, accuracy=accuracy, steps=3000, **changes)]
        if cost is not None:
            wiggle = 0.02 * np.resize([1, -1, 0.5, -0.5], 8) * (cost not in (0, 1))
            text = {"task": "shakespeare", "steps": 500, "accuracy": math.nan} | changes
            status = "ok" if cost < math.inf else "diverged"
            parts += [runs(rule, (1.0,), (100,), **text),
                      runs(rule, 2 + cost + wiggle, range(200, 208), status=status, **text)]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("rule, full, on_recall, on_both", [
    ((24, 24, 0.05), (24, 24), "mended", "mended"),
    ((0, 8, 0.05), (2, 24), "not mended", "not mended"),  # too few, though full is no better
    ((33, 60, 0.05), (60, 60), "not mended", "not mended"),  # too far behind full
    ((24, 24, 0.6), (24, 24), "mended", "not mended"),  # too much harm
    ((14, 24, 0.6), (24, 24), "undetermined", "not mended"),
    ((24, 24, 0.25), (24, 24), "mended", "undetermined"),  # the interval holds the bound
    ((24, 24, None), (24, 24), "mended", "missing"),
    ((None, None, 0.05), (24, 24), "missing", "missing"),
    ((24, 24, math.inf), (24, 24), "mended", "not mended"),  # it diverged
    ((17, 24, 0.05), (12, 24), "mended", "mended"),  # 0.508 to 0.851
    ((16, 24, 0.05), (12, 24), "undetermined", "undetermined"),  # 0.467 to 0.820
    ((7, 24, 0.05), (7, 24), "undetermined", "undetermined"),  # 0.492; 0.53 at a third of 0.05
    ((60, 80, 0.05), (70, 80), "mended", "mended"),  # 0.245 behind at most
    ((60, 80, 0.05), (71, 80), "undetermined", "undetermined")])  # 0.256
def test_mended_is_what_all_three_intervals_say_and_not_mended_what_one_does(
        rule, full, on_recall, on_both):
    (row,) = mending(arm({"zero": rule}, full)).itertuples()
    assert (row.rule, row.recall, row.both) == ("zero", on_recall, on_both)
    if rule[0] is not None:
        assert (row.solved, row.seeds, row.full_solved, row.full_seeds) == (*rule[:2], *full)
        assert (row.low, row.high) == share_interval(*rule[:2])
        assert (row.behind_low, row.behind_high) == share_difference(*rule[:2], *full)


def test_of_two_rules_the_surer_has_half_of_the_error_and_lets_the_other_have_all():
    alone, sure, unsure = (17, 24, 0.05), (24, 24, 0.05), (14, 24, 0.05)
    for rules, *expected in (({"zero": alone}, "mended"),
                             ({"zero": alone, "ste": unsure}, "undetermined", "undetermined"),
                             ({"zero": alone, "ste": sure}, "mended", "mended")):
        verdicts = mending(arm(rules, (12, 24)), rules).set_index("rule").loc[[*rules]]
        assert verdicts["recall"].tolist() == verdicts["both"].tolist() == expected
    (row,) = mending(arm({"zero": alone, "ste": unsure}, (12, 24))).itertuples()
    assert (row.rule, row.recall) == ("zero", "mended"), "ste is not of the family"


def test_each_setting_is_judged_by_itself_at_the_rate_of_full_and_the_protocol_s_length():
    alone, unsure = (17, 24, 0.05), (14, 24, 0.05)
    parts = [arm({"zero": alone}, (12, 24)), arm({"zero": unsure}, (12, 24), qk_norm="exact"),
             runs("zero", 0.9, (100, *range(200, 224)), 1e-4, accuracy=1.0, steps=3000),  # its own
             arm({"mean": unsure}, (12, 24)).assign(steps=10),
             runs("zero", 1.0, range(200, 208), dose=0.8, steps=3000)]
    verdicts = mending(pd.concat(parts, ignore_index=True), ("zero", "mean"))
    found = verdicts[["qk_norm", "rule", "recall"]].to_numpy().tolist()
    assert found == [["off", "zero", "mended"], ["exact", "zero", "undetermined"]]


def test_a_figure_shows_each_harm_with_its_interval_and_verdict_in_a_panel_a_group():
    diverged = failed(COMPLETE, "ste", 0, "diverged", math.inf).assign(qk_norm="exact")
    table = harm_table(pd.concat([COMPLETE, diverged], ignore_index=True))
    upper, lower = plot_harm(table)
    (row,) = table.query("rule == 'ste' and qk_norm == 'off'").itertuples()
    interval, point = upper.lines[:2]
    assert (*interval.get_xdata(), *point.get_xdata()) == (row.low, row.high, row.harm)
    assert (point.get_marker(), point.get_markerfacecolor()) == ("s", "white"), "at the rates' end"
    assert [[text.get_text() for text in ax.texts] for ax in (upper, lower)] == [
        ["costly"], ["diverged"]]
    assert (upper.get_title(), lower.get_title()) == (
        "recall, bp, 10 iterations", "recall, bp, qk_norm exact, 10 iterations")
    plt.close("all")
    with pytest.raises(ValueError, match="no rule in this table has a harm"):
        plot_harm(harm_table(COMPLETE[COMPLETE["rule"] != "ste"]))
