"""LocalGPT: a small GPT whose backward pass can be made local, one piece at a time.

Three independent choices decide how an error travels backwards:

* ``method``: how every linear map ``y = x W^T`` sends its error back to ``x`` (``bp``, ``fa``, ``sign_sym``, ``dfa``);
* ``softmax_backward``: how the softmax of attention sends its error back to the scores (``full``, ``diagonal``, ...);
* ``qk_norm``: whether queries and keys are normalised, and which of the two norms sends its error back exactly.

The forward pass is else the same whatever they are: a pre-LayerNorm GPT as in nanoGPT, without biases and with an
output layer of its own (tying it to the embedding would be weight transport by another name). The file reads from top
to bottom: configuration, linear maps, softmax, norms, attention, block, GPT; at the end, rules that only probe.

References
----------
Vaswani et al. 2017, "Attention is all you need"                                         the architecture
Lillicrap et al. 2016, "Random synaptic feedback weights support error backpropagation"   ``fa``
Liao et al. 2016, "How important is weight symmetry in backpropagation?"                  ``sign_sym``
Moskovitz et al. 2018, "Feedback alignment in deep convolutional networks"                ``sign_sym``
Nokland 2016, "Direct feedback alignment provides learning in deep neural networks"       ``dfa``
Launay et al. 2020, "Direct feedback alignment scales to modern deep learning"            ``dfa`` in transformers
Williams 1992, "Simple statistical gradient-following algorithms"                         baselines
Dao et al. 2022, "FlashAttention"                                                         the lateral sum as ``dO . O``
Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons for conditional computation" ``ste``
Ramapuram et al. 2024, "Theory, analysis, and best practices for sigmoid self-attention"  ``attn_mode="sigmoid"``
Henry et al. 2020, "Query-key normalization for transformers"                             ``qk_norm``
Zhang and Sennrich 2019, "Root mean square layer normalization"                           the norm in ``qk_norm``
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------

INIT_STD = 0.02  # GPT-2's; weights and feedback matrices start at the same scale


@dataclass(frozen=True)
class LocalGPTConfig:
    """Everything that determines the model; the defaults are the seed configuration of the report.

    >>> LocalGPTConfig(n_embd=130)
    Traceback (most recent call last):
        ...
    ValueError: n_embd=130 is not divisible by n_head=4: every head takes an equal share of the channels
    """

    block_size: int = 64  # longest sequence, in tokens
    vocab_size: int = 65  # distinct tokens; 65 is Tiny Shakespeare's
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # channels of the residual stream, shared out equally among the heads
    dropout: float = 0.0  # probability, in [0, 1); on the residual branches, never on the attention weights
    attn_mode: str = "softmax"  # one of ATTN_MODES
    method: str = "fa"  # one of METHODS
    softmax_backward: str = "full"  # one of SOFTMAX_BACKWARD
    feedback_scale: float = 1.0  # standard deviation of the feedback matrices, in units of INIT_STD
    qk_norm: str = "off"  # one of QK_NORM
    score_scale: float = 1.0  # a factor on the scores, beside the usual 1 / sqrt(D)

    def __post_init__(self) -> None:
        # NumPy's numbers, as loops over arrays give them, become Python's: a config is compared and written down
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number")
            object.__setattr__(self, name, int(value))
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                "every head takes an equal share of the channels"
            )
        for name, what, fits in (
            ("dropout", "a probability in [0, 1)", lambda p: 0 <= p < 1),
            ("feedback_scale", "a positive number", lambda scale: 0 < scale < math.inf),
            ("score_scale", "a positive number", lambda scale: 0 < scale < math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
                raise ValueError(f"{name}={value!r} is not {what}")
            object.__setattr__(self, name, float(value))
        registries = {"attn_mode": ATTN_MODES, "method": METHODS, "softmax_backward": SOFTMAX_BACKWARD}
        for name, known in (registries | {"qk_norm": QK_NORM}).items():
            if getattr(self, name) not in list(known):  # a list: what cannot be hashed is unknown, too
                raise ValueError(  # the names of rules, without the probes behind them
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(list(known)[:12])}"
                )
        if self.attn_mode == "sigmoid" and self.softmax_backward not in ("full", "none"):
            raise ValueError(
                f"softmax_backward={self.softmax_backward!r} replaces a softmax's Jacobian, and attn_mode='sigmoid' "
                "has none: choose 'full' (its own exact derivative) or 'none'"
            )

    @property
    def exact(self) -> LocalGPTConfig:
        """The model with this forward pass whose error goes back by the chain rule, all the way."""
        normed = issubclass(QK_NORM[self.qk_norm][0], RMSNorm)
        return replace(self, method="bp", softmax_backward="full", qk_norm="exact" if normed else "off")


# ---------------------------------------------------------------------------------------------------------------------
# Linear maps: how y = x W^T sends its error back. The weight's own update is grad_y^T x in all of them.
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_second_derivative() -> None:
    """The first line of every backward pass below: a rule is no derivative of anything, so it has none itself.

    ``once_differentiable`` is not enough: ``torch.autograd.grad`` passes its error by, and leaves terms out in silence.
    """
    if torch.is_grad_enabled():  # so it is in a backward pass under create_graph=True, and only there
        raise RuntimeError("create_graph=True: a learning rule cannot be differentiated, there is no second derivative")


class BackpropLinear(nn.Linear):
    """Backpropagation, ``grad_x = grad_y W``: the error returns through the very weights it is meant to correct."""

    def __init__(self, n_in: int, n_out: int, feedback_std: float = INIT_STD) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.feedback_std = feedback_std

    def reset_feedback(self) -> None:
        """Draw what the backward pass uses instead of ``W``; backpropagation uses ``W`` itself."""


class FeedbackAlignmentLinear(BackpropLinear):
    """Feedback alignment (Lillicrap et al. 2016), ``grad_x = grad_y B``: ``B`` fixed, random, shaped as ``W``.

    ``B`` is a buffer: drawn once, independently of ``W``, never trained, saved with the model.
    """

    def __init__(self, n_in: int, n_out: int, feedback_std: float = INIT_STD) -> None:
        super().__init__(n_in, n_out, feedback_std)
        self.register_buffer("feedback", torch.zeros(n_out, n_in))

    def reset_feedback(self) -> None:
        self.feedback.normal_(0.0, self.feedback_std)

    def forward(self, x: Tensor) -> Tensor:
        return _FeedbackLinear.apply(x, self.weight, self.feedback)


class SignSymmetricLinear(BackpropLinear):
    """Sign symmetry (Liao et al. 2016), ``grad_x = grad_y sign(W) std(B)``: wiring known, strength unknown."""

    def forward(self, x: Tensor) -> Tensor:
        return _FeedbackLinear.apply(x, self.weight, self.weight.detach().sign() * self.feedback_std)


class _FeedbackLinear(torch.autograd.Function):
    """``y = x W^T`` forwards, ``grad_x = grad_y B`` backwards. x: (..., n_in), W and B: (n_out, n_in)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, feedback: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # "no gradient" stays None instead of turning into zeros that AdamW acts on
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None):
        _refuse_second_derivative()
        if grad_y is None:
            return None, None, None
        grad_y = grad_y.contiguous()  # else each of the two products makes its own copy
        x, feedback = (saved.to(grad_y.dtype) for saved in ctx.saved_tensors)  # under autocast they differ
        grad_x = grad_y @ feedback if ctx.needs_input_grad[0] else None
        grad_weight = grad_y.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _DirectFeedback(torch.autograd.Function):
    """Direct feedback alignment: the output error reaches each block in one step, ``grad_x_l = e B_l``.

    Forwards it hands ``logits`` (B, T, V) through; ``taps`` are the block outputs (B, T, C), already cut off from what
    follows them, so that the graph is a star with the error ``e = dL/dlogits`` at its centre. feedback: (L, V, C).
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
    "dfa": BackpropLinear,  # exact inside a block; between blocks no error travels at all (see _DirectFeedback)
}

# ---------------------------------------------------------------------------------------------------------------------
# Softmax: how a = softmax(s) sends its error g = dL/da back to s. A rule takes a and g (B, H, T, T), the boolean map of
# visible keys (T, T) and its own memory, if it has one, and returns dL/ds, 0 on all other keys, or None where nothing
# is sent. A further rule is one entry in SOFTMAX_BACKWARD. A rule with a memory has two methods more: start(config) is
# the memory before training, and learn(memory, a, g, visible) what becomes of it after each step.
# ---------------------------------------------------------------------------------------------------------------------

Rule = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]


def zero(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> float:
    """No baseline, ``c = 0``."""
    return 0.0


def mean(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """``c``: the plain mean of ``g`` over the keys that the query sees, whatever it attends to."""
    return (g * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)


def remembered(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """``c``: what the rule remembers, known before the backward pass begins."""
    return memory


def lateral(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """``c = b = sum_j a_j g_j``, the lateral sum, which is ``dO . O`` (Dao et al. 2022): the exact baseline."""
    return (a * g).sum(-1, keepdim=True)


@dataclass(frozen=True)
class BaselineRule:
    """``a m (g - c)``: the error of each key against a baseline ``c``, times its weight and a slope ``m``.

    ``m = 1, c = b`` is the exact pass ``f = J g``; ``m = 1 - a, c = 0`` the diagonal of the Jacobian alone. In between
    are its surrogates: the policy gradient of REINFORCE (Williams 1992) under one baseline or another.

    >>> a, g, visible = torch.tensor([0.25, 0.75]), torch.tensor([1.0, -1.0]), torch.ones(2, dtype=bool)
    >>> full(a, g, visible)
    tensor([ 0.3750, -0.3750])
    """

    slope: bool  # True: m = 1 - a, the slope of a sigmoid; False: m = 1
    baseline: Callable[..., Tensor | float]

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        error = (g - self.baseline(a, g, visible, memory)).mul_(a)
        return error.mul_(1 - a) if self.slope else error


@dataclass(frozen=True)
class RunningMeanRule(BaselineRule):
    """``c``: the mean of ``g`` over batch and visible keys, per head (H, 1, 1), averaged over the steps before."""

    baseline: Callable[..., Tensor | float] = remembered
    decay: float = 0.9  # of the average, a training step

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, 1, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        average = (g * visible).sum((0, 2, 3)) / (visible.sum() * len(g))
        return memory.lerp(average.view_as(memory).to(memory.dtype), 1 - self.decay)


def ste(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """Straight-through (Bengio et al. 2013), ``e = g`` on the keys that the query may see: the identity for ``J``."""
    return g * visible


def none(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> None:
    """Nothing: ``W_q`` and ``W_k`` get no gradient at all and stay as they were drawn. The control."""


full = BaselineRule(slope=False, baseline=lateral)
diagonal = BaselineRule(slope=True, baseline=zero)


def balanced_evenly(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """``d`` less its row's mean over the visible keys: what ``diagonal`` becomes where the scores are centred."""
    d = diagonal(a, g, visible)
    return (d - d.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)) * visible


def balanced_by_attention(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
    """``d`` less its row's sum, shared out as attention is. So it is ``J (1 - a) g``, exact for another error."""
    d = diagonal(a, g, visible)
    return d - a * d.sum(-1, keepdim=True)


SOFTMAX_BACKWARD: dict[str, Rule] = {
    "full": full,
    "diagonal": diagonal,
    "ste": ste,
    "none": none,
    "zero": BaselineRule(slope=False, baseline=zero),
    "mean": BaselineRule(slope=False, baseline=mean),
    "running": RunningMeanRule(slope=False),
    "diagonal_mean": BaselineRule(slope=True, baseline=mean),
    "diagonal_running": RunningMeanRule(slope=True),
    "diagonal_lateral": BaselineRule(slope=True, baseline=lateral),
    "balanced_evenly": balanced_evenly,
    "balanced_by_attention": balanced_by_attention,
}


def _sigmoid(scores: Tensor) -> Tensor:
    """Sigmoid attention (Ramapuram et al. 2024): each key by itself, with their bias ``-log T``."""
    return torch.sigmoid(scores - math.log(scores.shape[-1]))


ATTN_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": functools.partial(torch.softmax, dim=-1),
    "sigmoid": _sigmoid,
}


class AttentionWeights(nn.Module):
    """Scores in, attention weights out, both (B, H, T, T): the one place a forward hook needs in order to see them.

    Masked scores are ``-inf`` and their weights exactly 0. The backward pass follows ``softmax_backward``; a sigmoid's
    exact derivative is the diagonal formula, which is why sigmoid attention has no lateral term.
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
        """dL/ds from dL/da. In training the rule's memory, where it has one, takes in this ``grad`` afterwards."""
        memory = getattr(self, "memory", None)
        sent = self.rule(attn, grad, visible, memory)
        if memory is not None and self.training:
            memory.copy_(self.rule.learn(memory, attn, grad, visible))
        return sent


def attention_weights(
    scores: Tensor,
    visible: Tensor,
    activation: Callable[[Tensor], Tensor] = ATTN_MODES["softmax"],
    send_back: Callable[[Tensor, Tensor, Tensor], Tensor | None] = SOFTMAX_BACKWARD["full"],
) -> Tensor:
    """``a = activation(s)`` forwards, ``dL/ds = send_back(a, dL/da, visible)`` backwards.

    scores: (..., T_q, T_k), ``-inf`` where ``visible``, of a shape that broadcasts to theirs, is False. Like PyTorch's
    own functions this one can be overridden by a ``torch.overrides.TorchFunctionMode``: that is how a capture sees it.
    """
    if has_torch_function_unary(scores):
        return handle_torch_function(attention_weights, (scores,), scores, visible, activation, send_back)
    return _RuledWeights.apply(scores, visible, activation, send_back)


class _RuledWeights(torch.autograd.Function):
    """See ``attention_weights``."""

    @staticmethod
    def forward(ctx, scores: Tensor, visible: Tensor, activation: Callable, send_back: Callable) -> Tensor:
        attn = activation(scores)
        ctx.send_back = send_back
        ctx.save_for_backward(attn, visible)
        return attn

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse_second_derivative()
        attn, visible = ctx.saved_tensors
        return ctx.send_back(attn, grad, visible), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Norms: queries and keys (..., D) over their root mean square, x / rms(x), without a learnt gain. The exact backward
# pass takes the radial part from dx, and for that forms x . dx: at a query q_i . dq_i = sum_j ds_ij s_ij, a sum over
# keys that nobody else is told; at a key k_j . dk_j = sum_i ds_ij s_ij, a sum over queries.
# ---------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """``x / rms(x)`` over the last axis, and its exact backward pass (Zhang and Sennrich 2019)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=1e-6, elementwise_affine=False)


class CutRMSNorm(RMSNorm):
    """The same forwards; backwards the divisor counts as a constant, a gain control that no error passes through."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.detach().square().mean(-1, keepdim=True) + self.eps).rsqrt()


class TangentNorm(nn.Module):
    """Changes nothing forwards; backwards it takes out the radial part of the error: the other half of a norm."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * (x.detach().square().mean(-1, keepdim=True) + self.norm.eps).sqrt()


QK_NORM: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {  # of queries, of keys
    "off": (nn.Identity, nn.Identity),
    "exact": (RMSNorm, RMSNorm),
    "cut": (CutRMSNorm, CutRMSNorm),
    "cut_q": (CutRMSNorm, RMSNorm),
    "cut_k": (RMSNorm, CutRMSNorm),
    "tangent": (TangentNorm, TangentNorm),
    "tangent_q": (TangentNorm, nn.Identity),
    "tangent_k": (nn.Identity, TangentNorm),
}

# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """Multi-head attention, ``O = A V`` with ``A = softmax(Q K^T / sqrt(D))``, written out so that A can be seen.

    Q and K are as ``qk_norm`` leaves them, and ``score_scale`` is one more factor on their product.
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
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=self.score_scale)  # mask + Q K^T / sqrt(D)
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
    """A GPT that learns by ``config.method``, with attention that learns by ``config.softmax_backward``.

    Two models built after the same ``torch.manual_seed`` start from the same weights, whatever their learning rules:
    the feedback matrices are drawn after all the weights.

    >>> _ = torch.manual_seed(0)
    >>> model = LocalGPT(LocalGPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
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
            if parameter.dim() == 2:
                # GPT-2: what is added to the residual stream is scaled down with the number of additions
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if is_residual else INIT_STD
                parameter.normal_(0.0, std)
        for module in self.modules():
            if isinstance(module, BackpropLinear):
                module.reset_feedback()
        if self.config.method == "dfa":
            self.direct_feedback.normal_(0.0, INIT_STD * self.config.feedback_scale)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next token at every position.

        idx, targets: (B, T) token ids in [0, vocab_size), T <= block_size; a target of -100 is left out of the loss.
        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats per token (None without targets). Raises
        ValueError on a wrong shape or type, and on ids out of range (on a CPU: a GPU raises an error of its own).
        """
        if idx.dim() != 2 or not idx.shape[0] or not 1 <= idx.shape[1] <= self.config.block_size:
            raise ValueError(
                f"idx has shape {tuple(idx.shape)}: expected (B, T), B from 1, T from 1 to {self.config.block_size}"
            )
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, idx {tuple(idx.shape)}: they must agree")
        for name, ids in (("idx", idx), ("targets", targets)):
            if ids is not None and ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name} are {ids.dtype}: token ids are whole numbers, convert them with .long()")
        try:
            x = self.token_embedding(idx)
        except IndexError as error:
            raise self._out_of_range("idx", idx) from error
        position = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(x + self.position_embedding(position))  # (B, T, C)
        taps: list[Tensor] = []
        x = self._between_blocks(x, taps)
        for block in self.blocks:
            x = self._between_blocks(block(x), taps)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if taps:
            logits = _DirectFeedback.apply(logits, self.direct_feedback, *taps)
        if targets is None:
            return logits, None
        try:
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
        except IndexError as error:
            raise self._out_of_range("targets", targets) from error

    def _out_of_range(self, name: str, ids: Tensor) -> ValueError:
        """The error for ids that have no token. Asked for afterwards: to look first is to wait for the device."""
        low, high = ids.aminmax()
        last = self.config.vocab_size - 1
        return ValueError(f"{name} hold ids from {low} to {high}, and the model's vocabulary goes from 0 to {last}")

    def _between_blocks(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """Under ``dfa`` cut the backward path here, and keep ``x`` as a place where the output error is to arrive."""
        if self.config.method != "dfa":
            return x
        taps.append(x)
        return x.detach()

    @torch.no_grad()
    def generate(
        self, idx: Tensor, n_new: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue ``idx`` (B, T) by ``n_new`` sampled tokens; returns (B, T + n_new).

        ``temperature`` > 0 divides the logits; ``generator`` makes the sample repeatable, and leaves torch's own random
        numbers alone. Every module keeps its mode.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not a positive number")
        if n_new < 0:
            raise ValueError(f"n_new={n_new} is negative")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for _ in range(n_new):
                logits, _ = self(idx[:, -self.config.block_size :])
                probs = torch.softmax(logits[:, -1] / temperature, dim=-1)
                idx = torch.cat((idx, torch.multinomial(probs, 1, generator=generator)), dim=1)
        finally:
            for module, training in modes:
                module.training = training
        return idx


# ---------------------------------------------------------------------------------------------------------------------
# Probes: rules that nobody would build, to ask what it is in the lateral sum that matters. Entries of their own below.
# What is random in them is drawn from the attention weights it is used with, so that to measure a model, or to resume
# a run, draws the same again and disturbs nothing else.
# ---------------------------------------------------------------------------------------------------------------------


def dosed(a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None, *, dose: float) -> Tensor:
    """``c = dose * b``: less or more of the exact baseline."""
    return dose * lateral(a, g, visible)


def _seeded_by(a: Tensor) -> torch.Generator:
    """A generator that starts where ``a`` says: fresh for every layer and iteration, the same for the same map."""
    return torch.Generator(a.device).manual_seed(abs(hash(a.double().square().sum().item())))


def as_sign(message: Tensor, a: Tensor, memory: Tensor | None) -> Tensor:
    """One bit a query, and one size for all queries of a head."""
    return message.sign() * message.abs().mean((0, 2, 3), keepdim=True)


def as_power(message: Tensor, a: Tensor, memory: Tensor | None) -> Tensor:
    """A sign and an exponent a query: the power of two that is nearest on a logarithmic scale."""
    return torch.where(message == 0, message, message.sign() * message.abs().log2().round().exp2())


def as_noise(message: Tensor, a: Tensor, memory: Tensor | None) -> Tensor:
    """Times a number from a normal distribution of mean 1 and deviation 1, drawn anew for each query."""
    noise = torch.randn(message.shape, generator=_seeded_by(a), dtype=a.dtype, device=a.device)
    return message * (1 + noise)


def as_remembered(message: Tensor, a: Tensor, memory: Tensor) -> Tensor:
    """What it was on average at this position in the iteration before, on other sequences."""
    return memory[:, : message.shape[2]].expand_as(message)


@dataclass(frozen=True)
class MessageRule:
    """``e_j - a_j m``: what a local rule sends, less a number of the query, told to its keys as they are attended to.

    Told exactly, ``m = sum_j e_j``: then ``zero`` becomes the exact pass and ``diagonal`` ``balanced_by_attention``.
    """

    base: Rule
    told: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        sent = self.base(a, g, visible)
        return sent - a * self.told(sent.sum(-1, keepdim=True), a, memory)


class LateMessageRule(MessageRule):
    """A message whose memory, of each head and position (H, block_size, 1), is that of the iteration before."""

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, config.block_size, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        learnt = memory.clone()
        learnt[:, : a.shape[2]] = self.base(a, g, visible).sum(-1, keepdim=True).mean(0)
        return learnt


@dataclass(frozen=True)
class ErrorRule:
    """``f + e``: the exact pass with an error of a given direction, persistence and size, at right angles to ``f``.

    direction: ``row``, the same for all keys of a query; ``attention``, in proportion to the weights; ``random``, drawn
    for each key. A ``fresh`` error has a new sign a head, or a new draw, at every iteration, otherwise it is always the
    same. Its size is 3/4 of that of ``f`` (a cosine of 0.8) in every map; or, if ``absolute``, 3/4 of what the size of
    ``f`` was at the first iteration, on average over the batch: that is the rule's memory, one number a head (H, 1, 1).
    """

    direction: str
    fresh: bool
    absolute: bool

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        f = full(a, g, visible)
        generator = _seeded_by(a) if self.fresh else torch.Generator(a.device).manual_seed(0)
        like = {"generator": generator, "dtype": a.dtype, "device": a.device}
        error = {"row": torch.ones_like(a), "attention": a}.get(self.direction)
        if error is None:
            error = torch.randn(a.shape[1:], **like).expand_as(a)
        elif self.fresh:
            error = error * torch.randn(a.shape[1], 1, 1, **like).sign()
        error = error * visible
        inner = [(x * f).sum((-2, -1), keepdim=True).double() for x in (error, f)]
        error = error - f * (inner[0] / inner[1]).nan_to_num().to(f.dtype)
        size = memory if self.absolute else _size(f)
        return f + 0.75 * error * (size / _size(error)).nan_to_num(posinf=0.0)

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, 1, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return torch.where(memory > 0, memory, _size(full(a, g, visible)).mean(0))


def _size(maps: Tensor) -> Tensor:
    """The norm of each map (B, H, 1, 1)."""
    return torch.linalg.vector_norm(maps, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class PartOfErrorRule:
    """``f`` and, of what a local rule gets wrong, ``e - f``, one half.

    Where ``constant`` it is what is the same for all keys of a query, the mean over them; else all but that. Of the
    error of ``diagonal`` the second half is that of ``balanced_evenly``.
    """

    base: Rule
    constant: bool

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        f = full(a, g, visible)
        error = self.base(a, g, visible) - f
        constant = error.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True) * visible
        return f + (constant if self.constant else error - constant)


@dataclass(frozen=True)
class TransplantRule:
    """``full`` in the first ``after`` iterations, then another rule: what becomes of attention that works already?

    The memory counts the iterations.
    """

    after: int
    then: Rule

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor | None = None) -> Tensor:
        return (full if memory < self.after else self.then)(a, g, visible)

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return memory + 1


DOSES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2)
PROBES: dict[str, Rule] = {
    f"{name}_{dose:g}b": BaselineRule(slope, functools.partial(dosed, dose=dose))
    for name, slope in (("zero", False), ("diagonal", True))
    for dose in DOSES
}
for _name, _base in (("zero", SOFTMAX_BACKWARD["zero"]), ("diagonal", diagonal)):
    PROBES |= {f"{_name}_{told.__name__}": MessageRule(_base, told) for told in (as_sign, as_power, as_noise)}
    PROBES[f"{_name}_as_remembered"] = LateMessageRule(_base, as_remembered)
PROBES |= {
    f"error_{direction}_{'fresh' if fresh else 'fixed'}{'_absolute' if absolute else ''}": ErrorRule(
        direction, fresh, absolute
    )
    for direction in ("row", "attention", "random")
    for fresh in (False, True)
    for absolute in (False, True)
}
PROBES["row_constant"] = PartOfErrorRule(diagonal, constant=True)
PROBES["zero_row_constant"] = PartOfErrorRule(SOFTMAX_BACKWARD["zero"], constant=True)
PROBES["zero_row_rest"] = PartOfErrorRule(SOFTMAX_BACKWARD["zero"], constant=False)
HALVES = ("balanced_evenly", "row_constant", "zero_row_rest", "zero_row_constant")
for _after, _name in itertools.product((500, 2000), ("diagonal", "zero", *HALVES)):
    PROBES[f"full_{_after}_then_{_name}"] = TransplantRule(_after, (SOFTMAX_BACKWARD | PROBES)[_name])
SOFTMAX_BACKWARD |= PROBES
