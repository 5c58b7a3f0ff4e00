"""The split of the softmax's backward pass and its energies, against matrices, exact fractions and hand-made cases."""

import itertools
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from helpers import (
    HeadSums, capture_attention, energy_table, get_batch, head_energy, head_sums, load_corpus,
    split_softmax_gradient, train,
)
from model_local import LocalGPTConfig

FIGURES = ["r_diag", "r_offdiag", "r_cross", "one_minus_r_diag", "cos_diag", "cos_ste"]
seeds = st.integers(0, 2**32 - 1)


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def random_maps(B, H, T, seed=0, sharpness=2.0, common=0.0, visible=None):
    """Softmax weights and a gradient (B, H, T, T) in float64; the gradient does not vanish on masked keys."""
    generator = torch.Generator().manual_seed(seed)
    scores, grad = torch.randn(2, B, H, T, T, generator=generator, dtype=torch.float64)
    visible = causal(T) if visible is None else visible
    return (sharpness * scores).masked_fill(~visible, -math.inf).softmax(-1), grad + common


def plain_energies(attn, grad, visible):
    """The columns of ``head_energy``, head by head and row by row from explicit Jacobians."""
    attn, grad, visible = attn.double().numpy(), grad.double().numpy(), visible.numpy()
    B, H, T, _ = attn.shape
    rows = []
    for h in range(H):
        sums, per_sequence = np.zeros(4), []
        for b in range(B):
            f, d, o, e = np.zeros((4, T, T))
            entropies, largest = [], []
            for q in range(T):
                a, g = attn[b, h, q], grad[b, h, q]
                J = np.diag(a) - np.outer(a, a)
                f[q], d[q], o[q] = J @ g, np.diag(np.diag(J)) @ g, (J - np.diag(np.diag(J))) @ g
                e[q] = np.where(visible[q], g, 0)
                if visible[q].sum() > 1:
                    entropies.append(-sum(p * math.log(p) for p in a if p > 0) / math.log(visible[q].sum()))
                    largest.append(a.max())
            sums += np.sum(f * f), np.sum(d * d), np.sum(o * o), 2 * np.sum(d * o)
            cosines = [np.sum(x * f) / math.sqrt(np.sum(x * x) * np.sum(f * f)) for x in (d, e, grad[b, h])]
            per_sequence.append([*cosines, np.mean(entropies), np.mean(largest), attn[b, h].sum() / visible.sum()])
        _, r_diag, r_offdiag, r_cross = sums / sums[0]
        rows.append([r_diag, r_offdiag, r_cross, r_offdiag + r_cross, *np.mean(per_sequence, axis=0)])
    names = [*FIGURES, "cos_ste_unmasked", "entropy", "attn_max", "attn_mean"]
    return dict(zip(names, np.transpose(rows), strict=True))


# --- the split -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", range(0, 60, 10))  # not hypothesis: its examples are too simple to be saturated
def test_each_part_is_its_own_matrix_times_g_to_its_own_rounding(first, dtype):
    for seed in range(first, first + 10):
        assert_parts(seed, dtype)


def assert_parts(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    n, sharpness, spread = 2 + seed % 5, seed % 12, seed % 4
    a = (sharpness * torch.randn(n, generator=generator)).softmax(-1).to(dtype)
    g = (torch.randn(n, generator=generator) * torch.exp(spread * torch.randn(n, generator=generator))).to(dtype)
    parts = split_softmax_gradient(a, g)
    weights, errors = ([Fraction(v) for v in row.tolist()] for row in (a, g))
    lateral = sum(abs(p * e) for p, e in zip(weights, errors, strict=True))
    u, keys = Fraction(torch.finfo(dtype).eps), range(n)
    tiny = Fraction(torch.finfo(dtype).tiny)
    for i in keys:
        J = [(weights[i] if i == j else 0) - weights[i] * weights[j] for j in keys]
        diag = J[i] * errors[i]
        offdiag = sum(J[j] * errors[j] for j in keys if j != i)
        # each part may be wrong by a few roundings of its own terms: a part made by subtraction is wrong by the other's
        for part, exact, terms in (
            (parts.diag, diag, 2 * abs(diag)),
            (parts.offdiag, offdiag, n * weights[i] * lateral),
            (parts.full, diag + offdiag, n * weights[i] * (abs(errors[i]) + lateral)),
        ):
            assert abs(Fraction(part[i].item()) - exact) <= 2 * u * terms + tiny


def test_the_parts_of_a_saturated_row_do_not_borrow_digits_from_each_other():
    a, g = torch.tensor([1 - 1e-6, 1e-6]), torch.tensor([0.00123, 1234.5])
    parts = split_softmax_gradient(a, g)
    exact = -a.double().prod() * g.double().flip(0)
    assert (parts.offdiag.double() / exact - 1).abs().max() < 1e-4  # with o = f - d it is 0.02
    assert (parts.diag.double() / (a.double() * (1 - a.double()) * g) - 1).abs().max() < 1e-6


def test_maps_of_different_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match="must agree"):
        split_softmax_gradient(torch.full((2, 2), 0.5), torch.ones(2))


# --- the energies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("common", [0.0, 3.0])
def test_every_column_is_what_explicit_jacobians_give(common):
    attn, grad = random_maps(B=3, H=2, T=5, common=common)
    grad = grad * torch.tensor([1.0, 5.0, 0.2])[:, None, None, None]
    table = head_energy(attn, grad)
    for name, expected in plain_energies(attn, grad, causal(5)).items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-9, err_msg=name)
    assert table["head"].tolist() == [0, 1] and table["defined"].all()


def test_a_map_of_visible_keys_may_be_any():
    visible = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    attn, grad = random_maps(B=2, H=3, T=4, visible=visible)
    table = head_energy(attn, grad, visible)
    for name, expected in plain_energies(attn, grad, visible).items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-9, err_msg=name)


@given(seeds, st.floats(-250, 250))
def test_a_sequence_scaled_keeps_its_cosine_and_weighs_in_the_ratios_by_its_square(seed, exponent):
    attn, grad = random_maps(B=3, H=2, T=4, seed=seed)
    factors = torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)
    before = head_energy(attn, grad, n_boot=1)
    after = head_energy(attn, grad * factors[:, None, None, None] * 10.0**exponent, n_boot=1)
    cosines = ["cos_diag", "cos_ste", "cos_ste_unmasked"]
    np.testing.assert_allclose(after[cosines], before[cosines], rtol=1e-9)
    f, d, o = split_softmax_gradient(attn, grad)
    energies = [torch.einsum("bhqk,bhqk,b->h", x, y, factors**2) for x, y in ((d, d), (o, o), (d, o), (f, f))]
    dd, oo, do, ff = energies
    np.testing.assert_allclose(after["r_diag"], dd / ff, rtol=1e-9)
    np.testing.assert_allclose(after["r_offdiag"], oo / ff, rtol=1e-9)
    np.testing.assert_allclose(after["r_cross"], 2 * do / ff, rtol=1e-9, atol=1e-9)


def test_a_sequence_without_any_gradient_has_no_cosine_to_average():
    attn, grad = random_maps(B=3, H=2, T=4)
    grad[1] = 0
    rest = [0, 2]
    np.testing.assert_allclose(head_energy(attn, grad)[FIGURES], head_energy(attn[rest], grad[rest])[FIGURES])


def test_the_interval_is_that_of_all_resamples_of_the_sequences():
    B = 5
    attn, grad = random_maps(B, 1, 4, common=1)
    singles = [head_energy(attn[[b]], grad[[b]], n_boot=1).iloc[0] for b in range(B)]
    f, d, _ = split_softmax_gradient(attn, grad)
    ff, dd = f.square().sum((1, 2, 3)).numpy(), d.square().sum((1, 2, 3)).numpy()
    resamples = np.array(list(itertools.product(range(B), repeat=B)))  # all 3,125, equally likely
    exact = {
        "r_diag": dd[resamples].sum(1) / ff[resamples].sum(1),
        "cos_ste": np.array([row["cos_ste"] for row in singles])[resamples].mean(1),
        "attn_max": np.array([row["attn_max"] for row in singles])[resamples].mean(1),
    }
    table = head_energy(attn, grad, n_boot=20_000).iloc[0]
    for name, values in exact.items():
        for end, share in (("lo", 0.025), ("hi", 0.975)):
            low, high = np.quantile(values, [share - 0.006, share + 0.006])  # five standard errors of 20,000 draws
            assert low - 1e-9 <= table[f"{name}_{end}"] <= high + 1e-9, (name, end)  # rounding: there are many ties
    few = [head_energy(attn, grad, n_boot=9, seed=seed).iloc[0] for seed in (0, 0, 1)]
    assert few[0].equals(few[1]) and few[0]["r_diag_lo"] != few[2]["r_diag_lo"]


def test_layers_and_heads_of_the_table_are_those_of_the_capture():
    maps = [random_maps(2, H, 4, seed=H) for H in (3, 3, 1, 2)]
    table = energy_table(SimpleNamespace(name="", sums=head_sums(a, g)) for a, g in maps)
    places = [(i, h) for i, (a, _) in enumerate(maps) for h in range(a.shape[1])]
    assert list(zip(table["layer"], table["head"], strict=True)) == places
    for place, row in zip(places, table.itertuples(), strict=True):
        a, g = (m[:, [place[1]]] for m in maps[place[0]])
        assert math.isclose(row.r_diag, head_energy(a, g, n_boot=1)["r_diag"].item(), rel_tol=1e-9)
    with pytest.raises(ValueError, match="no layer"):
        energy_table([])


# --- what rounding decides -------------------------------------------------------------------------------------------


def exact_energies(weights, errors):
    """Figures of one head from exact fractions: ``weights`` (any positive numbers), ``errors``: (B, T, T) each."""
    sums, cosines = [Fraction(0)] * 3, []
    for sequence in zip(weights, errors, strict=True):
        ff = dd = oo = df = ef = ee = Fraction(0)
        for q, (w, g) in enumerate(zip(*(rows.tolist() for rows in sequence), strict=True)):
            w, g = [Fraction(v) for v in w[: q + 1]], [Fraction(v) for v in g[: q + 1]]
            a = [v / sum(w) for v in w]
            for i in range(q + 1):
                d = a[i] * (1 - a[i]) * g[i]
                o = -a[i] * sum(a[j] * g[j] for j in range(q + 1) if j != i)
                f = d + o
                ff, dd, oo, df = ff + f * f, dd + d * d, oo + o * o, df + d * f
                ef, ee = ef + g[i] * f, ee + g[i] ** 2
        sums = [sums[0] + ff, sums[1] + dd, sums[2] + oo]
        cosines.append([float(x / y) * math.sqrt(y / ff) if ff and y else math.nan for x, y in ((df, dd), (ef, ee))])
    if not sums[0]:
        return dict.fromkeys(FIGURES, math.nan)
    r_diag, r_offdiag = float(sums[1] / sums[0]), float(sums[2] / sums[0])
    values = [r_diag, r_offdiag, 1 - r_diag - r_offdiag, 1 - r_diag, *np.mean(cosines, axis=0)]
    return dict(zip(FIGURES, values, strict=True))


def exact_case(seed, B, T, sharpness, common, scale):
    """Weights not yet normalised (so that their fractions are exact), and errors: (B, T, T) in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores, errors = torch.randn(2, B, T, T, generator=generator, dtype=torch.float64)
    weights = (sharpness * scores).exp() * causal(T)
    return weights, scale * (errors + common)


def assert_right(row, exact):
    """The tolerance that the docstring states."""
    largest = max(1, *(abs(exact[name]) for name in FIGURES if not name.startswith("cos")))
    for name in FIGURES:
        if name.startswith("cos"):
            assert math.isnan(row[name]) or abs(row[name] - exact[name]) <= 0.01, name
        else:
            assert abs(row[name] - exact[name]) <= 0.02 * largest, name


formats = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
decades = st.floats(-9, 7)


@settings(max_examples=200)
@given(seeds, formats, formats, st.integers(1, 2), st.integers(2, 4), st.floats(0, 12), decades, decades)
def test_a_head_is_right_to_the_stated_tolerance_or_undefined(seed, made_in, stored_in, B, T, sharpness, common, scale):
    common = 10.0**common
    weights, errors = exact_case(
        seed, B, T, sharpness, common, min(10.0**scale, 1e4 / max(common, 1))
    )  # float16: < 6e4
    attn = weights / weights.sum(-1, keepdim=True)
    maps = [m[:, None].to(made_in).to(torch.promote_types(made_in, stored_in)) for m in (attn, errors)]
    row = head_energy(*maps, n_boot=1).iloc[0]
    if row["defined"]:
        assert_right(row, exact_energies(weights, errors))
    else:
        assert row[FIGURES].isna().all()


@given(seeds, st.floats(0, 8), st.floats(0, 10))
def test_float32_defines_what_is_not_hopeless(seed, sharpness, common):
    weights, errors = exact_case(seed, 2, 4, sharpness, common, 1e-5)
    attn = (weights / weights.sum(-1, keepdim=True)).float()
    row = head_energy(attn[:, None], errors[:, None].float(), n_boot=1).iloc[0]
    assert row["defined"] and not row[FIGURES].isna().any()
    assert_right(row, exact_energies(weights, errors))


def test_half_precision_defines_a_head_of_everyday():
    attn, grad = random_maps(B=4, H=2, T=16, sharpness=1)
    expected = head_energy(attn, grad, n_boot=1)[FIGURES]
    for dtype in (torch.bfloat16, torch.float16):
        got = head_energy(attn.to(dtype), grad.to(dtype), n_boot=1)[FIGURES]
        np.testing.assert_allclose(got, expected, atol=0.01)


@pytest.mark.parametrize("made_in", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored_in", [torch.float32, torch.float64])
def test_a_constant_gradient_defines_nothing_however_it_was_rounded(made_in, stored_in):
    attn, _ = random_maps(B=2, H=3, T=8)
    attn = attn.to(made_in).to(stored_in)
    for constant in (0.1, 3e-7, 1000.0):
        table = head_energy(attn, torch.full_like(attn, constant).to(made_in).to(stored_in), n_boot=2)
        assert not table["defined"].any()
        assert table[FIGURES].isna().all(axis=None) and table["entropy"].between(0, 1).all()


def test_the_precision_is_the_coarser_of_attn_and_grad():
    attn, grad = random_maps(B=2, H=1, T=8, common=300)
    assert head_energy(attn, grad, n_boot=1)["defined"].all()
    for rounded in ((attn.half().double(), grad), (attn, grad.half().double())):  # e.g. after a subtraction, autocast
        assert not head_energy(*rounded, n_boot=1)["defined"].any()


def test_weights_of_half_precision_show_it_even_where_their_rows_sum_to_nearly_1():
    attn = torch.tensor([[1.0, 0.0], [0.7, 0.3]]).half().double()[None, None]
    assert (attn.sum(-1) - 1).abs().max() < torch.finfo(torch.float16).eps / 3
    grad = torch.tensor([[0.0, 0.0], [16.1, 16.9]], dtype=torch.float64)[None, None]
    assert head_energy(attn.pow(1 + 1e-9), grad, n_boot=1)["defined"].all()
    assert not head_energy(attn, grad, n_boot=1)["defined"].any()


def test_below_the_smallest_step_of_half_precision_nothing_is_defined():
    attn, grad = random_maps(B=2, H=1, T=8, sharpness=1)
    assert head_energy(attn.half(), grad.half(), n_boot=1)["defined"].all()
    assert not head_energy(attn.half(), (3e-7 * grad).half(), n_boot=1)["defined"].any()
    saturated = torch.tensor([[1.0, 0.0, 0.0], [1 - 3e-7, 3e-7, 0.0], [1 - 5e-7, 2e-7, 3e-7]])[None, None]
    errors = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.7, 0.0], [0.2, -0.3, 0.9]])[None, None]
    assert head_energy(saturated, errors, n_boot=1)["defined"].all()
    assert not head_energy(saturated.half(), errors, n_boot=1)["defined"].any()


def test_row_sums_tell_a_precision_that_the_values_hide():
    attn, grad = random_maps(B=2, H=1, T=8)
    rounded = attn.half().double() * (1 + 1e-6)  # no longer numbers of half precision, but as far from 1 as before
    noisy = grad + 1000  # the rounding of half precision is as large as the spread
    assert head_energy(attn, noisy, n_boot=1)["defined"].all()
    assert not head_energy(rounded, noisy, n_boot=1)["defined"].any()


def test_a_common_mode_of_1e5_in_float32_is_right_or_undefined():
    for seed in range(20):
        weights, errors = exact_case(seed, 1, 4, 1.0, 1e5, 1.0)
        attn = (weights / weights.sum(-1, keepdim=True)).float()
        row = head_energy(attn[:, None], errors[:, None].float(), n_boot=1).iloc[0]
        if row["defined"]:
            exact = exact_energies(weights, errors)
            assert_right(row, exact)
            assert abs(row["cos_diag"] - exact["cos_diag"]) < 0.01


def test_weights_saturated_beyond_float64_define_nothing():
    row = torch.tensor([[1.0, 0.0], [1.0, 1e-20]], dtype=torch.float64)
    grad = torch.tensor([[0.0, 0.0], [0.3, -0.7]], dtype=torch.float64)
    assert not head_energy(row[None, None], grad[None, None])["defined"].any()


def test_one_sequence_that_rounding_decides_leaves_the_cosine_undefined_not_selected():
    attn, grad = random_maps(B=3, H=1, T=4)
    grad[1] = 1e-3  # constant: f = 0, of which rounding leaves something
    row = head_energy(attn.float(), grad.float()).iloc[0]
    assert row["defined"] and np.isfinite(row[["r_diag", "r_offdiag", "r_cross"]].astype(float)).all()
    assert row[["cos_diag", "cos_ste", "cos_ste_unmasked"]].isna().all()


# --- the boundary ----------------------------------------------------------------------------------------------------

ATTN, GRAD = random_maps(B=2, H=2, T=3)
BEHIND = torch.zeros(3, 3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(0.5))  # key 1, of query 0
NEGATIVE = torch.tensor([[1.0, 0.0, 0.0], [1.5, -0.5, 0.0], [0.2, 0.3, 0.5]]).expand(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("attn", "grad", "changes", "reason"),
    [
        (NEGATIVE, GRAD, {}, "not weights that sum to 1"),
        (ATTN * 0.99, GRAD, {}, "not weights that sum to 1"),
        (ATTN * 1.002, GRAD, {}, "not weights that sum to 1"),
        (ATTN * math.nan, GRAD, {}, "not weights that sum to 1"),
        (ATTN, GRAD * math.nan, {}, "not finite"),
        (ATTN, torch.where(GRAD[0, 1, 2, 0] == GRAD, math.inf, GRAD), {}, "not finite"),
        (ATTN.tril(-1) + ATTN.triu(), GRAD, {"visible": torch.eye(3, dtype=torch.bool)}, "not zero on masked keys"),
        (ATTN + BEHIND, GRAD, {}, "not zero on masked keys"),
        (ATTN + BEHIND - BEHIND.roll(1, -1), GRAD, {}, "not zero on masked keys"),
        (ATTN, GRAD, {"visible": torch.ones(3, 3)}, "boolean map"),
        (ATTN, GRAD, {"visible": torch.ones(3, 2, 3, 3, dtype=torch.bool)}, "boolean map"),
        (ATTN, GRAD, {"visible": torch.ones(1, 2, 2, 3, 3, dtype=torch.bool)}, "boolean map"),
        (ATTN[0], GRAD[0], {}, "one shape"),
        (ATTN, GRAD[:1], {}, "one shape"),
        (ATTN[..., :2], GRAD[..., :2], {}, "say which keys are visible"),
        (ATTN[:0], GRAD[:0], {}, "one shape"),
        (ATTN[:, :0], GRAD[:, :0], {}, "one shape"),
        (torch.eye(3).long().expand(2, 2, 3, 3), GRAD, {}, "floating-point"),
        (ATTN, GRAD.long(), {}, "floating-point"),
        (ATTN, GRAD, {"n_boot": 0}, "n_boot=0"),
        (ATTN, GRAD, {"n_boot": 1.5}, "n_boot=1.5"),
        (ATTN.numpy(), GRAD, {}, "torch tensors"),
        (ATTN, GRAD, {"visible": [[True]]}, "torch tensors"),
    ],
)
def test_what_is_no_softmax_attention_is_refused(attn, grad, changes, reason):
    with pytest.raises(ValueError, match=reason):
        head_energy(attn, grad, **changes)


def test_sums_that_overflow_and_tensors_that_require_a_gradient_are_no_reason_to_refuse():
    expected = head_energy(ATTN, GRAD)
    huge = GRAD * (3e38 / GRAD.abs().max())
    np.testing.assert_allclose(head_energy(ATTN.float(), huge.float())[FIGURES], expected[FIGURES], rtol=1e-4)
    half = (GRAD * (6e4 / GRAD.abs().max())).half()
    np.testing.assert_allclose(head_energy(ATTN, half, n_boot=1)[FIGURES], expected[FIGURES], atol=0.01)
    ours = head_energy(ATTN.clone().requires_grad_(), GRAD.clone().requires_grad_())
    assert ours.equals(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_rounding_keeps_from_1_are_accepted(dtype):
    attn, grad = random_maps(B=8, H=4, T=32, sharpness=1)
    attn, grad = attn.to(dtype), grad.to(dtype)
    if dtype == torch.bfloat16:
        assert (attn.double().sum(-1) - 1).abs().max() > 1e-3
    for stored in (attn, attn.float()):
        assert head_energy(stored, grad.to(stored.dtype), n_boot=1)["defined"].all()


def test_a_single_token_and_a_head_without_gradient_give_an_undefined_row():
    one = torch.ones(2, 1, 1, 1)
    assert not head_energy(one, one)["defined"].any()
    row = head_energy(ATTN, GRAD * torch.tensor([1.0, 0.0])[:, None, None], n_boot=50).iloc[1]
    assert not row["defined"] and row[FIGURES].isna().all() and row["attn_mean"] == pytest.approx(2 / 4)


# --- maps that are not square, masks that differ, sums put together ---------------------------------------------------


def test_a_mask_of_each_sequence_is_as_the_sequences_without_what_is_masked():
    """Left padding: its queries see no key, and nobody sees its keys."""
    attn, grad = random_maps(B=2, H=2, T=6)
    padded = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    padded[..., 2:, 2:] = attn[0]
    whole, _ = random_maps(B=1, H=2, T=8, seed=3)
    grads = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grads[0, :, 2:, 2:] = grad[0]
    visible = causal(8).repeat(2, 1, 1, 1)
    visible[0, :, :2] = visible[0, ..., :2] = False
    both = head_sums(torch.cat([padded, whole]), grads, visible)
    alone = HeadSums.of_all([head_sums(attn[:1], grad[:1]), head_sums(whole, grads[1:])])
    visible_figures = [0, 1, 2, 3, 5]  # not that of g on all keys
    for got, expected in ((both, alone),):
        scale = (got.size / expected.size).square()[:, None]
        torch.testing.assert_close(got.products[..., visible_figures] * scale, expected.products[..., visible_figures])
        torch.testing.assert_close(got.shapes, expected.shapes)


def test_fewer_queries_than_keys_are_the_last_rows_of_the_map():
    attn, grad = random_maps(B=3, H=2, T=6)
    last = causal(6)[4:]
    table = head_energy(attn[:, :, 4:], grad[:, :, 4:], last, n_boot=1)
    parts = split_softmax_gradient(attn[:, :, 4:], grad[:, :, 4:])
    full, diag = (part.square().sum((-2, -1)).mean(0) for part in (parts.full, parts.diag))
    np.testing.assert_allclose(table["r_diag"], diag / full)


def test_the_sums_of_several_passes_are_those_of_their_sequences_together():
    attn, grad = random_maps(B=5, H=2, T=4)
    grad[3:] *= 1e3
    apart = HeadSums.of_all([head_sums(attn[:3], grad[:3]), head_sums(attn[3:], grad[3:])])
    for got, expected in zip(apart, head_sums(attn, grad), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_fast_logarithm_is_right_to_thirteen_digits():
    x = np.concatenate([np.logspace(-300, 300, 2001), np.linspace(0.5, 2, 2001)[1:-1]])
    fast, exact = np.array([helpers._log(value) for value in x]), np.log(x)
    assert np.abs(fast - exact).max() <= 1e-13 * np.abs(exact).max()
    assert np.abs(fast[2001:] - exact[2001:]).max() < 1e-13


# --- frozen numbers -----------------------------------------------------------------------------
# `python notebooks/tests/test_energy.py` writes them anew: only where a number is meant to change.

FROZEN = Path(__file__).parent / "frozen" / "energies.csv"
TRAINED = 1e-2


def seeded_tables():
    """``head_energy`` of seeded maps of several shapes, masks and types, one case a name."""
    quiet = torch.tensor([1.0, 0.0, 3.0])[:, None, None, None]  # the second sequence has no gradient
    holes = causal(9) & (torch.arange(81).view(9, 9) % 4 > 0) | torch.eye(9, dtype=torch.bool)
    wide = torch.ones(4, 11, dtype=torch.bool).tril(7)
    padded = causal(6).repeat(3, 1, 1, 1)
    padded[0, :, :2] = padded[0, ..., :2] = False
    cases = {
        "causal": random_maps(4, 3, 16),
        "sharp": random_maps(4, 2, 33, seed=1, sharpness=6),
        "common mode": random_maps(5, 2, 12, seed=2, common=4),
        "one sequence": random_maps(1, 2, 8, seed=3),
        "no gradient": [m * factor for m, factor in zip(random_maps(3, 2, 8, seed=4), (1, quiet))],
        "small": [m * factor for m, factor in zip(random_maps(4, 2, 10, seed=5), (1, 1e-9))],
        "holes": [*random_maps(4, 2, 9, seed=6, visible=holes), holes],
        "padded": [*(m.nan_to_num(0) for m in random_maps(3, 2, 6, 7, visible=padded)), padded],
        "wide": [m[:, :, -4:] for m in random_maps(4, 2, 11, seed=8)] + [wide],
    }
    tables = {name: head_energy(*maps) for name, maps in cases.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps = [m.to(dtype) for m in random_maps(4, 2, 16, seed=9, sharpness=1)]
        tables[f"{dtype}"] = head_energy(*maps)
    constant = torch.full((2, 2, 8, 8), 0.3)
    tables["constant"] = head_energy(random_maps(2, 2, 8, seed=10)[0].float(), constant)
    return pd.concat(tables, names=["case"]).reset_index(0).reset_index(drop=True)


def trained_tables():
    """``energy_table`` of the two models of notebook 04 after 50 iterations."""
    corpus, tables = load_corpus("shakespeare_char"), {}
    x, y = get_batch(corpus.val, 64, 16, torch.Generator().manual_seed(1337))
    for method in ("fa", "bp"):
        config = LocalGPTConfig(vocab_size=corpus.vocab_size, method=method)
        run = train(config, 50, seed=1337, data=corpus, directory=None, progress=False)
        with capture_attention(run.model) as layers:
            run.model(x, y)[1].backward()
        tables[method] = energy_table(layers, n_boot=200)
    return pd.concat(tables, names=["case"]).reset_index(0).reset_index(drop=True)


def frozen(cases):
    table = pd.read_csv(FROZEN)
    return table[table["case"].isin(cases)].reset_index(drop=True)


def test_the_energies_of_seeded_maps_are_the_frozen_ones():
    found = seeded_tables()
    expected = frozen(found["case"].unique()).drop(columns="layer")
    # sums in float64 may add up in another order; those of half precision are of the same numbers
    pd.testing.assert_frame_equal(found, expected, rtol=1e-7, atol=1e-10)


def test_the_energies_of_trained_models_are_the_frozen_ones():
    found = trained_tables()
    expected = frozen(["fa", "bp"])[found.columns]
    pd.testing.assert_frame_equal(found, expected, rtol=TRAINED, atol=TRAINED)


if __name__ == "__main__":
    FROZEN.parent.mkdir(exist_ok=True)
    pd.concat([seeded_tables(), trained_tables()]).to_csv(FROZEN, index=False)
