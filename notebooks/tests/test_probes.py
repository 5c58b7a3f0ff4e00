"""The probes: rules that ask what in the lateral sum matters. Each against a formula of its own, and what is random."""

import math

import pytest
import torch

from helpers import RecallTask, symptoms, train
from model_local import HALVES, PROBES, SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, as_noise

B, H, T = 3, 2, 6
CONFIG = LocalGPTConfig(block_size=T + 1, vocab_size=5, n_layer=1, n_head=H, n_embd=8, method="bp")
VISIBLE = torch.ones(T, T, dtype=torch.bool).tril()


def maps(seed=0):
    """Attention weights, dL/dA and the exact pass (B, H, T, T), in float64."""
    generator = torch.Generator().manual_seed(seed)
    scores, g = torch.randn(2, B, H, T, T, generator=generator, dtype=torch.float64)
    a = (2 * scores).masked_fill(~VISIBLE, -math.inf).softmax(-1)
    return a, g, a * (g - (a * g).sum(-1, keepdim=True))


def send(name, a, g, memory=None):
    rule = PROBES[name]
    if memory is None and hasattr(rule, "start"):
        memory = rule.start(CONFIG).double()
    return rule(a, g, VISIBLE, memory)


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten(2), y.flatten(2), dim=-1)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_a_rule(name):
    a, g, _ = maps()
    before = a.clone(), g.clone()
    sent = send(name, a, g)
    assert torch.equal(a, before[0]) and torch.equal(g, before[1])
    assert sent.isfinite().all() and not sent[..., ~VISIBLE].any() and torch.equal(sent, send(name, a, g))
    assert SOFTMAX_BACKWARD[name] is PROBES[name]
    a[:, :, 2:] = torch.nn.functional.one_hot(torch.zeros(T - 2, dtype=int), T)  # saturated rows, and no error at all
    assert send(name, a, g).isfinite().all() and send(name, a, torch.zeros_like(g)).isfinite().all()


@pytest.mark.parametrize("dose", [0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2])
def test_a_dose_of_the_exact_baseline(dose):
    a, g, _ = maps()
    b = (a * g).sum(-1, keepdim=True)
    torch.testing.assert_close(send(f"zero_{dose:g}b", a, g), a * (g - dose * b))
    torch.testing.assert_close(send(f"diagonal_{dose:g}b", a, g), a * (1 - a) * (g - dose * b))


@pytest.mark.parametrize(("base", "exact"), [("zero", "full"), ("diagonal", "balanced_by_attention")])
def test_a_message_told_in_few_bits_late_or_with_noise(base, exact):
    a, g, _ = maps()
    local, whole = (SOFTMAX_BACKWARD[name](a, g, VISIBLE) for name in (base, exact))
    m = local.sum(-1, keepdim=True)
    torch.testing.assert_close(local - a * m, whole)

    def told(name, **kwargs):
        """What stands in the place of m: the same for all keys of a query, so that attention weighs it."""
        number = (local - send(f"{base}_{name}", a, g, **kwargs)).sum(-1, keepdim=True)
        torch.testing.assert_close(local - a * number, send(f"{base}_{name}", a, g, **kwargs))
        return number

    sign, power, noisy = told("as_sign"), told("as_power"), told("as_noise")
    torch.testing.assert_close(sign, m.sign() * m.abs().mean((0, 2, 3), keepdim=True))
    exponent = power[m != 0].abs().log2()
    torch.testing.assert_close(exponent, exponent.round(), atol=1e-9, rtol=0)
    ratio = (power / m)[m != 0]
    assert ratio.min() >= 2**-0.5 - 1e-6 and ratio.max() <= 2**0.5 + 1e-6
    factors = (noisy / m)[m.abs() > 1e-9]
    assert factors.std() > 0.3 and factors.unique().numel() == factors.numel(), "each query draws its own"
    same, fresh = (as_noise(m, weights, None) for weights in (a, maps(1)[0]))
    torch.testing.assert_close(same, noisy, msg="the same map draws the same again")
    assert (fresh / m - noisy / m)[m.abs() > 1e-9].abs().min() > 0, "another map, in the next iteration, draws anew"
    memory = torch.randn(H, T + 1, 1, dtype=torch.float64)
    torch.testing.assert_close(told("as_remembered", memory=memory), memory[:, :T].expand(B, H, T, 1))
    learnt = PROBES[f"{base}_as_remembered"].learn(memory, a, g, VISIBLE)
    torch.testing.assert_close(learnt[:, :T], m.mean(0))
    assert torch.equal(learnt[:, T:], memory[:, T:])


@pytest.mark.parametrize("direction", ["row", "attention", "random"])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_error_has_its_direction_size_and_persistence(direction, fresh):
    name = f"error_{direction}_{'fresh' if fresh else 'fixed'}"
    signs, draws = set(), []
    for seed in range(8):
        a, g, f = maps(seed)
        error = send(name, a, g) - f
        torch.testing.assert_close((error * f).sum((-2, -1)), torch.zeros(B, H, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(cosine(f + error, f), torch.full((B, H), 0.8, dtype=torch.float64))
        pattern = {"row": VISIBLE.double().expand_as(a), "attention": a}.get(direction)
        if direction == "random" and not fresh:
            always = torch.randn(H, T, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            pattern = (always * VISIBLE).expand_as(a)
        if pattern is not None:
            along = pattern - f * ((pattern * f).sum((-2, -1)) / f.square().sum((-2, -1)))[..., None, None]
            assert (cosine(error, along).abs() > 1 - 1e-9).all()
            signs.update(
                (int(head), int(s)) for head in range(H) for s in cosine(error, along)[:, head].sign().unique()
            )
        draws.append(error / error.norm(dim=(-2, -1), keepdim=True))
    if direction == "random" and fresh:
        assert cosine(draws[0], draws[1]).abs().mean() < 0.5
    else:
        assert signs == {(head, s) for head in range(H) for s in ((-1, 1) if fresh else (1,))}


@pytest.mark.parametrize("name", [name for name in PROBES if name.endswith("absolute")])
def test_an_absolute_error_keeps_the_size_that_it_had_at_first(name):
    rule, (a, g, f) = PROBES[name], maps()
    memory = rule.start(CONFIG).double()
    assert torch.equal(rule(a, g, VISIBLE, memory), f), "the size is not known yet"
    memory = rule.learn(memory, a, g, VISIBLE)
    torch.testing.assert_close(memory[:, 0, 0], f.norm(dim=(-2, -1)).mean(0))
    assert torch.equal(rule.learn(memory, a, 5 * g, VISIBLE), memory)
    small = 0.01 * g
    error = rule(a, small, VISIBLE, memory) - 0.01 * f
    torch.testing.assert_close(error.norm(dim=(-2, -1)), (0.75 * memory[:, 0, 0]).expand(B, H))


@pytest.mark.parametrize(
    "rule, half, other",
    [("diagonal", "row_constant", "balanced_evenly"), ("zero", "zero_row_constant", "zero_row_rest")],
)
def test_the_error_of_a_local_rule_is_its_mean_over_a_row_and_the_rest(rule, half, other):
    a, g, exact = maps()
    error, constant, rest = (SOFTMAX_BACKWARD[name](a, g, VISIBLE) - exact for name in (rule, half, other))
    torch.testing.assert_close(constant + rest, error)
    torch.testing.assert_close(rest.sum(-1), torch.zeros(B, H, T, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(constant, error.sum(-1, keepdim=True) / VISIBLE.sum(-1, keepdim=True) * VISIBLE)


@pytest.mark.parametrize("after", [500, 2000])
@pytest.mark.parametrize("then", ["diagonal", "zero", *HALVES])
def test_a_transplant_is_exact_until_its_iteration_and_then_another_rule(after, then):
    a, g, exact = maps()
    rule, other = PROBES[f"full_{after}_then_{then}"], SOFTMAX_BACKWARD[then](a, g, VISIBLE)
    memory = rule.start(CONFIG)
    assert not torch.allclose(exact, other)
    for step in range(after + 2):
        if step in (0, after - 1, after, after + 1):
            torch.testing.assert_close(rule(a, g, VISIBLE, memory), exact if step < after else other)
        memory = rule.learn(memory, a, g, VISIBLE)


def test_a_transplant_counts_training_iterations_whatever_is_measured_between_them():
    task = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
    rule = "full_500_then_zero"
    config = LocalGPTConfig(task.block_size, task.vocab_size, 2, 2, 8, method="bp", softmax_backward=rule)
    run = train(config, 7, 1e-2, 4, 0, task, 3, symptoms, directory=None, progress=False)
    assert [block.attn.attn_weights.memory.item() for block in run.model.blocks] == [7, 7]


@pytest.mark.parametrize("name", ["zero_as_noise", "error_random_fresh", "error_row_fresh_absolute"])
def test_what_is_random_is_fresh_for_each_layer_and_step_and_disturbs_nothing(name):
    task = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
    config = LocalGPTConfig(task.block_size, task.vocab_size, 2, 2, 8, method="bp", softmax_backward=name)
    often, once = (
        train(config, 6, 1e-2, 4, 0, task, every, symptoms, directory=None, progress=False) for every in (1, 6)
    )
    for parameter, other in zip(often.model.parameters(), once.model.parameters(), strict=True):
        assert torch.equal(parameter, other), "measuring more often changes the run"
    model, (x, y) = LocalGPT(config), task.batch(task.block_size, 4, torch.Generator().manual_seed(0), "cpu")
    state = torch.get_rng_state()
    model(x, y)[1].backward()
    assert torch.equal(torch.get_rng_state(), state), "it draws from the numbers of others"
