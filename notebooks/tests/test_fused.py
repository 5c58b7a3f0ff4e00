"""A fused attention that is captured without maps: it stays fused, and its sums are those of the maps made by hand."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import helpers
from helpers import HeadSums, capture_attention, energy_table, head_sums, softmax_rule

B, H, T, D = 2, 4, 7, 8
INPUTS = ("query", "key", "value")


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
    pairs = [(h // (H // call.n_kv)) for h in range(H)]  # the keys of each head
    attn = (call.scale * query @ key[:, pairs].mT + call.added).softmax(-1).nan_to_num(0.0).detach().requires_grad_()
    out = attn @ value[:, pairs]
    (out * grad_out).sum().backward()
    return out.detach(), head_sums(attn, attn.grad, call.added > -math.inf)


def captured(call, query, key, value, grad_out, maps=False, passes=1):
    """The layer that a capture sees, and the output of the last pass."""
    model = nn.Module()
    model.forward = lambda: F.scaled_dot_product_attention(query, key, value, **call.options)
    with capture_attention(model, maps) as (layers):
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
