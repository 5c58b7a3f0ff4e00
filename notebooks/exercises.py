"""The exercises' self-checks: ``check("1.1", answer)`` says whether an answer is right, and if not, what is off.

An exercise is one function, registered under its number. It takes the answer, raises ``Wrong`` with a message that
helps, and returns a remark for those who got it right. It judges by autograd, by a run of the model or by a property
where it can, so that any answer that does what was asked passes, however it was found. Solutions: ``solutions/``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from copy import deepcopy

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from helpers import capture_attention, capture_batch, gradient_cosines, harm, head_energy, split_softmax_gradient
from model_local import SOFTMAX_BACKWARD, FeedbackAlignmentLinear, LocalGPT, LocalGPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """The answer is not right; the message says what is off."""


class Unanswered(Exception):
    """There is no answer yet."""


EXERCISES: dict[str, Callable[[object], str]] = {}


def exercise(number: str, level: str, minutes: int) -> Callable:
    """Register the function below as the judge of this exercise. The report says its level and its minutes."""

    def register(judge: Callable[[object], str]) -> Callable[[object], str]:
        EXERCISES[number] = judge
        return judge

    return register


def check(number: str, answer: object) -> None:
    """Print the verdict on the answer to an exercise. Nothing that an answer does ends in a stack trace.

    >>> check("1.1", ...)
    Exercise 1.1: not answered yet.
    >>> check("1.1", lambda a, g: None)
    Exercise 1.1: not answered yet (the function returns None).
    >>> check("1.1", 3)
    Exercise 1.1: not right yet. A function is wanted here, and this is 3 (int).
    >>> check("0.1", 3)
    There is no exercise 0.1. There are 1.1, 1.2, 1.3, 1.4, 2.1, 2.2, 2.3, 3.1, 3.2, 3.3, 4.1, 4.2, 4.3,
    5.1, 5.2, 5.3, 5.4, 6.1, 6.2, 6.3, 6.4.
    """
    number = str(number)
    if number not in EXERCISES:
        say(f"There is no exercise {number}. There are {', '.join(EXERCISES)}.")
        return
    try:
        if is_open(answer):
            raise Unanswered
        verdict = f"right. {EXERCISES[number](answer)}"
    except Unanswered as reason:
        verdict = f"not answered yet{reason}."
    except Wrong as reason:
        verdict = f"not right yet. {reason}"
    except Exception as error:  # an answer so unlike what was asked that the judge stumbles over it
        verdict = f"not right yet. The answer cannot be judged: {describe(error)}."
    say(f"Exercise {number}: {verdict}")


def say(text: str) -> None:
    print(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))


# ---------------------------------------------------------------------------------------------------------------------
# Reading answers
# ---------------------------------------------------------------------------------------------------------------------


def is_open(answer: object) -> bool:
    """Is it, or a part of it, still the ``...`` (or the None) that was there to be replaced?"""
    if isinstance(answer, Mapping):
        answer = tuple(answer.values())
    if isinstance(answer, (list, tuple, set)):
        return any(part is ... for part in answer)
    return answer is None or answer is ...


def call(function: object, **inputs: object) -> object:
    """What the student's function makes of ``inputs``; tensors and arrays among them must stay as they are."""
    if not callable(function):
        raise Wrong(f"A function is wanted here, and this is {describe(function)}.")
    arrays = {name: deepcopy(value) for name, value in inputs.items() if isinstance(value, (Tensor, np.ndarray))}
    try:
        result = function(*(inputs | arrays).values())
    except (Exception, SystemExit) as error:
        case = ", ".join(f"{name} = {describe(value)}" for name, value in inputs.items())
        raise Wrong(f"It raised {describe(error)}, on {case}.") from None
    for name, value in arrays.items():
        if not np.array_equal(to_array(value), to_array(inputs[name])):
            raise Wrong(
                f"It changes its input {name}, which others may still need. Operations with a trailing underscore, "
                "`*=` and assignments to elements do so: compute something new instead."
            )
    if is_open(result):
        raise Unanswered(" (the function returns None)" if result is None else "")
    return result


def numbers(
    value: object, shape: tuple[int, ...], what: str = "the answer", slips: Mapping[tuple[int, ...], str] | None = None
) -> np.ndarray:
    """Tensors, arrays, lists and plain numbers alike, as a float64 array of this shape.

    ``slips``: what a typical wrong shape says about how it came about.
    """
    try:
        array = to_array(value)
    except Exception:
        raise Wrong(f"Numbers are wanted here, and {what} is {describe(value)}.") from None
    if slips and array.shape in slips:
        raise Wrong(slips[array.shape])
    if array.shape != shape:
        wanted = str(shape) if shape else "that of a single number, ()"
        raise Wrong(f"The shape of {what} is {array.shape} and should be {wanted}.")
    if not np.isfinite(array).all():
        raise Wrong(f"There are NaNs or infinities in {what}.")
    return array


def to_array(value: object) -> np.ndarray:
    if value is None:
        raise TypeError("None would become NaN")
    if isinstance(value, Tensor):
        value = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64).numpy()
    if isinstance(value, (list, tuple)):
        value = [to_array(part) for part in value]
    array = np.asarray(value)
    if np.iscomplexobj(array):
        raise TypeError("a complex number would lose its imaginary part")
    return array.astype(float)


def scalar(value: object, what: str = "the answer") -> float:
    """A single number, also one in a tensor or a list of its own."""
    with suppress(Exception):  # numbers() says what is wrong
        value = to_array(value).squeeze()
    return float(numbers(value, (), what))


def pair(value: object, first: str, second: str) -> tuple[object, object]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise Wrong(f"Two things are wanted here, {first} and {second}, and this is {describe(value)}.")
    return value[0], value[1]


def truth(value: object, case: str) -> bool:
    """True or False, also as 0 or 1 or in a tensor."""
    try:
        flag = to_array(value).squeeze()
    except Exception:
        flag = np.array(np.nan)
    if flag.shape != () or flag not in (0, 1):
        raise Wrong(f"True or False is wanted here, and {case} it gives {describe(value)}.")
    return bool(flag)


def names(value: object, known: Iterable[str]) -> set[str]:
    """A set of names, however they were collected."""
    known = list(known)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, Iterable):
        raise Wrong(f"A set of names is wanted here, and this is {describe(value)}.")
    chosen = {name if isinstance(name, str) else describe(name) for name in value}
    for name in sorted(chosen - set(known)):
        raise Wrong(f"{name!r} is none of {', '.join(known)}.")
    return chosen


def describe(value: object) -> str:
    """In a few words, for a message."""
    if isinstance(value, BaseException):
        text = textwrap.shorten(str(value), 200).rstrip(".")
        return f"{type(value).__name__}: {text}" if text else type(value).__name__
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.size > 12:
            return f"{type(value).__name__} of shape {array.shape}"
        short = {"float_kind": lambda entry: f"{round(entry, 3) + 0.0:g}"}  # + 0.0: no minus zero
        return " ".join(np.array2string(array, separator=", ", formatter=short).split())
    if callable(value):
        return f"the function {value.__name__}" if hasattr(value, "__name__") else type(value).__name__
    return f"{textwrap.shorten(repr(value), 60)} ({type(value).__name__})"


def close(got: np.ndarray, right: object) -> bool:
    """Equal to rounding in float32, measured against the largest entry."""
    right = to_array(right)
    return got.shape == right.shape and bool(np.abs(got - right).max() <= 1e-4 * np.abs(right).max())


# ---------------------------------------------------------------------------------------------------------------------
# Cases. They have the default dtype, so that what a student makes with torch.zeros or torch.eye fits to them.
# ---------------------------------------------------------------------------------------------------------------------


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.get_default_dtype())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(size=shape))


def causal_maps(B: int, T: int, spread: float = 1.0, common: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights and errors (B, T, T) and the visible keys (T, T).

    ``spread``: that of the scores; ``common``: that of what all errors of a row have in common, theirs being 1.
    """
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    a = (spread * normal(B, T, T)).masked_fill(~visible, -torch.inf).softmax(-1)
    return a, normal(B, T, T, seed=1) + common * normal(B, T, 1, seed=2), visible


def jacobian(a: Tensor) -> Tensor:
    """The softmax's Jacobian (n, n) where its weights are ``a`` (n,)."""
    return torch.autograd.functional.jacobian(lambda s: s.softmax(-1), a.log())


def cosine(x: Tensor, y: Tensor) -> float:
    return torch.cosine_similarity(x.flatten().double(), y.flatten().double(), dim=0, eps=0).item()


def small_model(n_layer: int, method: str) -> tuple[LocalGPT, Tensor, Tensor]:
    """An untrained model of 2 heads of 4 channels, and a batch (3, 5) of inputs and targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LocalGPT(LocalGPTConfig(5, 11, n_layer, 2, 8, method=method))
        return model, *torch.randint(11, (2, 3, 5))


# ---------------------------------------------------------------------------------------------------------------------
# 01: the softmax Jacobian
# ---------------------------------------------------------------------------------------------------------------------


@exercise("1.1", "easy", minutes=10)
def lateral_part(answer: object) -> str:
    """A function (a, g) -> o, the lateral part of the softmax's backward pass, for rows (..., n)."""
    for a, g in ((tensor([0.5, 0.25, 0.25]), tensor([1, 2, 4])), (normal(2, 3).softmax(-1), normal(2, 3, seed=1))):
        matrices = torch.stack([jacobian(row) for row in a.reshape(-1, 3)])
        f = (matrices @ g.reshape(-1, 3, 1)).reshape(a.shape)
        matrices.diagonal(dim1=-2, dim2=-1).zero_()
        o = (matrices @ g.reshape(-1, 3, 1)).reshape(a.shape)
        got = numbers(call(answer, a=a, g=g), tuple(a.shape), f"the result for rows of shape {tuple(a.shape)}")
        if close(got, o):
            continue
        if close(got, f):
            raise Wrong("This is the whole of f: its rows sum to zero. What a key can do by itself has to go.")
        if close(got, f - o):
            raise Wrong("This is the diagonal part, what a key can do by itself. The other part is wanted.")
        if close(got, -o):
            raise Wrong("The sign is off: what the others gain, this key has to lose.")
        if close(got * to_array(a), o) or close(-got * to_array(a), o):
            raise Wrong("The sum is right, but each key weighs it by its own attention: a factor a is missing.")
        if close(got, o - a * a * g):
            raise Wrong("The sum runs over the *other* keys; yours takes in the key's own term, too.")
        if a.dim() > 1:
            raise Wrong("Right for one row, wrong for several: each row has a sum of its own, over the last axis.")
        raise Wrong(f"On a = {describe(a)}, g = {describe(g)} it gives {describe(got)} instead of {describe(o)}.")
    return "Its rows do not sum to zero, and neither do those of the diagonal part; together they do."


@exercise("1.2", "medium", minutes=15)
def local_weights(answer: object) -> str:
    """A function s -> weights, positive, growing with the own score, and blind to the others'."""
    s = tensor([[0.3, -1.2, 2.0, 0.5], [-3.0, 1.0, 0.0, 4.0]])
    before = numbers(call(answer, s=s), (2, 4), "the result for scores of shape (2, 4)")
    if (before <= 0).any():
        raise Wrong(f"Attention weights are positive here, and s = {describe(s)} gives {describe(before)}.")
    for key in range(4):
        raised = s.clone()
        raised[:, key] += 0.5
        change = numbers(call(answer, s=raised), (2, 4), "the result") - before
        if (change[:, key] <= 1e-6).any():
            raise Wrong(f"The score of key {key} rises by 0.5, and its own weight does not grow in every row.")
        change[:, key] = 0
        row, other = np.unravel_index(np.abs(change).argmax(), change.shape)
        if abs(change[row, other]) > 1e-6:
            raise Wrong(
                f"The score of key {key} rises, and in row {row} the weight of key {other} moves by "
                f"{change[row, other]:.3f}: an off-diagonal entry of the Jacobian. What is it that ties the keys?"
            )
    low, high = before.sum(-1).min(), before.sum(-1).max()
    return (
        f"The price: rows sum to {low:.2f} and {high:.2f} where a softmax has 1. Keys no longer compete, and a query "
        "without a match can attend to nothing, or one with many to all of them."
    )


@exercise("1.3", "medium", minutes=15)
def best_constant(answer: object) -> str:
    """A function (a, g) -> c, for which a (1 - a) (g - c) is closest to f. Rows (n,)."""
    cases = [(tensor([0.7, 0.2, 0.1]), tensor([1, 2, 4])), (normal(6).softmax(-1), 3 + normal(6, seed=1))]
    for a, g in cases:
        c = scalar(call(answer, a=a, g=g), "the constant")
        f, d, _ = split_softmax_gradient(a.double(), g.double())
        slope = jacobian(a.double()).diagonal()
        distances = {at: (d - slope * at - f).norm().item() for at in (c, c + 0.1, c - 0.1, c + 0.002, c - 0.002)}
        for at, distance in distances.items():
            if distance < distances[c]:
                known = {"the lateral sum b": (a * g).sum(), "the plain mean of g": g.mean()}
                which = [f" ({name})" for name, value in known.items() if abs(c - value) < 1e-4]
                raise Wrong(
                    f"On a = {describe(a)}, g = {describe(g)} your c is {c:.3f}{''.join(which)}. There the distance to "
                    f"f is {distances[c]:.4f}, and at {at:.3f} it is smaller."
                )
    return "So the best constant is in general neither b nor the plain mean: the factor 1-a has moved it."


@exercise("1.4", "medium", minutes=10)
def against(answer: object) -> str:
    """An error g for the weights (0.7, 0.2, 0.1), such that the diagonal part points against f."""
    a, g = torch.tensor([0.7, 0.2, 0.1]).double(), torch.from_numpy(numbers(answer, (3,)))
    f, d, _ = split_softmax_gradient(a, g)
    if g.max() == g.min():
        raise Wrong("All of its entries are the same: f is zero, and has no direction.")
    found = cosine(d, f)
    if not found < -0.2:
        raise Wrong(f"The cosine of d with f is {found:.2f}, and should be below -0.2.")
    return f"The cosine is {found:.2f}. A step along d undoes what a step along f does."


# ---------------------------------------------------------------------------------------------------------------------
# 02: training with local rules
# ---------------------------------------------------------------------------------------------------------------------


@exercise("2.1", "easy", minutes=10)
def feedback_alignment(answer: object) -> str:
    """A function (x, W, B, grad_y) -> (grad_x, grad_W), for x (B, T, n_in) and grad_y (B, T, n_out)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer = FeedbackAlignmentLinear(4, 5)
        layer.weight.copy_(normal(5, 4))
        layer.feedback.copy_(normal(5, 4, seed=1))
    x, grad_y = normal(2, 3, 4, seed=2), normal(2, 3, 5, seed=3)
    inputs = {"x": x, "W": layer.weight.detach(), "B": layer.feedback, "grad_y": grad_y}
    grad_x, grad_weight = pair(call(answer, **inputs), "grad_x", "grad_W")
    grad_x = numbers(grad_x, (2, 3, 4), "grad_x for x of shape (2, 3, 4)")
    right_x, right_weight = torch.autograd.grad(layer(x.requires_grad_()), (x, layer.weight), grad_y)
    exact_x, _ = torch.autograd.grad(x @ layer.weight.T, (x, layer.weight), grad_y)
    if close(grad_x, exact_x):
        raise Wrong("grad_x is backpropagation's: it has travelled through W, which is what feedback alignment avoids.")
    if not close(grad_x, right_x):
        raise Wrong("grad_x is not right: which matrix carries the error back, and along which of its axes?")
    transposed = {(4, 5): "grad_W has the shape (4, 5), and should have that of W, which is (5, 4)."}
    grad_weight = numbers(grad_weight, (5, 4), "grad_W for W of shape (5, 4)", transposed)
    for count, axes in ((6, "all positions of all sequences"), (2, "the sequences"), (3, "the positions")):
        if close(grad_weight * count, right_weight):
            raise Wrong(f"grad_W is a mean over {axes}. All of them pull at the weight together: it is a sum.")
    if not close(grad_weight, right_weight):
        raise Wrong("grad_W is not right. It is the same in all rules: an outer product, summed over all positions.")
    return "B appears in one place only: in what x is told. The weight's own update is that of backpropagation."


@exercise("2.2", "medium", minutes=10)
def same_direction(answer: object) -> str:
    """The parameters whose gradient keeps its direction when all feedback matrices of a one-block model double."""
    model, x, y = small_model(1, "fa")
    model.double()
    louder = deepcopy(model)
    for module in louder.modules():
        if hasattr(module, "feedback"):
            module.feedback.mul_(2)
    cosines = {key.split(".")[-2]: found for key, found in gradient_cosines(model, louder, x, y).items()}
    asked = ("lm_head", "ln_f", "down_proj", "up_proj", "ln_2", "o_proj", "v_proj", "token_embedding")
    kept = {name for name in asked if cosines[name] > 1 - 1e-9}
    if isinstance(answer, Iterable) and not isinstance(answer, str):
        answer = [name.removesuffix(".weight").split(".")[-1] if isinstance(name, str) else name for name in answer]
    chosen = names(answer, asked)
    for name in asked:
        if name in chosen - kept:
            raise Wrong(
                f"The gradient of {name} does turn. Errors reach it on several paths: how many feedback matrices are "
                "on each?"
            )
    if kept - chosen:
        raise Wrong(f"Nothing in it is wrong, but it is not complete: {len(kept - chosen)} more keep their direction.")
    return (
        "Adam, which divides by a gradient's size, trains these alike whatever the scale. Further down, paths with "
        "one feedback matrix and with three meet in the residual stream, and the scale decides how they mix."
    )


@exercise("2.3", "hard", minutes=25)
def always_helps(answer: object) -> str:
    """A function (W, B) -> whether dy B lies within 90 degrees of dy W for every dy."""
    eye, turn = np.eye(2), np.deg2rad(60)
    wide = normal(2, 3).numpy()
    cases = [
        (wide, wide),
        (wide, -wide),
        (eye, np.diag([1, -0.1])),
        (eye, [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]),
        (eye, [[1, 10], [0, 1]]),
        (eye, [[1, 5], [-5, 1]]),
        (wide, wide + 0.1 * normal(2, 3, seed=1).numpy()),
    ]
    for W, B in cases:
        W, B = tensor(W), tensor(B)
        case = f"for W = {describe(W)} and B = {describe(B)}"
        said = truth(call(answer, W=W, B=B), case)
        errors = normal(20_000, 2, seed=2)  # in two dimensions dense enough to find what there is
        products = ((errors @ W) * (errors @ B)).sum(-1)
        if said and products.min() < 0:
            dy = errors[products.argmin()]
            dy = dy / dy.abs().max()
            raise Wrong(
                f"You say True {case}. But dy = {describe(dy)} sends back dy W = {describe(dy @ W)} and dy B = "
                f"{describe(dy @ B)}: more than 90 degrees apart."
            )
        if not said and products.min() > 0:
            raise Wrong(f"You say False {case}. But of 20,000 random dy none has dy B more than 90 degrees from dy W.")
    return "Lillicrap et al. ask it of the errors that occur. B is fixed, so W has to come to meet it."


# ---------------------------------------------------------------------------------------------------------------------
# 03: capture
# ---------------------------------------------------------------------------------------------------------------------


@exercise("3.1", "easy", minutes=10)
def lateral_sum_at_query(answer: object) -> str:
    """A function (output, d_output, n_head) -> b (B, H, T), for outputs and errors (B, T, C)."""
    model, x, y = small_model(1, "bp")
    attention, seen = model.blocks[0].attn, {}

    def keep(module, inputs) -> None:
        seen["O"] = inputs[0]
        inputs[0].register_hook(lambda grad: seen.update(dO=grad))

    attention.o_proj.register_forward_pre_hook(keep)
    (layer,) = capture_batch(model, x, y)
    output, d_output = seen["O"].detach(), seen["dO"]
    slips = {
        (3, 5): "That is one number a query. There are two heads, and each has a lateral sum of its own.",
        (3, 5, 2): "The shape is (3, 5, 2), which is (B, T, H), and should be (B, H, T): swap the last two axes.",
    }
    got = numbers(call(answer, output=output, d_output=d_output, n_head=2), (3, 2, 5), "b", slips)
    wrongly_cut = (output * d_output).reshape(3, 2, 5, 4).sum(-1)
    if close(got, wrongly_cut):
        raise Wrong(
            "The channels are cut as if all of head 0 came first. In memory the heads sit side by side in every "
            "position: cut the last axis in two, then swap axes."
        )
    if not close(got, (layer.attn * layer.grad).sum(-1)):
        raise Wrong(
            "The shape is right, the numbers are not. Wanted is the inner product of O and dO over the channels of a "
            "head: are they this head's, and is it a sum?"
        )
    return "No attention weight was needed, and no other key: the query had it all."


def hooks_on(model: torch.nn.Module) -> list[str]:
    """The names of the modules that carry a hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


@exercise("3.2", "hard", minutes=25)
def own_capture(answer: object) -> str:
    """A function (model, x, y) -> dL/dA of every layer, in order, that leaves no hook behind."""
    model, x, y = small_model(2, "fa")
    layers = capture_batch(model, x, y)
    result = call(answer, model=model, x=x, y=y)
    if not isinstance(result, (list, tuple, Tensor)) or len(result) != 2:
        raise Wrong(f"The model has two layers: a list of two tensors is wanted, and this is {describe(result)}.")
    if any(part is None for part in result):
        raise Wrong("There is None in the list: the tensor that was asked is not the one that the forward pass used.")
    got = [numbers(part, (3, 2, 5, 5), "the gradient of a layer") for part in result]
    if all(close(part, layer.attn) for part, layer in zip(got, layers, strict=True)):
        raise Wrong("These are the attention weights. Their gradient is wanted.")
    if all(close(part, layer.grad) for part, layer in zip(got, reversed(layers), strict=True)):
        raise Wrong("The layers come in the order in which the backward pass meets them: the last one first.")
    sent = [SOFTMAX_BACKWARD["full"](layer.attn, layer.grad, model.blocks[0].attn.causal_mask) for layer in layers]
    if all(close(part, f) for part, f in zip(got, sent, strict=True)):
        raise Wrong("This is the error at the scores, before the softmax. That at the attention weights is wanted.")
    for i, (part, layer) in enumerate(zip(got, layers, strict=True)):
        if not close(part, layer.grad):
            raise Wrong(f"In layer {i} it is not the gradient at the attention weights that was captured here.")
    if hooks_on(model):
        raise Wrong(f"The gradients are right. But a hook is left behind on {hooks_on(model)[0]}.")
    too_long = torch.zeros(1, 6, dtype=torch.long)
    with suppress(Exception, SystemExit):  # the model refuses more than 5 tokens, which is what is wanted here
        answer(model, too_long, too_long)
    if hooks_on(model):
        raise Wrong(
            f"All is well until the model raises an error: then a hook is left behind on {hooks_on(model)[0]}. What "
            "stands after `finally` is done in any case."
        )
    return "And no hook is left behind, not even after an error."


OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "attn * 0": lambda attn: attn * 0,
    "attn.mul_(0)": lambda attn: attn.mul_(0),
    "attn.clone().mul_(0)": lambda attn: attn.clone().mul_(0),
    "attn.numpy().fill(0)": lambda attn: attn.numpy().fill(0),
    "attn.double().mul_(0)": lambda attn: attn.double().mul_(0),
}


@exercise("3.3", "medium", minutes=15)
def operations(answer: object) -> str:
    """What each operation on captured weights does to the backward pass that follows: harmless, error or silent."""
    if not isinstance(answer, Mapping):
        raise Wrong(f"A dict from operation to effect is wanted here, and this is {describe(answer)}.")
    names(answer, OPERATIONS)
    names(answer.values(), ("harmless", "error", "silent"))
    missing = [operation for operation in OPERATIONS if operation not in answer]
    if missing:
        raise Wrong(f"{missing[0]} is missing.")
    model, x, y = small_model(1, "bp")
    model.float()  # so that attn.double() is not attn itself
    weight = model.blocks[0].attn.q_proj.weight

    def gradient_after(operation: Callable[[Tensor], object]) -> Tensor:
        with capture_attention(model, maps=True) as layers:
            _, loss = model(x, y)
            operation(layers[0].attn)
            return torch.autograd.grad(loss, weight)[0]

    right = gradient_after(lambda attn: None)
    for operation, apply in OPERATIONS.items():
        try:
            effect = "harmless" if torch.equal(gradient_after(apply), right) else "silent"
        except RuntimeError:
            effect = "error"
        if answer[operation] != effect:
            reason = {
                "harmless": "it makes a tensor of its own and writes, if at all, there",
                "error": "it writes to the memory that the backward pass reads, and PyTorch notices",
                "silent": "it writes to the memory that the backward pass reads, and PyTorch does not see it happen",
            }[effect]
            raise Wrong(f"{operation} was tried, and is not of the kind {answer[operation]!r}: {reason}.")
    return "The last kind is the dangerous one: whoever writes to what was captured should take a copy first."


# ---------------------------------------------------------------------------------------------------------------------
# 04: the energy split
# ---------------------------------------------------------------------------------------------------------------------


@exercise("4.1", "easy", minutes=10)
def energy_ratios(answer: object) -> str:
    """A function (a, g) -> (r_diag, r_offdiag, r_cross) of one head, from maps (B, T, T), as ratios of means."""
    a, g, _ = causal_maps(4, 5, common=0.5)
    g = g * tensor([1, 2, 4, 8])[:, None, None]
    names_of = ["r_diag", "r_offdiag", "r_cross"]

    def ratios(a: Tensor, g: Tensor) -> np.ndarray:
        return head_energy(a[:, None].double(), g[:, None].double(), n_boot=2)[names_of].to_numpy()[0]

    right = ratios(a, g)
    single = "One triple a head is wanted, and these are those of the single sequences."
    got = numbers(call(answer, a=a, g=g), (3,), "the triple of ratios", {(3, 4): single, (4, 3): single})
    if close(got, np.mean([ratios(a[[i]], g[[i]]) for i in range(4)], axis=0)):
        raise Wrong("This is the mean of the sequences' ratios. Average the energies first, then divide.")
    if abs(got[1] - (1 - got[0])) < 1e-4:
        raise Wrong("Your r_offdiag is 1 - r_diag, which takes in the cross term and is no energy.")
    for i, name in enumerate(names_of):
        if abs(got[i] - right[i]) > 1e-3:
            slips = {2 * got[i]: " It is half of that.", got[i] ** 2: " It is the root of that: an energy is a square."}
            hints = [hint for value, hint in slips.items() if abs(value - right[i]) < 1e-3]
            raise Wrong(f"{name} is {got[i]:.3f} on this case and should be {right[i]:.3f}.{''.join(hints)}")
    return f"They sum to 1, and the largest sequence has most of the say: here r_diag is {right[0]:.2f}."


@exercise("4.2", "hard", minutes=20)
def low_temperature(answer: object) -> str:
    """The cosine of d with f for scores (2, 1.5, 1, 0) and errors (3, 1, -2, 5), as the temperature goes to zero."""
    scores, g = torch.tensor([2, 1.5, 1, 0]).double(), torch.tensor([3, 1, -2, 5]).double()

    def at(factor: float) -> float:
        f, d, _ = split_softmax_gradient((factor * scores).softmax(-1), g)
        return cosine(d, f)

    got, limit = scalar(answer), at(40)
    if abs(got) > 1:
        raise Wrong(f"A cosine lies between -1 and 1, and this is {got:g}.")
    for factor in (1, 3, 10):
        if abs(got - at(factor)) < 2e-3 < abs(limit - at(factor)):
            raise Wrong(f"That is the cosine at scores times {factor}. It goes on changing from there.")
    if abs(got - limit) > 2e-3:
        raise Wrong("It is another number. Which two keys still have a say when all others have lost theirs?")
    return "Both d and f vanish, but not their angle: it hangs on the errors of two keys, common mode included."


@exercise("4.3", "easy", minutes=10)
def local_rule(answer: object) -> str:
    """A rule (a, g, mean of g) -> what is sent to the score, key by key, with a cosine of 0.85 with f."""
    a, g, visible = causal_maps(50, 12, spread=2, common=2)
    f = SOFTMAX_BACKWARD["full"](a, g, visible)
    mean = (g * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
    shown = {"a": a, "g": g, "mean": mean.expand_as(g)}
    shown = {name: values[:, visible] for name, values in shown.items()}  # (B, visible pairs)
    n = shown["a"].shape[1]
    sent = numbers(call(answer, **shown), (50, n), "the result for 50 sequences of 78 visible pairs")
    fewer = {name: values[:, ::2] for name, values in shown.items()}
    if not close(numbers(call(answer, **fewer), (50, n // 2), "the result for fewer keys"), sent[:, ::2]):
        raise Wrong("It looks at other keys: when half of them are taken away, it sends something else to the rest.")
    if not sent.any():
        raise Wrong("It sends nothing.")
    found = np.mean([cosine(tensor(row), exact) for row, exact in zip(sent, f[:, visible], strict=True)])
    if not found >= 0.85:
        raise Wrong(f"Its mean cosine with f is {found:.2f} here, and should be at least 0.85.")
    return f"Its mean cosine with f is {found:.2f}, where that of the diagonal part is 0.39."


# ---------------------------------------------------------------------------------------------------------------------
# 05: the verdict
# ---------------------------------------------------------------------------------------------------------------------


def losses(n: int, seed: int = 0, excess: float = 0.5) -> dict[str, np.ndarray]:
    """Losses of n seeds under a rule, under full and under none, which have a scatter in common."""
    rng = np.random.default_rng(seed)
    rule, full, none = 0.1 * rng.normal(size=n) + 0.1 * rng.normal(size=(3, n))
    return {"rule": 2 + excess + rule, "full": 2 + full, "none": 3 + none}


@exercise("5.1", "easy", minutes=5)
def my_harm(answer: object) -> str:
    """A function (rule, full, none) -> harm."""
    by_hand = {"rule": np.array([2.2, 2.5, 2.8]), "full": np.full(3, 2.0), "none": np.array([3, 3.5, 4])}
    for case in (by_hand, losses(5), losses(5, seed=7, excess=-0.2)):
        got, right = scalar(call(answer, **case), "harm"), harm(**case).harm
        if abs(got - right) < 1e-3:
            continue
        if abs(got - np.mean((case["rule"] - case["full"]) / (case["none"] - case["full"]))) < 1e-3:
            raise Wrong("This is the mean of the seeds' ratios. A seed with a small denominator would decide it all.")
        if abs(got + right) < 1e-3:
            raise Wrong("Its sign is off: a rule that is worse than full does harm.")
        if abs(got - (1 - right)) < 1e-3:
            raise Wrong("This is the share of the gain that is *left*: full has harm 0, none has harm 1.")
        inputs = ", ".join(f"{name} = {describe(value)}" for name, value in case.items())
        raise Wrong(f"On {inputs} it gives {got:.3f}, and the harm is {right:.3f}.")
    return "It can be negative (better than the exact pass) and above 1 (worse than untrained queries and keys)."


@exercise("5.2", "medium", minutes=10)
def small_but_not_tolerable(answer: object) -> str:
    """Five losses whose harm is below 0.25 and whose verdict is not tolerable."""
    rule = numbers(answer, (5,)).tolist()
    result = harm(rule, [2.0, 2.1, 1.9, 2.0, 2.1], [3.0, 3.1, 2.9, 3.1, 3.0])
    if not result.harm < 0.25:
        raise Wrong(f"Its harm is {result.harm:.2f}, and should be below 0.25.")
    if result.verdict == "tolerable":
        raise Wrong(
            f"Its harm is {result.harm:.2f} [{result.low:.2f}, {result.high:.2f}]: tolerable, since all of the "
            "interval is below 0.25. What widens an interval?"
        )
    return (
        f"Its harm is {result.harm:.2f} [{result.low:.2f}, {result.high:.2f}]: {result.verdict}. Five such seeds leave "
        "it open whether the rule is harmless."
    )


@exercise("5.3", "hard", minutes=30)
def is_inside(answer: object) -> str:
    """A function (h, rule, full, none) -> whether h is in Fieller's 95 % interval."""
    for case in (losses(5), losses(3), losses(10, excess=1.2)):
        n, result = len(case["rule"]), harm(**case)
        width = result.high - result.low
        inputs = ", ".join(f"{name} = {describe(value)}" for name, value in case.items())
        for h in (result.harm, *np.linspace(result.low - width, result.high + width, 61)):
            inside = result.low <= h <= result.high
            if min(abs(h - result.low), abs(h - result.high)) < 0.01 * width:
                continue  # at the border rounding decides
            said = truth(call(answer, h=float(h), **case), f"for h = {h:.3f}")
            if said == inside:
                continue
            quantile = student_t.ppf(0.975, n - 1)
            slips = {
                f"a normal's 1.96, where {n} seeds have a t of {quantile:.2f}": 1.96,
                "a standard deviation that divides by n, not n - 1": quantile * np.sqrt(1 - 1 / n),
                "a one-sided quantile: 95 % leave 2.5 % at each side": student_t.ppf(0.95, n - 1),
            }
            for slip, used in slips.items():
                theirs = harm(**case, confidence=2 * student_t.cdf(used, n - 1) - 1)
                if all(
                    truth(call(answer, h=float(x), **case), "") == (theirs.low <= x <= theirs.high)
                    for x in np.linspace(result.low - width, result.high + width, 601)
                    if min(abs(x - theirs.low), abs(x - theirs.high)) > 0.001 * width
                ):
                    raise Wrong(f"The interval is a little off, as it would be with {slip}.")
            raise Wrong(
                f"On {inputs} the interval is [{result.low:.2f}, {result.high:.2f}], and you say {said} for {h:.2f}."
            )
    return "All that is uncertain is the mean of one set of differences: no ratio had to be trusted."


@exercise("5.4", "medium", minutes=15)
def adding_up(answer: object) -> str:
    """Cosines after 100 iterations of a rule with a constant error, and of one with an error drawn anew at each."""
    got = numbers(answer, (2,), "the pair of cosines")
    steps, size = 100, 0.75
    exact = torch.zeros(20_000, dtype=torch.float64)
    exact[0] = 1
    errors = torch.from_numpy(np.random.default_rng(0).normal(size=(steps, len(exact))))
    errors[:, 0] = 0  # at right angles to the exact gradient
    errors *= size / errors.norm(dim=1, keepdim=True)
    right = cosine(steps * (exact + errors[0]), exact), cosine(steps * exact + errors.sum(0), exact)
    if np.allclose(got, right[::-1], atol=1e-3):
        raise Wrong("These are the right numbers in the wrong order: the constant error comes first.")
    for value, true, which in zip(got, right, ("constant", "random"), strict=True):
        if abs(value - 1) < 1e-3 and true < 1 - 2e-3:
            raise Wrong(f"With a {which} error the cosine is not quite 1: how long is the sum of 100 such errors?")
        if abs(value - true) > 1e-3:
            raise Wrong(f"With a {which} error it is not {value:g}. How long is the sum of 100 such errors?")
    return "The cosine was 0.8 at every iteration, and after 100 of them one rule has gone astray, the other not."


# ---------------------------------------------------------------------------------------------------------------------
# 06: local surrogates
# ---------------------------------------------------------------------------------------------------------------------


@exercise("6.1", "easy", minutes=10)
def steps_to_follow(answer: object) -> str:
    """The steps after which a running mean has made up 90 % of a jump, at decays of 0.9 and of 0.99."""
    got = numbers(answer, (2,), "the pair of steps")
    for said, decay in zip(got, (0.9, 0.99), strict=True):
        memory, steps = torch.zeros((), dtype=torch.float64), 0
        while memory < 0.9:
            memory, steps = memory.lerp(torch.ones_like(memory), 1 - decay), steps + 1
        if said == steps - 1:
            raise Wrong(f"At a decay of {decay}, after {steps - 1} steps it is just below 0.9.")
        if said != steps:
            raise Wrong(
                f"At a decay of {decay} it is not {said:g}. How much of the gap is left after one step, and two?"
            )
    return "The lateral sum is another one in every row of every sequence: no memory of this kind can follow it."


@exercise("6.2", "medium", minutes=10)
def blind_rules(answer: object) -> str:
    """The rules of the family that do not see a constant added to g."""
    family = ("zero", "diagonal", "running", "diagonal_running", "mean", "diagonal_mean", "full", "diagonal_lateral")
    chosen = names(answer, family)
    a, g, visible = causal_maps(2, 6)
    memory = tensor(0.3)

    def sent(name: str, g: Tensor) -> np.ndarray:
        return to_array(SOFTMAX_BACKWARD[name](a, g, visible, memory))

    blind = {name for name in family if close(sent(name, g + 5), sent(name, g))}
    for name in sorted(chosen - blind):
        raise Wrong(f"{name} was tried with g and with g + 5, and sends something else. Does its baseline move along?")
    if blind - chosen:
        more = "one more is" if len(blind - chosen) == 1 else f"{len(blind - chosen)} more are"
        raise Wrong(f"Nothing in it is wrong, but it is not complete: {more} blind to it.")
    return "Blindness to the common mode is not enough either: only one of them leaves every row's sum at zero."


@exercise("6.3", "medium", minutes=15)
def turned_round(answer: object) -> str:
    """Weights and errors of two keys, for which the rule balanced by attention points against the exact pass."""
    a, g = numbers(answer, (2, 2), "the pair (a, g)")
    if (a <= 0).any() or abs(a.sum() - 1) > 1e-6:
        raise Wrong(f"a should be two positive weights that sum to 1, and it is {describe(a)}.")
    a, g = torch.from_numpy(a), torch.from_numpy(g)
    f, _, _ = split_softmax_gradient(a, g)
    sent, _, _ = split_softmax_gradient(a, (1 - a) * g)  # equation (6.2)
    if min(f.norm(), sent.norm()) < 1e-6 * g.norm() or not g.any():
        raise Wrong(f"One of the two is zero: f is {describe(f)}, the balanced rule sends {describe(sent)}.")
    if cosine(f, sent) > 0:
        raise Wrong(f"They point the same way: f is {describe(f)}, the balanced rule sends {describe(sent)}.")
    return f"f is {describe(f)}, and the balanced rule sends {describe(sent)}. Yet both have the form J x."


@exercise("6.4", "hard", minutes=20)
def distorted_error(answer: object) -> str:
    """A function (a, g) -> x with J x = g - a sum(g), for rows (..., n)."""
    for a, g in ((tensor([0.5, 0.25, 0.25]), tensor([1, 2, 4])), (normal(2, 3).softmax(-1), normal(2, 3, seed=1))):
        x = tensor(numbers(call(answer, a=a, g=g), tuple(a.shape), f"x for rows of shape {tuple(a.shape)}"))
        target = g - a * g.sum(-1, keepdim=True)
        scores = a.log().requires_grad_()
        (got,) = torch.autograd.grad(scores.softmax(-1), scores, x)  # the exact softmax, applied to x
        if close(to_array(x), target):
            raise Wrong("This is what the balanced rule sends, J x. The error x that J makes it of is wanted.")
        if not close(to_array(got), target):
            raise Wrong(
                f"On a = {describe(a)}, g = {describe(g)} your x is {describe(x)}: J x is {describe(got)}, and should "
                f"be {describe(target)}."
            )
    return "So it has the form J x. But see how large x is at a key that the query hardly looks at."
