"""Every softmax over keys in a model of anybody's, made by a function of one's own.

That is what a capture and a rule in ``helpers`` stand on. ``notebooks/91_one_capture.md`` says how
a softmax is found, why in this way, and what is not.
"""

from __future__ import annotations

import functools
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (register_module_forward_hook,
                                     register_module_forward_pre_hook)
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints

from model_local import attention_weights, full

TINY = torch.finfo(torch.float32).tiny  # a weight below this is that of a hidden key


class FusedCall(NamedTuple):
    """What ``F.scaled_dot_product_attention`` is called with: see there for the arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def cast(self) -> FusedCall:
        """To the type that autocast would choose."""
        device = self.query.device.type
        if self.query.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return self
        return FusedCall(*(x.to(torch.get_autocast_dtype(device)) for x in self[:3]), *self[3:])

    def in_full(self) -> FusedCall:
        """As kernels compute: in float32 at least, each head of queries with its keys."""
        query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in self[:3])
        if self.enable_gqa:  # query heads 0, 1, ... share the first head of the keys, and so on
            n = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(n, -3), value.repeat_interleave(n, -3)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return self._replace(query=query, key=key, value=value, scale=scale, enable_gqa=False)

    def scores(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of the queries in ``rows``, masked as they are told, and which keys they see."""
        # causal scores end with the last key that one of the queries sees
        keys = slice(rows.stop if self.is_causal else None)
        scores = self.query[..., rows, :] @ self.key[..., keys, :].mT * self.scale
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        if self.is_causal:
            visible = visible.tril(rows.start or 0)
        if self.attn_mask is not None:
            whole = self.query.shape[-2], self.key.shape[-2]
            mask = self.attn_mask.expand(*self.attn_mask.shape[:-2], *whole)[..., rows, keys]
            if mask.dtype == torch.bool:
                visible = visible & mask
            else:
                scores = scores + mask
        scores = scores.masked_fill(~visible, -math.inf)
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            visible = visible & visible_keys(scores, self.attn_mask.dtype)
        return scores, visible


def visible_keys(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Which keys (B, H, T_q, T_k) are not hidden by their scores, masked by numbers of ``dtype``.

    No score hides a key by itself: -10,000 and -100 do, and a model may have -110,000 on a key that
    it sees. But it does by its weight, in float32 at least: half precision has zeros elsewhere. If
    all scores of a query are about the type's least number, it is padding, and sees none.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    log_weights = scores - scores.logsumexp(-1, keepdim=True)
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return ~(log_weights < math.log(TINY)) & ~(scores <= least).all(-1, keepdim=True)


def softmax_or_nothing(scores: Tensor) -> Tensor:
    """A query that may see no key, as in padding, attends to none."""
    return scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


class Softmaxes(TorchFunctionMode):
    """While a module of ``model`` is at work, every softmax over keys in it is made by ``weights``.

    That takes the arguments of ``attention_weights`` (send_back=None: by autograd). A mode like
    this is offered every call of a PyTorch function, by whatever name the model has imported it. It
    is off inside its own handlers: what these call is seen by an outer mode alone, so captures and
    rules can be nested in any order.
    """

    def __init__(self, model: nn.Module, only: str, weights: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.only, self.weights = model, only, weights
        self.names = {module: name for name, module in model.named_modules()}
        self.heads: dict[str, int] = {}  # of a module, by its own word or of one above; 0: unknown
        for module, name in self.names.items():
            self.heads[name] = _heads(module) or self.heads.get(name.rpartition(".")[0], 0)
        self.at_work: list[str] = []  # names of modules, the innermost last
        self.used: dict[str, int] = {}  # how many attentions a module has had in this pass
        self.has_run = self.has_seen = False
        self.passed: dict[str, tuple[int, ...]] = {}  # modules whose softmax was let through
        self.n_heads = 0  # of scores (B * H, T_q, T_k); 0: there are none

    @contextmanager
    def attached(self) -> Iterator[None]:
        for module, name in self.names.items():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl:
                raise ValueError(f"{name or type(module).__name__!r} is compiled, so nothing is "
                                 "seen in it: use the model as it was before torch.compile")
        with ExitStack() as hooks:  # which takes them off again, whatever happens
            # hooks of all modules: those of this model's own would be copied and saved with it
            hooks.enter_context(register_module_forward_pre_hook(self._enter))
            hooks.enter_context(register_module_forward_hook(self._leave, always_call=True))
            # both kinds of checkpoints are given here the function that they are to call again
            for owner, name in ((checkpoints, "_checkpoint_without_reentrant_generator"),
                                (checkpoints.CheckpointFunction, "apply")):
                keep = functools.partial(self._keep, getattr(owner, name))
                hooks.enter_context(mock.patch.object(owner, name, keep))
            hooks.callback(self._end)
            yield
        self._check()

    # Hooks enter and leave the mode, by bare __enter__ and __exit__: so it is off for all that is
    # not this model's, and on again where a checkpoint, in the backward pass, calls a module once
    # more to recompute its activations.

    def _enter(self, module, inputs) -> None:
        if module not in self.names:
            return
        if not self.at_work:
            self.used.clear()
            self.has_run = True
            self.__enter__()
        self.at_work.append(self.names[module])

    def _leave(self, module, inputs, output) -> None:
        if module not in self.names:
            return
        self.at_work.pop()
        if not self.at_work:
            self.__exit__(None, None, None)

    def _end(self) -> None:
        if self.at_work:  # interrupted inside a module: PyTorch calls no hook then
            self.at_work.clear()
            self.__exit__(None, None, None)

    def _keep(self, checkpoint, function, *args, **kwargs):
        now = [*self.at_work], {**self.used}
        again = functools.partial(self._again, now, function) if self.at_work else function
        return checkpoint(again, *args, **kwargs)

    def _again(self, then, function, *args, **kwargs):
        """``function``, called by the modules that were at work when a checkpoint was given it."""
        if self.at_work:
            return function(*args, **kwargs)
        self.at_work, self.used = [*then[0]], {**then[1]}
        self.__enter__()
        try:
            return function(*args, **kwargs)
        finally:
            self._end()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if not re.search(self.only, self.at_work[-1]):
            return func(*args, **kwargs)
        # Modes are offered PyTorch's own functions alone; attention_weights, which is ours, offers
        # itself by torch.overrides.handle_torch_function.
        if func is attention_weights:
            self._admit(args[0])
            return self.weights(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            call = FusedCall(*args, **kwargs)
            self._admit(max(call[:3], key=Tensor.dim))
            return self.fused(func, call.cast())
        if name in ("softmax", "special_softmax"):  # of torch, torch.nn.functional, or a tensor
            return self._softmax(func, *args, **kwargs)
        if name in ("multi_head_attention_forward", "softmin", "gumbel_softmax"):
            return self._inside(func, *args, **kwargs)
        return func(*args, **kwargs)

    def fused(self, attention: Callable[..., Tensor], given: FusedCall) -> Tensor:
        """The output of ``F.scaled_dot_product_attention`` by way of weights that can be seen."""
        with torch.autocast(given.query.device.type, enabled=False):
            call = given.in_full()
            scores, visible = call.scores()
            attn = self.weights(scores, visible, softmax_or_nothing, full)
            return (F.dropout(attn, call.dropout_p) @ call.value).to(given.value.dtype)

    def _softmax(self, func, input: Tensor, dim: int | None = None, *args, **kwargs):
        is_batched = input.dim() == 4
        if dim not in (-1, input.dim() - 1) or not (is_batched or self.n_heads):
            if input.dim() > 2:  # two axes are of classes or of experts
                self.passed[self.at_work[-1]] = tuple(input.shape)
            return func(input, dim, *args, **kwargs)
        scores = input if is_batched else input.unflatten(0, (-1, self.n_heads))
        self._admit(scores)
        attn = self.weights(scores, visible_keys(scores, scores.dtype),
                            lambda scores: func(scores, -1, *args, **kwargs), None)
        return attn.view_as(input)

    def _inside(self, func, *args, **kwargs):
        # These call a softmax, which this mode would not see: it is off here, inside its handler.
        # On, it would be offered the whole function again, without end. So that one is told not to
        # offer itself; the functions that it calls ask by other names.
        is_multi_head = func is F.multi_head_attention_forward
        n_heads = args[4] if is_multi_head else self.n_heads
        asked = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda *_: False)
        with self, mock.patch.object(self, "n_heads", n_heads), mock.patch.multiple(F, **asked):
            return func(*args, **kwargs)

    def _admit(self, x: Tensor) -> None:
        """Refuse attention that would be read wrongly, by its scores or queries ``x``."""
        name = self.at_work[-1]
        heads = self.heads[name]
        callers = (frame.f_code.co_name for frame, _ in traceback.walk_stack(None))
        if torch._C._are_functorch_transforms_active():
            why = "is run by torch.func (grad, vmap, ...): take gradients by loss.backward()"
        elif torch.compiler.is_compiling() or "compile_wrapper" in callers:
            why = "is in a function that torch.compile made: call the one that it was made of"
        elif x.is_nested:
            why = "is of nested tensors: pad them"
        elif x.dim() != 4 or heads not in (0, x.shape[1]):
            why = f"has shape {tuple(x.shape)}, and not (batch, {heads or 'heads'}, queries, ...)"
        else:
            self.has_seen = True
            return
        raise ValueError(f"the attention of {name!r} {why}. Or leave it out by only=, a regular "
                         "expression that matches the names of other modules alone")

    def _check(self) -> None:
        """Was an attention seen, and what was not?"""
        passed = ", ".join(f"{name!r} on {shape}" for name, shape in self.passed.items())
        if not self.has_seen:
            why = "no module was called"
            if self.has_run:
                why = "none of PyTorch's softmaxes was called on scores (B, H, T_q, T_k)"
            where = f" in a module whose name matches {self.only!r}" if self.only else ""
            but = f", but in {passed}" if passed else ""
            raise RuntimeError(f"{type(self.model).__name__}: no attention was seen: {why}{where}"
                               f"{but}. A fused kernel that is called directly cannot be: choose "
                               "the model's eager or sdpa implementation")
        if passed:
            # to be shown where the 'with' statement stands, six calls from here
            warnings.warn("a softmax was let through, as its scores are not (B, H, T_q, T_k), in "
                          f"{passed}: if that is attention, it is missing here; if not, leave the "
                          "module out by only=", stacklevel=6)


# what a module or its configuration calls the number of its heads
HEADS = re.compile(r"(n|num)?_?(attention_|attn_)?heads?")


def _heads(module: nn.Module) -> int:
    for holder in (module, getattr(module, "config", None)):
        for name, value in getattr(holder, "__dict__", {}).items():
            if HEADS.fullmatch(name) and type(value) is int:
                return value
    return 0
