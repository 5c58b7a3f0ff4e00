"""A fused attention that is captured without maps: it stays fused, and its sums are those of the maps made by hand."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import helpers
from helpers import (
    HeadSums,
    attention_energy,
    binned_energy,
    capture_attention,
    energy_table,
    head_energy,
    head_sums,
    softmax_rule,
    split_softmax_gradient,
)

B, H, T, D = 2, 4, 7, 8


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hidden(visible):
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)


class Call(NamedTuple):
    """Options of ``F.scaled_dot_product_attention``, and the same by hand: what is added to the scores."""

    options: dict
    added: Tensor = torch.zeros(T, T, dtype=torch.float64)  # broadcasts to (B, H, T_q, T_k), -inf on hidden keys
    scale: float = D**-0.5
    n_kv: int = H  # heads of keys and values
    D_v: int = D

    def tensors(self, dtype=torch.float64):
        """Queries, keys, values and the gradient that arrives at the output."""
        T_q, T_k = self.added.shape[-2:]
        shapes = (B, H, T_q, D), (B, self.n_kv, T_k, D), (B, self.n_kv, T_k, self.D_v), (B, H, T_q, self.D_v)
        tensors = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
        return *(x.requires_grad_() for x in tensors[:3]), tensors[3]


def tri(T_q, T_k):
    return torch.ones(T_q, T_k, dtype=torch.bool).tril()


SOME = randn(T, T, seed=4) > 0  # of rows 0 to 6, each sees some key
BY_HEAD = (randn(H, T, T, seed=5) > 0) | torch.eye(T, dtype=torch.bool)
PADDING = torch.arange(T) > torch.tensor([1, -1])[:, None, None, None]  # two keys on the left of the first sequence
BIAS = randn(1, H, T, T, seed=6) + hidden(tri(T, T))
LEAST = torch.zeros(B, 1, 1, T, dtype=torch.float64).masked_fill(~PADDING, torch.finfo(torch.float64).min)
CALLS = {
    "all keys": Call({}),
    "own scale": Call({"scale": 0.9}, scale=0.9),
    "causal": Call({"is_causal": True}, hidden(tri(T, T))),
    "causal, more keys": Call({"is_causal": True}, hidden(tri(T, 11))),
    "causal, more queries": Call({"is_causal": True}, hidden(tri(11, T))),
    "groups": Call({"enable_gqa": True}, n_kv=2),
    "causal groups, more keys": Call({"enable_gqa": True, "is_causal": True}, hidden(tri(T, 11)), n_kv=2),
    "keys for all heads": Call({}, n_kv=1),
    "wider values": Call({"is_causal": True}, hidden(tri(T, T)), D_v=2 * D),
    "mask": Call({"attn_mask": SOME}, hidden(SOME)),
    "mask and causal": Call({"attn_mask": PADDING, "is_causal": True}, hidden(tri(T, T) & PADDING)),
    "mask by head": Call({"attn_mask": BY_HEAD}, hidden(BY_HEAD)),
    "padded keys": Call({"attn_mask": PADDING}, hidden(PADDING).expand(B, 1, T, T)),
    "padded queries": Call({"attn_mask": tri(T, T) & PADDING}, hidden(tri(T, T) & PADDING)),
    "bias by head": Call({"attn_mask": BIAS}, BIAS),
    "bias and scale": Call({"attn_mask": BIAS[0, 0], "scale": 0.2}, BIAS[0, 0], 0.2),
    "padding as the least number": Call({"attn_mask": LEAST}, hidden(PADDING).expand(B, 1, T, T)),
}


def sums_by_hand(call, query, key, value, grad_out):
    """Scores, weights and output as the textbook writes them, the gradient at the weights by autograd."""
    pairs = [h // (H // call.n_kv) for h in range(H)]  # the keys of each head
    attn = (call.scale * query @ key[:, pairs].mT + call.added).softmax(-1).nan_to_num(0.0).detach().requires_grad_()
    out = attn @ value[:, pairs]
    (out * grad_out).sum().backward()
    return out.detach(), head_sums(attn, attn.grad, call.added > -math.inf)


def captured(call, query, key, value, grad_out, maps=False, passes=1):
    """The layer that a capture sees, and the output of the last pass."""
    model = nn.Module()
    model.forward = lambda: F.scaled_dot_product_attention(query, key, value, **call.options)
    with capture_attention(model, maps) as layers:
        for _ in range(passes):
            out = model()
            (out * grad_out).sum().backward()
    return layers[0], out.detach()


def assert_same(got: HeadSums, expected: HeadSums, **tolerance):
    for name, one, other in zip(HeadSums._fields, got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(params=[1, 3, 100], ids="{} queries a tile".format)
def tiled(request, monkeypatch):
    """Three does not divide the number of queries, 100 is more than there are."""
    monkeypatch.setattr(helpers, "TILE", request.param * B * H * T)


@pytest.mark.parametrize("name", CALLS)
def test_the_sums_are_those_of_maps_by_hand_whatever_the_tiles(name, tiled):
    call = CALLS[name]
    out, expected = sums_by_hand(call, *call.tensors())
    layer, own = captured(call, *call.tensors())
    torch.testing.assert_close(own, out)
    assert_same(layer.sums, expected)


@pytest.mark.parametrize("name", CALLS)
def test_maps_say_the_same(name):
    call = CALLS[name]
    layer, _ = captured(call, *call.tensors(), maps=True)
    assert_same(captured(call, *call.tensors())[0].sums, layer.sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_and_autocast_round_what_goes_in_alone(dtype, autocast, tiled):
    call = CALLS["padded queries"]
    tensors = call.tensors(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # also around the backward pass
        layer, out = captured(call, *tensors)
    query, key, value, grad_out = (
        x.detach().to(out.dtype).to(torch.promote_types(dtype, torch.float)) for x in tensors
    )
    _, expected = sums_by_hand(call._replace(added=call.added.to(query)), query, key, value, grad_out)
    assert out.dtype == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype)
    assert_same(layer.sums._replace(noise=expected.noise), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.sums.noise, expected.noise, rtol=4, atol=0)  # of sums of rows, rounded


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_without_a_gradient_say_nothing_about_its_precision(dtype, scale, tiled):
    """As where the loss leaves tokens out: zeros fit every format, and the other queries' gradients do not."""
    *tensors, grad_out = CALLS["causal"].tensors(dtype)
    grad_out[:, :, 1:4] = 0
    layer, _ = captured(CALLS["causal"], *tensors, scale * grad_out)
    assert energy_table([layer], n_boot=1)["defined"].all()
    layer, _ = captured(CALLS["causal"], *tensors, 0 * grad_out)
    assert not energy_table([layer], n_boot=1)["defined"].any()


def test_tiles_of_very_different_gradients_add_up(tiled):
    *tensors, grad_out = CALLS["causal"].tensors()
    grad_out *= 10.0 ** torch.linspace(-160, 160, T, dtype=torch.float64)[:, None]
    assert_same(
        captured(CALLS["causal"], *tensors, grad_out)[0].sums, sums_by_hand(CALLS["causal"], *tensors, grad_out)[1]
    )


def test_an_attention_without_a_batch(tiled):
    tensors = [x.detach()[0] for x in CALLS["mask by head"].tensors()]
    tensors[0].requires_grad_()
    layer, _ = captured(CALLS["mask by head"], *tensors)
    assert_same(layer.sums, sums_by_hand(CALLS["mask by head"], *(x.detach()[None] for x in tensors))[1])


# --- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False])
def test_passes_add_up_one_after_the_other_and_in_one_backward_pass(together, tiled):
    call = CALLS["causal"]
    passes = [call.tensors(), [-2 * x.detach() for x in call.tensors()]]
    model = nn.Module()
    model.forward = lambda *inputs: F.scaled_dot_product_attention(*inputs, is_causal=True)
    with capture_attention(model) as layers:
        losses = []
        for *inputs, grad_out in passes:
            losses.append((model(*(x.detach().requires_grad_() for x in inputs)) * grad_out).sum())
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()  # the last comes back first
    expected = [sums_by_hand(call, *each)[1] for each in passes]
    assert len(layers) == 1
    assert_same(layers[0].sums, HeadSums.of_all(expected[::-1] if together else expected))


class Two(nn.Module):
    """One attention after another, their activations recomputed if asked."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant, self.first, self.second = reentrant, nn.Module(), nn.Module()
        for attention in (self.first, self.second):
            attention.forward = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, query, key, value):
        for attention in (self.first, self.second):
            if self.reentrant is None:
                query = attention(query, key, value)
            else:
                query = checkpoint(attention, query, key, value, use_reentrant=self.reentrant)
        return query


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_sums(reentrant, tiled):
    *inputs, grad_out = CALLS["causal"].tensors()
    found = []
    for model in (Two(), Two(reentrant)):
        with capture_attention(model) as layers:
            (model(*inputs) * grad_out).sum().backward()
        found.append({layer.name: layer.sums for layer in layers})
    assert found[0].keys() == found[1].keys() == {"first", "second"}
    for name, sums in found[0].items():
        assert_same(found[1][name], sums)


# --- fused stays fused -----------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """How many entries the largest tensor has that is made inside the ``with`` block."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), 0)
        return out


@pytest.mark.parametrize("learnt", [True, False])
def test_no_map_is_made_as_a_whole_and_the_pass_is_not_changed(learnt, monkeypatch):
    long = 32 * D
    monkeypatch.setattr(helpers, "TILE", B * H * long * D)
    bias = randn(long, long, seed=8).requires_grad_(learnt)
    call = Call({"attn_mask": bias}, bias)
    found, entries = [], []
    for capture in (nullcontext, capture_attention):
        *inputs, grad_out = call.tensors()
        bias.grad = None
        model = nn.Module()
        model.forward = lambda *inputs: F.scaled_dot_product_attention(*inputs, **call.options)
        with capture(model), Largest() as largest:
            out = model(*inputs)
            (out * grad_out).sum().backward()
        found.append([out.detach(), *(x.grad for x in (*inputs, bias)[: 3 + learnt])])
        entries.append(largest.entries)
    assert all(map(torch.equal, *found))
    assert [each < B * H * long**2 for each in entries] == [not learnt] * 2  # such a bias PyTorch itself does not fuse


def test_with_dropout_the_sums_are_those_of_the_maps_that_it_left():
    call = Call({"dropout_p": 0.5})
    found = []
    for maps in (False, True):
        torch.manual_seed(0)
        found.append(captured(call, *call.tensors(), maps=maps)[0].sums)
    assert_same(*found)


@pytest.mark.parametrize("rule_first", [True, False])
def test_under_a_rule_the_sums_are_those_of_the_maps(rule_first):
    *inputs, grad_out = CALLS["causal"].tensors()
    model, found = Two(), []
    for maps in (False, True):
        outer, inner = softmax_rule(model, "diagonal"), capture_attention(model, maps)
        if not rule_first:
            outer, inner = inner, outer
        with outer as one, inner as other:
            (model(*inputs) * grad_out).sum().backward()
        found.append(one or other)
    for one, other in zip(*found, strict=True):
        assert_same(one.sums, other.sums)


def test_at_a_length_of_2048_float32_is_right_to_a_millionth():
    call = CALLS["causal"]._replace(added=torch.zeros(2048, 2048))
    tensors = [x.detach()[:1] for x in call.tensors(torch.float32)]
    tensors[0].requires_grad_()
    assert tensors[0].shape[2] * tensors[1].shape[2] * H > 4 * helpers.TILE
    fused, maps = (captured(call, *tensors, maps=maps)[0].sums for maps in (False, True))
    assert_same(fused._replace(noise=maps.noise), maps, rtol=1e-6, atol=0)


# --- for those who hold queries, keys, values and the output's gradient ----------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in CALLS if CALLS[name].options.get("enable_gqa") or CALLS[name].n_kv == H]
)
def test_the_energy_of_an_attention_is_that_of_its_maps(name, tiled):
    call = CALLS[name]
    tensors = [x.detach() for x in call.tensors()]
    table = attention_energy(*tensors, **call.options, n_boot=20, seed=3)
    layer, _ = captured(call, *call.tensors(), maps=True)
    pd.testing.assert_frame_equal(table, head_energy(layer.attn, layer.grad, layer.visible, n_boot=20, seed=3))


@pytest.mark.parametrize("bins", [1, 3, T])
@pytest.mark.parametrize(
    "name", ["causal, more keys", "causal, more queries", "causal groups, more keys", "bias and scale"]
)
def test_bins_hold_the_energies_of_their_queries_and_keys(name, bins, tiled):
    call = CALLS[name]
    found = binned_energy(*(x.detach() for x in call.tensors()), **call.options, bins=bins)
    layer, _ = captured(call, *call.tensors(), maps=True)
    of_query, of_key = (F.one_hot(torch.arange(length) * bins // length).double() for length in layer.attn.shape[-2:])
    for energy, part in zip(found, split_softmax_gradient(layer.attn, layer.grad), strict=True):
        torch.testing.assert_close(energy, of_query.T @ part.square() @ of_key)


def test_autocast_does_not_round_what_one_holds():
    tensors = [x.detach() for x in CALLS["causal"].tensors(torch.float32)]
    expected = attention_energy(*tensors, n_boot=1), binned_energy(*tensors, bins=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_energy(*tensors, n_boot=1).equals(expected[0])
        assert all(map(torch.equal, binned_energy(*tensors, bins=2), expected[1]))


X, HALF = torch.zeros(B, H, T, D), torch.zeros(B, H // 2, T, D)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": [[1.0]]}, "four floating-point torch tensors .* got query list, key torch.float32"),
        ({"key": X.long()}, "four floating-point torch tensors .* key torch.int64"),
        ({"value": X[0]}, "of four axes"),
        ({"query": X[:, :, :0]}, "none of them of length 0"),
        ({"grad_out": X.double()}, "of one type, .* grad_out torch.float64"),
        ({"key": X[..., 1:]}, r"key should have the shape \(2, 4, 7, 8\) .* key torch.float32 \(2, 4, 7, 7\)"),
        ({"key": X[:, :, 1:]}, "key should have the shape"),
        ({"key": X[:1], "value": X[:1]}, "key should have the shape"),
        ({"value": X[:1]}, "value should have the shape"),
        ({"grad_out": X[..., 1:]}, "grad_out should have the shape"),
        ({"grad_out": X.mT}, "grad_out should have the shape"),
        ({"key": HALF, "value": HALF}, "for 4 heads, or with enable_gqa for a divisor of it, got 2"),
        ({"key": X[:, 1:], "value": X[:, 1:], "enable_gqa": True}, "got 3"),
        (
            {"attn_mask": X[0, 0, :, :T].long()},
            r"attn_mask is torch.int64 \(7, 7\): expected a tensor, boolean or of scores",
        ),
        ({"attn_mask": X[0, 0]}, r"attn_mask is torch.float32 \(7, 8\): .* broadcasts to \(2, 4, 7, 7\)"),
        ({"attn_mask": [True]}, "attn_mask is list"),
        ({"query": X * math.nan}, "not weights that sum to 1"),
        ({"grad_out": X + math.inf}, "not finite"),
        ({"n_boot": 0}, "n_boot=0"),
    ],
)
def test_what_is_no_attention_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        attention_energy(**dict.fromkeys(("query", "key", "value", "grad_out"), X) | changes)


@pytest.mark.parametrize("bins", [0, 8, 1.5])
def test_what_cannot_be_binned_is_refused(bins):
    with pytest.raises(ValueError, match=f"bins={bins}: expected an integer from 1 to 7"):
        binned_energy(X, X, X, X, bins=bins)
    with pytest.raises(ValueError, match="key should have the shape"):
        binned_energy(X, X[1:], X, X)


@pytest.mark.parametrize("which", [0, T - 1])
def test_a_query_that_is_no_number_is_found_in_any_tile(which, tiled):
    query = X.index_fill(2, torch.tensor(which), math.nan)
    with pytest.raises(ValueError, match="not weights that sum to 1"):
        attention_energy(query, X, X, X)
