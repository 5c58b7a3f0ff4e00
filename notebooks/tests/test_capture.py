"""The capture and the rules, on our model, PyTorch's attention and the transformers library's.

Independent ways: dO V^T, and the weights that a model returns.
"""

import copy
import functools
import io
import math
import re
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import (capture_attention, capture_batch, energy_table, head_energy, head_sums,
                     softmax_rule)
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, attention_weights

B, H, T, D = 2, 4, 6, 8
MATH = nn.attention.SDPBackend.MATH
ORIGINALS = {name: getattr(F, name) for name in (
    "softmax", "scaled_dot_product_attention", "has_torch_function")}
X = torch.randn(B, T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Calling(nn.Module):
    """A module that attends by a function of queries, keys and values that are its parameters."""

    def __init__(self, attend=None, shapes=((B, H, T, D),) * 3, **attributes):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.parts = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.attend = attend
        vars(self).update(attributes)

    def forward(self, *parts):
        return self.attend(*(parts or self.parts))


def adding(mask, softmax=torch.softmax):
    return lambda q, k, v: softmax(q @ k.mT / math.sqrt(D) + mask, -1) @ v


def sdpa(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


FULL = torch.ones(T, T, dtype=torch.bool)
LOWER = FULL.tril()
CAUSAL = torch.zeros(T, T, dtype=X.dtype).masked_fill(~LOWER, -math.inf)
PADDED = LOWER & (torch.arange(T) > torch.tensor([[[[1]]], [[[-1]]]]))
WAYS = {
    "sdpa": (sdpa(), FULL),
    "sdpa causal": (sdpa(is_causal=True), LOWER),
    "sdpa padded": (sdpa(attn_mask=PADDED), PADDED),
    "F.softmax": (adding(CAUSAL, F.softmax), LOWER),
    "torch.softmax": (adding(CAUSAL), LOWER),
    "Tensor.softmax": (adding(CAUSAL, torch.Tensor.softmax), LOWER),
    "torch.special": (adding(CAUSAL, torch.special.softmax), LOWER),
    "F.softmin": (adding(CAUSAL, lambda x, dim: F.softmin(-x, dim)), LOWER),
    "nn.Softmin": (adding(CAUSAL, lambda x, dim: nn.Softmin(dim)(-x)), LOWER),
    "own type": (adding(CAUSAL, lambda x, dim: F.softmax(x.float(), dim, dtype=X.dtype)), LOWER),
    "our own model's": (adding(CAUSAL, lambda x, dim: attention_weights(x, LOWER)), LOWER),
}


def of_parameters(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def weighed(out):
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).sin().view_as(out)).sum()


def gradients(model, *inputs):
    model.zero_grad()
    weighed(model(*inputs)).backward()
    return of_parameters(model)


def sums_of(model, maps=False):
    with capture_attention(model, maps) as layers:
        weighed(model()).backward()
    return layers[0].sums


def assert_all_close(found, expected):
    """But for rounding of each one's largest value: kernels add up in another order."""
    sizes = [values[values.isfinite()].abs().max().item() for values in expected]
    for one, other, size in zip(found, expected, sizes, strict=True):
        # that of a key's bias is zero, but for rounding in sums of what is as large as the others
        torch.testing.assert_close(one, other, rtol=0, atol=max(2e-5 * size, 1e-9 * max(sizes)))


def assert_as_it_was(model):
    assert all(getattr(F, name) is known for name, known in ORIGINALS.items())
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
    assert not torch._C._len_torch_function_stack()


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_gradients_are_those_of_the_pass_and_it_is_not_changed(way):
    attend, visible = WAYS[way]
    model = Calling(attend)
    expected = gradients(model)
    with capture_attention(model, maps=True) as layers:
        assert_all_close(gradients(model), expected)
        out = model()
        out.retain_grad()
        weighed(out).backward()
    (layer,), (_, _, value) = layers, model.parts
    torch.testing.assert_close(layer.grad, out.grad @ value.mT)
    torch.testing.assert_close(layer.attn @ value, out)
    assert_all_close([layer.scores.to(X).softmax(-1).nan_to_num(0.0)], [layer.attn])
    assert torch.equal(layer.visible.expand_as(layer.attn), visible.expand_as(layer.attn))
    with capture_attention(model) as streamed:
        assert_all_close(gradients(model), expected)
        first = streamed[0].sums
        table = energy_table(streamed, n_boot=1).drop(columns="layer")
        model.parts[0].data.mul_(2)
        gradients(model)
    of_maps = head_energy(layer.attn, layer.grad, visible, n_boot=1)
    pd.testing.assert_frame_equal(table, of_maps)
    assert len(streamed[0].sums) == 2 * B  # passes add up
    torch.testing.assert_close(streamed[0].sums[:B], first)
    with pytest.raises(RuntimeError, match="maps=True"):
        _ = streamed[0].attn


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_by_all_its_paths(need_weights, training):
    model = nn.MultiheadAttention(16, H, batch_first=True, dtype=torch.float64).train(training)
    out, weights = model(X, X, X, need_weights=True, average_attn_weights=False)
    with capture_attention(model, True) as layers, capture_attention(model, True) as inner:
        again = model(X, X, X, need_weights=need_weights)[0]
        again.sum().backward()
    torch.testing.assert_close(again, out)
    assert len(layers) == len(inner) == 1  # also nested
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
        shapes = [layer.attn.shape[2:] for layer in layers]
        assert shapes == [(5, 5), (5, 5), (3, 3), (3, 5)][: len(layers)]


def test_dropout_comes_after_the_weights():
    model, sums = Calling(sdpa(dropout_p=0.5)), []
    for maps in (False, True):
        torch.manual_seed(0)
        with capture_attention(model, maps) as layers:
            gradients(model)
        sums.append(layers[0].sums)
    torch.testing.assert_close(*sums)  # without maps it cannot stay fused
    (layer,) = layers
    torch.testing.assert_close(layer.attn.sum(-1), torch.ones(B, H, T, dtype=torch.float64))
    assert 0.2 < (layer.grad == 0).double().mean() < 0.8


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

    expected = gradients(Calling(by_rule))
    model = Calling(attend)
    with softmax_rule(model, rule):
        assert_all_close(gradients(model), expected)


@pytest.mark.parametrize("rule", ["full", "mean", "balanced_evenly"])
def test_a_query_in_padding_counts_for_nothing_however_the_padding_is_written(rule):
    def least(q, k, v):  # as many models write it: such a query attends to all keys alike
        bias = torch.where(PADDED, 0.0, torch.finfo(torch.float32).min)
        return (q @ k.mT / math.sqrt(D) + bias).softmax(-1) @ v

    found = []
    for attend in (least, WAYS["sdpa padded"][0]):
        model = Calling(attend)
        with capture_attention(model) as layers, softmax_rule(model, rule):
            of_scores = gradients(model)[:2]  # of queries and keys
        found.append([layers[0].sums, *of_scores])
    assert_all_close(*found)


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("way", ["sdpa causal", "torch.softmax"])
def test_rules_and_captures_can_be_nested_in_any_order(way, maps):
    model = Calling(WAYS[way][0])
    with softmax_rule(model, "diagonal"):
        expected = gradients(model)
    with softmax_rule(model, "diagonal"), capture_attention(model, maps) as inner:
        assert_all_close(gradients(model), expected)
    with capture_attention(model, maps) as outer, softmax_rule(model, "diagonal"):
        assert_all_close(gradients(model), expected)
    with capture_attention(model, maps=True) as exact:
        gradients(model)
    for layer in (*inner, *outer):
        torch.testing.assert_close(layer.sums, exact[0].sums)  # of the same a and g


def test_a_rule_is_that_of_our_own_model_to_the_digits_of_small_gradients_and_no_other():
    own, *ruled = (make_model(softmax_backward=name) for name in ("diagonal", "diagonal", "full"))
    own(*batch(4))[1].backward()
    for model in ruled:
        with softmax_rule(model, "diagonal"):
            model(*batch(4))[1].backward()
        for p, q in zip(own.parameters(), model.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm()
    for name in ("running", "nothing"):  # one with a memory, and none
        with pytest.raises(ValueError, match=r"choose one of full, diagonal, .*, none"):
            softmax_rule(model, name).__enter__()


def test_a_rule_is_that_of_the_layers_it_names_and_others_keep_the_exact_gradient():
    found = []
    for rule, only in (("full", ""), ("none", r"blocks\.0")):
        model = make_model()
        with softmax_rule(model, rule, only):
            model(*batch(4))[1].backward()
        found.append([block.attn.q_proj.weight.grad for block in model.blocks])
    (exact, *above), (nothing, *kept) = found
    assert exact.any() and nothing is None and all(map(torch.equal, above, kept))


# --- passes of our model are not mixed ------------------------------------------------------------


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"block_size": 7, "vocab_size": 11, "n_layer": 3, "n_head": 2, "n_embd": 12}
    return LocalGPT(LocalGPTConfig(**sizes | {"method": "bp"} | changes))


def batch(B, T=7, seed=0):
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(seed))


def maps_of(layers):
    return [x for layer in layers for x in (layer.scores, layer.attn, layer.grad)]


def test_maps_are_those_of_the_pass_whose_gradient_arrived_last_and_never_of_two():
    model, pairs = make_model(), [batch(4), batch(3, T=5, seed=1)]
    expected = [maps_of(capture_batch(model, *pair)) for pair in pairs]
    with capture_attention(model, maps=True) as layers:
        losses = [model(*pair)[1] for pair in pairs]
        with torch.no_grad():
            model(batch(5)[0])
        for loss, maps in zip(losses, expected, strict=True):
            loss.backward()
            assert_all_close(maps_of(layers), maps)
        sum(model(*pair)[1] for pair in pairs).backward()
    assert_all_close(maps_of(layers), expected[0 if len(layers[0].attn) == 4 else 1])


def test_capture_batch_leaves_gradients_mode_and_random_numbers_alone():
    model = make_model(method="dfa").eval()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 2.0)
    rng = torch.get_rng_state()
    capture_batch(model, *batch(4))
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is None if i % 2 else bool((parameter.grad == 2).all())
    assert_as_it_was(model)


# --- what is missing says why, and nothing is left behind -----------------------------------------

TOO_LATE = r"call loss\.backward\(\) inside the 'with' block, on a loss that depends on this layer"


def test_what_was_not_captured_says_why():
    model, (x, y) = make_model(), batch(4)
    with capture_attention(model, maps=True) as layers:
        with torch.no_grad():
            model(x, y)
        with pytest.raises(RuntimeError, match=r"no_grad\(\), or every parameter is frozen"):
            _ = layers[0].grad
        model(x, y)[1].backward()
        _, loss = model(*batch(3))  # hides the gradient of the earlier pass
        assert all(len(layer.attn) == len(layer.scores) == 3 for layer in layers)
    loss.backward()  # too late
    with pytest.raises(RuntimeError, match=TOO_LATE):
        _ = layers[0].grad


@pytest.mark.parametrize("maps", [True, False])
def test_a_layer_that_the_loss_does_not_depend_on_is_named(maps):
    model = nn.ModuleList([Calling(sdpa()), Calling(sdpa())])
    model.forward = lambda: [attention() for attention in model]
    with capture_attention(model, maps) as layers:
        model()[0].sum().backward()
    assert len(energy_table(layers[:1], n_boot=1)) == H
    with pytest.raises(RuntimeError, match=f"'1': {TOO_LATE}"):
        energy_table(layers)


def test_a_compiled_model_is_refused_also_if_only_in_part():
    compiled = make_model()
    compiled.blocks[1].compile(backend="eager")
    for model in (compiled, torch.compile(make_model(), backend="eager")):
        with pytest.raises(ValueError, match=r"is compiled, .* before torch\.compile"):
            capture_attention(model).__enter__()
        assert_as_it_was(model)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("watch", [capture_attention, lambda model: softmax_rule(model, "zero")])
def test_after_an_exception_all_is_as_it_was_and_other_peoples_hooks_stay(watch, where, error):
    def fail(*args):
        raise error

    def attend(q, k, v):
        out = sdpa()(q, k, v)
        out.register_hook(fail) if where == "backward" else fail()
        return out

    model = Calling(Calling(attend), [])
    theirs = model.register_forward_hook(lambda *args: None)
    with pytest.raises(error), watch(model):
        model().sum().backward()
    assert list(model._forward_hooks) == [theirs.id]
    theirs.remove()
    assert_as_it_was(model)


# --- models of others: right, or refused before the pass goes on ----------------------------------

WATCHES = [capture_attention, functools.partial(softmax_rule, name="diagonal")]


@pytest.mark.parametrize("number", [-100.0, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("way", [lambda mask: sdpa(attn_mask=mask), adding], ids=["fused", "eager"])
def test_a_key_is_hidden_by_whatever_number(way, number):
    found = []
    for hides in (-math.inf, number):
        mask = torch.where(LOWER & (torch.arange(T) < 3), 0.0, hides).double()
        model = Calling(way(mask))
        with capture_attention(model) as layers:
            gradients(model)
        found.append([layers[0].sums])
        for rule in ("ste", "mean", "balanced_evenly"):
            with softmax_rule(model, rule):
                found[-1] += gradients(model)
    assert_all_close(*found)


@pytest.mark.parametrize("way", [lambda mask: sdpa(attn_mask=mask), adding], ids=["fused", "eager"])
def test_no_key_is_hidden_by_its_score_alone_or_by_half_precision(way):
    # in a head of Pythia-70m all scores are about -110,208
    shifted = [sums_of(Calling(way(torch.full((T, T), by).double()))) for by in (0.0, -110208.0)]
    torch.testing.assert_close(*shifted, atol=1e-9, rtol=1e-6)
    model = Calling(way(-20 * (1 - torch.eye(T)).half())).half()  # exp(-20) is zero in half
    with capture_attention(model, maps=True) as layers:
        model().sum().backward()
    assert layers[0].visible.all() and (way is not adding or not layers[0].attn.all())


@pytest.mark.parametrize("shared", ["q", "k", "v", "qk", "kv", "qv"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_that_are_shared_get_the_sum_of_their_gradients(shared, axis):
    shapes = [[B, H, T, D] for _ in "qkv"]
    for name, shape in zip("qkv", shapes, strict=True):
        shape[axis] = 1 if name in shared else shape[axis]
    q, k, v = Calling(None, shapes).parts
    attn = (q @ k.mT / math.sqrt(D)).softmax(-1)
    attn.retain_grad()
    weighed(attn @ v).backward()
    expected = head_sums(attn.detach(), attn.grad, FULL)
    for maps in (False, True):
        torch.testing.assert_close(sums_of(Calling(sdpa(), shapes), maps), expected)


@pytest.mark.parametrize("watch", WATCHES)
def test_attention_whose_heads_cannot_be_told_is_refused_by_its_name(watch):
    went_on = []

    def attend(*parts):
        went_on.append(sdpa()(*parts))

    for shape in ((B, T, D), (B, 3, H, T, D)):
        reason = rf"attention of 'attend' has shape {re.escape(str(shape))}.* leave it out by only="
        model = Calling(Calling(attend, [shape] * 3), [])
        with pytest.raises(ValueError, match=reason), watch(model):
            model()
    jagged = torch.nested.nested_tensor([torch.ones(n, H, D) for n in (2, 5)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested tensors"), watch(model := Calling(attend, [])):
        model.attend = lambda: attend(*[jagged.transpose(1, 2)] * 3)
        model()
    assert not went_on


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("attend", [sdpa(), adding(0.0)], ids=["fused", "eager"])
def test_an_empty_batch_adds_nothing(attend, maps):
    empty = Calling(attend, [(0, H, T, D)] * 3)
    assert sums_of(empty, maps).shape[:2] == (0, H)
    with pytest.raises(ValueError, match="every batch was empty"):
        energy_table([SimpleNamespace(sums=sums_of(empty, maps), shape=None)])


LAYOUTS = {"window": (B, T, H, 3), "batch second": (H, B, T, T), "landmarks": (B * H, 3, 2, 4)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["num_heads", "n_head", "heads", "nhead", "num_attention_heads"])
def test_scores_are_compared_with_how_many_heads_the_model_says_it_has(name, layout):
    shape = LAYOUTS[layout]

    def model_with(n_heads):
        inner = Calling(lambda scores: scores.softmax(-1), [shape])
        in_config = SimpleNamespace(**{name: n_heads})
        here, above = Calling(inner, [], **{name: n_heads}), Calling(inner, [], config=in_config)
        own = Calling(inner.attend, [shape], config=SimpleNamespace(**{name: n_heads}))
        return own, here, above

    for watch in WATCHES:
        for model in model_with(5):
            reason = rf"'(attend)?' has shape {re.escape(str(shape))}, and not \(batch, 5"
            with pytest.raises(ValueError, match=reason), watch(model):
                model()
    for model in model_with(shape[1]):
        with capture_attention(model) as layers:
            weighed(model()).backward()
        assert energy_table(layers, n_boot=1).attrs["shapes"] == [shape]


def test_what_was_let_through_is_named_unless_only_leaves_it_out():
    model = nn.ModuleList([Calling(adding(0.0)), Calling(adding(0.0), [(1, B, H, T, D)] * 3)])
    model.append(Calling(lambda x: x.softmax(1), [(B, H, T, D)]))
    model.append(Calling(lambda x: x.softmax(-1), [(T, D)]))  # a router, or classes
    model.forward = lambda: sum(weighed(part()) for part in model)
    for watch in WATCHES:
        passed = r"in '1' on \(1, 2, 4, 6, 6\), '2' on \(2, 4, 6, 8\): if"
        with pytest.warns(UserWarning, match=passed) as found, watch(model):
            model().backward()
        assert found[0].filename == __file__
        with warnings.catch_warnings(action="error"), watch(model, only="0|3"):
            model().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("watch", WATCHES)
def test_where_no_attention_is_seen_a_rule_says_so_too(watch):
    unseen = "no attention was seen: none of PyTorch's softmaxes"
    layer = nn.TransformerEncoderLayer(16, H, 8, dtype=torch.float64, batch_first=True).eval()
    traced = torch.jit.trace(layer, X, check_trace=False)
    for model in (Calling(adding(0.0), [(H, T, D)] * 3), traced):
        with pytest.raises(RuntimeError, match=unseen), watch(model):
            model(*[] if isinstance(model, Calling) else [X])
    misspelled = rf"{unseen} .* matches 'selfattn'"
    with pytest.raises(RuntimeError, match=misspelled), watch(layer, only="selfattn"):
        layer(X)
    with pytest.raises(RuntimeError, match="no module was called"), watch(layer):
        pass
    assert_as_it_was(layer)


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("attend", [sdpa(), adding(0.0)], ids=["fused", "eager"])
def test_a_compiled_function_in_a_model_is_refused(attend, watch):
    model = Calling(torch.compile(attend, backend="eager"))
    for _ in range(2):  # compiled within the block, and before it
        with pytest.raises(ValueError, match=r"that torch\.compile made"), watch(model):
            model()
        model()
    unattended = torch.compile(lambda x: x.sin(), backend="eager")
    with watch(model := Calling(lambda *parts: attend(*map(unattended, parts)))):
        weighed(model()).backward()


@pytest.mark.parametrize("watch", WATCHES)
def test_under_transforms_of_functions_it_is_refused(watch):
    model = Calling(sdpa())
    state = dict(model.named_parameters())

    def loss(state):
        return weighed(torch.func.functional_call(model, state, ()))

    doubled = {name: torch.stack([value, value]) for name, value in state.items()}
    for call in (lambda: torch.func.grad(loss)(state), lambda: torch.vmap(loss)(doubled)):
        with pytest.raises(ValueError, match=r"'' is run by torch\.func"), watch(model):
            call()


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("attend", [sdpa(), adding(0.0)], ids=["fused", "eager"])
def test_a_gradient_that_is_to_be_differentiated_is_refused(attend, maps):
    model = Calling(attend)

    def penalty(loss):
        grads = torch.autograd.grad(loss, [*model.parts], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), [*model.parts])

    with nn.attention.sdpa_kernel(MATH):
        with capture_attention(model, maps):
            loss = weighed(model())
            with pytest.raises(RuntimeError, match=r"create_graph=True: the gradient at ''"):
                penalty(loss)
        assert_all_close(penalty(loss), penalty(weighed(model())))  # outside of the block


def test_a_copy_that_is_made_in_the_block_is_not_watched():
    model = nn.TransformerEncoderLayer(16, H, 8, 0.0, dtype=torch.float64, batch_first=True)
    exact, file = gradients(model, X), io.BytesIO()
    with capture_attention(model) as layers, softmax_rule(model, "diagonal"):
        copied = copy.deepcopy(model)
        torch.save(model, file)
        gradients(model, X)
        assert_all_close(gradients(copied, X), exact)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert_as_it_was(other)
        assert_all_close(gradients(other, X), exact)
    assert len(layers[0].sums) == B


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("attend", [sdpa(), adding(0.0)], ids=["fused", "eager"])
def test_a_gradient_that_is_not_finite_is_taken_note_of(attend, maps):
    model = Calling(attend)
    scale = torch.ones(H).double()
    with capture_attention(model, maps) as layers:
        for scale[1] in (1.0, math.inf) if maps else (math.inf, 1.0):  # maps are of the last pass
            weighed(model() * scale[:, None, None]).backward()
    with pytest.warns(UserWarning, match=r"layer 0, heads \[1\]: .* not finite"):
        table = energy_table(layers, n_boot=2)
    assert table["defined"].tolist() == [True, False, True, True]
    assert table.loc[1, "r_diag":].isna().all() and not table.drop(1).isna().any(axis=None)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("attend", [sdpa(), adding(0.0), Calling(sdpa(is_causal=True), [])],
                         ids=["fused", "eager", "a module that is shared, as in ALBERT"])
def test_what_is_used_twice_is_two_layers_also_if_it_is_recomputed(attend, use_reentrant):
    def recomputed(*parts):
        first = checkpoint(attend, *parts, use_reentrant=use_reentrant)
        return checkpoint(attend, first, *parts[1:], use_reentrant=use_reentrant)

    models = [Calling(lambda q, k, v: attend(attend(q, k, v), k, v)), Calling(recomputed)]
    name = "shared" if isinstance(attend, nn.Module) else ""
    for model in models:
        model.shared = attend
    for maps in (False, True):
        found = []
        for model in models:
            with capture_attention(model, maps) as layers:
                weighed(model()).backward()
            assert [layer.name for layer in layers] == [name, f"{name} (2)"]
            found.append([layer.sums for layer in layers])
        assert_all_close(*found)
    found = []
    for model in models:
        with softmax_rule(model, "diagonal"):
            found.append(gradients(model))
    assert_all_close(*found)


def test_the_output_of_fused_attention_can_be_changed_in_place():
    found = []
    for double in (lambda out: 2 * out, lambda out: out.mul_(2)):
        model = Calling(lambda *parts, by=double: by(sdpa()(*parts)))
        with nn.attention.sdpa_kernel(MATH):  # others keep it for their own backward pass
            found.append([sums_of(model), *of_parameters(model)])
    assert_all_close(*found)


def test_a_softmax_of_scores_and_noise_is_seen():
    model = Calling(adding(0.0, lambda x, dim: F.gumbel_softmax(x, dim=dim)))
    assert sums_of(model).shape[:2] == (B, H)


# --- models of the transformers library, random and small -----------------------------------------

V, N = 300, 10
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": H}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
QWEN = GROUPED | {"use_sliding_window": True, "max_window_layers": 1}
GEMMA = GROUPED | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
GPT_OSS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": H, "n_positions": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": H}
T5 |= {"decoder_start_token_id": 0}
LAYERS = [f"model.layers.{i}.self_attn" for i in range(2)]
T5_LAYERS = [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
T5_LAYERS += [f"decoder.block.{i}.layer.{name}"
              for i in range(2) for name in ("0.SelfAttention", "1.EncDecAttention")]
# model type: what it is made for, its configuration, the names of its attentions
MODELS = {
    "gpt2": ("CausalLM", GPT2, ["transformer.h.0.attn", "transformer.h.1.attn"]),
    "qwen3": ("CausalLM", QWEN, LAYERS),
    "gemma2": ("CausalLM", GEMMA, LAYERS),
    "gpt_oss": ("CausalLM", GPT_OSS, LAYERS),
    "t5": ("Seq2SeqLM", T5, T5_LAYERS),
}
EAGER_ALONE = {"gemma2", "gpt_oss"}  # a soft cap, a sink: no fused attention has them


@pytest.fixture(scope="module")
def model_of():
    transformers = pytest.importorskip("transformers", reason="pip install -e .[transformers]")

    def make(name):
        torch.manual_seed(0)
        kind, sizes, _ = MODELS[name]
        special = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = transformers.AutoConfig.for_model(name, **sizes, **special)
        auto = getattr(transformers, f"AutoModelFor{kind}")
        model = auto.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():  # as sharp as after some training, also the sinks
            nn.init.normal_(parameter, mean=float(parameter.data.mean().round()), std=0.15)
        return model.eval()

    return make


def text_for(model, padded=False):
    """Three sequences, if ``padded`` the second on its left and the third on its right."""
    ids = torch.randint(3, V, (3, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, N, dtype=torch.long)
    if padded:
        mask[1, :3] = mask[2, -3:] = 0
    # the first token would be asked of a query that sees nothing
    labels = ids.masked_fill((mask.cumsum(1) == 1) | (mask == 0), -100)
    if model.config.is_encoder_decoder:
        labels = ids[:, :7].flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def weight_gradients(model, text):
    model.zero_grad()
    model(**text).loss.backward()
    return of_parameters(model)


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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_gradients_are_those_that_the_model_returns_itself(name, padded, model_of):
    model = model_of(name)
    text = text_for(model, padded)
    weights, expected = own_attentions(model, text), weight_gradients(model, text)
    tables = []
    for implementation in ("eager",) if name in EAGER_ALONE else ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with capture_attention(model, maps=True) as layers:
            assert_all_close(weight_gradients(model, text), expected)
        assert [layer.name for layer in layers] == MODELS[name][2]
        for layer, own in zip(layers, weights, strict=True):
            rows = text["attention_mask"].bool()[:, None, :, None]  # queries that are no padding
            rows = rows if own.shape[2] == N else torch.tensor(True)
            keys = slice(own.shape[-1])  # without the sink
            visible = layer.visible.expand_as(layer.attn)[..., keys] & rows
            assert torch.equal(visible, (own > 0) & rows)
            assert_all_close([layer.attn[..., keys] * rows], [own * rows])
            assert_all_close([layer.grad[..., keys] * visible], [own.grad * visible])
        tables.append(energy_table(layers, n_boot=20))
        with capture_attention(model) as streamed:
            weight_gradients(model, text)
        pd.testing.assert_frame_equal(energy_table(streamed, n_boot=20), tables[-1], atol=1e-5)
    assert tables[0]["defined"].all() and len(tables[0]) == H * len(weights)
    # sliding windows, a sink, a soft cap: there to be seen, where the model is to have them
    has_window = any(not own[0, :, -1, 0].any() for own in weights)
    assert has_window == (name in {"qwen3", "gemma2", "gpt_oss"})
    assert (weights[0][0].sum(-1).min() < 0.999) == (name == "gpt_oss")
    if name == "gemma2":
        assert max(layer.scores[layer.scores > -1e4].abs().max() for layer in layers) < 2
