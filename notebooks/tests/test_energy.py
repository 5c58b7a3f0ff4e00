"""The energies, against explicit matrices, exact fractions and hand-made cases."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import helpers
from helpers import (attention_energy, capture_attention, energy_table, head_energy, head_sums,
                     split_softmax_gradient)

FIGURES = ["r_diag", "r_offdiag", "r_cross", "one_minus_r_diag", "cos_diag", "cos_ste"]
seeds = st.integers(0, 2**32 - 1)


def causal(T, T_k=None):
    return torch.ones(T, T_k or T, dtype=torch.bool).tril()


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_maps(B, H, T=None, seed=0, sharpness=2.0, common=0.0, visible=None):
    """Softmax weights and a gradient (B, H, T_q, T) in float64, which is not 0 on masked keys."""
    visible = causal(T) if visible is None else visible
    scores, grad = randn(2, B, H, *visible.shape[-2:], seed=seed)
    scores = (sharpness * scores).masked_fill(~visible, -math.inf)
    return scores.softmax(-1), grad + common


def fractions(x):
    return np.vectorize(Fraction, otypes=[object])(x.double().numpy())


def exact_energies(weights, grad, visible):
    """``head_energy`` head by head and row by row, from explicit Jacobians of exact fractions.

    weights: any positive numbers, which are scaled to sum to 1.
    """
    B, H, _, _ = weights.shape
    visible = visible.expand(weights.shape).numpy()
    rows = []
    for h in range(H):
        energies, per_sequence = np.zeros(4, dtype=object), []
        for b in range(B):
            products, entropies, largest = np.zeros(8, dtype=object), [], []
            seeing = visible[b, h].any(-1)
            for q in np.flatnonzero(seeing):
                a, g = (fractions(x[b, h, q]) for x in (weights, grad))
                a = a / a.sum()
                J = np.diag(a) - np.outer(a, a)
                D = np.diag(np.diag(J))
                f, d, o, e = J @ g, D @ g, (J - D) @ g, np.where(visible[b, h, q], g, 0)
                pairs = (f, f), (d, d), (o, o), (d, o), (d, f), (e, f), (g, f), (e, e)
                products += [x @ y for x, y in pairs]
                n_visible = visible[b, h, q].sum()
                if n_visible > 1:
                    entropies.append(-sum(p * math.log(p) for p in map(float, a) if p > 0)
                                     / math.log(n_visible))
                    largest.append(float(a.max()))
            ff, dd, oo, do, df, ef, gf, ee = products
            gg = (fractions(grad[b, h]) ** 2).sum()
            energies += ff, dd, oo, 2 * do
            cosines = [float(x / y) * math.sqrt(y / ff) if ff and y else math.nan
                       for x, y in ((df, dd), (ef, ee), (gf, gg))]
            mean = seeing.sum() / visible[b, h].sum()
            per_sequence.append([*cosines, np.mean(entropies), np.mean(largest), mean])
        ff, dd, oo, do = energies
        ratios = [float(x / ff) if ff else math.nan for x in (dd, oo, do, oo + do)]
        rows.append([*ratios, *np.mean(per_sequence, axis=0)])
    names = [*FIGURES, "cos_ste_unmasked", "entropy", "attn_max", "attn_mean"]
    return dict(zip(names, np.transpose(rows), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_part_is_its_own_matrix_times_g_to_its_own_rounding(dtype):
    for seed in range(40):  # not hypothesis: its examples are too simple to be saturated
        generator = torch.Generator().manual_seed(seed)
        n, sharpness, spread = 2 + seed % 5, seed % 12, seed % 4
        a = (sharpness * torch.randn(n, generator=generator)).softmax(-1).to(dtype)
        sizes = torch.exp(spread * torch.randn(n, generator=generator))
        g = (torch.randn(n, generator=generator) * sizes).to(dtype)
        parts, weights, errors = split_softmax_gradient(a, g), fractions(a), fractions(g)
        own, outer = np.diag(weights), np.outer(weights, weights)
        D = np.diag(np.diag(own - outer))
        # a few roundings of the part's own terms: one made by subtraction has the other's
        for part, matrix, terms in ((parts.full, own - outer, own + outer), (parts.diag, D, D),
                                    (parts.offdiag, own - outer - D, outer)):
            off = abs(fractions(part) - matrix @ errors)
            u, tiny = Fraction(torch.finfo(dtype).eps), Fraction(torch.finfo(dtype).tiny)
            assert (off <= 2 * n * u * terms @ abs(errors) + tiny).all()
    with pytest.raises(ValueError, match="shapes agree"):
        split_softmax_gradient(torch.full((2, 2), 0.5), torch.ones(2))


# --- the energies ---------------------------------------------------------------------------------

HOLES = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
PADDED = causal(4) & torch.tensor([[[[0, 1, 1, 1]]], [[[1, 1, 1, 1]]], [[[0, 0, 1, 1]]]]).bool()


@pytest.mark.parametrize("scale", [1, 1e-120, 1e120])
@pytest.mark.parametrize("visible", [causal(4), HOLES, PADDED, causal(20)[-3:]],
                         ids=["causal", "holes", "padded", "long rows"])
def test_every_column_is_what_explicit_jacobians_give_whatever_the_scale(visible, scale):
    """Padding on the left: its queries see no key, and nobody sees its keys."""
    attn, grad = random_maps(3, 2, common=1, visible=visible)
    attn, grad = attn.nan_to_num(0), grad * torch.tensor([1.0, 5.0, 0.2])[:, None, None, None]
    table = head_energy(attn, scale * grad, visible)
    for name, expected in exact_energies(attn, grad, visible).items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-9, err_msg=name)
    assert table["head"].tolist() == [0, 1] and table["defined"].all()


def test_the_interval_is_that_of_all_resamples_of_the_sequences():
    B = 5
    attn, grad = random_maps(B, 1, 4, common=1)
    singles = [head_energy(attn[[b]], grad[[b]], n_boot=1).iloc[0] for b in range(B)]
    f, d, _ = split_softmax_gradient(attn, grad)
    ff, dd = f.square().sum((1, 2, 3)).numpy(), d.square().sum((1, 2, 3)).numpy()
    resamples = np.array(list(itertools.product(range(B), repeat=B)))  # all 3,125, equally likely
    exact = {name: np.array([row[name] for row in singles])[resamples].mean(1)
             for name in ("cos_ste", "attn_max")}
    exact["r_diag"] = dd[resamples].sum(1) / ff[resamples].sum(1)
    table = head_energy(attn, grad, n_boot=20_000).iloc[0]
    for name, values in exact.items():
        for end, share in (("lo", 0.025), ("hi", 0.975)):
            # five standard errors of 20,000 draws, and rounding: there are many ties
            low, high = np.quantile(values, [share - 0.006, share + 0.006])
            assert low - 1e-9 <= table[f"{name}_{end}"] <= high + 1e-9, (name, end)
    few = [head_energy(attn, grad, n_boot=9, seed=seed).iloc[0] for seed in (0, 0, 1)]
    assert few[0].equals(few[1]) and few[0]["r_diag_lo"] != few[2]["r_diag_lo"]
    one = head_energy(attn[:1], grad[:1], n_boot=9).iloc[0]
    assert one["r_diag_lo"] == one["r_diag"] == one["r_diag_hi"]


def test_layers_and_heads_of_the_table_are_those_of_the_capture():
    maps = [random_maps(2, H, 4, seed=H) for H in (3, 1, 2)]
    table = energy_table(SimpleNamespace(sums=head_sums(*pair, causal(4)), shape=None)
                         for pair in maps)
    expected = pd.concat([head_energy(*pair) for pair in maps], ignore_index=True)
    assert table["layer"].tolist() == [0, 0, 0, 1, 2, 2]
    pd.testing.assert_frame_equal(table.drop(columns="layer"), expected)
    with pytest.raises(ValueError, match="no layer"):
        energy_table([])


# --- what rounding decides ------------------------------------------------------------------------


def rounding_case(seed, B, T, sharpness, common, scale):
    """Weights not yet scaled to sum to 1, so that their fractions are exact, weights and errors."""
    scores, errors = randn(2, B, 1, T, T, seed=seed)
    weights = (sharpness * scores).exp() * causal(T)
    return weights, weights / weights.sum(-1, keepdim=True), scale * (errors + common)


def assert_right(row, exact):
    """The tolerance that the docstring states."""
    exact = {name: exact[name][0] for name in FIGURES}
    largest = max(1, *(abs(exact[name]) for name in FIGURES if not name.startswith("cos")))
    for name in FIGURES:
        tolerance = 0.01 if name.startswith("cos") else 0.02 * largest
        undefined = name.startswith("cos") and math.isnan(row[name])
        assert undefined or abs(row[name] - exact[name]) <= tolerance, name


formats = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
decades = st.floats(-9, 7)


@settings(max_examples=40)
@given(seeds, formats, formats, st.integers(1, 2), st.integers(2, 4), st.floats(0, 12), decades,
       decades)
def test_a_head_is_right_to_the_stated_tolerance_or_undefined(
    seed, of_attn, of_grad, B, T, sharpness, common, scale
):
    common = 10.0**common
    scale = min(10.0**scale, 1e4 / max(common, 1))  # float16 holds less than 6e4
    weights, attn, errors = rounding_case(seed, B, T, sharpness, common, scale)
    row = head_energy(attn.to(of_attn), errors.to(of_grad), n_boot=1).iloc[0]
    if row["defined"]:
        assert_right(row, exact_energies(weights, errors, causal(T)))
    else:
        assert row[FIGURES].isna().all()


@settings(max_examples=20)
@given(seeds, st.floats(0, 8), st.floats(0, 10))
def test_float32_defines_what_is_not_hopeless(seed, sharpness, common):
    weights, attn, errors = rounding_case(seed, 2, 4, sharpness, common, 1e-5)
    row = head_energy(attn.float(), errors.float(), n_boot=1).iloc[0]
    assert row["defined"] and not row[FIGURES].isna().any()
    assert_right(row, exact_energies(weights, errors, causal(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_defines_a_head_of_everyday_and_its_rows_may_miss_1(dtype):
    attn, grad = random_maps(B=8, H=4, T=32, sharpness=1)
    expected = head_energy(attn, grad, n_boot=1)[FIGURES]
    for stored in (attn.to(dtype), attn.to(dtype).float()):
        got = head_energy(stored, grad.to(stored.dtype), n_boot=1)[FIGURES]
        np.testing.assert_allclose(got, expected, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_constant_gradient_defines_nothing_however_it_was_rounded(dtype):
    attn = random_maps(B=2, H=3, T=8)[0].to(dtype)
    for constant in (0.1, 3e-7, 1000.0):
        table = head_energy(attn, torch.full_like(attn, constant), n_boot=2)
        assert not table["defined"].any()
        assert table[FIGURES].isna().all(axis=None) and table["entropy"].between(0, 1).all()


def test_the_precision_is_the_coarser_of_the_types_and_of_what_row_sums_tell():
    attn, grad = random_maps(B=2, H=1, T=8, common=1000)
    assert head_energy(attn, grad, n_boot=1)["defined"].all()
    for rounded in ((attn.half(), grad), (attn, grad.half()), (attn.half().double(), grad)):
        assert not head_energy(*rounded, n_boot=1)["defined"].any()


def test_what_rounding_decides_is_undefined_not_selected_and_leaves_other_heads_as_they_are():
    attn, grad = random_maps(B=3, H=3, T=4)
    grad[:, 1] = grad[1, 2] = 1e-3  # constant: f = 0, of which rounding leaves something
    attn, grad = attn.float(), grad.float()
    table = head_energy(attn, grad)
    assert table["defined"].tolist() == [True, False, True]
    for head in (0, 2):
        alone = head_energy(attn[:, [head]], grad[:, [head]]).assign(head=head)
        pd.testing.assert_frame_equal(table.loc[[head]].reset_index(drop=True), alone)
    row = table.loc[2]  # of which one sequence has no cosine
    assert not row[["r_diag", "r_offdiag", "r_cross"]].isna().any()
    assert row[["cos_diag", "cos_ste", "cos_ste_unmasked"]].isna().all()


# --- the boundary ---------------------------------------------------------------------------------

ATTN, GRAD = random_maps(B=2, H=2, T=3)
BEHIND = torch.zeros(3, 3).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(0.5))
NO_SUM, NO_MASK = "not weights that sum to 1", "not zero on masked keys"


@pytest.mark.parametrize("attn, grad, changes, reason", [
    (ATTN * math.nan, GRAD, {}, NO_SUM),
    (ATTN, torch.where(GRAD[0, 1, 2, 0] == GRAD, math.inf, GRAD), {}, "not finite"),
    (ATTN.tril(-1) + ATTN.triu(), GRAD, {"visible": torch.eye(3).bool()}, NO_MASK),
    (ATTN + BEHIND, GRAD, {}, NO_MASK),
    (torch.full_like(ATTN, 1 / 3), GRAD, {}, f"{NO_MASK}: pass as visible= .* for an encoder"),
    (ATTN, GRAD, {"visible": torch.ones(3, 3)}, r"boolean .* got visible torch.float32 \(3, 3"),
    (ATTN, GRAD[:1], {}, r"B H T_q T_k.* grad torch.float64 \(1, 2, 3, 3\)"),
    (ATTN[..., :2], GRAD[..., :2], {}, "map of visible keys"),
    (ATTN.numpy(), GRAD, {}, "torch tensors .* got attn ndarray"),
    (ATTN, GRAD, {"n_boot": 0}, "n_boot=0"),
])
def test_what_is_no_softmax_attention_is_refused(attn, grad, changes, reason):
    with pytest.raises(ValueError, match=reason):
        head_energy(attn, grad, **changes)


def test_a_single_token_and_a_head_without_gradient_give_an_undefined_row():
    one = torch.ones(2, 1, 1, 1)
    assert not head_energy(one, one)["defined"].any()
    row = head_energy(ATTN, GRAD * torch.tensor([1.0, 0.0])[:, None, None], n_boot=50).iloc[1]
    assert not row["defined"] and row[FIGURES].isna().all()
    assert row["attn_mean"] == pytest.approx(2 / 4)
    half = GRAD * torch.tensor([1.0, 0.0])[:, None, None, None]  # no gradient in one sequence
    row = head_energy(ATTN, half, n_boot=50).iloc[0]
    assert row["defined"] and row[["r_diag_lo", "cos_ste_hi"]].isna().all()


# --- a fused attention: its sums are those of maps made by hand -----------------------------------

B, H, T, D = 2, 4, 7, 8


def hidden(visible):
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)


class Call(NamedTuple):
    """Options of ``F.scaled_dot_product_attention``, and the same by hand."""

    options: dict
    added: Tensor = torch.zeros(T, T, dtype=torch.float64)  # to the scores, -inf on hidden keys
    scale: float = D**-0.5
    n_kv: int = H  # heads of keys and values
    D_v: int = D

    def tensors(self, dtype=torch.float64):
        """Queries, keys, values and the gradient that arrives at the output."""
        T_q, T_k = self.added.shape[-2:]
        shapes = [(B, H, T_q, D), (B, self.n_kv, T_k, D), (B, self.n_kv, T_k, self.D_v)]
        shapes.append((B, H, T_q, self.D_v))
        tensors = [randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
        return *(x.requires_grad_() for x in tensors[:3]), tensors[3]


BY_HEAD = (randn(H, T, T, seed=5) > 0) | torch.eye(T, dtype=torch.bool)
PADDING = torch.arange(T) > torch.tensor([1, -1])[:, None, None, None]  # the first's left two keys
BIAS = randn(1, H, T, T, seed=6) + hidden(causal(T))
CALLS = {
    "own scale": Call({"scale": 0.9}, scale=0.9),
    "causal": Call({"is_causal": True}, hidden(causal(T))),
    "causal, more queries": Call({"is_causal": True}, hidden(causal(11, T))),
    "causal groups": Call({"enable_gqa": True, "is_causal": True}, hidden(causal(T, 11)), n_kv=2),
    "wider values": Call({"is_causal": True}, hidden(causal(T)), D_v=2 * D),
    "mask and causal": Call({"attn_mask": PADDING, "is_causal": True}, hidden(causal(T) & PADDING)),
    "mask by head": Call({"attn_mask": BY_HEAD}, hidden(BY_HEAD)),
    "padded queries": Call({"attn_mask": causal(T) & PADDING}, hidden(causal(T) & PADDING)),
    "bias by head": Call({"attn_mask": BIAS, "scale": 0.2}, BIAS, 0.2),
}


def sums_by_hand(call, query, key, value, grad_out):
    """Scores, weights and output as the textbook writes them, dL/dA by autograd."""
    pairs = [h // (H // call.n_kv) for h in range(H)]  # the keys of each head
    attn = (call.scale * query @ key[:, pairs].mT + call.added).softmax(-1).nan_to_num(0.0)
    attn = attn.detach().requires_grad_()
    out = attn @ value[:, pairs]
    (out * grad_out).sum().backward()
    return out.detach(), head_sums(attn, attn.grad, call.added > -math.inf)


def captured(call, query, key, value, grad_out, maps=False, autocast=False):
    """The layer that a capture sees, and the output."""
    model = nn.Module()
    model.forward = lambda: F.scaled_dot_product_attention(query, key, value, **call.options)
    with capture_attention(model, maps) as layers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model()
        (out * grad_out).sum().backward()
    return layers[0], out.detach()


def assert_same(got, expected, **tolerance):
    """But for the noise: how far rows are from 1 depends on the way."""
    torch.testing.assert_close(got[..., :-1], expected[..., :-1], **tolerance)


@pytest.fixture(params=[2, 100], ids="{} queries a tile".format)
def tiled(request, monkeypatch):
    """Two does not divide the number of queries, 100 is more than there are."""
    monkeypatch.setattr(helpers, "TILE", request.param * B * H * T)


@pytest.mark.parametrize("name", CALLS)
def test_the_sums_are_those_of_maps_by_hand_whatever_the_tiles(name, tiled):
    call = CALLS[name]
    out, expected = sums_by_hand(call, *call.tensors())
    for maps in (False, True):
        layer, own = captured(call, *call.tensors(), maps=maps)
        torch.testing.assert_close(own, out)
        assert_same(layer.sums, expected)
    table = attention_energy(*call.tensors(), **call.options, n_boot=20, seed=3)
    of_maps = head_energy(layer.attn, layer.grad, layer.visible, n_boot=20, seed=3)
    pd.testing.assert_frame_equal(table, of_maps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("maps", [True, False])
def test_half_precision_and_autocast_round_what_goes_in_and_comes_out_alone(dtype, autocast, maps):
    call = CALLS["padded queries"]
    tensors = call.tensors(dtype)
    layer, out = captured(call, *tensors, maps=maps, autocast=autocast)
    assert out.dtype == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype)
    wide = torch.promote_types(dtype, torch.float)
    rounded = [x.detach().to(out.dtype).to(wide) for x in tensors]
    by_hand, expected = sums_by_hand(call._replace(added=call.added.to(wide)), *rounded)
    if maps:
        torch.testing.assert_close(out, by_hand.to(out.dtype))
    assert_same(layer.sums, expected, rtol=1e-5, atol=1e-6)
    alone = attention_energy(*tensors, **call.options, n_boot=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # does not round what one holds
        assert alone.equals(attention_energy(*tensors, **call.options, n_boot=1))


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made inside the ``with`` block."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *made])
        return out


def test_no_map_is_made_as_a_whole(monkeypatch):
    long = 32 * D
    monkeypatch.setattr(helpers, "TILE", B * H * long * D)
    call = Call({"is_causal": True}, torch.zeros(long, long))
    tensors = call.tensors()
    with Largest() as largest:
        captured(call, *tensors)
    assert largest.entries < B * H * long**2


X, HALF = torch.zeros(B, H, T, D), torch.zeros(B, H // 2, T, D)


@pytest.mark.parametrize("changes, reason", [
    ({"query": [[1.0]]}, "floating-point torch tensors .* got query list, key torch.float32"),
    ({"query": X[:, :, :0]}, "no axis of length 0"),
    ({"grad_out": X.double()}, "of one type, .* grad_out torch.float64"),
    ({"key": X[..., 1:]}, r"'key': 'B H T_k D'.* key torch.float32 \(2, 4, 7, 7\)"),
    ({"value": X[:1]}, "torch tensors .*B H T_k D"),
    ({"key": HALF, "value": HALF}, "'B H T_k D'"),
    ({"attn_mask": X[0, 0, :, :T].long()}, "a mask, .* got attn_mask torch.int64"),
    ({"attn_mask": X[0, 0]}, r"broadcasts to \(2, 4, 7, 7\), .* torch.float32 \(7, 8\)"),
    ({"query": X * math.nan}, NO_SUM),
    ({"grad_out": X + math.inf}, "not finite"),
])
def test_what_is_no_attention_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        attention_energy(**dict.fromkeys(("query", "key", "value", "grad_out"), X) | changes)


@pytest.mark.parametrize("size", [1e3, 1e-9])
@pytest.mark.parametrize("attend", [
    F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(-1) @ v])
def test_passes_whose_gradients_differ_in_size_are_sequences_of_one_table(attend, size):
    model, tensors = nn.Module(), [randn(5, H, T, D, seed=seed) for seed in range(4)]
    model.forward = attend
    tensors[3][2:] *= size  # the gradients of the second pass
    with capture_attention(model) as layers:
        for part in (slice(2), slice(2, 5)):
            q, k, v, grad = (x[part].clone().requires_grad_() for x in tensors)
            (model(q, k, v) * grad).sum().backward()
    found = energy_table(layers, n_boot=20, seed=3).drop(columns="layer")
    pd.testing.assert_frame_equal(found, attention_energy(*tensors, n_boot=20, seed=3))
