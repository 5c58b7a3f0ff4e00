"""The exercises' self-checks: ``check("1.1", answer)`` says whether it is right, and if not, why.

Most exercises have one right answer and are data: the right answer as a function, cases to try it
on, and slips, which are wrong answers with the words that each deserves. Where many answers are
right, a judge of its own looks for the property that was asked for. A judge takes the answer,
raises a ``Verdict`` that helps where it is not right, and returns a remark where it is.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from data.experiment import SOLVES, share_interval
from helpers import capture_batch
from helpers import split_softmax_gradient as split
from model_local import LocalGPT, LocalGPTConfig

# ---- the verdict ----


class Verdict(Exception):
    """Ends the judging: what is said of an answer that is not right."""


EXERCISES: dict[str, Callable[[object], str]] = {}


def exercise(number: str, level: str, minutes: int) -> Callable:
    """Register the judge below under this number. The report says its level and its minutes."""
    return lambda judge: EXERCISES.setdefault(number, judge)


def check(number: str, answer: object) -> None:
    """Print the verdict on the answer to an exercise. Nothing that an answer does ends in a trace.

    >>> check("1.1", lambda a, g: a * (1 - a) * g)
    Exercise 1.1: not right yet. This is the diagonal part. The other part is wanted.
    """
    number = str(number)
    try:
        known = ", ".join(EXERCISES)
        require(number in EXERCISES, f"There is no such exercise. There are {known}.")
        refuse_open(answer)
        verdict = f"right. {EXERCISES[number](answer)}"
    except Verdict as reason:
        verdict = str(reason)
    except Exception as error:  # an answer so unlike what was asked that the judge stumbles over it
        verdict = f"not right yet. The answer cannot be judged: {describe(error)}."
    verdict = f"Exercise {number}: {verdict}"
    print(textwrap.fill(verdict, 96, break_long_words=False, break_on_hyphens=False))


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Verdict(f"not right yet. {otherwise}")


@dataclass(frozen=True)
class Comparison:
    """The judge of an exercise with one right answer, which is the function below it."""

    right: Callable  # of the inputs of a case; of nothing, where the answer is no function
    remark: str  # for who got it right
    slips: Mapping[str, Callable]  # wrong answers; None instead of a part: whatever it is
    cases: Callable[[], list[tuple]] = lambda: [()]  # made anew each time, in the default dtype
    parts: tuple[str, ...] = ("the answer",)  # what an answer consists of
    within: float | None = None  # as far off as this is right; None: rounding in float32
    otherwise: str = ""  # to any other wrong answer, where the right one should not be told
    further: Callable[[object], object] = lambda answer: None  # a judge of more

    def __call__(self, answer: object) -> str:
        inputs = inspect.signature(self.right).parameters
        cases = [dict(zip(inputs, values, strict=False)) for values in self.cases()]
        given = [self.split(call(answer, **case) if case else answer) for case in cases]
        given = [list(map(to_array, values, self.parts)) for values in given]
        # Is it, in every case, a slip that is known?
        for words, slip in self.slips.items():
            said = [self.split(slip(*case.values())) for case in cases]
            known = [both for values, parts in zip(given, said, strict=True)
                     for both in zip(values, parts, strict=True) if both[1] is not None]
            require(not all(close(*both, self.within) for both in known), words)
        # Any other answer: is it right, and where is the first difference?
        for case, values in zip(cases, given, strict=True):
            where = f" on {listed(case)}" if case else ""
            rights = self.split(self.right(*case.values()))
            for part, value, right in zip(self.parts, values, rights, strict=True):
                numbers(value, tuple(np.shape(right)), part)
                require(close(value, right, self.within), self.otherwise.format(part=part) or
                        f"Not so: {part}{where} should be {describe(right)}, and it is "
                        f"{describe(value)}.")
        self.further(answer)
        return self.remark

    def split(self, answer: object) -> Sequence:
        """The parts of an answer."""
        parts, n = [answer] if len(self.parts) == 1 else answer, len(self.parts)
        several = isinstance(parts, list | tuple | Tensor | np.ndarray) and len(parts) == n
        require(several, f"{n} things are wanted here, {', '.join(self.parts)}, and this is "
                f"{describe(answer)}.")
        return parts


def compare_names(answer: object, right: set[str], others: set[str], too_many: str) -> None:
    """The judge of a set of names; too_many: what to say of one of the others."""
    chosen = names(answer, [*right, *others])
    for name in sorted(chosen):
        require(name in right, too_many.format(name=name))
    missing = len(right - chosen)
    require(not missing, f"Nothing in it is wrong, but it is not complete: {missing} missing.")


# ---- reading answers ----


def refuse_open(answer: object, why: str = "") -> None:
    """Is it, or a part of it, still the ``...`` (or the None) that was there to be replaced?"""
    parts = answer.values() if isinstance(answer, Mapping) else answer
    parts = parts if isinstance(answer, list | tuple | set | Mapping) else [answer]
    if answer is None or any(part is ... for part in parts):
        raise Verdict(f"not answered yet{why}.")


def call(function: object, **inputs: object) -> object:
    """What the student's function makes of the inputs."""
    require(callable(function), f"A function is wanted here, and this is {describe(function)}.")
    try:
        result = function(*deepcopy(list(inputs.values())))
    except (Exception, SystemExit) as error:
        require(False, f"It raised {describe(error)}, on {listed(inputs)}.")
    refuse_open(result, " (the function returns None)" if result is None else "")
    return result


def to_array(value: object, what: str = "the answer") -> np.ndarray:
    """Tensors, arrays, lists and plain numbers (no text, None, complex ones), in float64."""
    if isinstance(value, list | tuple):
        value = [to_array(part, what) for part in value]
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except ValueError:  # parts of different shapes
        array = np.array(None)
    numeric = array.dtype.kind in "biuf"
    require(numeric, f"Numbers are wanted here, and {what} is {describe(value)}.")
    return array.astype(float)


def numbers(value: object, shape: tuple[int, ...], what: str = "the answer") -> np.ndarray:
    """An array of this shape, without NaNs."""
    array = to_array(value, what)
    wanted = str(shape) if shape else "that of a single number, ()"
    require(array.shape == shape or (array.size == 1 and shape == ()),
            f"The shape of {what} is {array.shape} and should be {wanted}.")
    require(np.isfinite(array).all(), f"There are NaNs or infinities in {what}.")
    return array


def names(value: object, known: Iterable[str]) -> set[str]:
    """A set of names, however they were collected."""
    value = [value] if isinstance(value, str) else value
    require(isinstance(value, Iterable), f"Names are wanted here, and this is {describe(value)}.")
    chosen = {name if isinstance(name, str) else describe(name) for name in value}
    for name in sorted(chosen):
        require(name in known, f"{name!r} is none of {', '.join(known)}.")
    return chosen


def close(got: object, right: object, within: float | None = None) -> bool:
    """Equal up to ``within``, or to rounding in float32, measured against the largest entry."""
    got, right = to_array(got), to_array(right)
    if got.size == 1 and right.shape == ():  # a number may be in a tensor or a list of its own
        got = got.reshape(())
    within = 1e-4 * np.abs(right).max() if within is None else within
    return got.shape == right.shape and bool(np.abs(got - right).max() <= within)


def describe(value: object) -> str:
    """In a few words, for a message."""
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {textwrap.shorten(str(value), 200).rstrip('.')}"
    if isinstance(value, Tensor | np.ndarray | np.generic | bool | int | float):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.size > 12:
            return f"{type(value).__name__} of shape {array.shape}"
        short = {"float_kind": lambda entry: f"{round(entry, 3) + 0.0:g}"}  # + 0.0: no minus zero
        return " ".join(np.array2string(array, separator=", ", formatter=short).split())
    return type(value).__name__ if callable(value) else textwrap.shorten(repr(value), 60)


def listed(inputs: Mapping[str, object]) -> str:
    return ", ".join(f"{name} = {describe(value)}" for name, value in inputs.items())


# ---- cases, in the default dtype, so that what a student makes with torch.zeros fits to them ----


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.get_default_dtype())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(size=shape))


def rows() -> list[tuple]:
    """Weights and errors of one row, and of two."""
    return [(tensor([0.5, 0.25, 0.25]), tensor([1, 2, 4])),
            (normal(2, 3).softmax(-1), normal(2, 3, seed=1))]


def causal_maps(B: int, T: int, spread: float, common: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of scores with this spread, errors with this common part, and the visible keys."""
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    a = (spread * normal(B, T, T)).masked_fill(~visible, -torch.inf).softmax(-1)
    g = normal(B, T, T, seed=1) + common * normal(B, T, 1, seed=2)
    return a, g * tensor(range(1, B + 1))[:, None, None], visible  # larger errors further down


def cosine(x: Tensor, y: Tensor) -> float:
    return torch.cosine_similarity(x.flatten().double(), y.flatten().double(), dim=0, eps=0).item()


def small_model() -> tuple[LocalGPT, Tensor, Tensor]:
    """An untrained model, 2 layers of 2 heads, and a batch (3, 5) of inputs and targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LocalGPT(LocalGPTConfig(5, 11, n_layer=2, n_head=2, n_embd=8, method="fa"))
        return model, *torch.randint(11, (2, 3, 5))


def losses(n: int, seed: int = 0, excess: float = 0.5) -> tuple[np.ndarray, ...]:
    """Losses of n seeds under a rule, under full and under none, with a scatter in common."""
    rng = np.random.default_rng(seed)
    rule, full, none = 0.1 * rng.normal(size=n) + 0.1 * rng.normal(size=(3, n))
    return 2 + excess + rule, 2 + full, 3 + none


# ---- the exercises, notebook by notebook ----


@exercise("1.1", "easy", minutes=10)
@partial(Comparison, cases=rows, slips={
    "This is the whole of f: its rows sum to zero. What a key can do by itself has to go.":
        lambda a, g: split(a, g).full,
    "This is the diagonal part. The other part is wanted.":
        lambda a, g: split(a, g).diag,
    "The sign is off: what the others gain, this key has to lose.":
        lambda a, g: -lateral_part.right(a, g),
    "The sum is right, but each key weighs it by its own attention: a factor a is missing.":
        lambda a, g: lateral_part.right(a, g) / a,
    "The sum runs over the *other* keys; yours takes in the key's own term, too.":
        lambda a, g: -a * (a * g).sum(-1, keepdim=True),
    "Right for one row, wrong for several: each row has a sum of its own, over the last axis.":
        lambda a, g: a * (a * g - (a * g).sum()),
}, remark="Its rows do not sum to zero, nor do those of the diagonal part; together they do.")
def lateral_part(a, g):
    return split(a, g).offdiag


@exercise("1.2", "medium", minutes=15)
def local_weights(answer: object) -> str:
    """A function s -> weights, positive, growing with the own score, and blind to the others'."""
    s = tensor([[0.3, -1.2, 2.0, 0.5], [-3.0, 1.0, 0.0, 4.0]])
    weights = numbers(call(answer, s=s), (2, 4))
    require((weights > 0).all(), "Attention weights are positive here, and "
            f"s = {describe(s)} gives {describe(weights)}.")
    for key in range(4):
        change = numbers(call(answer, s=s + 0.5 * torch.eye(4)[key].to(s)), (2, 4)) - weights
        require((change[:, key] > 1e-6).all(),
                f"The score of key {key + 1} rises, and its own weight does not grow in every row.")
        require(np.abs(np.delete(change, key, axis=1)).max() <= 1e-6,
                f"The score of key {key + 1} rises, and the weight of another key moves: an "
                "off-diagonal entry of the Jacobian. What is it that ties the keys?")
    low, high = weights.sum(-1).min(), weights.sum(-1).max()
    return (f"The price: rows sum to {low:.2f} and {high:.2f} where a softmax has 1. Keys do not "
            "compete: a query without a match can attend to nothing, one with many to all of them.")


@exercise("1.3", "medium", minutes=15)
@partial(Comparison, cases=lambda: [(tensor([0.7, 0.2, 0.1]), tensor([1, 2, 4])),
                         (normal(6).softmax(-1), 3 + normal(6, seed=1))], slips={
    "This is the lateral sum b. Try constants near it: some come closer to f.":
        lambda a, g: (a * g).sum(),
    "This is the plain mean of g. Try constants near it: some come closer to f.":
        lambda a, g: g.mean(),
}, within=1e-3, remark="It is neither b nor the plain mean: the factor 1-a has moved it.")
def best_constant(a, g):
    f, d, _ = split(a, g)
    slope = a * (1 - a)
    return slope @ (d - f) / (slope @ slope)


@exercise("1.4", "medium", minutes=10)
def against(answer: object) -> str:
    """An error g for the weights (0.7, 0.2, 0.1), such that the diagonal part points against f."""
    a, g = torch.tensor([0.7, 0.2, 0.1]).double(), torch.from_numpy(numbers(answer, (3,)))
    require(g.max() > g.min(), "All of its entries are the same: f is zero, and has no direction.")
    f, d, _ = split(a, g)
    found = cosine(d, f)
    require(found < -0.2, f"The cosine of d with f is {found:.2f}, and should be below -0.2.")
    return f"The cosine is {found:.2f}. A small step against d raises the loss."


@exercise("2.1", "easy", minutes=10)
@partial(Comparison, cases=lambda: [(normal(2, 3, 4, seed=2), normal(5, 4), normal(5, 4, seed=1),
                          normal(2, 3, 5, seed=3))], slips={
    "grad_x is backpropagation's: it came through W, which is what feedback alignment avoids.":
        lambda x, W, B, grad_y: (grad_y @ W, None),
    "grad_W is a mean over all positions. All of them pull at the weight together: it is a sum.":
        lambda x, W, B, grad_y: (None, feedback_alignment.right(x, W, B, grad_y)[1] / 6),
}, parts=("grad_x", "grad_W"),
   otherwise="{part} is not right. Which matrix carries the error back to x? The weight's gradient "
   "is the same in all rules: an outer product, summed over all positions.",
   remark="B is in one place only: in what x is told. The weight's update is backpropagation's.")
def feedback_alignment(x, W, B, grad_y):
    return grad_y @ B, torch.einsum("bto,bti->oi", grad_y, x)


@exercise("2.2", "medium", minutes=10)
def same_direction(answer: object) -> str:
    """The parameters whose gradient keeps its direction when all feedback of a block doubles."""
    compare_names(answer, right={"lm_head", "ln_f", "down_proj", "up_proj", "ln_2"},
                  others={"o_proj", "v_proj", "token_embedding"},
                  too_many="The gradient of {name} does turn. Errors reach it on several paths: "
                  "how many feedback matrices are on each?")
    return ("Adam, which divides by a gradient's size, trains these alike whatever the scale. "
            "Below, paths with one feedback matrix and with three meet: scale decides their mix.")


@exercise("2.3", "hard", minutes=25)
@partial(Comparison, cases=lambda: [(normal(2, 3), normal(2, 3)), (normal(2, 3), -normal(2, 3)),
                         *((tensor(np.eye(2)), tensor(B)) for B in (
    [[0.5, -0.866], [0.866, 0.5]], [[1, 0], [0, -0.1]], [[1, 10], [0, 1]], [[1, 5], [-5, 1]],
))], slips={
    "This tells of dy on average. For W = eye(2) and B = [[1, 0], [0, -0.1]] try dy = (0, 1).":
        lambda W, B: (W * B).sum() > 0,
    "Eigenvalues of M do not tell. For W = eye(2) and B = [[1, 10], [0, 1]] try dy = (-1, 1).":
        lambda W, B: (torch.linalg.eigvals(W @ B.T).real > 0).all(),
}, remark="Lillicrap et al. ask it of the errors that occur. B is fixed: W has to come to meet it.")
def always_helps(W, B):
    return bool((torch.linalg.eigvalsh(W @ B.T + B @ W.T) > 0).all())


@exercise("3.1", "easy", minutes=10)
@partial(Comparison, cases=lambda: [(normal(3, 5, 8), normal(3, 5, 8, seed=1), 2)], slips={
    "That is one number a query. There are two heads, and each has a lateral sum of its own.":
        lambda output, d_output, n_head: (output * d_output).sum(-1),
    "The channels are cut as if all of head 0 came first. In memory the heads sit side by side in "
    "every position: cut the last axis in two, then swap axes.":
        lambda output, d_output, n_head: (output * d_output).reshape(3, 2, 5, 4).sum(-1),
}, otherwise="The shape is right, the numbers are not. Wanted is the inner product of O and dO "
   "over the channels of a head: are they this head's, and is it a sum?",
   remark="No attention weight was needed, and no other key: the query had it all.")
def lateral_sum(output, d_output, n_head):
    return (output * d_output).unflatten(-1, (n_head, -1)).sum(-1).mT


def leave_no_hook(capture: Callable) -> None:
    """Neither after a call nor after an error. (The model refuses more than 5 tokens.)"""
    model, x, y = small_model()
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for tokens, words in (
        ((x, y), "The gradients are right. But a hook is left behind on {}."),
        (torch.zeros(2, 1, 6, dtype=torch.long), "All is well until the model raises an error: "
         "then a hook is left behind on {}. What stands after `finally` is done in any case."),
    ):
        with suppress(Exception, SystemExit):
            capture(model, *tokens)
        modules = model.named_modules()
        left = [name for name, m in modules if any(getattr(m, kind) for kind in kinds)]
        require(not left, words.format(", ".join(left)))


@exercise("3.2", "hard", minutes=25)
@partial(Comparison, cases=lambda: [small_model()], slips={
    "These are the attention weights. Their gradient is wanted.":
        lambda *inputs: [layer.attn for layer in capture_batch(*inputs)],
    "The layers come in the order in which the backward pass meets them: the last one first.":
        lambda *inputs: [layer.grad for layer in capture_batch(*inputs)[::-1]],
    "This is the error at the scores, before the softmax. That at the attention weights is wanted.":
        lambda *inputs: [split(layer.attn, layer.grad).full for layer in capture_batch(*inputs)],
}, parts=("the gradient of layer 0", "that of layer 1"), further=leave_no_hook,
   otherwise="It is not the one at the attention weights that was captured here: {part}.",
   remark="And no hook is left behind, not even after an error.")
def own_capture(model, x, y):
    return [layer.grad for layer in capture_batch(model, x, y)]


MEANINGS = {
    "harmless": "it makes a tensor of its own and writes, if at all, there",
    "error": "it writes to the memory that the backward pass reads, and PyTorch notices",
    "silent": "it writes to the memory that the backward pass reads, and PyTorch does not see it",
}
EFFECTS = {
    "attn * 0": "harmless", "attn.mul_(0)": "error", "attn.clone().mul_(0)": "harmless",
    "attn.numpy().fill(0)": "silent", "attn.double().mul_(0)": "harmless",
}


@exercise("3.3", "medium", minutes=15)
def operations(answer: object) -> str:
    """What each operation on captured weights does to the backward pass."""
    require(isinstance(answer, Mapping),
            f"A dict from operation to effect is wanted here, and this is {describe(answer)}.")
    names(answer, EFFECTS)
    names(answer.values(), MEANINGS)
    for operation, effect in EFFECTS.items():
        require(operation in answer, f"{operation} is missing.")
        require(answer[operation] == effect, f"{operation} is not of the kind "
                f"{answer[operation]!r}: {MEANINGS[effect]}.")
    return "The last kind is the dangerous one: whoever writes to what was captured should copy it."


@exercise("4.1", "easy", minutes=10)
@partial(Comparison, cases=lambda: [causal_maps(4, 5, spread=1, common=0.5)[:2]], slips={
    "One triple a head is wanted, and these are those of the single sequences.":
        lambda a, g: np.transpose(list(map(energy_ratios.right, a, g))),
    "This is the mean of the sequences' ratios. Average the energies first, then divide.":
        lambda a, g: np.mean(list(map(energy_ratios.right, a, g)), axis=0),
    "Your r_offdiag is 1 - r_diag, which takes in the cross term and is no energy.":
        lambda a, g: (None, 1 - energy_ratios.right(a, g)[0], None),
    "Your r_cross is half of what it should be: the square of d + o has the term 2 d o.":
        lambda a, g: (None, None, energy_ratios.right(a, g)[2] / 2),
}, parts=("r_diag", "r_offdiag", "r_cross"), within=1e-3,
   remark="They sum to 1, and the largest sequence has most of the say.")
def energy_ratios(a, g):
    f, d, o = split(a.double(), g.double())
    return [part.sum().item() / (f * f).sum().item() for part in (d * d, o * o, 2 * d * o)]


@exercise("4.2", "hard", minutes=20)
@partial(Comparison, slips={
    f"That is the cosine at scores times {factor}. It goes on changing from there.":
        lambda factor=factor: low_temperature.right(factor) for factor in (1, 3)
}, within=2e-3,
   otherwise="It is another number between -1 and 1. Which two keys have a say to the last?",
   remark="Both d and f vanish, but not their angle: it hangs on two errors, common mode included.")
def low_temperature(factor=40):
    scores, g = torch.tensor([2, 1.5, 1, 0]).double(), torch.tensor([3, 1, -2, 5]).double()
    f, d, _ = split((factor * scores).softmax(-1), g)
    return cosine(d, f)


@exercise("4.3", "easy", minutes=10)
def local_rule(answer: object) -> str:
    """A rule (a, g, mean of g) -> what is sent, key by key, with a cosine of 0.85 with f."""
    a, g, visible = causal_maps(50, 12, spread=2, common=2)
    f = split(a, g).full[:, visible]  # (B, visible pairs), as all below
    mean = (g * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
    shown = {"a": a[:, visible], "g": g[:, visible], "mean": mean.expand_as(g)[:, visible]}
    sent = numbers(call(answer, **shown), tuple(f.shape))
    fewer = {name: values[:, ::2] for name, values in shown.items()}
    require(close(numbers(call(answer, **fewer), (50, 39)), sent[:, ::2]), "It looks at other keys:"
            " without half of them it sends something else to the rest.")
    require(sent.any(), "It sends nothing.")
    found = np.mean([cosine(tensor(row), exact) for row, exact in zip(sent, f, strict=True)])
    require(found >= 0.85, f"Its mean cosine with f is {found:.3f} here, and 0.85 is wanted.")
    return f"Its mean cosine with f is {found:.2f}, where that of the diagonal part is 0.39."


@exercise("5.1", "easy", minutes=5)
@partial(Comparison, cases=lambda: [losses(3), losses(5, seed=7, excess=-0.2)], slips={
    "This is the mean of the seeds' ratios. A seed with a small denominator would decide it all.":
        lambda rule, full, none: 1 - np.mean((rule - full) / (none - full)),
    "This is what is *lost*: full keeps 1, and none keeps 0.":
        lambda rule, full, none: 1 - kept.right(rule, full, none),
}, within=1e-3, remark="It can be above 1 (better than the exact pass) and negative (worse than "
    "untrained queries and keys).")
def kept(rule, full, none):
    return 1 - (rule.mean() - full.mean()) / (none.mean() - full.mean())


@exercise("5.2", "medium", minutes=15)
@partial(Comparison, slips={
    "Six of eight are three quarters, but the interval of that share reaches down to 0.41.":
        lambda: (6, None),
    "That is the probability of this number of runs exactly. More are welcome, too.":
        lambda: (None, binom.pmf(7, 8, 0.75)),
}, parts=("the number of runs", "the probability"), within=2e-3,
   otherwise="It is another number, {part}.",
   remark="Eight runs often miss a share of three quarters: say the power before the runs.")
def of_eight():
    needed = next(k for k in range(9) if share_interval(k, 8)[0] > SOLVES)
    return needed, binom.sf(needed - 1, 8, 0.75)


@exercise("5.3", "medium", minutes=10)
def blind_rules(answer: object) -> str:
    """The rules of the family that do not see a constant added to g."""
    compare_names(answer, right={"mean", "diagonal_mean", "full", "diagonal_lateral"},
                  others={"zero", "diagonal", "running", "diagonal_running"},
                  too_many="{name} sends something else for g + 5 than for g. Does its baseline "
                  "move along?")
    return "Blindness is not enough either: only one of them leaves every row's sum at zero."


@exercise("5.4", "medium", minutes=15)
def turned_round(answer: object) -> str:
    """Weights and errors of two keys, for which the rule balanced by attention points against f."""
    a, g = torch.from_numpy(numbers(answer, (2, 2), "the pair (a, g)"))
    require((a > 0).all() and abs(a.sum() - 1) < 1e-6,
            f"a should be two positive weights that sum to 1, and it is {describe(a)}.")
    f, sent = split(a, g).full, split(a, (1 - a) * g).full  # equation (5.3)
    found = f"f is {describe(f)}, and the balanced rule sends {describe(sent)}"
    require(min(f.norm(), sent.norm()) > 1e-6 * g.norm(), f"One of the two is zero: {found}.")
    require(cosine(f, sent) < 0, f"They point the same way: {found}.")
    return f"{found}. Yet both have the form J x."


@exercise("5.5", "hard", minutes=20)
def distorted_error(answer: object) -> str:
    """A function (a, g) -> x with J x = g - a sum(g), for rows (..., n)."""
    for a, g in rows():
        where, wanted = f"On {listed({'a': a, 'g': g})}", g - a * g.sum(-1, keepdim=True)
        x = tensor(numbers(call(answer, a=a, g=g), tuple(a.shape), f"{where}, x"))
        require(not close(x, wanted),
                "This is what the balanced rule sends, J x. The x that J makes it of is wanted.")
        sent = split(a, x).full
        require(close(sent, wanted), f"{where} your x is {describe(x)}: J x is {describe(sent)}, "
                f"and should be {describe(wanted)}.")
    return "So it has the form J x. But see how large x is at a key that the query hardly looks at."


@exercise("6.1", "easy", minutes=10)
@partial(Comparison, cases=lambda: [(4 * normal(2, 3), normal(2, 3, seed=1), c) for c in (1, 3)],
         slips={
    "The factor c in front and the 1/c inside cancel: a cap does not change small scores.":
        lambda s, sent, c: c * behind_a_cap.right(s, sent, c),
    "This passes on what was sent as it is: the slope is missing.": lambda s, sent, c: sent,
    "This takes the slope where the capped score is, not the raw one.":
        lambda s, sent, c: behind_a_cap.right(c * (s / c).tanh(), sent, c),
}, remark="Beyond the cap next to nothing arrives: a score that has run far is pushed no further.")
def behind_a_cap(s, sent, c):
    return sent * (1 - (s / c).tanh() ** 2)


@exercise("6.2", "medium", minutes=10)
@partial(Comparison, cases=lambda: [(normal(2, 3, 4), normal(2, 3, 4, seed=1))], slips={
    "This is right where q has root mean square 1. Of what size is q here?":
        lambda q, dq: dq - (q * dq).mean(-1, keepdim=True) * q,
    "This is the part along q, which is to be taken out.":
        lambda q, dq: dq - tangent_part.right(q, dq),
}, remark="That takes one sum over the channels of a query, and nothing of its keys.")
def tangent_part(q, dq):
    return dq - (q * dq).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True) * q


@exercise("7.1", "medium", minutes=15)
@partial(Comparison, slips={
    "These are the right numbers in the wrong order: the constant error comes first.":
        lambda: (100 / np.hypot(100, 7.5), 0.8),
}, parts=("the cosine under the first rule", "that under the second"), within=1e-3,
   otherwise="It is another number, {part}. How long is the sum of 100 such errors?",
   remark="It was 0.8 at every iteration, and after 100 of them only one rule has gone astray.")
def adding_up():
    error, steps = 0.75, 100  # errors at right angles to each other grow as a random walk does
    return steps / np.hypot(steps, steps * error), steps / np.hypot(steps, steps**0.5 * error)
