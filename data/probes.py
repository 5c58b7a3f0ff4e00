"""Rules that nobody would build, to ask what it is in the lateral sum that matters.

Importing this module enters them in ``SOFTMAX_BACKWARD`` beside the others. What is random in them
is drawn from the attention weights they are used with: to measure a model draws the same again and
disturbs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_local import SOFTMAX_BACKWARD, LocalGPTConfig, Rule, full, lateral_sum


def probe_name(rule: str, base: str = "", dose: float = 1.0, after: int = 0) -> str:
    """The name in ``SOFTMAX_BACKWARD`` of what four columns of the table of runs say.

    A rule, the local one that it changes, the dose of the lateral sum, and after how many
    iterations of the exact pass it sets in.

    >>> probe_name("zero"), probe_name("dosed", "zero", 0.2), probe_name("zero", after=500)
    ('zero', 'dosed zero 0.2', 'zero after 500')
    """
    name = f"{rule} {base}" if base else rule
    if dose != 1:
        name += f" {dose:g}"
    return f"{name} after {after}" if after else name


@dataclass(frozen=True)
class DosedRule:
    """``a m (g - dose b)``: a local rule with less or more of the exact baseline."""

    base: Rule
    dose: float

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return self.base.against(self.dose * lateral_sum(a, g, visible), a, g)


def normal(shape: torch.Size, a: Tensor, fresh: bool) -> Tensor:
    """Normal numbers: ``fresh`` for each map, so for each layer and step, or always the same."""
    seed = abs(hash(a.double().square().sum().item())) if fresh else 0
    generator = torch.Generator(a.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=a.dtype, device=a.device)


def as_sign(message: Tensor, a: Tensor) -> Tensor:
    """One bit per query, and one size for all queries of a head."""
    return message.sign() * message.abs().mean((0, 2, 3), keepdim=True)


def as_power(message: Tensor, a: Tensor) -> Tensor:
    """A sign and an exponent per query: the power of two that is nearest on a logarithmic scale."""
    power = message.sign() * message.abs().log2().round().exp2()
    return torch.where(message == 0, message, power)


def as_noise(message: Tensor, a: Tensor) -> Tensor:
    """Times a number from a normal distribution of mean 1 and deviation 1, drawn for each query."""
    return message * (1 + normal(message.shape, a, fresh=True))


@dataclass(frozen=True)
class MessageRule:
    """``e_j - a_j m``: what a local rule sends, less a number of the query, weighed by attention.

    Told exactly, ``m = sum_j e_j``: then ``zero`` becomes the exact pass and ``diagonal``
    ``balanced_by_attention``.
    """

    base: Rule
    told: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        sent = self.base(a, g, visible)
        return sent - a * self.told(sent.sum(-1, keepdim=True), a)


@dataclass(frozen=True)
class LateMessageRule:
    """The same, told what it was on average at this position in the iteration before.

    The memory has a number for each head and position (H, block_size, 1).
    """

    base: Rule

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor) -> Tensor:
        return self.base(a, g, visible) - a * memory[:, : a.shape[2]]

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, config.block_size, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        learnt = memory.clone()
        learnt[:, : a.shape[2]] = self.base(a, g, visible).sum(-1, keepdim=True).mean(0)
        return learnt


def map_size(maps: Tensor) -> Tensor:
    """The norm of each map (B, H, 1, 1)."""
    return torch.linalg.vector_norm(maps, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class ErrorRule:
    """``f + e``: the exact pass with an error at right angles to ``f``.

    direction: ``row``, the same for all keys of a query; ``attention``, in proportion to the
    weights; ``random``, drawn for each key. A ``fresh`` error has a new sign per head, or a new
    draw, at every iteration, otherwise it is always the same. Its size is 3/4 of that of ``f`` (a
    cosine of 0.8) in every map; or, if ``absolute``, 3/4 of what the size of ``f`` was at the first
    iteration, on average over the batch: that is the memory, a number per head (H, 1, 1).
    """

    direction: str
    fresh: bool
    absolute: bool

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor) -> Tensor:
        f = full(a, g, visible)
        error = self.pattern(a) * visible
        # at right angles to f, and of the size that is asked for; 0 where there is no direction
        along = (error * f).sum((-2, -1), keepdim=True).double()
        squared = (f * f).sum((-2, -1), keepdim=True).double()
        error = error - f * (along / squared).nan_to_num().to(f.dtype)
        size = memory if self.absolute else map_size(f)
        return f + 0.75 * error * (size / map_size(error)).nan_to_num(posinf=0.0)

    def pattern(self, a: Tensor) -> Tensor:
        if self.direction == "random":
            return normal(a.shape[1:], a, self.fresh).expand_as(a)
        pattern = a if self.direction == "attention" else torch.ones_like(a)
        if not self.fresh:
            return pattern
        return pattern * normal((a.shape[1], 1, 1), a, fresh=True).sign()

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(config.n_head, 1, 1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return torch.where(memory > 0, memory, map_size(full(a, g, visible)).mean(0))


@dataclass(frozen=True)
class PartOfErrorRule:
    """``f`` and, of what a local rule gets wrong, ``e - f``, one half.

    Where ``constant`` it is what is the same for all keys of a query, the mean over them; else all
    but that. Of the error of ``diagonal`` the second half is that of ``balanced_evenly``.
    """

    base: Rule
    constant: bool

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        f = full(a, g, visible)
        error = self.base(a, g, visible) - f
        constant = error.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True) * visible
        return f + (constant if self.constant else error - constant)


@dataclass(frozen=True)
class TransplantRule:
    """``full`` in the first ``after`` iterations, then another: what becomes of working attention?

    The memory counts the iterations.
    """

    after: int
    then: Rule

    def __call__(self, a: Tensor, g: Tensor, visible: Tensor, memory: Tensor) -> Tensor:
        return (full if memory < self.after else self.then)(a, g, visible)

    def start(self, config: LocalGPTConfig) -> Tensor:
        return torch.zeros(1)

    def learn(self, memory: Tensor, a: Tensor, g: Tensor, visible: Tensor) -> Tensor:
        return memory + 1


DOSES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2)
# both halves of the errors of two local rules: of diagonal's the other one is balanced_evenly
HALVES = (("row_constant", "diagonal"), ("row_constant", "zero"), ("row_rest", "zero"))
TRANSPLANTS = (("diagonal", ""), ("zero", ""), ("balanced_evenly", ""), *HALVES)

PROBES: dict[str, Rule] = {}
for base in ("zero", "diagonal"):
    local = SOFTMAX_BACKWARD[base]
    for dose in DOSES:
        PROBES[probe_name("dosed", base, dose)] = DosedRule(local, dose)
    for told in (as_sign, as_power, as_noise):
        PROBES[probe_name(told.__name__, base)] = MessageRule(local, told)
    PROBES[probe_name("as_remembered", base)] = LateMessageRule(local)
for direction in ("row", "attention", "random"):
    for word, fresh in (("fixed", False), ("fresh", True)):
        PROBES[f"error_{direction}_{word}"] = ErrorRule(direction, fresh, absolute=False)
        PROBES[f"error_{direction}_{word}_absolute"] = ErrorRule(direction, fresh, absolute=True)
for half, base in HALVES:
    rule = PartOfErrorRule(SOFTMAX_BACKWARD[base], constant=half == "row_constant")
    PROBES[probe_name(half, base)] = rule
for half, base in TRANSPLANTS:
    then = (SOFTMAX_BACKWARD | PROBES)[probe_name(half, base)]
    for after in (500, 2000):
        PROBES[probe_name(half, base, after=after)] = TransplantRule(after, then)
SOFTMAX_BACKWARD |= PROBES
