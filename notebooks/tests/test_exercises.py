"""Exercises: solutions are right, slips get their words, and what is just beyond is wrong."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import exercises
from exercises import EXERCISES, Comparison, check
from helpers import capture_attention, head_energy, split_softmax_gradient
from model_local import ScoreCap

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
        said, right = judge.slips[words](*inputs), judge.right(*inputs)
        if len(judge.parts) == 1:
            return said
        return [right[i] if part is None else part for i, part in enumerate(said)]

    value = answer() if judge.cases() == [()] else answer
    assert verdict(capsys, number, value) == f"not right yet. {words}"


def unsafe_capture(model, x, y, keep=False):
    """A capture that leaves its hooks behind: after an error, or after every call."""
    weights = []

    def hook(module, inputs, attn):
        attn.retain_grad()
        weights.append(attn)

    handles = [block.attn.attn_weights.register_forward_hook(hook) for block in model.blocks]
    model(x, y)[1].backward()
    for handle in () if keep else handles:
        handle.remove()
    return [attn.grad for attn in weights]


EFFECTS = SOLUTIONS["3.3"]


@pytest.mark.parametrize(("number", "answer", "words"), [
    # what students write beside the slips, and a word that only the message for it has
    ("1.1", lambda a, g: g, "g = [1, 2, 4] should be [-0.75, -0.375, -0.25], and it is [1, 2, 4]"),
    ("1.2", lambda s: s.softmax(-1), "What is it that ties the keys?"),
    ("1.2", torch.relu, "positive here"),
    ("1.2", torch.ones_like, "does not grow in every row"),
    ("1.4", [2.0, 0.0, -1.0], "is 0.88, and should be below"),
    ("1.4", [-1, -1, -1], "has no direction"),
    ("2.1", lambda x, W, B, dy: (dy @ B, B), "grad_W is not right"),
    ("2.2", {"lm_head"}, "not complete: 4 missing"),
    ("2.2", {"lm_head", "o_proj"}, "The gradient of o_proj does turn"),
    ("2.3", lambda W, B: W @ B.T, "(2, 2) and should be that of a single number"),
    ("3.1", lambda out, err, n: (out * err).unflatten(-1, (-1, n)).sum(-2).mT, "numbers are not"),
    ("3.2", lambda model, x, y: [None, None], "layer 0 is None"),
    ("3.2", unsafe_capture, "until the model raises an error"),
    ("3.2", lambda *inputs: unsafe_capture(*inputs, keep=True), "The gradients are right. But"),
    ("3.3", EFFECTS | {"attn.mul_(0)": "silent"}, "PyTorch notices"),
    ("3.3", "harmless", "A dict"),
    ("4.3", lambda a, g, mean: a * (1 - a) * g, "is 0.386 here"),
    ("4.3", lambda a, g, mean: a * (g - (a * g).sum(-1, keepdim=True)), "other keys"),
    ("4.3", lambda a, g, mean: 0 * a, "It sends nothing"),
    ("4.3", lambda a, g, mean: a / 0, "NaNs or infinities"),
    ("5.2", "7, 0.37", "2 things are wanted here"),
    ("5.3", SOLUTIONS["5.3"] | {"running"}, "running sends something else"),
    ("5.3", 4, "Names are wanted here, and this is 4"),
    ("5.4", ((0.9, 0.1), (1.0, 1.0)), "One of the two is zero"),
    ("5.4", ((9, 1), (1.0, 0.5)), "sum to 1"),
    ("5.5", lambda a, g: (1 - a) * g, "your x is [0.5, 1.5, 3]: J x is [-0.438, 0.031, 0.406]"),
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
    ("1.4", [[1, 2, 3]], "not right yet. The shape of the answer is (1, 3) and should be (3,)."),
    ("0.1", 3, f"not right yet. There is no such exercise. There are {', '.join(EXERCISES)}."),
])
def test_an_answer_that_is_none_is_told_so(capsys, number, answer, words) -> None:
    assert verdict(capsys, number, answer) == words


def mixed(share: float):
    """A rule for 4.3 that subtracts a share of the mean."""
    return lambda a, g, mean: a * (1 - a) * (g - share * mean)


@pytest.mark.parametrize(("number", "right", "wrong"), [
    *((number, changed(SOLUTIONS[number], lambda x: x * (1 + 1e-6)),
       changed(SOLUTIONS[number], lambda x: x * (1 + 3e-4)))
      for number in ("1.1", "2.1", "3.1", "6.1", "6.2")),
    *((number, changed(SOLUTIONS[number], lambda x: x + 5e-4),
       changed(SOLUTIONS[number], lambda x: x - 1.5e-3))
      for number in ("1.3", "4.1", "5.1", "7.1")),
    ("1.2", torch.exp, lambda s: s.exp() + 1e-5 * s.sum(-1, keepdim=True)),
    ("1.4", [-28, -30, -31], [-23, -25, -26]),  # cosines of -0.204 and -0.196
    ("4.2", 0.4482, 0.4502),
    ("4.3", mixed(0.875), mixed(0.85)),  # mean cosines of 0.86 and 0.848
    ("5.2", (7, 0.3671), (7, 0.3644)),
    ("5.4", ((0.9, 0.1), (1, 0.12)), ((0.9, 0.1), (1, 0.11))),
    ("5.4", ((0.9, 0.1), (1, 0.5)), ((0.9, 0.10001), (1, 0.5))),
    ("5.5", lambda a, g: g / a - 7, lambda a, g: g / a**1.001),
])
def test_what_is_just_beyond_is_wrong(capsys, number, right, wrong) -> None:
    assert verdict(capsys, number, right).startswith("right.")
    assert verdict(capsys, number, wrong).startswith("not right yet.")


def test_the_right_answers_hold_by_other_means() -> None:
    right = {number: getattr(judge, "right", None) for number, judge in EXERCISES.items()}
    a, g = torch.rand(5).softmax(-1), torch.rand(5)
    f, d, _ = split_softmax_gradient(a, g)
    c = right["1.3"](a, g)
    distances = [(d - at * a * (1 - a) - f).norm() for at in (c, c - 0.01, c + 0.01)]
    assert min(distances) == distances[0]

    dy = torch.randn(20_000, 2)
    for W, B in EXERCISES["2.3"].cases():
        assert right["2.3"](W, B) == bool((((dy @ W) * (dy @ B)).sum(-1) > 0).all())

    a, g = EXERCISES["4.1"].cases()[0]
    table = head_energy(a[:, None].double(), g[:, None].double())
    ratios = table[["r_diag", "r_offdiag", "r_cross"]].to_numpy()[0]
    assert right["4.1"](a, g) == pytest.approx(ratios)

    s = torch.randn(3, 4, requires_grad=True)
    sent, q = torch.randn(2, 3, 4)
    (passed,) = torch.autograd.grad(ScoreCap(1.5, cut=False)(s), s, sent)
    assert torch.allclose(right["6.1"](s, sent, 1.5), passed)
    q.requires_grad_()
    (passed,) = torch.autograd.grad(torch.nn.functional.normalize(q, dim=-1), q, sent)
    assert torch.allclose(right["6.2"](q, sent), passed * q.norm(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(("operation", "effect"), exercises.EFFECTS.items())
def test_the_effects_of_operations_are_those_found_by_trying(operation, effect) -> None:
    def gradient(done):
        model, x, y = exercises.small_model()
        with capture_attention(model.float(), maps=True) as layers:
            _, loss = model(x, y)
            eval(done, {"attn": layers[0].attn})
            return torch.autograd.grad(loss, model.blocks[0].attn.q_proj.weight)[0]

    try:
        found = "harmless" if torch.equal(gradient(operation), gradient("attn")) else "silent"
    except RuntimeError:
        found = "error"
    assert found == effect
