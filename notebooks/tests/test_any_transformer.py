"""The capture and the rules on PyTorch's own attention, each against an independent way."""

import math
import runpy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import DATA, capture_attention, energy_table, head_energy, softmax_rule, split_softmax_gradient
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, attention_weights

B, H, T, D = 2, 4, 6, 8
ORIGINALS = {name: getattr(F, name) for name in ("softmax", "scaled_dot_product_attention")}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


class Attention(nn.Module):
    """Projects, attends by a function of queries, keys and values, and keeps what the output's gradient will be."""

    def __init__(self, attend, n_kv=H):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(16, n * D, dtype=torch.float64) for n in (H, n_kv, n_kv))
        self.attend = attend

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = (
            part(of).unflatten(-1, (-1, D)).transpose(1, 2)
            for part, of in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        self.value, self.out = v, self.attend(q, k, v)
        self.out.retain_grad()
        return self.out.transpose(1, 2).flatten(2)


def by_hand(q, k, v, mask=None, softmax=torch.softmax):
    scores = q @ k.mT / math.sqrt(D)
    return softmax(scores if mask is None else scores.masked_fill(~mask, -math.inf), -1) @ v


LOWER = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = LOWER & (torch.arange(T) > torch.tensor([[[[1]]], [[[-1]]]]))
BIAS = torch.where(LOWER, torch.randn(H, T, T, generator=torch.Generator().manual_seed(5)).double(), -math.inf)
WAYS = {
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), None),
    "sdpa causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), LOWER),
    "sdpa mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, LOWER), LOWER),
    "sdpa padded": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=PADDED), PADDED),
    "sdpa bias": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS, scale=0.3), LOWER),
    "F.softmax": (lambda q, k, v: by_hand(q, k, v, LOWER, F.softmax), LOWER),
    "torch.softmax": (lambda q, k, v: by_hand(q, k, v, LOWER), LOWER),
    "Tensor.softmax": (lambda q, k, v: by_hand(q, k, v, LOWER, torch.Tensor.softmax), LOWER),
    "dim=3": (lambda q, k, v: by_hand(q, k, v, LOWER, lambda s, _: s.softmax(dim=3)), LOWER),
}


def gradients(model, *inputs):
    model.zero_grad()
    weigh = random(B, inputs[0].shape[1], H * D, seed=9).detach()
    (model(*inputs) * weigh).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_gradients_are_those_of_the_pass_and_it_is_not_changed(way):
    attend, mask = WAYS[way]
    model, x = Attention(attend), random(B, T, 16)
    expected = gradients(model, x)
    with capture_attention(model, maps=True) as layers:
        found = gradients(model, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    (layer,) = layers
    torch.testing.assert_close(layer.grad, model.out.grad @ model.value.mT)
    torch.testing.assert_close(layer.attn @ model.value, model.out)
    allowed = torch.ones(T, T, dtype=torch.bool) if mask is None else mask
    assert torch.equal(layer.visible.expand_as(layer.attn), allowed.expand_as(layer.attn))
    with capture_attention(model) as layers:
        gradients(model, x)
    table = energy_table(layers, n_boot=1)
    assert table.drop(columns="layer").equals(head_energy(layer.attn, layer.grad, allowed, n_boot=1))


def test_grouped_queries_share_keys_and_values_in_their_order():
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    model, x = Attention(attend, n_kv=2), random(B, T, 16)
    expected = gradients(model, x)
    with capture_attention(model, maps=True) as layers:
        for one, other in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(one, other)
    values = model.value[:, [0, 0, 1, 1]]
    torch.testing.assert_close(layers[0].grad, model.out.grad @ values.mT)


def test_cross_attention_has_a_row_for_each_query_and_a_column_for_each_key():
    model = Attention(WAYS["sdpa"][0])
    with capture_attention(model, maps=True) as layers:
        gradients(model, random(B, 3, 16), random(B, 5, 16, seed=1))
    assert layers[0].attn.shape == layers[0].grad.shape == (B, H, 3, 5)
    assert len(energy_table(layers, n_boot=1)) == H


def mha(batch_first=True, **changes):
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, H, batch_first=batch_first, dtype=torch.float64, **changes)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_by_all_its_paths(need_weights, training):
    model, x = mha().train(training), random(B, T, 16)
    out, weights = model(x, x, x, need_weights=True, average_attn_weights=False)
    with capture_attention(model, maps=True) as layers:
        again = model(x, x, x, need_weights=need_weights)[0]
        again.sum().backward()
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(layers[0].attn, weights)
    assert all(getattr(F, name) is known for name, known in ORIGINALS.items())


def test_layers_of_an_encoder_and_decoder_come_in_their_order_and_by_their_names():
    torch.manual_seed(0)
    model = nn.Transformer(16, H, 2, 1, 32, dropout=0.0, batch_first=True)
    with capture_attention(model, maps=True) as layers:
        model(torch.randn(B, 5, 16), torch.randn(B, 3, 16)).sum().backward()
    encoder = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    assert [layer.name for layer in layers] == [
        *encoder,
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    assert [layer.attn.shape[2:] for layer in layers] == [(5, 5), (5, 5), (3, 3), (3, 5)]
    with capture_attention(model, only="encoder") as layers:
        model(torch.randn(B, 5, 16), torch.randn(B, 3, 16)).sum().backward()
    assert [layer.name for layer in layers] == encoder


def test_the_fast_path_of_an_encoder_that_only_predicts_is_seen_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, H, 32, batch_first=True).eval()
    x = torch.randn(B, T, 16)
    with torch.no_grad(), capture_attention(model, maps=True) as layers:
        model(x)
    with pytest.raises(RuntimeError, match="no_grad"):
        energy_table(layers)


class Stack(nn.Module):
    """The same attention twice, as ALBERT shares it, the second time with its activations recomputed if asked."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.shared, self.reentrant = Attention(WAYS["sdpa causal"][0]), reentrant
        self.back = nn.Linear(H * D, 16, dtype=torch.float64)

    def forward(self, x):
        for _ in range(2):
            if self.reentrant is None:
                x = self.back(self.shared(x))
            else:
                x = self.back(checkpoint(self.shared, x, use_reentrant=self.reentrant))
        return x


def test_a_module_that_is_used_twice_is_two_layers_and_passes_add_up():
    model, x = Stack(), random(B, T, 16)
    with capture_attention(model) as layers:
        for _ in range(3):
            model(x).sum().backward()
    assert [layer.name for layer in layers] == ["shared", "shared (2)"]
    assert [len(layer.sums.products) for layer in layers] == [3 * B, 3 * B]


def test_recomputed_activations_give_the_same_maps():
    x = random(B, T, 16)
    seen = []
    for reentrant in (None, False):
        model = Stack(reentrant)
        torch.manual_seed(0)
        nn.init.normal_(model.back.weight)
        with capture_attention(model, maps=True) as layers:
            model(x).sum().backward()
        seen.append([(layer.name, layer.attn, layer.grad) for layer in layers])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one[1:], other[1:])
        assert one[0] == other[0]


def test_half_precision_under_autocast_is_taken_as_it_comes():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, H, 32, dropout=0.0, batch_first=True)
    x = torch.randn(B, T, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with capture_attention(model, maps=True) as layers:
            model(x).float().sum().backward()
    torch.testing.assert_close(model(x), expected.float(), atol=0.1, rtol=0.1)
    assert energy_table(layers, n_boot=1)["entropy"].between(0, 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_weights_and_gradients_are_no_coarser_than_a_fused_kernels(dtype, autocast):
    q, k, v, weigh = torch.randn(4, B, H, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )
    q.requires_grad_()
    model = nn.Module()
    model.forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with capture_attention(model, maps=True) as layers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model()
        (out * weigh).sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model()
    assert out.dtype == expected.dtype
    q, k, v, weigh = (x.to(out.dtype).double() for x in (q, k, v, weigh))
    attn = (q @ k.mT / math.sqrt(D)).masked_fill(~LOWER, -math.inf).softmax(-1)
    torch.testing.assert_close(layers[0].attn.double(), attn, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layers[0].grad.double(), weigh @ v.mT, atol=1e-6, rtol=1e-6)
    assert (out - attn @ v).abs().max() <= (expected - attn @ v).abs().max() + 1e-6


def test_dropout_comes_after_the_weights():
    model, x = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)), random(B, T, 16)
    with capture_attention(model, maps=True) as layers:
        gradients(model, x)
    torch.testing.assert_close(layers[0].attn.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    dropped = layers[0].grad == 0
    assert 0.2 < dropped.double().mean() < 0.8
    full = split_softmax_gradient(layers[0].attn, layers[0].grad).full
    assert full.sum(-1).abs().max() < 1e-12


def test_the_router_of_a_mixture_is_no_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.gate = Attention(WAYS["sdpa"][0]), nn.Linear(H * D, 3, dtype=torch.float64)

        def forward(self, x):
            x = self.attention(x)
            return self.gate(x).softmax(-1).amax(-1, keepdim=True) * x

    with capture_attention(model := Router()) as layers:
        model(random(B, T, 16)).sum().backward()
    assert [layer.name for layer in layers] == ["attention"]


def test_a_softmax_that_leaves_its_axis_to_pytorch_is_let_through():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(WAYS["sdpa"][0])

        def forward(self, x):
            return F.softmax(self.attention(x))

    model, x = Old(), random(B, T, 16)
    with pytest.warns(UserWarning, match="Implicit dimension"), capture_attention(model) as layers:
        out = model(x)
    torch.testing.assert_close(out, model.attention(x).softmax(0))
    assert [layer.name for layer in layers] == ["attention"]


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["full", "diagonal", "zero", "mean", "ste", "none"])
@pytest.mark.parametrize("way", ["sdpa padded", "sdpa causal", "torch.softmax"])
def test_a_rule_sends_back_what_it_says(way, rule):
    attend, mask = WAYS[way]

    def by_rule(q, k, v):
        def activation(scores):
            return scores.softmax(-1).nan_to_num(0.0)

        def send_back(a, g, visible):
            sent = SOFTMAX_BACKWARD[rule](a, g, visible)
            return sent if sent is None else sent.nan_to_num(0.0)

        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
        return attention_weights(scores, mask, activation, send_back) @ v

    x = random(B, T, 16)
    model = Attention(by_rule)
    expected = gradients(model, x)
    model.attend = attend
    with softmax_rule(model, rule):
        found = gradients(model, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rule", ["full", "diagonal", "zero", "mean", "balanced_evenly"])
def test_a_query_in_padding_sends_nothing_back_however_the_padding_is_written(rule):
    def least(q, k, v):  # padding as many models write it: such a query attends to all keys alike
        bias = torch.where(PADDED, 0.0, torch.finfo(torch.float32).min)
        return (q @ k.mT / math.sqrt(D) + bias).softmax(-1) @ v

    found = []
    for attend in (least, WAYS["sdpa padded"][0]):
        model = Attention(attend)
        with softmax_rule(model, rule):
            found.append(gradients(model, random(B, T, 16))[:4])  # of queries and keys
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rule_first", [True, False])
def test_rules_and_captures_can_be_nested_in_any_order(rule_first):
    for model in (Attention(WAYS["sdpa causal"][0]), Attention(WAYS["torch.softmax"][0])):
        x = random(B, T, 16)
        with softmax_rule(model, "diagonal"):
            expected = gradients(model, x)
        outer, inner = softmax_rule(model, "diagonal"), capture_attention(model, maps=True)
        if not rule_first:
            outer, inner = inner, outer
        with outer as one, inner as other:
            found = gradients(model, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        (layer,) = one or other
        torch.testing.assert_close(layer.grad, model.out.grad @ model.value.mT)


def test_nested_captures_see_multihead_attention_both():
    model, x = mha(), random(B, T, 16)
    for need_weights in (True, False):
        with capture_attention(model, maps=True) as outer, capture_attention(model, maps=True) as inner:
            model(x, x, x, need_weights=need_weights)[0].sum().backward()
        assert len(outer) == len(inner) == 1
        torch.testing.assert_close(outer[0].grad, inner[0].grad)


def test_a_rule_is_that_of_our_own_model_too():
    config = LocalGPTConfig(block_size=7, vocab_size=11, n_layer=2, n_head=2, n_embd=12, method="bp")
    found = []
    for name in ("diagonal", "full"):
        torch.manual_seed(0)
        model = LocalGPT(LocalGPTConfig(**{**config.__dict__, "softmax_backward": name}))
        idx = torch.arange(7)[None]
        with softmax_rule(model, "diagonal"):
            model(idx, idx)[1].backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["running", "nothing", None])
def test_what_is_no_rule_for_any_model_is_refused(name):
    with pytest.raises(ValueError, match="choose one of full, diagonal"), softmax_rule(nn.Linear(1, 1), name):
        pass


# --- afterwards ------------------------------------------------------------------------------------------------------


def assert_as_it_was(model):
    assert all(getattr(F, name) is known for name, known in ORIGINALS.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not torch.overrides.has_torch_function_unary(torch.ones(1))
    assert not torch._C._len_torch_function_stack()


def test_afterwards_everything_is_as_it_was_also_after_an_exception():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = mha()

        def forward(self, x):
            self.attention(x, x, x)
            raise KeyError("inside")

    model = Breaks()
    for _ in range(2):
        with pytest.raises(KeyError, match="inside"), capture_attention(model) as layers, softmax_rule(model, "zero"):
            model(random(B, T, 16))
        assert len(layers) == 1
        assert_as_it_was(model)


def test_maps_that_were_not_kept_are_asked_for():
    model = Attention(WAYS["sdpa"][0])
    with capture_attention(model) as layers:
        gradients(model, random(B, T, 16))
    with pytest.raises(RuntimeError, match="maps=True"):
        _ = layers[0].attn


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, H, 32, 0.0, batch_first=True), 2)
    yield model
    assert_as_it_was(model)


X, TARGET = torch.randn(2, B, T, 16, generator=torch.Generator().manual_seed(0))


def loss_of(out):
    return F.mse_loss(out, TARGET)


def test_a_model_without_attention_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))  # over channels
    with pytest.raises(RuntimeError, match="no attention was seen"), capture_attention(model):
        model(X).sum().backward()
    assert_as_it_was(model)


def test_without_a_backward_pass_or_with_one_that_comes_too_late_there_is_no_gradient(encoder):
    with capture_attention(encoder) as layers:
        out = encoder(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'layers.0.self_attn': call loss.backward\(\) inside the 'with' block"):
            energy_table(layers)
        loss_of(out).backward(retain_graph=True)


def test_a_loss_that_only_some_layers_take_part_in_names_the_first_that_does_not(encoder):
    with capture_attention(encoder) as layers:
        encoder(X)
        loss_of(encoder.layers[0](X)).backward()
    with pytest.raises(RuntimeError, match=r"'layers.1.self_attn': .* a loss that depends on this layer"):
        energy_table(layers)


@pytest.mark.parametrize("name", ["encoder", "only a part", "by torch.compile"])
def test_a_compiled_model_is_refused(name, encoder):
    model = encoder
    if name == "encoder":
        model.compile()
    elif name == "only a part":
        model.layers[1].self_attn.compile()
    else:
        model = torch.compile(encoder)
    for watch in (capture_attention(model), softmax_rule(model, "zero")):
        with pytest.raises(ValueError, match=r"is compiled, .*: use the model as it was before torch.compile"), watch:
            pass


@pytest.mark.parametrize("watch", [capture_attention, lambda model: softmax_rule(model, "zero")])
def test_weights_that_change_between_forward_and_backward_are_autograds_error(watch, encoder):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), watch(encoder):
        loss = loss_of(encoder(X))
        with torch.no_grad():
            encoder.layers[1].self_attn.in_proj_weight.mul_(1.1)
        loss.backward()


def test_weights_that_change_between_two_passes_are_each_passs_own(encoder):
    with capture_attention(encoder) as both:
        for _ in range(2):
            loss_of(encoder(X)).backward()
            with torch.no_grad():
                encoder.layers[0].self_attn.in_proj_weight.mul_(1.1)
    with capture_attention(encoder) as third:
        loss_of(encoder(X)).backward()
    first, second = both[0].sums.products.split(B)
    assert len({tuple(sums.flatten().tolist()) for sums in (first, second, third[0].sums.products)}) == 3


@pytest.mark.parametrize("watch", [capture_attention, lambda model: softmax_rule(model, "zero")])
def test_a_capture_is_for_one_block(watch, encoder):
    block = watch(encoder)
    with block:
        loss_of(encoder(X)).backward()
        with pytest.raises(RuntimeError, match=r"call (capture_attention|softmax_rule) anew for each 'with' block"):
            block.__enter__()
    with pytest.raises(RuntimeError, match="entered a second time"):
        block.__enter__()


def test_a_failing_backward_pass_leaves_nothing_behind(encoder):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError("backward")

    with pytest.raises(KeyError, match="backward"), capture_attention(encoder), softmax_rule(encoder, "zero"):
        encoder(Fails.apply(encoder(X))).sum().backward()


def test_the_command_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    with pytest.raises(SystemExit, match=r"python -m pip install -e .\[transformers\]"):
        runpy.run_path(str(DATA / "any_model.py"), run_name="__main__")
