"""LocalGPT: each learning rule against an independent way of writing it, and what the model promises to leave alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from model_local import INIT_STD, METHODS, PROBES, QK_NORM, SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig

# everything of a size of its own, so that no two of them can be exchanged unseen
NORMED = {"exact": "", "cut": "qk", "cut_q": "q", "cut_k": "k"}  # whose norm's divisor counts as a constant
TANGENT = {"tangent": "qk", "tangent_q": "q", "tangent_k": "k"}  # who is not normalised, and drops the radial part
CONFIG = LocalGPTConfig(block_size=7, vocab_size=11, n_layer=3, n_head=2, n_embd=12)
B, T = 4, 5
RULES = [rule for rule in SOFTMAX_BACKWARD if rule not in PROBES]  # probes: test_probes


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return LocalGPT(replace(CONFIG, **changes))


def batch(B=B, T=T, seed=0):
    return torch.randint(11, (2, B, T), generator=torch.Generator().manual_seed(seed))


def gradients(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_become_python_s():
    config = LocalGPTConfig(np.int64(7), np.int32(11), np.uint8(3), np.int16(2), np.int64(12), np.float32(0), "softmax")
    assert config == replace(CONFIG) and hash(config) == hash(CONFIG)
    assert all(
        type(getattr(config, name)) is int for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    )
    ours = LocalGPTConfig(dropout=np.float64(0.5), feedback_scale=np.int64(2), score_scale=np.float32(3))
    assert (type(ours.dropout), type(ours.feedback_scale), type(ours.score_scale)) == (float, float, float)
    assert repr(LocalGPTConfig(dropout=0, feedback_scale=1, score_scale=1)) == repr(LocalGPTConfig())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_layer": True}, "n_layer=True is not a positive whole number"),
        ({"n_head": np.float64(2)}, "not a positive whole number"),
        ({"vocab_size": "65"}, "not a positive whole number"),
        ({"block_size": 0}, "not a positive whole number"),
        ({"n_embd": torch.tensor(12)}, "not a positive whole number"),
        ({"n_embd": 13}, "not divisible by n_head=2"),
        ({"dropout": 1}, r"not a probability in \[0, 1\)"),
        ({"dropout": -0.1}, "not a probability"),
        ({"dropout": math.nan}, "not a probability"),
        ({"dropout": False}, "not a probability"),
        ({"dropout": None}, "not a probability"),
        ({"feedback_scale": 0}, "not a positive number"),
        ({"feedback_scale": math.inf}, "not a positive number"),
        ({"feedback_scale": True}, "not a positive number"),
        ({"feedback_scale": "1"}, "not a positive number"),
        *[
            ({"score_scale": wrong}, "score_scale=.* not a positive number")
            for wrong in (0, -1, math.nan, math.inf, True)
        ],
        ({"score_scale": None}, "not a positive number"),
        ({"qk_norm": "l2"}, "qk_norm='l2' is unknown: choose one of off, exact, cut, cut_q, cut_k"),
        ({"qk_norm": None}, "choose one of off"),
        ({"qk_norm": ["exact"]}, "choose one of off"),
        ({"method": "backprop"}, "choose one of bp, fa, sign_sym, dfa"),
        ({"method": ["fa"]}, "choose one of"),
        ({"attn_mode": None}, "choose one of softmax, sigmoid"),
        ({"softmax_backward": "half"}, "choose one of full, diagonal.*, balanced_by_attention$"),
        ({"attn_mode": "sigmoid", "softmax_backward": "diagonal"}, "choose 'full'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=reason):
        replace(CONFIG, **changes)


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        CONFIG.n_layer = 4


@pytest.mark.parametrize("arm", QK_NORM)
@pytest.mark.parametrize("rule", RULES)
def test_the_exact_config_has_the_same_forward_pass_and_the_chain_rule(arm, rule):
    forward = replace(CONFIG, dropout=0.5, score_scale=2.0)
    for method in METHODS:
        local = replace(forward, method=method, softmax_backward=rule, qk_norm=arm)
        exact = "exact" if arm in NORMED else "off"
        assert local.exact == replace(forward, method="bp", softmax_backward="full", qk_norm=exact)
        assert local.exact.exact == local.exact
    assert replace(forward, attn_mode="sigmoid", softmax_backward="none").exact.attn_mode == "sigmoid"


# --- initial weights -------------------------------------------------------------------------------------------------


def test_weights_and_feedback_start_as_stated():
    torch.manual_seed(0)
    model = LocalGPT(LocalGPTConfig(n_layer=3, n_embd=64, vocab_size=300, block_size=128, feedback_scale=2.5))
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = INIT_STD / math.sqrt(2 * 3) if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
        tolerance = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        assert abs(weight.std().item() / std - 1) < tolerance and abs(weight.mean().item() / std) < 2 * tolerance, name
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) == 3 * 6 + 1
    for name, linear in linears.items():
        assert (
            linear.bias is None and linear.feedback.shape == linear.weight.shape and not linear.feedback.requires_grad
        )
        tolerance = 5 / math.sqrt(linear.weight.numel())
        assert abs(linear.feedback.std().item() / (2.5 * INIT_STD) - 1) < tolerance, name
        pair = torch.stack([linear.weight.detach().flatten(), linear.feedback.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < tolerance, name


def test_a_seed_gives_the_same_weights_under_every_rule():
    rules = [{"method": method} for method in METHODS] + [{"softmax_backward": rule} for rule in RULES]
    rules += [{"attn_mode": "sigmoid"}, {"feedback_scale": 3.0}, {"dropout": 0.5}, {"score_scale": 2.0}]
    rules += [{"qk_norm": arm} for arm in QK_NORM]
    expected = dict(make_model(method="bp").named_parameters())
    for changes in rules:
        for name, parameter in make_model(**changes).named_parameters():
            assert torch.equal(parameter, expected[name]), (changes, name)
    assert not torch.equal(make_model(seed=1).lm_head.weight, expected["lm_head.weight"])


def test_feedback_scale_is_a_factor_on_what_the_error_travels_through():
    for method, name in (("fa", "feedback"), ("dfa", "direct_feedback")):
        one, three = (dict(make_model(method=method, feedback_scale=s).named_buffers()) for s in (1, 3))
        found = [key for key in one if key.endswith(name)]
        assert len(found) == {"fa": 3 * 6 + 1, "dfa": 1}[method]
        for key in found:
            torch.testing.assert_close(3 * one[key], three[key])
    x = torch.randn(2, 12, requires_grad=True)
    one, three = (make_model(method="sign_sym", feedback_scale=s).blocks[0].attn.q_proj(x) for s in (1, 3))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] * s for y, s in ((one, 3), (three, 1))))


# --- the linear maps and the whole network ---------------------------------------------------------------------------


def surrogate_linear(x, weight, feedback):
    """``x W^T`` whose gradient, by PyTorch's own rules, is ``grad_y B`` for x and ``grad_y^T x`` for W."""
    return x.detach() @ weight.T + (x - x.detach()) @ feedback.T


EPS = 1e-6


def plain_loss(model, idx, targets, feedback, direct=None, arm="off", scale=1.0):
    """The loss of a GPT written out plainly on ``model``'s parameters; each map's error returns through ``feedback``.

    With ``direct`` (L + 1, V, C) blocks are cut apart, and an extra term, of value 0, sends the output error to them.
    ``arm`` is the ``qk_norm``, see NORMED and TANGENT.
    """
    p, (n_layer, n_head) = dict(model.named_parameters()), (model.config.n_layer, model.config.n_head)
    taps = []

    def linear(x, name):
        return surrogate_linear(x, p[f"{name}.weight"], feedback[name])

    def between(x):
        taps.append(x)
        return x if direct is None else x.detach()

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

    x = between(p["token_embedding.weight"][idx] + p["position_embedding.weight"][: idx.shape[1]])
    for i in range(n_layer):
        name = f"blocks.{i}"
        h = norm(x, f"{name}.ln_1")
        q, k, v = (linear(h, f"{name}.attn.{n}_proj").unflatten(-1, (n_head, -1)).transpose(1, 2) for n in "qkv")
        q, k = normalised(q, "q") * scale, normalised(k, "k")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(o, f"{name}.attn.o_proj")
        h = norm(x, f"{name}.ln_2")
        x = between(x + linear(F.gelu(linear(h, f"{name}.mlp.up_proj")), f"{name}.mlp.down_proj"))
    logits = linear(norm(x, "ln_f"), "lm_head")
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if direct is not None:
        (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
        sent = [(tap * (error @ feedback_l)).sum() for tap, feedback_l in zip(taps, direct, strict=True)]
        loss = loss + sum(term - term.detach() for term in sent)
    return loss


def feedback_of(model):
    """What the error of each linear map returns through, by the map's name, as ``method`` has it."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    how = {
        "bp": lambda m: m.weight,
        "dfa": lambda m: m.weight,
        "fa": lambda m: m.feedback,
        "sign_sym": lambda m: torch.sign(m.weight.detach()) * INIT_STD * model.config.feedback_scale,
    }[model.config.method]
    return {name: how(m) for name, m in linears.items()}


@pytest.mark.parametrize("arm", QK_NORM)
@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_is_that_of_a_plain_network_with_this_feedback_and_these_norms(method, arm):
    model = make_model(method=method, feedback_scale=1.7, qk_norm=arm, score_scale=1.3).double()
    x, y = batch()
    y[0, 1] = -100  # left out of the loss
    direct = model.direct_feedback if method == "dfa" else None
    _, loss = model(x, y)
    plain = plain_loss(model, x, y, feedback_of(model), direct, arm, 1.3)
    torch.testing.assert_close(loss, plain)
    expected = gradients(plain, model)
    for name, grad in gradients(loss, model).items():
        assert grad.any(), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-14, msg=name)


def test_where_a_norm_is_cut_changes_gradients_and_nothing_else():
    (x, y), arms = batch(), {arm: make_model(method="bp", qk_norm=arm).double() for arm in QK_NORM}
    logits = {arm: model(x)[0] for arm, model in arms.items()}
    grads = {arm: gradients(model(x, y)[1], model) for arm, model in arms.items()}
    for arm, changed in (NORMED | TANGENT).items():
        like = "exact" if arm in NORMED else "off"
        torch.testing.assert_close(logits[arm], logits[like], rtol=1e-12, atol=1e-14)
        for name in "qkv":
            part = f"blocks.2.attn.{name}_proj.weight"  # above it the arms agree in everything
            same = torch.allclose(grads[arm][part], grads[like][part], rtol=1e-9, atol=0)
            assert same == (name not in changed), (arm, name)
    assert (logits["off"] - logits["exact"]).abs().max() > 1e-3


@pytest.mark.parametrize("arm", QK_NORM)
def test_a_score_scale_is_a_factor_on_the_scores(arm):
    scores = []
    for scale in (1, 2.5):
        model = make_model(qk_norm=arm, score_scale=scale)
        model.blocks[0].attn.attn_weights.register_forward_pre_hook(lambda m, inputs: scores.append(inputs[0]))
        model(batch()[0])
    one, other = scores
    seen = one.isfinite()
    assert one[seen].any() and torch.equal(seen, other.isfinite())
    torch.testing.assert_close(other[seen], 2.5 * one[seen])


def test_without_a_gradient_at_queries_and_keys_it_makes_no_difference_whether_a_norm_is_cut():
    def trained(**changes):
        model = make_model(method="bp", **changes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            model(*batch(seed=step))[1].backward()
            optimizer.step()
        return model.state_dict()

    exact, start = trained(softmax_backward="none", qk_norm="exact"), make_model(qk_norm="exact").state_dict()
    for arm in NORMED:
        other = trained(softmax_backward="none", qk_norm=arm)
        assert exact.keys() == other.keys() and all(torch.equal(exact[name], other[name]) for name in exact), arm
    off = trained(softmax_backward="none", qk_norm="off")
    for arm in TANGENT:
        for name, value in trained(softmax_backward="none", qk_norm=arm).items():
            torch.testing.assert_close(value, off[name], msg=f"{arm} {name}")
    for name in ("blocks.1.attn.q_proj.weight", "blocks.1.attn.v_proj.weight"):
        assert torch.equal(exact[name], start[name]) == ("q_proj" in name)
    part = "blocks.1.attn.q_proj.weight"  # under another rule it does
    assert not torch.equal(*(trained(softmax_backward="zero", qk_norm=arm)[part] for arm in ("exact", "cut")))


def test_feedback_matrices_do_not_learn_and_are_saved():
    for method, name in (("fa", "blocks.2.mlp.up_proj.feedback"), ("dfa", "direct_feedback")):
        model, (x, y) = make_model(method=method), batch()
        before = model.state_dict()[name].clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(x, y)[1].backward()
        optimizer.step()
        assert torch.equal(model.state_dict()[name], before) and before.any()


def test_where_no_error_arrives_no_gradient_arises():
    model, (x, y) = make_model(method="fa", softmax_backward="none"), batch()
    for name, grad in gradients(model(x, y)[1], model).items():
        assert (grad is None) == name.endswith(("q_proj.weight", "k_proj.weight")), name


def test_a_frozen_weight_lets_the_error_through():
    model, (x, y) = make_model(method="fa"), batch()
    expected = gradients(model(x, y)[1], model)["token_embedding.weight"]
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.requires_grad_(False)
    grad = torch.autograd.grad(model(x, y)[1], model.token_embedding.weight)[0]
    torch.testing.assert_close(grad, expected)


# --- the softmax rules -----------------------------------------------------------------------------------------------


def g_bar(a, g, v, r):
    return (g * v).sum(-1, keepdim=True) / v.sum(-1, keepdim=True)


def b(a, g, v, r):
    return torch.einsum("...k,...k->...", a, g)[..., None]


def centring(v):
    """The projection (T, T, T) that takes from a query's row its mean over the keys that it sees."""
    v = v.double()
    return torch.diag_embed(v) - v[:, :, None] * v[:, None, :] / v.sum(-1)[:, None, None]


FORMULAS = {
    "full": lambda a, g, v, r: torch.einsum(
        "...ij,...j->...i", torch.diag_embed(a) - a[..., :, None] * a[..., None, :], g
    ),
    "diagonal": lambda a, g, v, r: (a - a**2) * g,
    "ste": lambda a, g, v, r: torch.where(v, g, 0.0),
    "none": lambda a, g, v, r: None,
    "zero": lambda a, g, v, r: a * g,
    "mean": lambda a, g, v, r: a * (g - g_bar(a, g, v, r)),
    "running": lambda a, g, v, r: a * (g - r),
    "diagonal_mean": lambda a, g, v, r: (a - a**2) * (g - g_bar(a, g, v, r)),
    "diagonal_running": lambda a, g, v, r: (a - a**2) * (g - r),
    "diagonal_lateral": lambda a, g, v, r: (a - a**2) * (g - b(a, g, v, r)),
    "balanced_evenly": lambda a, g, v, r: torch.einsum("ijk,...ik->...ij", centring(v), (a - a**2) * g),
    "balanced_by_attention": lambda a, g, v, r: torch.einsum(
        "...ij,...j->...i", torch.diag_embed(a) - a[..., :, None] * a[..., None, :], g - a * g
    ),
}


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1), causal=st.booleans(), sharpness=st.floats(0, 20))
def test_a_rule_is_its_formula_and_sends_nothing_to_masked_keys(rule, seed, causal, sharpness):
    generator = torch.Generator().manual_seed(seed)
    scores, g = torch.randn(2, B, 3, T, T, generator=generator, dtype=torch.float64)
    r = torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    if not causal:
        visible = (torch.rand(T, T, generator=generator) < 0.5) | torch.eye(T, dtype=torch.bool)
    a = (sharpness * scores).masked_fill(~visible, -math.inf).softmax(-1)
    inputs = [part.clone() for part in (a, g, r)]
    sent, expected = SOFTMAX_BACKWARD[rule](a, g, visible, r), FORMULAS[rule](a, g, visible, r)
    assert all(torch.equal(part, before) for part, before in zip((a, g, r), inputs, strict=True))
    if expected is None:
        assert sent is None
        return
    torch.testing.assert_close(sent, expected, rtol=1e-9, atol=1e-13)
    assert not sent[..., ~visible].any()
    if rule.startswith("balanced"):
        torch.testing.assert_close(sent.sum(-1), torch.zeros(B, 3, T, dtype=torch.float64), rtol=0, atol=1e-12)


def sent_back(model, x, y):
    """(a, g, dL/ds) of every layer, by hooks on plain tensors."""
    seen, handles = [], []

    def hook(module, inputs, attn):
        layer = {"a": attn.detach()}
        seen.append(layer)
        attn.register_hook(lambda grad: layer.update(g=grad))
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: layer.update(sent=grad))

    for block in model.blocks:
        handles.append(block.attn.attn_weights.register_forward_hook(hook))
    model(x, y)[1].backward()
    for handle in handles:
        handle.remove()
    return [(layer["a"], layer["g"], layer.get("sent")) for layer in seen]


@pytest.mark.parametrize("rule", RULES)
def test_the_network_sends_back_what_the_rule_says(rule):
    model, (x, y) = make_model(method="bp", softmax_backward=rule).double(), batch()
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    memory = [torch.randn(2, 1, 1, dtype=torch.float64) for _ in range(3)]
    for block, r in zip(model.blocks, memory, strict=True):
        if rule.endswith("running"):
            block.attn.attn_weights.memory.copy_(r)
    for (a, g, sent), r in zip(sent_back(model, x, y), memory, strict=True):
        expected = FORMULAS[rule](a, g, visible, r)
        assert sent is None if expected is None else torch.allclose(sent, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("arm", QK_NORM)
def test_what_comes_back_has_a_radial_part_except_through_an_exact_or_a_tangent_norm(arm):
    """``q . dq`` is a sum over the query's keys, ``k . dk`` over the key's queries; an exact norm takes all but eps."""
    model = make_model(method="bp", softmax_backward="zero", qk_norm=arm, score_scale=1.3).double()
    attn, seen = model.blocks[1].attn, {}

    def keep(name, tensor):
        seen[name] = tensor.detach()
        tensor.register_hook(lambda grad: seen.update({f"d{name}": grad}))

    attn.attn_weights.register_forward_pre_hook(lambda m, inputs: keep("s", inputs[0]))
    attn.q_proj.register_forward_hook(lambda m, inputs, output: keep("q", output))
    attn.k_proj.register_forward_hook(lambda m, inputs, output: keep("k", output))
    model(*batch())[1].backward()
    products = seen["ds"] * seen["s"].nan_to_num(neginf=0)  # (B, H, T, T)
    for name, across in (("q", -1), ("k", -2)):
        vector, error = (seen[key].view(B, T, 2, 6).transpose(1, 2) for key in (name, f"d{name}"))
        radial, expected = (vector * error).sum(-1), products.sum(across)
        if name in TANGENT.get(arm, "") or (arm in NORMED and name not in NORMED[arm]):
            expected *= EPS / (vector.square().mean(-1) + EPS)
            assert radial.abs().max() < 1e-2 * (vector.norm(dim=-1) * error.norm(dim=-1)).max()
        assert expected.all()
        torch.testing.assert_close(radial, expected, rtol=1e-6, atol=1e-15)


def test_a_running_mean_learns_after_the_rule_and_in_training_only():
    model, visible = make_model(method="bp", softmax_backward="running").double(), torch.ones(T, T).tril().bool()
    memory = [torch.zeros(2, 1, 1, dtype=torch.float64) for _ in range(3)]
    for step, training in enumerate((True, False, True, True)):
        x, y = batch(seed=step)
        for i, (a, g, sent) in enumerate(sent_back(model.train(training), x, y)):
            torch.testing.assert_close(sent, a * (g - memory[i]), rtol=1e-9, atol=1e-15)
            if training:
                average = torch.stack([g[:, head][:, visible].mean() for head in range(2)]).view(2, 1, 1)
                memory[i] = 0.9 * memory[i] + 0.1 * average
            torch.testing.assert_close(model.blocks[i].attn.attn_weights.memory, memory[i])
    assert "blocks.0.attn.attn_weights.memory" in model.state_dict()
    assert "blocks.0.attn.attn_weights.memory" not in make_model().state_dict()


class Diary:
    """A rule whose memory, of a shape of its own, is a number of steps and a sum over all that it was shown."""

    def start(self, config):
        return torch.tensor([0.0, float(config.n_head)])

    def __call__(self, a, g, visible, memory):
        return g * visible * memory[1]

    def learn(self, memory, a, g, visible):
        return memory + torch.stack([torch.ones(()), (a + 2 * g * visible).sum()])


def test_a_memory_is_whatever_its_rule_makes_of_it(monkeypatch):
    monkeypatch.setitem(SOFTMAX_BACKWARD, "diary", Diary())
    model, visible = make_model(method="bp", softmax_backward="diary"), torch.ones(T, T).tril().bool()
    expected = [torch.tensor([0.0, 2.0]) for _ in range(3)]
    for training in (True, False, True):
        for i, (a, g, sent) in enumerate(sent_back(model.train(training), *batch())):
            torch.testing.assert_close(sent, g * visible * expected[i][1])
            if training:
                expected[i] = expected[i] + torch.stack([torch.ones(()), a.sum() + 2 * g[..., visible].sum()])
            torch.testing.assert_close(model.blocks[i].attn.attn_weights.memory, expected[i], rtol=1e-4, atol=1e-4)
    again = make_model(seed=1, method="bp", softmax_backward="diary")
    again.load_state_dict(model.state_dict())
    assert again.blocks[2].attn.attn_weights.memory[0] == 2


@pytest.mark.parametrize("length", [1, 3, 7])
def test_sigmoid_attention_has_the_bias_minus_log_t_and_its_own_derivative(length):
    model, (x, y) = make_model(method="bp", attn_mode="sigmoid").double(), batch(T=length)
    scores = []
    handle = model.blocks[1].attn.attn_weights.register_forward_hook(
        lambda m, inputs, out: scores.append((*inputs, out))
    )
    model(x, y)
    handle.remove()
    ((s, visible, a),) = scores
    s = s.detach().requires_grad_()
    expected = torch.where(visible, 1 / (1 + length * torch.exp(-s)), 0.0)
    torch.testing.assert_close(a, expected)
    g = torch.randn(s.shape, dtype=torch.float64)
    (derivative,) = torch.autograd.grad(torch.sigmoid(s - math.log(length)), s, g)
    torch.testing.assert_close(model.blocks[1].attn.attn_weights.send_back(a.detach(), g, visible), derivative)


def test_no_query_sees_a_later_key():
    model, (x, _) = make_model(), batch(T=7)
    logits, _ = model(x)
    for t in range(1, 7):
        other = x.clone()
        other[:, t:] = (other[:, t:] + 1) % 11
        changed = (model(other)[0] - logits).abs().amax((0, 2)) > 0
        assert changed.tolist() == [False] * t + [True] * (7 - t)
        torch.testing.assert_close(model(x[:, :t])[0], logits[:, :t])


# --- what else runs through a backward pass --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_can_be_differentiated_twice(method, rule):
    model, (x, y) = make_model(method=method, softmax_backward=rule), batch()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(x, y)[1], model.blocks[0].attn.v_proj.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        model(x, y)[1].backward(create_graph=True)


@pytest.mark.parametrize("method", ["fa", "sign_sym"])
def test_nor_can_a_linear_map_by_itself(method):
    x = torch.randn(2, 12, requires_grad=True)
    y = make_model(method=method).blocks[0].attn.q_proj(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes",
    [{"softmax_backward": rule} for rule in RULES] + [{"attn_mode": "sigmoid"}] + [{"qk_norm": arm} for arm in QK_NORM],
    ids=lambda changes: "-".join(changes.values()),
)
def test_autocast_gives_the_gradients_in_less_precision(method, changes):
    model, (x, y) = make_model(method=method, **changes), batch()
    expected = gradients(model.eval()(x, y)[1], model)  # in eval mode: a memory stays as it was
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(x, y)
    for name, grad in gradients(loss, model).items():
        assert (grad is None) == (expected[name] is None)
        if grad is not None:
            assert grad.dtype == torch.float32
            assert F.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0) > 0.99, name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(x, y)[1].backward()


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_falls_on_the_residual_branches_in_training_only():
    p, (x, y) = 0.3, batch(B=64, T=7)
    model, without = make_model(dropout=p), make_model()
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert set(dropouts) == {"drop"} | {f"blocks.{i}.{part}.resid_drop" for i in range(3) for part in ("attn", "mlp")}
    seen = {}
    for name, module in dropouts.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    rows = []
    for block in model.blocks:
        block.attn.attn_weights.register_forward_hook(lambda m, inputs, attn: rows.append(attn.sum(-1)))
    one, two = model(x, y)[0], model(x, y)[0]
    assert not torch.equal(one, two)
    assert set(seen) == set(dropouts)
    for name, (before, after) in seen.items():
        dropped = (after == 0).float().mean().item()
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / after.numel()), name
        torch.testing.assert_close(after[after != 0], before[after != 0] / (1 - p))
    for row in rows:
        torch.testing.assert_close(row, torch.ones_like(row))  # never on the attention weights
    assert torch.equal(model.eval()(x, y)[0], without(x, y)[0])


# --- the forward pass refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idx", "targets", "reason"),
    [
        (torch.tensor([[0, 11]]), None, "idx hold ids from 0 to 11, and the model's vocabulary goes from 0 to 10"),
        (torch.tensor([[0, -1]]), None, "idx hold ids from -1 to 0"),
        (torch.tensor([[0, 1]]), torch.tensor([[0, 11]]), "targets hold ids from 0 to 11"),
        (torch.tensor([[0, 1]]), torch.tensor([[0, -1]]), "targets hold ids from -1 to 0"),
        (torch.tensor([[0.0, 1.0]]), None, r"idx are torch.float32: .* \.long\(\)"),
        (torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0]]), "targets are torch.float32"),
        (torch.tensor([[True, False]]), None, "idx are torch.bool"),
        (torch.zeros(1, 8, dtype=torch.long), None, r"shape \(1, 8\)"),
        (torch.zeros(1, 0, dtype=torch.long), None, r"shape \(1, 0\)"),
        (torch.zeros(0, 3, dtype=torch.long), None, r"shape \(0, 3\)"),
        (torch.zeros(3, dtype=torch.long), None, r"shape \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long), "must agree"),
    ],
)
def test_ids_that_are_none_are_refused(idx, targets, reason):
    with pytest.raises(ValueError, match=reason):
        make_model()(idx, targets)


def test_ids_may_be_short_integers_and_targets_left_out():
    model, (x, y) = make_model(), batch()
    expected = F.cross_entropy(model(x)[0][:, 1:].flatten(0, 1), y[:, 1:].flatten())
    y = y.clone()
    y[:, 0] = -100
    torch.testing.assert_close(model(x.int(), y.int())[1], expected)
    assert model(x)[1] is None


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_generate_samples_from_the_softmax_over_temperature_of_the_last_block(temperature):
    model, (x, _) = make_model(), batch()
    model.lm_head.weight.data *= 30  # far from uniform
    sample = model.generate(x, n_new=6, temperature=temperature, generator=torch.Generator().manual_seed(3))
    generator, expected = torch.Generator().manual_seed(3), x
    for _ in range(6):
        logits = model(expected[:, -7:])[0][:, -1].detach().double()
        probabilities = torch.exp(logits / temperature) / torch.exp(logits / temperature).sum(-1, keepdim=True)
        expected = torch.cat([expected, torch.multinomial(probabilities.float(), 1, generator=generator)], 1)
    assert torch.equal(sample, expected) and sample.shape == (B, T + 6)
    assert torch.equal(model.generate(x, n_new=0), x)


def test_a_low_temperature_takes_the_most_probable_token():
    model, (x, _) = make_model(), batch(B=50)
    model.lm_head.weight.data *= 30
    assert torch.equal(model.generate(x, 1, temperature=1e-4)[:, -1], model(x)[0][:, -1].argmax(-1))


def test_generate_leaves_modes_gradients_and_random_numbers_alone():
    model, (x, y) = make_model(dropout=0.5), batch()
    model(x, y)[1].backward()
    model.blocks[1].eval()  # somebody's own choice
    modes = [module.training for module in model.modules()]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    rng, given_ids = torch.get_rng_state(), x.clone()
    recording = []
    model.register_forward_hook(lambda *args: recording.append(torch.is_grad_enabled()))
    one, two = (model.generate(x, 20, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    with pytest.raises(ValueError, match="idx hold ids"):
        model.generate(torch.full((1, 2), 11), 1)
    assert torch.equal(one, two) and torch.equal(x, given_ids) and not any(recording)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"temperature": -1}, {"temperature": math.nan}, {"n_new": -1}])
def test_generate_refuses_what_it_cannot_sample(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        make_model().generate(batch()[0], **{"n_new": 1} | wrong)
