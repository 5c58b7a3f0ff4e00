"""LocalGPT: a small GPT whose backward pass can be made local, one piece at a time.

Two choices decide how an error travels backwards: by ``method`` every linear map ``y = x W^T``
sends it back to ``x``, by ``softmax_backward`` the softmax of attention to its scores. Four more
change attention itself: how queries and keys start (``qk_start``), whether they are normalised
(``qk_norm``), a factor on the scores (``score_scale``) and a bound on them (``score_cap``).

The rest is a pre-LayerNorm GPT as in nanoGPT, without biases and with an output layer of its own
(tying it to the embedding would be weight transport by another name). The file reads from top to
bottom: configuration, linear maps, softmax, norms and caps, attention, block, GPT.

References
----------
Vaswani et al. 2017, "Attention is all you need": the architecture
Lillicrap et al. 2016, "Random synaptic feedback weights support error backpropagation": ``fa``
Liao et al. 2016, "How important is weight symmetry in backpropagation?": ``sign_sym``
Moskovitz et al. 2018, "Feedback alignment in deep convolutional networks": ``sign_sym``
Nokland 2016, "Direct feedback alignment provides learning in deep neural networks": ``dfa``
Launay et al. 2020, "Direct feedback alignment scales to modern deep learning": ``dfa``
Williams 1992, "Simple statistical gradient-following algorithms": baselines
Dao et al. 2022, "FlashAttention": the lateral sum as ``dO . O``
Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons": ``ste``
Ramapuram et al. 2024, "Theory, analysis, and best practices for sigmoid self-attention": sigmoid
Henry et al. 2020, "Query-key normalization for transformers": ``qk_norm``
Zhang and Sennrich 2019, "Root mean square layer normalization": the norm in ``qk_norm``
LeCun et al. 1998, "Efficient backprop": ``qk_start="lecun"``
Gemma team 2024, "Gemma 2": ``score_cap``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------

INIT_STD = 0.02  # GPT-2's; weights and feedback matrices start at the same scale


@dataclass(frozen=True)
class LocalGPTConfig:
    """Everything that determines the model; the defaults are the seed configuration of the report.

    A setting that cannot be raises ValueError, which names it and says what could be.
    """

    block_size: int = 64  # longest sequence, in tokens
    vocab_size: int = 65  # distinct tokens; 65 is Tiny Shakespeare's
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # channels of the residual stream, shared out equally among the heads
    dropout: float = 0.0  # probability, in [0, 1); on the residual branches, never on attention
    attn_mode: str = "softmax"  # one of ATTN_MODES
    method: str = "fa"  # one of METHODS
    softmax_backward: str = "full"  # one of SOFTMAX_BACKWARD
    feedback_scale: float = 1.0  # standard deviation of feedback matrices, in units of INIT_STD
    qk_norm: str = "off"  # one of QK_NORM
    score_scale: float = 1.0  # a factor on the scores, beside the usual 1 / sqrt(D)
    qk_start: str = "gpt2"  # one of QK_START: how W_q and W_k are drawn
    score_cap: float = math.inf  # bound c on the scores, c tanh(s / c); infinite: none
    cap_backward: str = "exact"  # one of CAP_BACKWARD

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             "every head takes an equal share")
        p = self.dropout
        if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p < 1:
            raise ValueError(f"dropout={p!r} is not a probability in [0, 1)")
        for name in ("feedback_scale", "score_scale", "score_cap"):
            value, most = getattr(self, name), math.inf if name == "score_cap" else 1e30
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most:
                raise ValueError(f"{name}={value!r} is not a positive number")
        for name, known in REGISTRIES.items():
            if getattr(self, name) not in list(known):  # a list: unhashable values are unknown, too
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: "
                                 f"choose one of {', '.join(known)}")
        if self.attn_mode == "sigmoid" and self.softmax_backward not in ("full", "none"):
            raise ValueError(
                f"softmax_backward={self.softmax_backward!r} replaces a softmax's Jacobian, and "
                "attn_mode='sigmoid' has none: choose 'full' (its own derivative) or 'none'")

    @property
    def exact(self) -> LocalGPTConfig:
        """The model with this forward pass whose error goes back by the chain rule, all the way."""
        normed = issubclass(QK_NORM[self.qk_norm][0], RMSNorm)
        return replace(self, method="bp", softmax_backward="full", cap_backward="exact",
                       qk_norm="exact" if normed else "off")


# --------------------------------------------------------------------------------------------------
# Linear maps: how y = x W^T sends its error back. The weight's own update is always grad_y^T x.
# --------------------------------------------------------------------------------------------------


def _refuse_second_derivative() -> None:
    """A rule is no derivative, so it has none. (``once_differentiable`` passes ``grad`` by.)"""
    if torch.is_grad_enabled():  # in a backward pass: only under create_graph=True
        raise RuntimeError("create_graph=True: a learning rule cannot be differentiated, "
                           "there is no second derivative")


class BackpropLinear(nn.Linear):
    """Backpropagation, ``grad_x = grad_y W``: through the very weights that it is to correct."""

    def __init__(self, n_in: int, n_out: int, feedback_std: float = INIT_STD) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.feedback_std = feedback_std


class FeedbackAlignmentLinear(BackpropLinear):
    """Feedback alignment (Lillicrap et al. 2016), ``grad_x = grad_y B``.

    ``B`` is a buffer: drawn once by LocalGPT, independently of ``W``, never trained, saved with it.
    """

    def __init__(self, n_in: int, n_out: int, feedback_std: float = INIT_STD) -> None:
        super().__init__(n_in, n_out, feedback_std)
        self.register_buffer("feedback", torch.zeros(n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return _FeedbackLinear.apply(x, self.weight, self.feedback)


class SignSymmetricLinear(BackpropLinear):
    """Sign symmetry (Liao et al. 2016), ``grad_x = grad_y sign(W) std(B)``: no strengths."""

    def forward(self, x: Tensor) -> Tensor:
        feedback = self.weight.detach().sign() * self.feedback_std
        return _FeedbackLinear.apply(x, self.weight, feedback)


class _FeedbackLinear(torch.autograd.Function):
    """``y = x W^T``, backwards ``grad_x = grad_y B``. x: (..., n_in), W and B: (n_out, n_in)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # "no gradient" stays None: AdamW would act on zeros
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None):
        _refuse_second_derivative()
        if grad_y is None:
            return None, None, None
        grad_y = grad_y.contiguous()  # else each of the two products makes its own copy
        x, feedback = (saved.to(grad_y.dtype) for saved in ctx.saved_tensors)  # autocast
        for_x, for_weight, _ = ctx.needs_input_grad
        grad_x = grad_y @ feedback if for_x else None
        grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2) if for_weight else None
        return grad_x, grad_weight, None


class _DirectFeedback(torch.autograd.Function):
    """Direct feedback alignment: the output error reaches each block at once, ``grad_x_l = e B_l``.

    Forwards it hands ``logits`` (B, T, V) through. ``taps`` are what enters each block and leaves
    the last (B, T, C), cut off from what follows. feedback: (n_layer + 1, V, C).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, feedback: Tensor, *taps: Tensor) -> Tensor:
        ctx.save_for_backward(feedback)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, error: Tensor):
        _refuse_second_derivative()
        (feedback,) = ctx.saved_tensors
        return error, None, *(error @ b for b in feedback.to(error.dtype))


METHODS: dict[str, type[BackpropLinear]] = {
    "bp": BackpropLinear,
    "fa": FeedbackAlignmentLinear,
    "sign_sym": SignSymmetricLinear,
    "dfa": BackpropLinear,  # exact inside a block; between blocks see _DirectFeedback
}

# --------------------------------------------------------------------------------------------------
# Softmax: how a = softmax(s) sends its error g = dL/da back to s. A rule takes a and g (B, H, T, T)
# and the boolean map of visible keys (T, T); it returns dL/ds, 0 on all other keys, or None where
# nothing is sent. A further rule is one entry in SOFTMAX_BACKWARD. A rule with a memory takes it as
# a fourth argument, and has two methods: start(config) is the memory before training, and
# learn(memory, a, g, visible) what becomes of it after each step.
# --------------------------------------------------------------------------------------------------

Rule = Callable[..., Tensor | None]


def no_baseline(a: Tensor, g: Tensor, visible: Tensor) -> float:
    """``c = 0``."""
    return 0.0


def plain_mean(a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
    """``c``: the mean of ``g`` over the keys that the query sees, whatever it attends to."""
    return (g * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)


def lateral_sum(a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
    """``c = b = sum_j a_j g_j``, which is ``dO . O`` (Dao et al. 2022): the exact baseline."""
    return (a * g).sum(-1, keepdim=True)


@dataclass(frozen=True)
class BaselineRule:
    """``a m (g - c)``: each key's error against a baseline ``c``, times its weight and a slope.

    ``m = 1, c = b`` is the exact pass ``f = J g``; ``m = 1 - a, c = 0`` the Jacobian's diagonal. In
    between: the policy gradient of REINFORCE (Williams 1992) under one baseline or another.

    >>> a, g = torch.tensor([0.25, 0.75]), torch.tensor([1.0, -1.0])
    >>> full(a, g, visible=torch.ones(2, dtype=bool))
    tensor([ 0.3750, -0.3750])
    """

    slope: bool  # True: m = 1 - a, the slope of a sigmoid; False: m = 1
    baseline: Callable[..., Tensor | float]

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return self.against(self.baseline(a, g, visible), a, g)

    def against(self, baseline: Tensor | float, a: Tensor, g: Tensor) -> Tensor:
        error = (g - baseline).mul_(a)
        return error.mul_(1 - a) if self.slope else error


@dataclass(frozen=True)
class RunningMeanRule(BaselineRule):
    """``c``: the mean of ``g`` over batch and visible keys, averaged over the steps before.

    One number a head (H, 1, 1), known before the backward pass begins.
    """

    baseline: None = None
    decay: float = 0.9  # of the average, per training step

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor) -> Tensor:
        return self.against(memory, a, g)

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, 1, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        average = (g * visible).sum((0, 2, 3)) / (visible.sum() * len(g))
        return memory.lerp(average.view_as(memory).to(memory.dtype), 1 - self.decay)


full = BaselineRule(slope=False, baseline=lateral_sum)
diagonal = BaselineRule(slope=True, baseline=no_baseline)


def straight_through(a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
    """``e = g`` on the visible keys (Bengio et al. 2013): the identity in the place of ``J``."""
    return g * visible


def nothing(a: Tensor, g: Tensor, visible: Tensor) -> None:
    """The control: ``W_q`` and ``W_k`` get no gradient at all and stay as they were drawn."""


def balanced_evenly(a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
    """``d`` less its row's mean: what ``diagonal`` becomes where the scores are centred."""
    d = diagonal(a, g, visible)
    return (d - d.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)) * visible


def balanced_by_attention(a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
    """``d`` less its row's sum, shared out as attention is: ``J (1 - a) g``."""
    d = diagonal(a, g, visible)
    return d - a * d.sum(-1, keepdim=True)


SOFTMAX_BACKWARD: dict[str, Rule] = {
    "full": full,
    "diagonal": diagonal,
    "ste": straight_through,
    "none": nothing,
    "zero": BaselineRule(slope=False, baseline=no_baseline),
    "mean": BaselineRule(slope=False, baseline=plain_mean),
    "running": RunningMeanRule(slope=False),
    "diagonal_mean": BaselineRule(slope=True, baseline=plain_mean),
    "diagonal_running": RunningMeanRule(slope=True),
    "diagonal_lateral": BaselineRule(slope=True, baseline=lateral_sum),
    "balanced_evenly": balanced_evenly,
    "balanced_by_attention": balanced_by_attention,
}


ATTN_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: torch.softmax(scores, dim=-1),
    # Ramapuram et al. 2024: each key by itself, with their bias -log T
    "sigmoid": lambda scores: torch.sigmoid(scores - math.log(scores.shape[-1])),
}


class AttentionWeights(nn.Module):
    """Scores in, attention weights out, both (B, H, T, T): where a forward hook sees them.

    Masked scores are ``-inf``, their weights exactly 0. The backward pass follows
    ``softmax_backward``; a sigmoid's exact one is the diagonal formula: it has no lateral term.
    """

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        self.activation = ATTN_MODES[config.attn_mode]
        exact_sigmoid = config.attn_mode == "sigmoid" and config.softmax_backward == "full"
        self.rule = diagonal if exact_sigmoid else SOFTMAX_BACKWARD[config.softmax_backward]
        if hasattr(self.rule, "start"):
            self.register_buffer("memory", self.rule.start(config))

    def forward(self, scores: Tensor, visible: Tensor) -> Tensor:
        return attention_weights(scores, visible, self.activation, self.send_back)

    @torch.no_grad()
    def send_back(self, attn: Tensor, grad: Tensor, visible: Tensor) -> Tensor | None:
        """dL/ds from dL/da. In training a rule's memory takes in this ``grad`` afterwards."""
        if not hasattr(self, "memory"):
            return self.rule(attn, grad, visible)
        sent = self.rule(attn, grad, visible, self.memory)
        if self.training:
            self.memory.copy_(self.rule.learn(self.memory, attn, grad, visible))
        return sent


def attention_weights(scores: Tensor, visible: Tensor,
                      activation: Callable[[Tensor], Tensor] = ATTN_MODES["softmax"],
                      send_back: Rule = full) -> Tensor:
    """``a = activation(s)`` forwards, ``dL/ds = send_back(a, dL/da, visible)`` backwards.

    scores: (..., T_q, T_k), ``-inf`` where ``visible``, of a shape that broadcasts to theirs, is
    False. Like PyTorch's own functions this one can be overridden by a ``TorchFunctionMode`` (see
    ``torch.overrides``): that is how a capture sees it.
    """
    if has_torch_function_unary(scores):
        arguments = scores, visible, activation, send_back
        return handle_torch_function(attention_weights, (scores,), *arguments)
    return _RuledWeights.apply(scores, visible, activation, send_back)


class _RuledWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, visible: Tensor, activation, send_back) -> Tensor:
        attn = activation(scores)
        ctx.send_back = send_back
        ctx.save_for_backward(attn, visible)
        return attn

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.send_back is not full:  # which is the derivative, and has one of its own
            _refuse_second_derivative()
        attn, visible = ctx.saved_tensors
        return ctx.send_back(attn, grad, visible), None, None, None


# --------------------------------------------------------------------------------------------------
# Norms and caps: what attention does to queries and keys (..., D), and to their scores.
#
# A norm divides by the root mean square, x / rms(x), without a learnt gain. Its exact backward pass
# takes the radial part from dx, and for that forms x . dx: at a query a sum over keys that nobody
# else is told, q_i . dq_i = sum_j ds_ij s_ij; at a key k_j . dk_j = sum_i ds_ij s_ij, over queries.
# --------------------------------------------------------------------------------------------------


NORM_EPS = 1e-6  # added to the mean square


class RMSNorm(nn.RMSNorm):
    """``x / rms(x)`` over the last axis, and its exact backward pass (Zhang and Sennrich 2019)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=NORM_EPS, elementwise_affine=False)


class CutRMSNorm(RMSNorm):
    """The same forwards; backwards the divisor counts as a constant: a gain control."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.detach().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()


class TangentNorm(nn.Identity):
    """Changes nothing forwards; backwards it takes out the radial part: a norm's other half."""

    def forward(self, x: Tensor) -> Tensor:
        rms = (x.detach().square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * rms


QK_NORM: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {  # of queries, of keys
    "off": (nn.Identity, nn.Identity),
    "exact": (RMSNorm, RMSNorm),
    "cut": (CutRMSNorm, CutRMSNorm),
    "cut_q": (CutRMSNorm, RMSNorm),
    "cut_k": (RMSNorm, CutRMSNorm),
    "tangent": (TangentNorm, TangentNorm),
    "tangent_q": (TangentNorm, nn.Identity),
    "tangent_k": (nn.Identity, TangentNorm),
}


class ScoreCap(nn.Module):
    """``c tanh(s / c)`` (Gemma 2's soft-capping): no score is larger than ``c``.

    Its derivative is ``1 - tanh^2(s / c)``, or 1 where it is ``cut``: bound and slope apart.
    """

    def __init__(self, cap: float, cut: bool) -> None:
        super().__init__()
        self.cap, self.cut = cap, cut

    def forward(self, scores: Tensor) -> Tensor:
        capped = self.cap * torch.tanh(scores / self.cap)
        return scores + (capped - scores).detach() if self.cut else capped


CAP_BACKWARD = ("exact", "cut")
QK_START = ("gpt2", "lecun")
REGISTRIES = {
    "method": METHODS,
    "softmax_backward": SOFTMAX_BACKWARD,
    "attn_mode": ATTN_MODES,
    "qk_norm": QK_NORM,
    "qk_start": QK_START,
    "cap_backward": CAP_BACKWARD,
}

# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Multi-head attention, ``O = A V``, ``A = softmax(Q K^T / sqrt(D))``: A can be seen.

    Q and K pass their norm; the scores are scaled and capped before they are masked.
    """

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        linear, std = METHODS[config.method], INIT_STD * config.feedback_scale
        self.n_head = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.q_proj = linear(config.n_embd, config.n_embd, std)
        self.k_proj = linear(config.n_embd, config.n_embd, std)
        self.v_proj = linear(config.n_embd, config.n_embd, std)
        self.o_proj = linear(config.n_embd, config.n_embd, std)
        self.q_norm, self.k_norm = (norm(self.head_dim) for norm in QK_NORM[config.qk_norm])
        self.score_scale = config.score_scale * self.head_dim**-0.5
        cap, cut = config.score_cap, config.cap_backward == "cut"
        self.score_cap = ScoreCap(cap, cut) if cap < math.inf else None
        self.attn_weights = AttentionWeights(config)
        self.resid_drop = nn.Dropout(config.dropout)
        # True where the query (row) may see the key (column), as in F.scaled_dot_product_attention
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2).flatten(0, 1)  # (B*H, T, D)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2).flatten(0, 1)  # (B*H, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        visible = self.causal_mask[:T, :T]
        mask = x.new_zeros(T, T).masked_fill(~visible, -math.inf)
        if self.score_cap is None:  # mask + Q K^T / sqrt(D) in one go
            scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=self.score_scale)
        else:  # a cap would make a finite score of -inf
            scores = self.score_cap(q @ k.transpose(1, 2) * self.score_scale) + mask
        attn = self.attn_weights(scores.view(B, self.n_head, T, T), visible)  # (B, H, T, T)
        o = (attn @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_drop(self.o_proj(o))


class MLP(nn.Module):
    """The position-wise half of a block: widen by four, GELU, narrow."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        linear, std = METHODS[config.method], INIT_STD * config.feedback_scale
        self.up_proj = linear(config.n_embd, 4 * config.n_embd, std)
        self.down_proj = linear(4 * config.n_embd, config.n_embd, std)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.resid_drop(self.down_proj(F.gelu(self.up_proj(x))))


class Block(nn.Module):
    """``x + attention(LN(x))``, then ``x + MLP(LN(x))``."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=False)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class LocalGPT(nn.Module):
    """A GPT that learns by ``config.method``, its attention by ``config.softmax_backward``.

    Two models built after the same ``torch.manual_seed`` start from the same weights, whatever
    their learning rules: the feedback matrices are drawn after all the weights.

    >>> _ = torch.manual_seed(0)
    >>> config = LocalGPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16)
    >>> model = LocalGPT(config)
    >>> idx = torch.arange(8)[None]
    >>> logits, loss = model(idx, targets=idx)
    >>> logits.shape, loss.shape
    (torch.Size([1, 8, 10]), torch.Size([]))
    >>> model.generate(idx, n_new=3).shape
    torch.Size([1, 11])
    """

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        self.config = config
        linear, std = METHODS[config.method], INIT_STD * config.feedback_scale
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.lm_head = linear(config.n_embd, config.vocab_size, std)
        if config.method == "dfa":  # one map for the embedding's output and one for each block's
            shape = (config.n_layer + 1, config.vocab_size, config.n_embd)
            self.register_buffer("direct_feedback", torch.zeros(shape))
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            part, std = name.split(".")[-2], INIT_STD
            if part in ("o_proj", "down_proj"):
                # GPT-2: what is added to the residual stream shrinks with the number of additions
                std /= math.sqrt(2 * self.config.n_layer)
            if part in ("q_proj", "k_proj") and self.config.qk_start == "lecun":
                std = self.config.n_embd**-0.5  # queries and keys of root mean square 1
            if parameter.dim() == 2:  # the gains of LayerNorm stay 1
                parameter.normal_(0.0, std)
        for name, buffer in self.named_buffers():
            if name.endswith("feedback"):
                buffer.normal_(0.0, INIT_STD * self.config.feedback_scale)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position.

        idx, targets: (B, T) token ids in [0, vocab_size), T <= block_size; a target of -100 is left
        out of the loss. Returns logits (B, T, vocab_size) and the mean cross-entropy in nats per
        token (None without targets). Raises ValueError on a wrong shape or type, and on ids out of
        range (on a CPU: a GPU raises an error of its own).
        """
        longest = self.config.block_size
        if idx.dim() != 2 or not idx.shape[0] or not 1 <= idx.shape[1] <= longest:
            raise ValueError(f"idx has shape {tuple(idx.shape)}: expected (B, T), B from 1, "
                             f"T from 1 to {longest}")
        self._check_ids("idx", idx)
        if targets is not None:
            if targets.shape != idx.shape:
                raise ValueError(f"targets have shape {tuple(targets.shape)}, "
                                 f"idx {tuple(idx.shape)}: they must agree")
            self._check_ids("targets", targets.masked_fill(targets == -100, 0))

        # Between blocks DFA cuts the backward path; its error arrives at what was there.
        direct = self.config.method == "dfa"
        x = self.token_embedding(idx) + self.position_embedding.weight[: idx.shape[1]]
        stream = [self.drop(x)]  # the embedding and the output of every block, each (B, T, C)
        for block in self.blocks:
            stream.append(block(stream[-1].detach() if direct else stream[-1]))
        logits = self.lm_head(self.ln_f(stream[-1].detach() if direct else stream[-1]))  # (B, T, V)
        if direct:
            logits = _DirectFeedback.apply(logits, self.direct_feedback, *stream)

        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
        return logits, loss

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} are {ids.dtype}: token ids are whole numbers, "
                             "convert them with .long()")
        if ids.device.type != "cpu":  # to look at them is to wait for a GPU
            return
        low, high = ids.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"{name} hold ids from {low} to {high}, and the model's vocabulary "
                             f"goes from 0 to {self.config.vocab_size - 1}")

    @torch.no_grad()
    def generate(self, idx: Tensor, n_new: int, temperature: float = 1.0,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continue ``idx`` (B, T) by ``n_new`` sampled tokens; returns (B, T + n_new).

        ``temperature`` > 0 divides the logits; ``generator`` makes the sample repeatable, and
        leaves torch's own random numbers alone. ValueError on either number out of range.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not a positive number")
        if n_new < 0:
            raise ValueError(f"n_new={n_new} is negative")
        was_training = self.training
        self.eval()
        for _ in range(n_new):
            logits, _ = self(idx[:, -self.config.block_size :])
            probs = torch.softmax(logits[:, -1] / temperature, dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1, generator=generator)), dim=1)
        self.train(was_training)
        return idx
