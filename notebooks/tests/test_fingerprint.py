"""A fingerprint changes with what code does, and with nothing else."""

import functools
import importlib.util
import linecache
import subprocess
import sys
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import helpers
import model_local
from helpers import fingerprint
from model_local import LocalGPTConfig

CONFIG = LocalGPTConfig(method="bp")


def key(config=CONFIG, measure=helpers.symptoms, optimizer="adamw"):
    return helpers.training_code(config, helpers.Corpus, measure, optimizer)


@pytest.fixture
def cell(tmp_path):
    """Runs source as a notebook does: in one namespace, each time as a source of its own, known to linecache."""
    namespace, count = {"__name__": "__main__"}, iter(range(1000))

    def run(source):
        name = str(tmp_path / f"cell_{next(count)}.py")
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), namespace)
        return namespace

    return run


def module(path, source, name):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


BASE = """
import functools, math
from dataclasses import dataclass
scale = 2.0
def helper(x): return x * scale
class Base:
    def sign(self): return 1
@dataclass(frozen=True)
class Rule(Base):
    slope: float = 1.0
    def __call__(self, x): return helper(x) * self.sign()
    def __repr__(self): return "shown"
def closure(factor):
    def inner(x): return x * factor
    return inner
def reads(x, rate=0.5, *, shift=1):
    "What it does."
    if x < 0: raise ValueError(f"{x} is negative")
    return [helper(y) + math.pi for y in x]  # a comment
def calls(x): return helper(x)
start = 1
def begins(x, at=start): return x + at
objects = [reads, Rule(0.5), closure(3), functools.partial(reads, rate=0.1), calls, begins]
"""


@pytest.mark.parametrize(
    "old, new, changed",
    [
        ("scale = 2.0", "scale = 3.0", "01 34"),  # a global two functions away
        ("x * scale", "x + scale", "01 34"),
        ("return 1\n", "return -1\n", " 1"),  # an inherited method
        ("Rule(0.5)", "Rule(0.6)", " 1"),
        ("closure(3)", "closure(4)", "  2"),
        ("rate=0.5", "rate=0.6", "0  3"),
        ("shift=1", "shift=2", "0  3"),
        ("partial(reads, rate=0.1)", "partial(reads, rate=0.2)", "   3"),
        ("calls(x): return helper(x)", "calls(x): return helper(-x)", "    4"),
        ("math.pi", "math.e", "0  3"),
        ("slope: float = 1.0", "slope: float = 2.0", " 1"),
        ("start = 1", "start = 2", "     5"),
        ("What it does.", "Other words.", ""),
        ("# a comment", "# another", ""),
        ("is negative", "is below zero", ""),
        ('"shown"', '"displayed"', ""),
        ("def helper(x): return x", "def helper(x):\n\n    return (x)", ""),
    ],
)
def test_it_follows_whatever_a_result_hangs_on_and_nothing_else(cell, old, new, changed):
    assert old in BASE
    before = [fingerprint(o) for o in cell(BASE)["objects"]]
    after = [fingerprint(o) for o in cell(BASE.replace(old, new))["objects"]]
    assert {i for i in range(6) if before[i] != after[i]} == {int(i) for i in changed.replace(" ", "")}


def test_a_decorator_of_a_package_hides_nothing(cell):
    source = "import torch\n@torch.no_grad()\ndef f(x): return x + 1"
    prints = [
        fingerprint(cell(s)["f"]) for s in (source, source.replace("x + 1", "x + 2"), source.replace("no_", "enable_"))
    ]
    assert len({*prints}) == 3


def test_values_count_by_content():
    same = [np.arange(3), torch.arange(3), {"a": [1, 2]}, {1, "b", 2.5}, np.float64(2), torch.tensor(1.5)]
    again = [np.arange(3), torch.arange(3), {"a": [1, 2]}, {2.5, "b", 1}, np.float64(2), torch.tensor(1.5)]
    other = [np.arange(1, 4), torch.arange(3) + 1, {"a": (1, 2)}, {1, "b"}, np.float64(3), torch.tensor(1.25)]
    for a, b, c in zip(same, again, other, strict=True):
        assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert fingerprint(1) != fingerprint(1.0) != fingerprint("1.0") and fingerprint("a", "b") != fingerprint("a b")
    base = torch.arange(6.0).view(2, 3)
    assert fingerprint(base.T) == fingerprint(base.T.clone()) != fingerprint(base)


def test_recursion_ends(cell):
    namespace = cell("def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)")
    assert fingerprint(namespace["even"]) != fingerprint(namespace["odd"])


@dataclass
class Holder:
    content: object


def imports_inside(x):
    from model_local import ste

    return ste(*x)


def uses_a_module_of_the_project(x):
    return model_local.ste(*x)


UNSOUND = [threading.Lock(), (i for i in "a"), Holder([threading.Lock()]), eval("lambda x: x"), lambda x: x, "".join]
UNSOUND += [imports_inside, uses_a_module_of_the_project, helpers.RecallTask().batch, torch.Generator()]


@pytest.mark.parametrize("value", UNSOUND, ids=str)
def test_what_cannot_be_hashed_is_refused_with_a_way_out(value):
    with pytest.raises(TypeError, match=r"has no fingerprint.*notebook cell"):
        fingerprint(value)


def test_a_file_that_is_edited_beside_a_running_kernel_changes_nothing(tmp_path):
    own = module(tmp_path / "edited.py", "def f(x): return x + 1", "edited")
    before = fingerprint(own.f)
    (tmp_path / "edited.py").write_text("def f(x): return x + 2")
    linecache.checkcache()
    assert fingerprint(own.f) == before


def test_code_whose_source_has_moved_on_is_refused(tmp_path):
    own = module(tmp_path / "moved.py", "def f(x): return x + 1", "moved")
    (tmp_path / "moved.py").write_text("\n\ndef f(x): return x + 2")
    with pytest.raises(TypeError, match="changed"):
        fingerprint(own.f)


def test_the_projects_sources_are_read_at_import(monkeypatch):
    monkeypatch.setattr(linecache, "getlines", lambda *args: pytest.fail("read only now"))
    assert helpers._functions(helpers.__file__) and helpers._functions(model_local.__file__)


def test_two_sessions_agree():
    code = "import helpers; c = helpers.LocalGPTConfig(method='bp'); "
    code += "print(helpers.training_code(c, helpers.Corpus, helpers.symptoms))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == key()


@pytest.mark.parametrize("name", ["twin", "gradients", "gradient_cosines", "capture_batch", "full", "evaluate"])
def test_the_key_of_a_run_holds_all_that_its_numbers_hang_on(monkeypatch, name):
    before = key()
    assert key() == before
    monkeypatch.setattr(helpers, name, model_local.none)
    assert key() != before


@pytest.mark.parametrize("name", ["Block", "INIT_STD", "_DirectFeedback", "_RuledWeights"])
def test_the_key_of_a_run_holds_the_model(monkeypatch, name):
    before = key()
    monkeypatch.setattr(model_local, name, 0)
    assert key() != before


def test_the_key_of_a_run_holds_neither_figures_nor_the_table_nor_rules_that_it_does_not_use(monkeypatch):
    before = key()
    for name in ("plot_harm", "COLORS", "harm", "load_results", "head_energy", "train", "_Capture", "head_sums"):
        monkeypatch.setattr(helpers, name, None)
    monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "mine", "whatever")
    monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "ste", model_local.none)
    monkeypatch.setitem(model_local.QK_NORM, "cut", "whatever")
    monkeypatch.setitem(helpers.OPTIMIZERS, "sgd", "whatever")
    assert key() == before != key(LocalGPTConfig(method="bp", softmax_backward="ste"))


def test_every_rule_norm_and_optimizer_has_a_key_of_its_own_that_changes_with_it_alone(monkeypatch):
    def keys():
        found = {("softmax_backward", name): CONFIG for name in model_local.SOFTMAX_BACKWARD}
        found |= {("qk_norm", name): CONFIG for name in model_local.QK_NORM}
        found = {part: key(replace(config, **dict([part]))) for part, config in found.items()}
        return found | {("optimizer", name): key(optimizer=name) for name in helpers.OPTIMIZERS}

    usual = {("softmax_backward", "full"), ("qk_norm", "off"), ("optimizer", "adamw")}
    before = keys()
    assert {before[part] for part in usual} == {key()}
    assert len({*before.values()}) == len(before) - 2
    monkeypatch.setitem(model_local.QK_NORM, "cut_q", (model_local.CutRMSNorm, model_local.CutRMSNorm))
    monkeypatch.setitem(helpers.OPTIMIZERS, "clip", helpers.sgd)
    monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "ste", model_local.none)
    after, changed = keys(), {("qk_norm", "cut_q"), ("optimizer", "clip"), ("softmax_backward", "ste")}
    assert {part for part in before if before[part] != after[part]} == changed


def test_a_rule_of_ones_own_under_one_name_has_a_key_of_its_own(monkeypatch):
    slope = 1.0

    def mine(a, g, visible, memory=None):
        return g * slope

    rules = [model_local.BaselineRule(True, model_local.zero), model_local.BaselineRule(False, model_local.mean), mine]
    rules += [functools.partial(model_local.ste, memory=1), functools.partial(model_local.ste, memory=2)]
    keys = []
    for rule in rules:
        monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "mine", rule)
        keys.append(key(LocalGPTConfig(softmax_backward="mine")))
    slope = 2.0
    monkeypatch.setitem(model_local.SOFTMAX_BACKWARD, "mine", mine)
    assert len({*keys, key(LocalGPTConfig(softmax_backward="mine"))}) == 6
