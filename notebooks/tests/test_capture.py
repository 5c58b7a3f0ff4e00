"""The capture and the rules, on our model, PyTorch's attention and the transformers library's.

Independent ways: dO V^T, the slope of the loss, the weights that a model returns, with the gradient
that autograd leaves at them, and a softmax whose gradient is cut by hand.
"""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import (
    capture_attention,
    capture_batch,
    energy_table,
    head_energy,
    softmax_rule,
    split_softmax_gradient,
)
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, attention_weights

B, H, T, D = 2, 4, 6, 8
ORIGINALS = {name: getattr(F, name) for name in (
    "softmax", "scaled_dot_product_attention", "has_torch_function")}
X = torch.randn(B, T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    """Attends by a function of queries, keys and values, and keeps the output's gradient."""

    def __init__(self, attend, n_kv=H):
        super().__init__()
        torch.manual_seed(1)
        heads = (H, n_kv, n_kv)
        self.q, self.k, self.v = (nn.Linear(16, n * D, dtype=torch.float64) for n in heads)
        self.attend = attend

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        parts = self.q(x), self.k(memory), self.v(memory)
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in parts)
        self.value, self.out = v, self.attend(q, k, v)
        self.out.retain_grad()
        return self.out.transpose(1, 2).flatten(2)


def by_hand(softmax):
    def attend(q, k, v):
        return softmax((q @ k.mT / math.sqrt(D)).masked_fill(~LOWER, -math.inf), -1) @ v
    return attend


def sdpa(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


LOWER = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = LOWER & (torch.arange(T) > torch.tensor([[[[1]]], [[[-1]]]]))
BIAS = torch.where(LOWER, torch.linspace(-1, 1, H * T * T).double().view(H, T, T), -math.inf)
WAYS = {
    "sdpa": (sdpa(), torch.ones(T, T, dtype=torch.bool)),
    "sdpa causal": (sdpa(is_causal=True), LOWER),
    "sdpa padded": (sdpa(attn_mask=PADDED), PADDED),
    "sdpa bias": (sdpa(attn_mask=BIAS, scale=0.3), LOWER),
    "F.softmax": (by_hand(F.softmax), LOWER),
    "torch.softmax": (by_hand(torch.softmax), LOWER),
    "Tensor.softmax": (by_hand(torch.Tensor.softmax), LOWER),
    "dim=3": (by_hand(lambda scores, _: scores.softmax(dim=3)), LOWER),
}


def gradients(model, *inputs):
    model.zero_grad()
    out = model(*inputs)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).sin().view_as(out)).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_all_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def assert_as_it_was(model):
    assert all(getattr(F, name) is known for name, known in ORIGINALS.items())
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
    assert not torch._C._len_torch_function_stack()


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_gradients_are_those_of_the_pass_and_it_is_not_changed(way):
    attend, visible = WAYS[way]
    model = Attention(attend)
    expected = gradients(model, X)
    with capture_attention(model, maps=True) as layers:
        found = gradients(model, X)
    assert_all_close(found, expected)
    (layer,) = layers
    torch.testing.assert_close(layer.grad, model.out.grad @ model.value.mT)
    torch.testing.assert_close(layer.attn @ model.value, model.out)
    assert torch.equal(layer.visible.expand_as(layer.attn), visible.expand_as(layer.attn))
    with capture_attention(model) as streamed:
        assert_all_close(gradients(model, X), expected)
    table = energy_table(streamed, n_boot=1).drop(columns="layer")
    of_maps = head_energy(layer.attn, layer.grad, visible, n_boot=1)
    pd.testing.assert_frame_equal(table, of_maps)
    with pytest.raises(RuntimeError, match="maps=True"):
        _ = streamed[0].attn


def test_grouped_queries_share_keys_and_values_in_their_order():
    model = Attention(sdpa(is_causal=True, enable_gqa=True), n_kv=2)
    expected = gradients(model, X)
    with capture_attention(model, maps=True) as layers:
        assert_all_close(gradients(model, X), expected)
    values = model.value[:, [0, 0, 1, 1]]
    torch.testing.assert_close(layers[0].grad, model.out.grad @ values.mT)
    torch.testing.assert_close(layers[0].attn @ values, model.out)


def test_cross_attention_has_a_row_for_each_query_and_a_column_for_each_key():
    model = Attention(sdpa())
    with capture_attention(model, maps=True) as layers:
        gradients(model, X[:, :3], X[:, :5])
    assert layers[0].attn.shape == layers[0].grad.shape == (B, H, 3, 5)
    assert len(energy_table(layers, n_boot=1)) == H


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_by_all_its_paths(need_weights, training):
    model = nn.MultiheadAttention(16, H, batch_first=True, dtype=torch.float64).train(training)
    out, weights = model(X, X, X, need_weights=True, average_attn_weights=False)
    with capture_attention(model, True) as layers, capture_attention(model, True) as inner:
        again = model(X, X, X, need_weights=need_weights)[0]
        again.sum().backward()
    torch.testing.assert_close(again, out)
    assert len(layers) == len(inner) == 1  # also nested, where F is patched twice
    torch.testing.assert_close(layers[0].attn, weights)
    torch.testing.assert_close(layers[0].grad, inner[0].grad)
    assert_as_it_was(model)


def test_layers_of_an_encoder_and_decoder_come_in_their_order_and_by_their_names():
    model = nn.Transformer(16, H, 2, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    encoder = [f"encoder.layers.{i}.self_attn" for i in range(2)]
    decoder = [f"decoder.layers.0.{name}" for name in ("self_attn", "multihead_attn")]
    for only, expected in {"": encoder + decoder, "encoder": encoder}.items():
        with capture_attention(model, maps=True, only=only) as layers:
            model(X[:, :5], X[:, :3]).sum().backward()
        assert [layer.name for layer in layers] == expected
        shapes = [(5, 5), (5, 5), (3, 3), (3, 5)][: len(layers)]
        assert [layer.attn.shape[2:] for layer in layers] == shapes


def test_the_fast_path_of_an_encoder_that_only_predicts_is_seen_too():
    model = nn.TransformerEncoderLayer(16, H, 32, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad(), capture_attention(model, maps=True) as layers:
        model(X)
    with pytest.raises(RuntimeError, match="no_grad"):
        energy_table(layers)


class Shared(nn.Module):
    """The same attention twice, as ALBERT has it, its activations recomputed if asked."""

    def __init__(self, reentrant=None, way="sdpa causal"):
        super().__init__()
        self.shared, self.reentrant = Attention(WAYS[way][0]), reentrant
        self.back = nn.Linear(H * D, 16, dtype=torch.float64)

    def forward(self, x):
        for _ in range(2):
            if self.reentrant is None:
                out = self.shared(x)
            else:
                out = checkpoint(self.shared, x, use_reentrant=self.reentrant)
            x = self.back(out)
        return x


def test_a_module_that_is_used_twice_is_two_layers_and_passes_add_up():
    model, tables = Shared(), []
    with capture_attention(model) as layers:
        for factor in (1, 2, 3):
            model(factor * X).sum().backward()
            tables.append(layers[1].sums)
    assert [layer.name for layer in layers] == ["shared", "shared (2)"]
    assert [len(sums) for sums in tables] == [B, 2 * B, 3 * B]
    torch.testing.assert_close(tables[2][: 2 * B], tables[1])


@pytest.mark.parametrize("maps", [True, False])
def test_recomputed_activations_give_the_same(maps):
    found = []
    for reentrant in (None, False):
        model = Shared(reentrant)
        with capture_attention(model, maps) as layers:
            model(X).sum().backward()
        found.append([(layer.name, layer.sums) for layer in layers])
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert_all_close([sums for _, sums in found[0]], [sums for _, sums in found[1]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_weights_and_gradients_are_no_coarser_than_a_fused_kernels(dtype, autocast):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weigh = torch.randn(4, B, H, T, D, generator=generator).to(dtype)
    q.requires_grad_()
    model = nn.Module()
    model.forward = lambda: sdpa(is_causal=True)(q, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model()
    with capture_attention(model, maps=True) as layers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model()
        (out * weigh).sum().backward()
    assert out.dtype == expected.dtype
    q, k, v, weigh = (x.to(out.dtype).double() for x in (q, k, v, weigh))
    attn = (q @ k.mT / math.sqrt(D)).masked_fill(~LOWER, -math.inf).softmax(-1)
    torch.testing.assert_close(layers[0].attn.double(), attn, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layers[0].grad.double(), weigh @ v.mT, atol=1e-6, rtol=1e-6)
    assert (out - attn @ v).abs().max() <= (expected - attn @ v).abs().max() + 1e-6


@pytest.mark.parametrize("maps", [True, False])
def test_dropout_comes_after_the_weights(maps):
    model = Attention(sdpa(dropout_p=0.5))
    torch.manual_seed(0)
    with capture_attention(model, maps) as layers:
        gradients(model, X)
    if maps:
        (layer,) = layers
        torch.testing.assert_close(layer.attn.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
        assert 0.2 < (layer.grad == 0).double().mean() < 0.8
        full = split_softmax_gradient(layer.attn, layer.grad).full
        assert full.sum(-1).abs().max() < 1e-12
    assert energy_table(layers, n_boot=1)["defined"].all()


@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_the_router_of_a_mixture_and_a_softmax_without_an_axis_are_no_attention():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.gate = Attention(sdpa()), nn.Linear(H * D, 3, dtype=torch.float64)

        def forward(self, x):
            x = self.attention(x)
            return self.gate(x).softmax(-1).amax(-1, keepdim=True) * F.softmax(x)

    with capture_attention(model := Router()) as layers:
        out = model(X)
    torch.testing.assert_close(out, model(X))
    assert [layer.name for layer in layers] == ["attention"]


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["full", "diagonal", "zero", "mean", "ste", "none"])
@pytest.mark.parametrize("way", ["sdpa padded", "sdpa causal", "torch.softmax"])
def test_a_rule_sends_back_what_it_says(way, rule):
    attend, visible = WAYS[way]

    def send_back(a, g, visible):
        sent = SOFTMAX_BACKWARD[rule](a, g, visible)
        return sent if sent is None else sent.nan_to_num(0.0)

    def by_rule(q, k, v):
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~visible, -math.inf)
        activation = lambda scores: scores.softmax(-1).nan_to_num(0.0)  # noqa: E731
        return attention_weights(scores, visible, activation, send_back) @ v

    expected = gradients(Attention(by_rule), X)
    model = Attention(attend)
    with softmax_rule(model, rule):
        assert_all_close(gradients(model, X), expected)


@pytest.mark.parametrize("rule", ["full", "diagonal", "mean", "balanced_evenly"])
def test_a_query_in_padding_sends_nothing_back_however_the_padding_is_written(rule):
    def least(q, k, v):  # as many models write it: such a query attends to all keys alike
        bias = torch.where(PADDED, 0.0, torch.finfo(torch.float32).min)
        return (q @ k.mT / math.sqrt(D) + bias).softmax(-1) @ v

    found = []
    for attend in (least, WAYS["sdpa padded"][0]):
        model = Attention(attend)
        with softmax_rule(model, rule):
            found.append(gradients(model, X)[:4])  # of queries and keys
    assert_all_close(*found)


@pytest.mark.parametrize("rule_first", [True, False])
@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("way", ["sdpa causal", "torch.softmax"])
def test_rules_and_captures_can_be_nested_in_any_order(way, maps, rule_first):
    model = Attention(WAYS[way][0])
    with softmax_rule(model, "diagonal"):
        expected = gradients(model, X)
    outer, inner = softmax_rule(model, "diagonal"), capture_attention(model, maps)
    if not rule_first:
        outer, inner = inner, outer
    with outer as one, inner as other:
        assert_all_close(gradients(model, X), expected)
    (layer,) = one or other
    with capture_attention(model, maps=True) as exact:
        gradients(model, X)
    torch.testing.assert_close(layer.sums, exact[0].sums)  # of the same a and g


def test_a_rule_is_that_of_our_own_model_too():
    found = []
    for name in ("diagonal", "full"):
        model = make_model(softmax_backward=name)
        with softmax_rule(model, "diagonal"):
            model(*batch(4))[1].backward()
        found.append([p.grad for p in model.parameters()])
    assert_all_close(*found)


@pytest.mark.parametrize("name", ["running", "nothing", None])
def test_what_is_no_rule_for_any_model_is_refused(name):
    known = "choose one of full, diagonal, .*, none"
    with pytest.raises(ValueError, match=known), softmax_rule(nn.Linear(1, 1), name):
        pass


# --- passes of our model are not mixed ------------------------------------------------------------


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"block_size": 7, "vocab_size": 11, "n_layer": 3, "n_head": 2, "n_embd": 12}
    return LocalGPT(LocalGPTConfig(**sizes | {"method": "bp"} | changes))


def batch(B, T=7, seed=0):
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(seed))


def maps_of(layers):
    return [x for layer in layers for x in (layer.scores, layer.attn, layer.grad)]


@pytest.mark.parametrize("B", [4, 5])
def test_a_forward_pass_between_forward_and_backward_changes_nothing(B):
    model, (x, y), (x2, _) = make_model(), batch(4), batch(B, seed=1)
    with capture_attention(model, maps=True) as layers:
        _, loss = model(x, y)
        with torch.no_grad():
            model(x2)
        model.eval()(x2)
        loss.backward()
    assert_all_close(maps_of(layers), maps_of(capture_batch(model, x, y)))


def test_backward_passes_in_the_other_order_each_bring_their_own_maps():
    model, pairs = make_model(), [batch(4), batch(3, T=5, seed=1)]
    expected = [maps_of(capture_batch(model, *pair)) for pair in pairs]
    with capture_attention(model, maps=True) as layers:
        losses = [model(*pair)[1] for pair in pairs]
        for loss, maps in zip(losses, expected, strict=True):
            loss.backward()
            assert_all_close(maps_of(layers), maps)


def test_two_losses_added_give_the_maps_of_one_pass_the_same_in_all_layers():
    model, first, second = make_model(), batch(4), batch(3, seed=1)
    with capture_attention(model, maps=True) as layers:
        (model(*first)[1] + model(*second)[1]).backward()
    pair = first if len(layers[0].attn) == 4 else second
    assert_all_close(maps_of(layers), maps_of(capture_batch(model, *pair)))


def test_the_gradient_is_the_slope_of_the_loss_in_the_attention_weights():
    model, (x, y) = make_model().double(), batch(4)
    layers = capture_batch(model, x, y)
    assert [layer.name for layer in layers] == [f"blocks.{i}.attn.attn_weights" for i in range(3)]
    for i, layer in enumerate(layers):
        assert torch.equal(layer.scores > -torch.inf, torch.ones(4, 2, 7, 7).tril().bool())
        torch.testing.assert_close(layer.scores.softmax(-1), layer.attn)
        direction = torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(i)).double()
        losses = []
        for step in (1e-6, -1e-6):
            handle = model.blocks[i].attn.attn_weights.register_forward_hook(
                lambda *args, by=step * direction: args[-1] + by)
            losses.append(model(x, y)[1])
            handle.remove()
        slope = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close((layer.grad * direction).sum(), slope, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("method", ["bp", "fa", "dfa"])
@pytest.mark.parametrize("training", [True, False])
def test_capture_batch_leaves_gradients_weights_mode_and_random_numbers_alone(method, training):
    model = make_model(method=method).train(training)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 2.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    capture_batch(model, *batch(4))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is None if i % 2 else bool((parameter.grad == 2).all())
    assert_as_it_was(model)


# --- what is missing says why ---------------------------------------------------------------------

TOO_LATE = r"call loss\.backward\(\) inside the 'with' block, on a loss that depends on this layer"


def test_what_was_not_captured_says_why():
    model, (x, y) = make_model(), batch(4)
    with capture_attention(model, maps=True) as layers:
        assert not layers
        with torch.no_grad():
            model(x, y)
        with pytest.raises(RuntimeError, match=r"no_grad\(\), or every parameter is frozen"):
            _ = layers[0].grad
        model(x, y)[1].backward()
        _, loss = model(batch(3)[0], batch(3)[1])  # hides the gradient of the earlier pass
        assert all(len(layer.attn) == len(layer.scores) == 3 for layer in layers)
        with pytest.raises(RuntimeError, match=TOO_LATE):
            _ = layers[0].grad
    loss.backward()  # too late
    with pytest.raises(RuntimeError, match=TOO_LATE):
        _ = layers[0].grad


@pytest.mark.parametrize("maps", [True, False])
def test_a_loss_that_only_some_layers_take_part_in_names_the_first_that_does_not(maps):
    model = make_model()
    with capture_attention(model, maps) as layers:
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(args[-1]))
        model(*batch(4))
        handle.remove()
        seen[0].sum().backward()
    assert len(energy_table(layers[:2], n_boot=1)) == 4
    with pytest.raises(RuntimeError, match=f"'blocks.2.attn.attn_weights': {TOO_LATE}"):
        energy_table(layers)


def test_a_model_without_attention_is_refused():
    linear = nn.Linear(16, 16)
    unused = r"Linear: no attention .*: no module was called"
    with pytest.raises(RuntimeError, match=unused), capture_attention(linear):
        pass
    softmax = nn.Sequential(linear, nn.Softmax(-1))  # over channels
    unseen = r"softmaxes was called on scores .* matches 'x'"
    with pytest.raises(RuntimeError, match=unseen), capture_attention(softmax, only="x"):
        softmax(X.float()).sum().backward()
    assert_as_it_was(softmax)


@pytest.mark.parametrize("watch", [capture_attention, lambda model: softmax_rule(model, "zero")])
def test_a_compiled_model_is_refused_also_if_only_in_part(watch):
    compiled = make_model()
    compiled.blocks[1].compile(backend="eager")
    reason = r"is compiled, .* before torch\.compile"
    for model in (compiled, torch.compile(make_model(), backend="eager")):
        with pytest.raises(ValueError, match=reason), watch(model):
            pass
        assert_as_it_was(model)


@pytest.mark.parametrize("watch", [capture_attention, lambda model: softmax_rule(model, "zero")])
def test_weights_that_change_between_forward_and_backward_are_autograds_error(watch):
    model = Shared()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), watch(model):
        loss = model(X).sum()
        with torch.no_grad():
            model.back.weight.mul_(1.1)
        loss.backward()


# --- nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_afterwards_everything_is_as_it_was_also_after_an_exception_inside_the_model(error):
    def attend(q, k, v):
        sdpa()(q, k, v)
        raise error

    model = nn.Sequential(Attention(attend))
    for _ in range(2):
        with pytest.raises(error), capture_attention(model) as layers, softmax_rule(model, "zero"):
            model(X)
        assert [layer.name for layer in layers] == ["0"]
        assert_as_it_was(model)


def test_a_failing_backward_pass_leaves_nothing_behind_and_other_peoples_hooks_stay():
    def fail(grad):
        raise KeyError("backward")

    model, calls = Attention(sdpa()), []
    theirs = model.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(KeyError), capture_attention(model), softmax_rule(model, "zero"):
        out = model(X)
        model.value.register_hook(fail)
        out.sum().backward()
    assert len(calls) == 1 and list(model._forward_hooks) == [theirs.id]
    theirs.remove()
    assert_as_it_was(model)


# --- models of the transformers library, random and small -----------------------------------------

V, N = 300, 10
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": H}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = GROUPED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
GEMMA = GROUPED | WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": H, "n_positions": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": H}
T5 |= {"decoder_start_token_id": 0}
LLAMA_LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
ALBERT_LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention"
T5_LAYERS = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)] + [
    f"decoder.block.{i}.layer.{name}"
    for i in range(2) for name in ("0.SelfAttention", "1.EncDecAttention")]
BERT_LAYERS = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
# model type: what it is made for, its configuration, the names of its attentions
MODELS = {
    "gpt2": ("CausalLM", GPT2, ["transformer.h.0.attn", "transformer.h.1.attn"]),
    "llama": ("CausalLM", GROUPED, LLAMA_LAYERS),
    "mistral": ("CausalLM", GROUPED | {"sliding_window": 4}, LLAMA_LAYERS),
    "qwen3": ("CausalLM", QWEN, LLAMA_LAYERS),
    "gemma2": ("CausalLM", GEMMA, LLAMA_LAYERS),
    "gpt_oss": ("CausalLM", GROUPED | EXPERTS | WINDOW, LLAMA_LAYERS),
    "mixtral": ("CausalLM", GROUPED | EXPERTS, LLAMA_LAYERS),
    "bert": ("MaskedLM", SIZES, BERT_LAYERS),
    "albert": ("MaskedLM", SIZES | {"embedding_size": 16}, [ALBERT_LAYER, f"{ALBERT_LAYER} (2)"]),
    "t5": ("Seq2SeqLM", T5, T5_LAYERS),
}
EAGER_ALONE = {"gemma2", "gpt_oss"}  # a soft cap, a sink: no fused attention has them


@pytest.fixture(scope="module")
def model_of():
    how = "not installed: python -m pip install -e .[transformers]"
    transformers = pytest.importorskip("transformers", reason=how)

    def make(name, implementation="eager"):
        torch.manual_seed(0)
        kind, sizes, _ = MODELS[name]
        special = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.AutoConfig.for_model(name, **sizes, **special)
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model = auto.from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():  # as sharp as after some training, also the sinks
            nn.init.normal_(parameter, mean=float(parameter.data.mean().round()), std=0.15)
        return model.eval()

    return make


def text_for(model, padding=None):
    ids = torch.randint(3, V, (2, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, N, dtype=torch.long)
    if padding:
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
    # the first token would be asked of a query that sees nothing
    labels = ids.masked_fill((mask.cumsum(1) == 1) | (mask == 0), -100)
    if model.config.is_encoder_decoder:
        labels = ids[:, :7].flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def weight_gradients(model, text):
    model.zero_grad()
    model(**text).loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def own_attentions(model, text):
    """The weights that the model returns, in the order of use, with ``grad``."""
    out = model(**text, output_attentions=True)
    if model.config.is_encoder_decoder:
        pairs = zip(out.decoder_attentions, out.cross_attentions, strict=True)
        weights = [*out.encoder_attentions, *(weights for pair in pairs for weights in pair)]
    else:
        weights = list(out.attentions)
    for each in weights:
        each.retain_grad()
    out.loss.backward()
    return weights


def assert_near(found, expected, share=1e-5):
    """To a ``share`` of the largest value: other kernels add up in another order, in float32."""
    atol = share * max(values.abs().max().item() for values in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_gradients_are_those_that_the_model_returns_itself(name, padding, model_of):
    model = model_of(name)
    text = text_for(model, padding)
    weights, expected = own_attentions(model, text), weight_gradients(model, text)
    tables = []
    for implementation in ("eager",) if name in EAGER_ALONE else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with capture_attention(model, maps=True) as layers:
            assert_near(weight_gradients(model, text), expected)
        assert [layer.name for layer in layers] == MODELS[name][2]
        for layer, own in zip(layers, weights, strict=True):
            rows = text["attention_mask"].bool()[:, None, :, None]  # queries that are no padding
            if own.shape[2] != N:
                rows = torch.ones(2, 1, own.shape[2], 1, dtype=torch.bool)
            keys = slice(own.shape[-1])  # without the sink
            visible = layer.visible.expand_as(layer.attn)[..., keys] & rows
            assert torch.equal(visible, (own > 0) & rows)
            assert_near([layer.attn[..., keys] * rows], [own * rows])
            assert_near([layer.grad[..., keys] * visible], [own.grad * visible])
        tables.append(energy_table(layers, n_boot=20))
        with capture_attention(model) as streamed:
            weight_gradients(model, text)
        pd.testing.assert_frame_equal(energy_table(streamed, n_boot=20), tables[-1], atol=1e-5)
    assert tables[0]["defined"].all() and len(tables[0]) == H * len(weights)


def test_a_sink_a_soft_cap_and_a_sliding_window_are_seen(model_of):
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    for name, windows in {"qwen3": (N, 4), "gemma2": (4, N), "gpt_oss": (4, N)}.items():
        model = model_of(name)
        with capture_attention(model, maps=True) as layers:
            weight_gradients(model, text_for(model))
        for layer, window in zip(layers, windows, strict=True):
            seen = layer.visible.expand_as(layer.attn)[1, 2, :, :N]
            assert torch.equal(seen, causal & ~causal.tril(-window))
            torch.testing.assert_close(layer.attn.sum(-1), torch.ones(2, H, N))
            if name == "gemma2":
                assert layer.scores[layer.scores > -1e4].abs().max() < 2
            if name == "gpt_oss":
                assert layer.attn[..., -1].min() > 0 and not layer.grad[..., -1].any()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_softmax_that_is_asked_for_in_float32_stays_one(name, model_of):
    model = model_of(name).bfloat16()
    expected = weight_gradients(model, text_for(model))
    with capture_attention(model, maps=True) as layers:
        assert all(map(torch.equal, weight_gradients(model, text_for(model)), expected))
    for layer in layers:  # rounded to bfloat16 they would be off by 1e-3
        assert (layer.attn.sum(-1) - 1).abs().max() < 1e-5


CUTS = {
    "none": lambda scores: scores.detach().log_softmax(-1).exp(),  # the scores hear nothing
    "zero": lambda scores: (scores - scores.logsumexp(-1, keepdim=True).detach()).exp(),
}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("rule", CUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_a_rule_is_a_softmax_that_is_cut_by_hand(name, rule, padding, model_of, monkeypatch):
    found = []
    for implementation in ("eager", "sdpa"):
        model = model_of(name, implementation)
        text = text_for(model, padding)
        with softmax_rule(model, rule):
            found.append(weight_gradients(model, text))
    model = model_of(name)
    exact = weight_gradients(model, text)
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: CUTS[rule](scores))
    expected = weight_gradients(model, text)
    for other in found:
        assert_near(other, expected)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[0], exact, strict=True))
