"""The probes: each against a formula of its own, and what is random in them."""

import math

import pytest
import torch
from torch.nn import functional as F

from data.probes import DOSES, HALVES, PROBES, TRANSPLANTS, as_noise, probe_name
from model_local import SOFTMAX_BACKWARD, LocalGPTConfig

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
    rule = SOFTMAX_BACKWARD[name]
    if not hasattr(rule, "start"):
        return rule(a, g, VISIBLE)
    return rule(a, g, VISIBLE, rule.start(CONFIG).double() if memory is None else memory)


def cosine(x, y):
    return F.cosine_similarity(x.flatten(2), y.flatten(2), dim=-1)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_a_rule(name):
    a, g, _ = maps()
    before, random_numbers = (a.clone(), g.clone()), torch.get_rng_state()
    sent = send(name, a, g)
    assert torch.equal(a, before[0]) and torch.equal(g, before[1])
    assert torch.equal(random_numbers, torch.get_rng_state()), "it draws from those of others"
    assert sent.isfinite().all() and not sent[..., ~VISIBLE].any()
    assert torch.equal(sent, send(name, a, g)), "to measure a model draws the same again"
    a[:, :, 2:] = F.one_hot(torch.zeros(T - 2, dtype=int), T)  # saturated rows, and no error
    assert send(name, a, g).isfinite().all() and send(name, a, 0 * g).isfinite().all()


@pytest.mark.parametrize("dose", DOSES)
def test_a_dose_of_the_exact_baseline(dose):
    a, g, _ = maps()
    error = g - dose * (a * g).sum(-1, keepdim=True)
    torch.testing.assert_close(send(probe_name("dosed", "zero", dose), a, g), a * error)
    torch.testing.assert_close(send(probe_name("dosed", "diagonal", dose), a, g),
                               a * (1 - a) * error)


@pytest.mark.parametrize("base, exact", [("zero", "full"), ("diagonal", "balanced_by_attention")])
def test_a_message_told_in_few_bits_late_or_with_noise(base, exact):
    a, g, _ = maps()
    local = send(base, a, g)
    m = local.sum(-1, keepdim=True)
    torch.testing.assert_close(local - a * m, send(exact, a, g))

    def told(rule, memory=None):
        """What stands in the place of m: one number per query, weighed by attention."""
        sent = send(probe_name(rule, base), a, g, memory)
        number = (local - sent).sum(-1, keepdim=True)
        torch.testing.assert_close(local - a * number, sent)
        return number

    size = m.abs().mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(told("as_sign"), m.sign() * size)
    power = told("as_power")
    exponent = power[m != 0].abs().log2()
    torch.testing.assert_close(exponent, exponent.round(), atol=1e-9, rtol=0)
    ratio = (power / m)[m != 0]
    assert ratio.min() >= 2**-0.5 - 1e-6 and ratio.max() <= 2**0.5 + 1e-6

    factors = (told("as_noise") / m)[m.abs() > 1e-9]
    assert factors.std() > 0.3 and len(factors.unique()) == len(factors), "each query draws its own"
    fresh = as_noise(m, maps(1)[0])
    assert (fresh / m)[m.abs() > 1e-9].sub(factors).abs().min() > 0, "another map draws anew"

    memory = torch.randn(H, T + 1, 1, dtype=torch.float64)
    torch.testing.assert_close(told("as_remembered", memory), memory[:, :T].expand(B, H, T, 1))
    learnt = PROBES[probe_name("as_remembered", base)].learn(memory, a, g, VISIBLE)
    torch.testing.assert_close(learnt, torch.cat([m.mean(0), memory[:, T:]], 1))


@pytest.mark.parametrize("direction", ["row", "attention", "random"])
@pytest.mark.parametrize("fresh", [False, True])
def test_an_error_has_its_direction_size_and_persistence(direction, fresh):
    name = f"error_{direction}_{'fresh' if fresh else 'fixed'}"
    signs, draws = set(), []
    for seed in range(8):
        a, g, f = maps(seed)
        error = send(name, a, g) - f
        assert (error * f).sum((-2, -1)).abs().max() < 1e-9, "at right angles"
        torch.testing.assert_close(cosine(f + error, f), torch.full((B, H), 0.8).double())
        pattern = {"row": VISIBLE.double().expand_as(a), "attention": a}.get(direction)
        if direction == "random" and not fresh:
            generator = torch.Generator().manual_seed(0)
            always = torch.randn(H, T, T, generator=generator, dtype=torch.float64)
            pattern = (always * VISIBLE).expand_as(a)
        if pattern is not None:
            share = (pattern * f).sum((-2, -1)) / f.square().sum((-2, -1))
            along = cosine(error, pattern - f * share[..., None, None])
            assert (along.abs() > 1 - 1e-9).all()
            signs |= {(head, int(s)) for head in range(H) for s in along[:, head].sign().unique()}
        draws.append(error)
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
    error = rule(a, 0.01 * g, VISIBLE, memory) - 0.01 * f
    torch.testing.assert_close(error.norm(dim=(-2, -1)), (0.75 * memory[:, 0, 0]).expand(B, H))


@pytest.mark.parametrize("base, constant, rest", [
    ("diagonal", "row_constant diagonal", "balanced_evenly"),
    ("zero", "row_constant zero", "row_rest zero")])
def test_the_error_of_a_local_rule_is_its_mean_over_a_row_and_the_rest(base, constant, rest):
    a, g, exact = maps()
    error, constant, rest = (send(name, a, g) - exact for name in (base, constant, rest))
    torch.testing.assert_close(constant + rest, error)
    assert rest.sum(-1).abs().max() < 1e-12
    mean = error.sum(-1, keepdim=True) / VISIBLE.sum(-1, keepdim=True)
    torch.testing.assert_close(constant, mean * VISIBLE)


@pytest.mark.parametrize("after", [500, 2000])
@pytest.mark.parametrize("then", TRANSPLANTS, ids=" ".join)
def test_a_transplant_is_exact_until_its_iteration_and_then_another_rule(after, then):
    assert {*HALVES} < {*TRANSPLANTS}
    a, g, exact = maps()
    rule, other = PROBES[probe_name(*then, after=after)], send(probe_name(*then), a, g)
    memory = rule.start(CONFIG)
    assert not torch.allclose(exact, other)
    for step in range(after + 2):
        if step in (0, after - 1, after, after + 1):
            sent = rule(a, g, VISIBLE, memory)
            torch.testing.assert_close(sent, exact if step < after else other)
        memory = rule.learn(memory, a, g, VISIBLE)
