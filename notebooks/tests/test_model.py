"""LocalGPT: each rule against an independent way of writing it, and what the model leaves alone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from data.probes import PROBES
from model_local import INIT_STD, METHODS, QK_NORM, SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig

# every size is another one, so that no two of them can be exchanged unseen
CONFIG = LocalGPTConfig(block_size=7, vocab_size=11, n_layer=3, n_head=2, n_embd=12)
B, T = 4, 5
RULES = [rule for rule in SOFTMAX_BACKWARD if rule not in PROBES]  # probes: test_probes
NORMED = {"exact": "", "cut": "qk", "cut_q": "q", "cut_k": "k"}  # whose divisor is a constant
TANGENT = {"tangent": "qk", "tangent_q": "q", "tangent_k": "k"}  # who only drops the radial part
EPS = 1e-6
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return LocalGPT(replace(CONFIG, **changes))


def batch(B=B, T=T, seed=0):
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(seed))


def gradients(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, reason", [
    ({"n_layer": True}, "n_layer=True is not a positive whole number"),
    ({"n_embd": 13}, "not divisible by n_head=2"),
    ({"dropout": 1}, r"not a probability in \[0, 1\)"),
    ({"score_cap": math.nan}, "score_cap=nan is not a positive number"),
    ({"score_scale": math.inf}, "not a positive number"),
    ({"qk_norm": "l2"}, "qk_norm='l2' is unknown: choose one of off, exact, cut, cut_q, cut_k"),
    ({"softmax_backward": "half"}, "choose one of full, diagonal.*, balanced_by_attention"),
    ({"attn_mode": "sigmoid", "softmax_backward": "diagonal"}, "choose 'full'"),
], ids=str)
def test_a_wrong_setting_is_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(CONFIG, **changes)


@pytest.mark.parametrize("arm", QK_NORM)
def test_the_exact_config_keeps_the_forward_pass_and_goes_back_by_the_chain_rule(arm):
    """Which settings have one forward pass, the plain network below shows."""
    forward = replace(CONFIG, dropout=0.5, score_scale=2.0, qk_start="lecun", score_cap=3.0)
    for method in METHODS:
        local = replace(forward, method=method, softmax_backward="zero", qk_norm=arm,
                        cap_backward="cut")
        exact = replace(forward, method="bp", qk_norm="exact" if arm in NORMED else "off")
        assert local.exact == exact


# ---- initial weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["gpt2", "lecun"])
def test_weights_and_feedback_start_as_stated(start):
    """Within five standard errors; LeCun's start is that of queries and keys alone."""
    config = LocalGPTConfig(n_layer=3, n_embd=64, vocab_size=300, block_size=128,
                            feedback_scale=2.5, qk_start=start)
    torch.manual_seed(0)
    model = LocalGPT(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = INIT_STD
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * 3)
        if start == "lecun" and name.endswith(("q_proj.weight", "k_proj.weight")):
            std = 1 / 8
        tolerance = 5 / math.sqrt(2 * weight.numel())
        assert abs(weight.std().item() / std - 1) < tolerance, name
        assert abs(weight.mean().item() / std) < 2 * tolerance, name
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 3 * 6 + 1
    alike = torch.corrcoef(torch.stack([matrix.flatten()[:4096] for linear in linears.values()
                                        for matrix in (linear.weight.detach(), linear.feedback)]))
    assert (alike - torch.eye(len(alike))).abs().max() < 5 / 64, "none is made of another"
    for name, linear in linears.items():
        assert linear.bias is None and linear.feedback.shape == linear.weight.shape
        tolerance = 5 / math.sqrt(linear.weight.numel())
        assert abs(linear.feedback.std().item() / (2.5 * INIT_STD) - 1) < tolerance, name
    direct = LocalGPT(replace(config, method="dfa")).direct_feedback
    assert direct.std().item() == pytest.approx(2.5 * INIT_STD, rel=0.01)
    alike = torch.corrcoef(direct.flatten(1)) - torch.eye(4)
    assert alike.abs().max() < 0.05, "a map of its own for each block"


@pytest.mark.parametrize("changes", [
    {"method": "fa"}, {"softmax_backward": "running"}, {"qk_norm": "cut"}, {"score_cap": 1.0},
    {"attn_mode": "sigmoid"}, {"feedback_scale": 3.0}, {"qk_start": "lecun"}], ids=str)
def test_a_seed_gives_the_same_weights_under_every_rule_and_start(changes):
    expected = dict(make_model(method="bp").named_parameters())
    for name, parameter in make_model(**changes).named_parameters():
        lecun = "qk_start" in changes and name.endswith(("q_proj.weight", "k_proj.weight"))
        factor = 12**-0.5 / INIT_STD if lecun else 1
        torch.testing.assert_close(parameter, factor * expected[name], msg=name)
    assert not torch.equal(make_model(seed=1).lm_head.weight, expected["lm_head.weight"])


# ---- the linear maps and the whole network -------------------------------------------------------


def surrogate_linear(x, weight, feedback):
    """``x W^T`` whose gradient by PyTorch is ``grad_y B`` at x and ``grad_y^T x`` at W."""
    return x.detach() @ weight.T + (x - x.detach()) @ feedback.T


def plain_loss(model, idx, targets):
    """The loss of a GPT written out plainly on ``model``'s parameters, of the same gradients.

    Under dfa blocks are cut apart, and a term of value 0 sends the output error to them.
    """
    p, config = dict(model.named_parameters()), model.config
    arm, taps = config.qk_norm, []

    def linear(x, name):
        weight = p[f"{name}.weight"]
        feedback = {"bp": weight, "dfa": weight,
                    "fa": getattr(model.get_submodule(name), "feedback", None),
                    "sign_sym": weight.detach().sign() * INIT_STD * config.feedback_scale}
        return surrogate_linear(x, weight, feedback[config.method])

    def between(x):
        taps.append(x)
        return x.detach() if config.method == "dfa" else x

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"])

    def normalised(x, name):
        divisor = torch.sqrt(torch.mean(x**2, -1, keepdim=True) + EPS)
        if name in TANGENT.get(arm, ""):
            direction = (x / divisor).detach()
            tangent = x - direction * torch.mean(direction * x, -1, keepdim=True)
            return x.detach() + tangent - tangent.detach()
        if arm not in NORMED:
            return x
        return x / (divisor.detach() if name in NORMED[arm] else divisor)

    def capped(s):
        if config.score_cap == math.inf:
            return s
        value = config.score_cap * (1 - 2 / (torch.exp(2 * s / config.score_cap) + 1))
        return value.detach() + s - s.detach() if config.cap_backward == "cut" else value

    x = between(p["token_embedding.weight"][idx] + p["position_embedding.weight"][: idx.shape[1]])
    for i in range(config.n_layer):
        name = f"blocks.{i}"
        h = norm(x, f"{name}.ln_1")
        q, k, v = (linear(h, f"{name}.attn.{n}_proj").unflatten(-1, (2, -1)).transpose(1, 2)
                   for n in "qkv")
        scores = capped(normalised(q, "q") @ normalised(k, "k").mT / 6**0.5 * config.score_scale)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        o = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        x = x + linear(o.transpose(1, 2).flatten(2), f"{name}.attn.o_proj")
        h = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.up_proj"))
        x = between(x + linear(h, f"{name}.mlp.down_proj"))
    logits = linear(norm(x, "ln_f"), "lm_head")
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if config.method == "dfa":
        (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
        sent = [(tap * (error @ direct)).sum()
                for tap, direct in zip(taps, model.direct_feedback, strict=True)]
        loss = loss + sum(term - term.detach() for term in sent)
    return loss


SETTINGS = [{"qk_norm": arm} for arm in QK_NORM] + [
    {"score_cap": 0.05, "qk_start": "lecun", "cap_backward": backward, "qk_norm": arm}
    for backward in ("exact", "cut") for arm in ("off", "exact")]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_is_that_of_a_plain_network(method, changes):
    """With this feedback, these norms and this cap, in float64 and to nine digits."""
    model = make_model(method=method, feedback_scale=1.7, score_scale=1.3, **changes).double()
    x, y = batch()
    y[0, 1] = -100  # left out of the loss
    loss, plain = model(x, y)[1], plain_loss(model, x, y)
    torch.testing.assert_close(loss, plain)
    expected = gradients(plain, model)
    for name, grad in gradients(loss, model).items():
        assert grad.any(), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-14, msg=name)


def test_where_no_error_arrives_no_gradient_arises():
    model, (x, y) = make_model(method="fa", softmax_backward="none"), batch()
    for name, grad in gradients(model(x, y)[1], model).items():
        assert (grad is None) == name.endswith(("q_proj.weight", "k_proj.weight")), name


# ---- the softmax rules ---------------------------------------------------------------------------


def jacobian(a):
    return torch.diag_embed(a) - a[..., :, None] * a[..., None, :]


def mean_of(g, v):
    return (g * v).sum(-1, keepdim=True) / v.sum(-1, keepdim=True)


def centring(v):
    """The projection (T, T, T) that takes from a query's row its mean over the keys it sees."""
    v = v.double()
    return torch.diag_embed(v) - v[:, :, None] * v[:, None, :] / v.sum(-1)[:, None, None]


FORMULAS = {  # of a, g, visible, and r, the memory of the rules that have one
    "full": lambda a, g, v, r: torch.einsum("...ij,...j->...i", jacobian(a), g),
    "diagonal": lambda a, g, v, r: (a - a**2) * g,
    "ste": lambda a, g, v, r: torch.where(v, g, 0.0),
    "none": lambda a, g, v, r: None,
    "zero": lambda a, g, v, r: a * g,
    "mean": lambda a, g, v, r: a * (g - mean_of(g, v)),
    "running": lambda a, g, v, r: a * (g - r),
    "diagonal_mean": lambda a, g, v, r: (a - a**2) * (g - mean_of(g, v)),
    "diagonal_running": lambda a, g, v, r: (a - a**2) * (g - r),
    "diagonal_lateral": lambda a, g, v, r: (a - a**2) * (g - torch.einsum(
        "...k,...k->...", a, g)[..., None]),
    "balanced_evenly": lambda a, g, v, r: torch.einsum(
        "ijk,...ik->...ij", centring(v), (a - a**2) * g),
    "balanced_by_attention": lambda a, g, v, r: torch.einsum(
        "...ij,...j->...i", jacobian(a), g - a * g),
}


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), causal=st.booleans(), sharpness=st.floats(0, 20))
def test_a_rule_is_its_formula_and_sends_nothing_to_masked_keys(rule, seed, causal, sharpness):
    generator = torch.Generator().manual_seed(seed)
    scores, g = torch.randn(2, B, 3, T, T, generator=generator, dtype=torch.float64)
    r = torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
    visible = CAUSAL
    if not causal:
        visible = (torch.rand(T, T, generator=generator) < 0.5) | torch.eye(T, dtype=torch.bool)
    a = (sharpness * scores).masked_fill(~visible, -math.inf).softmax(-1)
    inputs = [part.clone() for part in (a, g, r)]
    memory = [r] if hasattr(SOFTMAX_BACKWARD[rule], "start") else []
    sent = SOFTMAX_BACKWARD[rule](a, g, visible, *memory)
    expected = FORMULAS[rule](a, g, visible, r)
    assert all(torch.equal(part, old) for part, old in zip((a, g, r), inputs, strict=True))
    if expected is None:
        assert sent is None
        return
    torch.testing.assert_close(sent, expected, rtol=1e-9, atol=1e-13)
    assert not sent[..., ~visible].any()


def sent_back(model, x, y):
    """(a, g, dL/ds) of every layer, by hooks on plain tensors."""
    seen = []

    def hook(module, inputs, attn):
        layer = {"a": attn.detach(), "sent": None}
        seen.append(layer)
        attn.register_hook(lambda grad: layer.update(g=grad))
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: layer.update(sent=grad))

    for block in model.blocks:
        block.attn.attn_weights.register_forward_hook(hook)
    model(x, y)[1].backward()
    return [(layer["a"], layer["g"], layer["sent"]) for layer in seen]


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.endswith("running")])
def test_the_network_sends_back_what_the_rule_says(rule):
    model, (x, y) = make_model(method="bp", softmax_backward=rule).double(), batch()
    for a, g, sent in sent_back(model, x, y):
        expected = FORMULAS[rule](a, g, CAUSAL, None)
        assert (sent is None) == (expected is None)
        if sent is not None:
            torch.testing.assert_close(sent, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("rule", ["running", "diagonal_running"])
def test_a_running_mean_learns_after_the_rule_and_in_training_only(rule):
    model = make_model(method="bp", softmax_backward=rule).double()
    memory = [torch.zeros(2, 1, 1, dtype=torch.float64) for _ in range(3)]
    for step, training in enumerate((True, False, True, True)):
        x, y = batch(seed=step)
        for i, (a, g, sent) in enumerate(sent_back(model.train(training), x, y)):
            expected = FORMULAS[rule](a, g, CAUSAL, memory[i])
            torch.testing.assert_close(sent, expected, rtol=1e-9, atol=1e-15)
            if training:
                average = torch.stack([g[:, head][:, CAUSAL].mean() for head in range(2)])
                memory[i] = 0.9 * memory[i] + 0.1 * average.view(2, 1, 1)
            learnt = model.blocks[i].attn.attn_weights.memory
            torch.testing.assert_close(learnt, memory[i], rtol=1e-9, atol=0)
    again = make_model(seed=1, method="bp", softmax_backward=rule).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.blocks[2].attn.attn_weights.memory, learnt)


def test_sigmoid_attention_has_the_bias_minus_log_t_and_its_own_derivative():
    length, model, (x, y) = 3, make_model(method="bp", attn_mode="sigmoid").double(), batch(T=3)
    attention, seen = model.blocks[1].attn.attn_weights, []
    attention.register_forward_hook(lambda m, inputs, out: seen.append((*inputs, out)))
    model(x, y)
    ((s, visible, a),) = seen
    s = s.detach().requires_grad_()
    torch.testing.assert_close(a, torch.where(visible, 1 / (1 + length * torch.exp(-s)), 0.0))
    g = torch.randn(s.shape, dtype=torch.float64)
    (derivative,) = torch.autograd.grad(torch.sigmoid(s - math.log(length)), s, g)
    torch.testing.assert_close(attention.send_back(a.detach(), g, visible), derivative)


@pytest.mark.parametrize("changes", [{}, {"score_cap": 0.1}])
def test_no_query_sees_a_later_key(changes):
    model, (x, _) = make_model(**changes), batch(T=7)
    logits, _ = model(x)
    for t in range(1, 7):
        other = x.clone()
        other[:, t:] = (other[:, t:] + 1) % 11
        changed = (model(other)[0] - logits).abs().amax((0, 2)) > 0
        assert changed.tolist() == [False] * t + [True] * (7 - t)
        torch.testing.assert_close(model(x[:, :t])[0], logits[:, :t])


# ---- what else runs through a backward pass ------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nothing_can_be_differentiated_twice(method):
    model, (x, y) = make_model(method=method, softmax_backward="zero"), batch()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x, y)[1], model.blocks[0].attn.v_proj.weight, create_graph=True)


@pytest.mark.parametrize("changes", [
    {"method": "bp", "softmax_backward": "running"}, {"method": "fa", "softmax_backward": "ste"},
    {"method": "sign_sym", "qk_norm": "cut"}, {"method": "dfa", "attn_mode": "sigmoid"},
    {"method": "bp", "score_cap": 1.0}], ids=str)
def test_autocast_gives_the_gradients_in_less_precision(changes):
    model, (x, y) = make_model(**changes).eval(), batch()  # a memory stays
    expected = gradients(model(x, y)[1], model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(x, y)
    for name, grad in gradients(loss, model).items():
        assert (grad is None) == (expected[name] is None)
        if grad is not None:
            assert grad.dtype == torch.float32
            cosine = F.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
            assert cosine > 0.99, name


def test_dropout_falls_on_the_residual_branches_in_training_only():
    p, (x, y) = 0.3, batch(B=64, T=7)
    model, without, seen, rows = make_model(dropout=p), make_model(), {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda m, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    for block in model.blocks:
        block.attn.attn_weights.register_forward_hook(lambda m, i, attn: rows.append(attn.sum(-1)))
    model(x, y)
    branches = {f"blocks.{i}.{part}.resid_drop" for i in range(3) for part in ("attn", "mlp")}
    assert set(seen) == {"drop"} | branches
    for name, (before, after) in seen.items():
        dropped = (after == 0).float().mean().item()
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / after.numel()), name
        torch.testing.assert_close(after[after != 0], before[after != 0] / (1 - p))
    for row in rows:
        torch.testing.assert_close(row, torch.ones_like(row))  # never on the attention weights
    assert torch.equal(model.eval()(x, y)[0], without(x, y)[0])


# ---- what is refused; generate -------------------------------------------------------------------


def ids(*rows, dtype=torch.long):
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("idx, targets, reason", [
    (ids([0, 11]), None, "idx hold ids from 0 to 11, and the model's vocabulary goes from 0 to 10"),
    (ids([0, 1]), ids([-100, -1]), "targets hold ids from -1 to 0"),
    (ids([0, 1], dtype=torch.float), None, r"idx are torch.float32: .* \.long\(\)"),
    (torch.zeros(1, 8, dtype=torch.long), None, r"shape \(1, 8\)"),
    (torch.zeros(0, 3, dtype=torch.long), None, r"shape \(0, 3\)"),
    (ids([0, 1]), ids([0, 1, 2]), "must agree"),
], ids=str)
def test_ids_that_are_none_are_refused(idx, targets, reason):
    with pytest.raises(ValueError, match=reason):
        make_model()(idx, targets)


def test_ids_may_be_short_integers_and_targets_left_out():
    model, (x, y) = make_model(), batch()
    expected = F.cross_entropy(model(x)[0][:, 1:].flatten(0, 1), y[:, 1:].flatten())
    y[:, 0] = -100
    torch.testing.assert_close(model(x.int(), y.int())[1], expected)
    assert model(x)[1] is None


def test_generate_samples_from_the_softmax_over_temperature_of_the_last_block():
    temperature, model, (x, _) = 3.0, make_model(dropout=0.5), batch()
    model.lm_head.weight.data *= 30  # far from uniform
    random_numbers, drawn = torch.get_rng_state(), torch.Generator().manual_seed(3)
    sample = model.generate(x, 6, temperature, generator=torch.Generator().manual_seed(3))
    assert model.training and torch.equal(random_numbers, torch.get_rng_state())
    model.eval()
    expected = x
    for _ in range(6):
        logits = model(expected[:, -7:])[0][:, -1].detach().double() / temperature
        odds = torch.exp(logits - logits.amax(-1, keepdim=True)).float()
        expected = torch.cat([expected, torch.multinomial(odds, 1, generator=drawn)], 1)
    assert torch.equal(sample, expected) and sample.shape == (B, T + 6) and not model.training
    assert torch.equal(model.generate(x, n_new=0), x)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"n_new": -1}], ids=str)
def test_generate_refuses_what_it_cannot_sample(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        make_model().generate(batch()[0], **{"n_new": 1} | wrong)
