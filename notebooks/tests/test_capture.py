"""The capture: maps of one pass only, the right gradient, and nothing left behind."""

from dataclasses import replace

import pytest
import torch

from helpers import capture_attention, capture_batch
from model_local import LocalGPT, LocalGPTConfig

CONFIG = LocalGPTConfig(block_size=7, vocab_size=11, n_layer=3, n_head=2, n_embd=12, method="bp")


def make_model(**changes):
    torch.manual_seed(0)
    return LocalGPT(replace(CONFIG, **changes))


def batch(B, T=7, seed=0):
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(seed))


def maps(layers):
    return [(layer.scores, layer.attn, layer.grad) for layer in layers]


def assert_same(layers, expected):
    for ours, theirs in zip(maps(layers), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def alone(model, x, y):
    """The maps of a pass that nothing disturbs."""
    return maps(capture_batch(model, x, y))  # never inside another capture, which would see this pass, too


def n_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# --- passes are not mixed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [4, 5])
def test_a_forward_pass_between_forward_and_backward_changes_nothing(B):
    model, (x, y), (x2, _) = make_model(), batch(4), batch(B, seed=1)
    with capture_attention(model, maps=True) as layers:
        _, loss = model(x, y)
        with torch.no_grad():
            model(x2)
        model.eval()(x2)
        loss.backward()
    assert_same(layers, alone(model, x, y))


def test_backward_passes_in_the_other_order_each_bring_their_own_maps():
    model, first, second = make_model(), batch(4), batch(3, T=5, seed=1)
    expected = [alone(model, *pair) for pair in (first, second)]
    with capture_attention(model, maps=True) as layers:
        losses = [model(*pair)[1] for pair in (first, second)]
        losses[0].backward()
        assert_same(layers, expected[0])
        losses[1].backward()
        assert_same(layers, expected[1])


def test_two_losses_added_give_the_maps_of_one_pass_the_same_in_all_layers():
    model, first, second = make_model(), batch(4), batch(3, seed=1)
    with capture_attention(model, maps=True) as layers:
        (model(*first)[1] + model(*second)[1]).backward()
    assert_same(layers, alone(model, *(first if len(layers[0].attn) == 4 else second)))


def test_a_later_forward_pass_hides_the_gradient_of_the_earlier_one():
    model, (x, y), (x2, _) = make_model(), batch(4), batch(3, seed=1)
    with capture_attention(model, maps=True) as layers:
        model(x, y)[1].backward()
        model(x2)
        assert all(len(layer.attn) == len(layer.scores) == 3 for layer in layers)
        with pytest.raises(RuntimeError, match=r"call loss\.backward"):
            _ = layers[0].grad


# --- the right numbers -----------------------------------------------------------------------------------------------


def test_the_gradient_is_the_slope_of_the_loss_in_the_attention_weights():
    model, (x, y) = make_model().double(), batch(4)
    layers = capture_batch(model, x, y)
    for i, layer in enumerate(layers):
        direction = torch.randn(layer.attn.shape, generator=torch.Generator().manual_seed(i)).double()
        losses = []
        for step in (1e-6, -1e-6):
            module = model.blocks[i].attn.attn_weights
            handle = module.register_forward_hook(lambda *args, step=step, to=direction: args[-1] + step * to)
            losses.append(model(x, y)[1])
            handle.remove()
        slope = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close((layer.grad * direction).sum(), slope, rtol=1e-6, atol=1e-10)


def test_scores_weights_and_names_belong_to_their_layer():
    model, (x, y) = make_model(), batch(4)
    layers = capture_batch(model, x, y)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    assert [layer.name for layer in layers] == [f"blocks.{i}.attn.attn_weights" for i in range(3)]
    for layer in layers:
        assert layer.scores.shape == layer.attn.shape == layer.grad.shape == (4, 2, 7, 7)
        assert torch.equal(layer.scores == -torch.inf, hidden.expand(4, 2, 7, 7))
        torch.testing.assert_close(layer.scores.softmax(-1), layer.attn)
        assert not any(part.requires_grad for part in (layer.scores, layer.attn, layer.grad))


# --- what is missing says why ----------------------------------------------------------------------------------------


def test_what_was_not_captured_says_why():
    model, (x, y) = make_model(), batch(4)
    with capture_attention(model, maps=True) as layers:
        assert not layers
        with torch.no_grad():
            model(x, y)
        with pytest.raises(RuntimeError, match=r"no_grad\(\), or every parameter is frozen"):
            _ = layers[0].grad
        _, loss = model(x, y)
    loss.backward()  # too late
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) inside"):
        _ = layers[0].grad
    assert layers[0].attn.shape == layers[0].scores.shape == (4, 2, 7, 7)


def test_a_loss_that_does_not_depend_on_a_layer_leaves_it_without_gradient():
    model, (x, y) = make_model(), batch(4)
    with capture_attention(model, maps=True) as layers:
        seen = []
        handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(x, y)
        handle.remove()
        seen[0].sum().backward()
    assert layers[1].grad.shape == (4, 2, 7, 7)
    with pytest.raises(RuntimeError, match="depends on this layer"):
        _ = layers[2].grad


def test_a_model_without_attention_is_refused():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"Linear: no attention .*: no module was called"), capture_attention(linear):
        pass
    with pytest.raises(RuntimeError, match="softmaxes was called on scores"), capture_attention(linear):
        linear(torch.ones(2)).softmax(-1)


def test_a_compiled_model_is_refused_and_its_original_captured():
    model, (x, y) = make_model(), batch(4)
    expected = alone(model, x, y)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"before torch\.compile"), capture_attention(compiled):
        pass
    with capture_attention(model, maps=True) as layers:
        model(x, y)[1].backward()
    assert_same(layers, expected)
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"before torch\.compile"), capture_attention(model):
        pass


# --- nothing is left behind ------------------------------------------------------------------------------------------


def test_its_own_hooks_go_and_no_others_also_after_an_exception():
    model, (x, y) = make_model(), batch(4)
    calls = []
    theirs = model.blocks[0].attn.attn_weights.register_forward_hook(lambda *args: calls.append(1))
    before = n_hooks(model)
    kept = []
    for leave in (None, KeyboardInterrupt, ValueError):
        try:
            with capture_attention(model, maps=True) as layers:
                kept.append(model(x, y)[1])
                if leave:
                    raise leave
        except (KeyboardInterrupt, ValueError):
            pass
        assert n_hooks(model) == before
        kept[-1].backward()
        with pytest.raises(RuntimeError, match="no gradient"):  # it came too late
            _ = layers[0].grad
    assert len(calls) == 3
    theirs.remove()


def test_captures_can_be_nested_in_any_order():
    model, (x, y) = make_model(), batch(4)
    expected = alone(model, x, y)
    with capture_attention(model, maps=True) as outer:
        with capture_attention(model, maps=True) as inner:
            _, loss = model(x, y)
        loss.backward()
    assert_same(outer, expected)
    with pytest.raises(RuntimeError, match="no gradient"):
        _ = inner[0].grad


@pytest.mark.parametrize("method", ["bp", "fa", "dfa"])
@pytest.mark.parametrize("training", [True, False])
def test_capture_batch_leaves_gradients_weights_mode_and_random_numbers_alone(method, training):
    model, (x, y) = make_model(method=method).train(training), batch(4)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 2.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    capture_batch(model, x, y)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    for i, parameter in enumerate(model.parameters()):
        assert parameter.grad is None if i % 2 else bool((parameter.grad == 2).all())
    assert n_hooks(model) == 0


def test_the_forward_and_backward_pass_are_the_same_with_a_capture():
    model, (x, y) = make_model(method="fa"), batch(4)
    model(x, y)[1].backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with capture_attention(model):
        model(x, y)[1].backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        # to rounding: with one thread the order of a sum depends on where its terms lie in memory
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())
