"""Exercises: solutions are right, slips get their words, and what is just beyond is wrong."""

import inspect
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from exercises import EXERCISES, Comparison, check
from helpers import capture_batch, split_softmax_gradient

FILES = sorted((Path(__file__).parents[1] / "solutions").glob("s*.py"))
SOLUTIONS = {}  # by the exercise's number
for path in FILES:
    found = re.findall(r'>>> check\("(\d\.\d)", (\w+)\)', path.read_text(encoding="utf-8"))
    parts = runpy.run_path(str(path))
    SOLUTIONS |= {number: parts[name] for number, name in found}
SLIPS = [(number, words) for number, judge in EXERCISES.items() if isinstance(judge, Comparison)
         for words in judge.slips]


def verdict(capsys, number: str, answer: object) -> str:
    check(number, answer)
    return " ".join(capsys.readouterr().out.split()).removeprefix(f"Exercise {number}: ")


def changed(answer: object, change) -> object:
    """The answer, or what it gives, with its last part changed."""
    if callable(answer):
        return lambda *inputs: changed(answer(*inputs), change)
    if isinstance(answer, tuple | list):
        return [*answer[:-1], change(answer[-1])]
    return change(answer)


@pytest.mark.parametrize("number", EXERCISES)
def test_a_solution_is_right(capsys, number: str) -> None:
    assert verdict(capsys, number, SOLUTIONS[number]).startswith("right. ")


@pytest.mark.parametrize(("number", "words"), SLIPS)
def test_a_slip_gets_its_words(capsys, number: str, words: str) -> None:
    judge = EXERCISES[number]

    def answer(*inputs: object) -> object:
        said = judge.slips[words](*inputs)
        if len(judge.parts) == 1:
            return said
        return [right if part is None else part
                for part, right in zip(said, judge.right(*inputs), strict=True)]

    is_function = bool(inspect.signature(judge.right).parameters)
    assert verdict(capsys, number, answer if is_function else answer()) == f"not right yet. {words}"


def unsafe_capture(model, x, y, keep=False, copies=False):
    """A capture that leaves its hooks behind: after an error, or after every call."""
    weights = []

    def hook(module, inputs, attn):
        attn = attn.detach().clone().requires_grad_() if copies else attn
        attn.retain_grad()
        weights.append(attn)

    handles = [block.attn.attn_weights.register_forward_hook(hook) for block in model.blocks]
    model(x, y)[1].backward()
    for handle in () if keep else handles:
        handle.remove()
    return [attn.grad for attn in weights]


EFFECTS, RATIOS = SOLUTIONS["3.3"], SOLUTIONS["4.1"]


@pytest.mark.parametrize(("number", "answer", "words"), [
    # what students write, and a word that only the message for it has
    ("1.1", lambda a, g: split_softmax_gradient(a, g).full, "the whole of f"),
    ("1.1", lambda a, g: split_softmax_gradient(a, g).diag, "the diagonal part"),
    ("1.1", lambda a, g: -split_softmax_gradient(a, g).offdiag, "The sign is off"),
    ("1.1", lambda a, g: split_softmax_gradient(a, g).offdiag / a, "a factor a"),
    ("1.1", lambda a, g: a * (a * g - (a * g).sum()), "Right for one row, wrong for several"),
    ("1.1", lambda a, g: g, "g = [1, 2, 4] should be [-0.75, -0.375, -0.25], and it is [1, 2, 4]"),
    ("1.1", lambda a, g: (a * g).sum(-1), "() and should be (3,)"),
    ("1.2", lambda s: s.softmax(-1), "What is it that ties the keys?"),
    ("1.2", torch.relu, "positive here"),
    ("1.3", lambda a, g: a @ g, "the lateral sum b"),
    ("1.4", [2.0, 0.0, -1.0], "is 0.88, and should be below"),
    ("1.4", [-1, -1, -1], "has no direction"),
    ("2.1", lambda x, W, B, dy: (dy @ W, 0 * W), "backpropagation's"),
    ("2.1", lambda x, W, B, dy: (dy @ B, (dy.mT @ x).sum(0).T), "the shape (4, 5)"),
    ("2.1", lambda x, W, B, dy: (dy @ B, (dy.mT @ x).mean(0) / 3), "all positions. All"),
    ("2.1", lambda x, W, B, dy: (dy @ B, B), "grad_W is not right"),
    ("2.2", {"lm_head"}, "not complete: 4 missing"),
    ("2.2", {"lm_head", "o_proj"}, "The gradient of o_proj does turn"),
    ("2.2", {"mlp"}, "'mlp' is none of lm_head"),
    ("2.3", lambda W, B: torch.trace(W.T @ B) > 0, "on average"),
    ("2.3", lambda W, B: min(np.linalg.eigvals(W @ B.T).real) > 0, "Eigenvalues"),
    ("2.3", lambda W, B: W @ B.T, "(2, 2) and should be that of a single number"),
    ("3.1", lambda out, err, n: (out * err).sum(-1), "one number a query"),
    ("3.1", lambda out, err, n: (out * err).unflatten(-1, (n, -1)).sum(-1), "swap the last two"),
    ("3.1", lambda out, err, n: (out * err).unflatten(-1, (-1, n)).sum(-2).mT, "numbers are not"),
    ("3.2", lambda *inputs: unsafe_capture(*inputs, copies=True), "There is None"),
    ("3.2", unsafe_capture, "until the model raises an error"),
    ("3.2", lambda *inputs: unsafe_capture(*inputs, keep=True), "The gradients are right. But"),
    ("3.2", lambda *inputs: unsafe_capture(*inputs)[::-1], "the last one first"),
    ("3.2", lambda *inputs: unsafe_capture(*inputs)[0], "2 things are wanted here"),
    ("3.2", lambda *inputs: [layer.attn for layer in capture_batch(*inputs)], "the attention w"),
    ("3.2", lambda *inputs: [2 * grad for grad in unsafe_capture(*inputs)], "It is not the one"),
    ("3.3", EFFECTS | {"attn.mul_(0)": "silent"}, "PyTorch notices"),
    ("3.3", EFFECTS | {"attn.double().mul_(0)": "error"}, "a tensor of its own"),
    ("3.3", EFFECTS | {"attn.numpy().fill(0)": "error"}, "does not see it"),
    ("3.3", EFFECTS | {"attn * 0": "fine"}, "'fine' is none of harmless, error, silent"),
    ("3.3", {"attn * 0": "harmless"}, "attn.mul_(0) is missing"),
    ("3.3", "harmless", "A dict"),
    ("4.1", lambda a, g: np.mean(list(map(RATIOS, a, g)), 0), "mean of the sequences' ratios"),
    ("4.1", lambda a, g: (RATIOS(a, g)[0], 1 - RATIOS(a, g)[0], 0), "no energy"),
    ("4.1", lambda a, g: (*RATIOS(a, g)[:2], RATIOS(a, g)[2] / 2), "r_cross is half"),
    ("4.1", lambda a, g: np.sqrt(np.abs(RATIOS(a, g))), "an energy is a square"),
    ("4.2", 0, "Which two keys"),
    ("4.2", 0.816, "at scores times 1"),
    ("4.3", lambda a, g, mean: a * (1 - a) * g, "is 0.386 here"),
    ("4.3", lambda a, g, mean: a * (g - (a * g).sum(-1, keepdim=True)), "other keys"),
    ("4.3", lambda a, g, mean: 0 * a, "It sends nothing"),
    ("4.3", lambda a, g, mean: a / 0, "NaNs or infinities"),
    ("5.1", lambda r, f, n: ((r - f) / (n - f)).mean(), "the mean of the seeds' ratios"),
    ("5.1", lambda r, f, n: (f - r).sum() / (n - f).sum(), "sign"),
    ("5.2", [2.1, 2.2, 2.0, 2.1, 2.2], "What widens an interval?"),
    ("5.2", [2.5, 2.6, 2.4, 2.5, 2.6], "and should be below 0.25"),
    ("5.2", [2.0, 2.1, 1.9, 2.0, math.nan], "NaNs"),
    ("5.3", lambda h, *losses: True, "should be False, and it is 1"),
    ("5.3", lambda h, rule, full, none: abs((d := rule - full - h * (none - full)).mean())
     <= 1.96 * d.std(ddof=1) / len(d) ** 0.5, "a normal's 1.96"),
    ("5.3", lambda h, rule, full, none: interval(0.9)(h, rule, full, none), "a one-sided quantile"),
    ("5.4", (0.8, 0.8), "under the second"),
    ("5.4", SOLUTIONS["5.4"][::-1], "wrong order"),
    ("6.1", (9, 90), "How much of the gap"),
    ("6.1", (22, 231), "that at a decay of 0.99."),
    ("6.1", "22, 230", "2 things are wanted here"),
    ("6.2", {"full"}, "not complete: 3 missing"),
    ("6.2", SOLUTIONS["6.2"] | {"running"}, "running was tried"),
    ("6.2", 4, "Names are wanted here, and this is 4"),
    ("6.3", ((0.5, 0.5), (1.0, -1.0)), "the same way"),
    ("6.3", ((0.9, 0.1), (1.0, 1.0)), "One of the two is zero"),
    ("6.3", ((9, 1), (1.0, 0.5)), "sum to 1"),
    ("6.4", lambda a, g: (1 - a) * g, "your x is [0.5, 1.5, 3]: J x is [-0.438, 0.031, 0.406]"),
])
def test_a_wrong_answer_is_told_what_is_off(capsys, number, answer, words) -> None:
    told = verdict(capsys, number, answer)
    assert told.startswith("not right yet. ") and words in told, told


@pytest.mark.parametrize(("number", "answer", "words"), [
    ("1.1", ..., "not answered yet."),
    ("1.1", lambda a, g: None, "not answered yet (the function returns None)."),
    ("3.3", EFFECTS | {"attn * 0": ...}, "not answered yet."),
    ("1.1", 3, "not right yet. A function is wanted here, and this is 3."),
    ("1.1", lambda a, g: 1 / 0, "not right yet. It raised ZeroDivisionError: division by zero, on "
     "a = [0.5, 0.25, 0.25], g = [1, 2, 4]."),
    ("1.1", lambda a, g: "o", "not right yet. Numbers are wanted here, and the answer is 'o'."),
    ("1.4", [1j, 0, 0], "not right yet. Numbers are wanted here, and the answer is 1j."),
    ("1.4", [[1, 2, 3]], "not right yet. The shape of the answer is (1, 3) and should be (3,)."),
    ("0.1", 3, f"not right yet. There is no such exercise. There are {', '.join(EXERCISES)}."),
])
def test_an_answer_that_is_none_is_told_so(capsys, number, answer, words) -> None:
    assert verdict(capsys, number, answer) == words


def mixed(share: float):
    """A rule for 4.3 that subtracts a share of the mean."""
    return lambda a, g, mean: a * (1 - a) * (g - share * mean)


def interval(level: float):
    """An answer to 5.3 with another level of confidence."""
    return lambda h, rule, full, none: (
        ttest_1samp(rule - full - h * (none - full), 0).pvalue >= 1 - level)


@pytest.mark.parametrize(("number", "right", "wrong"), [
    *((number, changed(SOLUTIONS[number], lambda x: x * (1 + 1e-6)),
       changed(SOLUTIONS[number], lambda x: x * (1 + 3e-4))) for number in ("1.1", "2.1", "3.1")),
    *((number, changed(SOLUTIONS[number], lambda x: x + 5e-4),
       changed(SOLUTIONS[number], lambda x: x - 1.5e-3))
      for number in ("1.3", "4.1", "5.1", "5.4")),
    ("1.2", torch.exp, lambda s: s.exp() + 1e-5 * s.sum(-1, keepdim=True)),
    ("1.4", [-28, -30, -31], [-23, -25, -26]),  # cosines of -0.204 and -0.196
    ("2.3", SOLUTIONS["2.3"], lambda W, B: bool(W.norm() > 0)),
    ("4.2", 0.4482, 0.4502),
    ("4.3", mixed(0.875), mixed(0.85)),  # mean cosines of 0.86 and 0.848
    ("5.2", [2.0, 2.1, 1.9, 2.0, 3.34], [2.0, 2.1, 1.9, 2.0, 3.36]),  # harms of 0.248 and 0.252
    ("5.2", [2.0, 2.1, 1.9, 2.0, 2.425], [2.0, 2.1, 1.9, 2.0, 2.4]),  # up to 0.264 and to 0.244
    ("5.3", interval(0.95), interval(0.945)),
    ("5.3", interval(0.95), interval(0.955)),
    ("6.1", (22, 230), (22, 231)),
    ("6.3", ((0.9, 0.1), (1, 0.12)), ((0.9, 0.1), (1, 0.11))),
    ("6.3", ((0.9, 0.1), (1, 0.5)), ((0.9, 0.10001), (1, 0.5))),
    ("6.4", lambda a, g: g / a - 7, lambda a, g: g / a**1.001),
])
def test_what_is_just_beyond_is_wrong(capsys, number, right, wrong) -> None:
    assert verdict(capsys, number, right).startswith("right.")
    assert verdict(capsys, number, wrong).startswith("not right yet.")


def test_the_right_answers_hold_by_other_means() -> None:
    a, g = torch.rand(5).softmax(-1), torch.rand(5)
    f, d, _ = split_softmax_gradient(a, g)
    c = EXERCISES["1.3"].right(a, g)
    distances = [(d - at * a * (1 - a) - f).norm() for at in (c, c - 0.01, c + 0.01)]
    assert min(distances) == distances[0]

    dy = torch.randn(20_000, 2)
    for W, B in EXERCISES["2.3"].cases():
        assert EXERCISES["2.3"].right(W, B) == bool((((dy @ W) * (dy @ B)).sum(-1) > 0).all())

    attn, value, error = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    grad = error @ value.mT
    joined = [x.transpose(1, 2).flatten(2) for x in (attn @ value, error)]
    torch.testing.assert_close(EXERCISES["3.1"].right(*joined, 3), (attn * grad).sum(-1))

    errors = np.random.default_rng(0).normal(size=(100, 20_000))
    total = 0.75 * (errors / np.linalg.norm(errors, axis=1, keepdims=True)).sum(0)
    cosine = 100 / np.hypot(100, np.linalg.norm(total))
    assert EXERCISES["5.4"].right()[1] == pytest.approx(cosine, abs=1e-4)
