"""Shared tools of the notebooks, in reading order: data, training, capture and energies, experiment, figures.

Numbers come from pure functions, figures from ``plot_*`` functions that only draw. The model and its learning rules are
in ``model_local``; nothing here knows which rule is at work.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import dis
import errno
import functools
import hashlib
import inspect
import io
import json
import linecache
import math
import os
import pickle
import pickletools
import re
import shutil
import sys
import sysconfig
import time
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import BinaryIO, NamedTuple
from unittest import mock

import matplotlib.pyplot as plt
import numba
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib_inline.config import InlineBackend
from scipy.stats import binomtest
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import model_local
from model_local import (
    ATTN_MODES,
    METHODS,
    QK_NORM,
    SOFTMAX_BACKWARD,
    LocalGPT,
    LocalGPTConfig,
    Rule,
    attention_weights,
    diagonal,
    full,
)

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"

# ---------------------------------------------------------------------------------------------------------------------
# 1. Data: a corpus is a folder in nanoGPT's layout (train.bin, val.bin, meta.pkl), made by data/prepare.py
# ---------------------------------------------------------------------------------------------------------------------

SHAKESPEARE_SHA256 = "56c25d4855680bb29279a84bcf28065b8053a158bede65b7f57d0c581ba81944"  # as Corpus.sha256 has it


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, memory-mapped. ``train`` and ``val`` hold token ids (uint16), ``itos`` their characters."""

    name: str
    train: np.ndarray
    val: np.ndarray
    stoi: Mapping[str, int]
    itos: Mapping[int, str]
    sha256: str  # of the tokens and the vocabulary: what results made from this corpus depend on

    @property
    def vocab_size(self) -> int:
        return len(self.itos)

    @property
    def is_shakespeare(self) -> bool:
        """Whether this is Tiny Shakespeare, which the report's sentences are about, whatever its folder is called."""
        return self.sha256 == SHAKESPEARE_SHA256

    def encode(self, text: str) -> Tensor:
        """Token ids (T,) of ``text``; ValueError names a character that the corpus does not have."""
        unknown = sorted(set(text) - set(self.stoi))
        if unknown:
            raise ValueError(f"{unknown[0]!r} does not occur in the corpus {self.name!r}, which has no token for it")
        return torch.tensor([self.stoi[character] for character in text], dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[int(i)] for i in ids)

    def batch(self, block_size: int, batch_size: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
        """A random batch of the training part, see ``get_batch``."""
        return get_batch(self.train, block_size, batch_size, generator, device)

    def score(self, model: LocalGPT) -> dict[str, float]:
        """``val_loss``, see ``evaluate``."""
        return {"val_loss": evaluate(model, self.val)}

    def __repr__(self) -> str:
        name = "Tiny Shakespeare" if self.is_shakespeare else self.name
        size = f"{len(self.train):,} training and {len(self.val):,} validation tokens, {self.vocab_size} distinct"
        return f"Corpus: {name}, {size}."

    def _repr_markdown_(self) -> str:
        if self.is_shakespeare:
            return repr(self)
        return f"{self}\n\n> **Not Tiny Shakespeare**: what the text says of trained models was seen on that, not here."


def load_corpus(name: str | None = None, root: Path = DATA) -> Corpus:
    """Open the corpus ``root/name``; without a name that of the environment variable CORPUS, else Tiny Shakespeare.

    Raises FileNotFoundError where it is missing and ValueError where it is damaged, saying what to do.

    >>> load_corpus("my_text")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: data/my_text is missing: 'python data/prepare.py' makes Tiny Shakespeare, ...
    """
    name = os.environ.get("CORPUS") or "shakespeare_char" if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} names no corpus: give the name of a folder in {root.name}/ (letters, digits, _, -)")
    folder = root / name
    make = f"'python data/prepare.py' makes Tiny Shakespeare, with '--text FILE --name {name}' a text of your own"
    for path in (folder, folder / "train.bin", folder / "val.bin", folder / "meta.pkl"):
        if not path.exists():
            raise FileNotFoundError(f"{path.relative_to(root.parent)} is missing: {make}")

    def damaged(what: str) -> ValueError:
        return ValueError(f"{root.name}/{name} is damaged: {what}; {make}")

    try:
        characters = _characters((folder / "meta.pkl").read_bytes())
    except Exception as error:  # a hostile or broken pickle can fail in any way
        raise damaged(f"meta.pkl cannot be read ({type(error).__name__}: {error})") from error
    digest = hashlib.sha256(json.dumps(characters).encode())
    splits = []
    for file in ("train.bin", "val.bin"):
        n_bytes = (folder / file).stat().st_size
        if n_bytes == 0 or n_bytes % 2:
            raise damaged(f"{file} has {n_bytes} bytes, not a positive number of 2-byte tokens")
        tokens = np.memmap(folder / file, dtype="<u2", mode="r")
        if tokens.max() >= len(characters):
            raise damaged(f"{file} holds the token id {tokens.max()}, and the vocabulary ends at {len(characters) - 1}")
        digest.update(tokens.tobytes())
        splits.append(tokens)
    if not any(tokens[1::2].any() for tokens in splits) and not all(tokens[::2].all() for tokens in splits):
        raise damaged("every second token is 0, as in files of 4-byte ids (int32), and here an id has 2 bytes (uint16)")
    itos = dict(enumerate(characters))
    return Corpus(name, *splits, {c: i for i, c in itos.items()}, itos, digest.hexdigest())


def _characters(pickled: bytes) -> list[str]:
    """The vocabulary in a meta.pkl, in the order of its ids; any exception where it is not as nanoGPT writes it."""
    # Dicts, strings and integers alone: nothing that imports or calls, no tuple in tuples to take for ever as a key.
    plain = {"PROTO", "FRAME", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINUNICODE", "SHORT_BINUNICODE", "STOP"}
    plain |= {"BININT", "BININT1", "BININT2", "MEMOIZE", "BINPUT", "BINGET", "LONG_BINGET"}
    if foreign := {opcode.name for opcode, _, _ in pickletools.genops(pickled)} - plain:
        raise ValueError(f"it holds {', '.join(sorted(foreign))}, and only plain dicts, strings and integers are read")
    meta = pickle.loads(pickled)
    characters = [meta["itos"][i] for i in range(len(meta["itos"]))]
    itos = dict(enumerate(characters))
    expected = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    if {key: meta[key] for key in expected} != expected or len(itos) < 2 or any(len(c) != 1 for c in characters):
        raise ValueError("vocab_size, stoi and itos do not belong together, or are not of two or more characters")
    return characters


def get_batch(
    tokens: np.ndarray, block_size: int, batch_size: int, generator: torch.Generator, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A random batch: inputs and next-token targets, both (batch_size, block_size), int64.

    ``generator`` alone decides which windows are drawn: the same seed gives the same batches, whatever else draws
    random numbers. Raises ValueError where the text is shorter than a window.

    >>> x, y = get_batch(np.arange(100), block_size=4, batch_size=2, generator=torch.Generator().manual_seed(0))
    >>> x.shape, bool((y == x + 1).all())
    (torch.Size([2, 4]), True)
    """
    if len(tokens) <= block_size:
        raise ValueError(
            f"a window of block_size={block_size} needs {block_size + 1} tokens and this text has {len(tokens)}: "
            "choose a smaller block_size or a longer text"
        )
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator).numpy()
    return _windows(tokens, starts, block_size, device)


def _windows(tokens: np.ndarray, starts: np.ndarray, block_size: int, device: str) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (B, 1), in one gather from the file."""
    window = torch.from_numpy(tokens[starts + np.arange(block_size + 1)].astype(np.int64)).to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()  # nanoGPT's model asks for views of the targets


def ngram_losses(corpus: Corpus) -> dict[str, float]:
    """Validation cross-entropy in nats of the unigram and bigram models of the training text (add-one smoothing).

    A model above the unigram line has learnt nothing; one above the bigram line knows less than pairs of letters tell.
    """
    V = corpus.vocab_size
    train, val = corpus.train.astype(np.int64), corpus.val.astype(np.int64)
    unigram = np.bincount(train, minlength=V) + 1.0
    bigram = np.bincount(train[:-1] * V + train[1:], minlength=V * V).reshape(V, V) + 1.0
    return {
        "unigram": float(-np.log(unigram / unigram.sum())[val].mean()),
        "bigram": float(-np.log(bigram / bigram.sum(1, keepdims=True))[val[:-1], val[1:]].mean()),
    }


@dataclass(frozen=True)
class RecallTask:
    """Associative recall (Arora et al. 2023, "Zoology"): pairs of key and value, then some of the keys; which values?

    Only attention can carry a value from its pair to the query. Tokens are ``n_keys`` keys, then ``n_values`` values; a
    sequence has ``n_pairs`` pairs of different keys, then ``n_queries`` of these keys in random order. A generator
    makes endlessly many, so that unseen ones are the rule; only queries have a target (other positions have -100,
    which the loss leaves out).

    >>> task = RecallTask(n_keys=3, n_values=2, n_pairs=2, n_queries=2)
    >>> x, y = task.batch(task.block_size, 1, torch.Generator().manual_seed(0), "cpu")
    >>> x.tolist(), y.tolist()
    ([[2, 3, 0, 4, 0, 2]], [[-100, -100, -100, -100, 4, 3]])
    """

    n_keys: int = 8
    n_values: int = 8
    n_pairs: int = 4
    n_queries: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n_queries <= self.n_pairs <= self.n_keys or self.n_values < 2:
            raise ValueError(f"{self} cannot be: 1 <= n_queries <= n_pairs <= n_keys and n_values >= 2 must hold")

    @property
    def name(self) -> str:
        return "recall"

    @property
    def vocab_size(self) -> int:
        return self.n_keys + self.n_values

    @property
    def block_size(self) -> int:
        return 2 * self.n_pairs + self.n_queries

    @property
    def chance(self) -> float:
        """Accuracy of one who names any of the values that occur in the sequence."""
        return 1 / self.n_pairs + (1 - 1 / self.n_pairs) / self.n_values

    @property
    def best_guess(self) -> float:
        """Accuracy of one who names the value that occurs most often in the sequence: the best without any lookup."""
        ways = [1 / math.factorial(times) for times in range(self.n_pairs + 1)]
        at_most = []  # how probable it is that no value occurs more than 0, 1, 2, ... times
        for most in range(self.n_pairs + 1):
            series = np.polynomial.polynomial.polypow(ways[: most + 1], self.n_values)
            series = np.append(series, np.zeros(self.n_pairs))[self.n_pairs]
            at_most.append(series * math.factorial(self.n_pairs) / self.n_values**self.n_pairs)
        return (self.n_pairs - sum(at_most[:-1])) / self.n_pairs

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def batch(self, block_size: int, batch_size: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
        """``batch_size`` sequences and their targets, both (batch_size, block_size), int64."""
        if block_size != self.block_size:
            raise ValueError(f"block_size={block_size}, and {self} has sequences of {self.block_size} tokens")
        B, P = batch_size, self.n_pairs
        keys = torch.rand(B, self.n_keys, generator=generator).argsort(dim=1)[:, :P]  # without repetition
        values = self.n_keys + torch.randint(self.n_values, (B, P), generator=generator)
        asked = torch.rand(B, P, generator=generator).argsort(dim=1)[:, : self.n_queries]
        x = torch.cat([torch.stack([keys, values], dim=2).flatten(1), keys.gather(1, asked)], dim=1)
        y = torch.full_like(x, -100)
        y[:, 2 * P :] = values.gather(1, asked)
        return x.to(device), y.to(device)

    @torch.no_grad()
    def score(self, model: LocalGPT) -> dict[str, float]:
        """``val_loss`` (nats) and ``accuracy`` in [0, 1] on the same 2,048 sequences at every call."""
        device = next(model.parameters()).device
        x, y = self.batch(model.config.block_size, 2048, torch.Generator().manual_seed(2**31), device)
        was_training = model.training
        logits, loss = model.eval()(x, y)
        model.train(was_training)
        right = (logits.argmax(-1) == y)[y != -100]
        return {"val_loss": loss.item(), "accuracy": right.double().mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Training
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint(*objects, without: Iterable = ()) -> str:
    """SHA-256 of what ``objects`` do: the code of functions with all that it depends on, the content of values.

    Functions are followed to their defaults, closures and the globals that they read, classes to their bases, methods
    and attributes, dataclasses to their fields, all of these further. Comments, docstrings, layout, the words of errors
    and how an object is displayed do not count; installed packages do by name, and what is in ``without`` not at all.
    TypeError on anything else. (joblib.hash takes classes by name, cloudpickle's bytes change with Python's version.)

    >>> step = 2
    >>> def advance(x):
    ...     return x + step
    >>> before, step = fingerprint(advance), 3
    >>> before == fingerprint(advance)
    False
    """
    known = {id(value): ("left out", value) for value in without}  # with the object, so that its id stays its own

    def of(value, name: str) -> str:
        if type(value) in (type(None), bool, int, float, complex, str, bytes, type(...)):
            return f"{type(value).__name__} {value!a}"
        if id(value) not in known:
            known[id(value)] = f"number {len(known)}", value  # for what is below it and comes back to it
            try:
                parts = list(_parts(value))
            except (RuntimeError, TypeError, ValueError) as error:
                advice = "use plain data, arrays, dataclasses, functions defined with def in a file or notebook cell"
                raise TypeError(f"{name} ({type(value).__name__}) has no fingerprint: {error}; {advice}") from error
            words = [f"{label}={of(part, f'{name}: {label}')}" for label, part in parts]
            known[id(value)] = hashlib.sha256("; ".join(words).encode()).hexdigest(), value
        return known[id(value)][0]

    words = [of(value, getattr(value, "__name__", type(value).__name__)) for value in objects]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def _parts(value) -> Iterator[tuple[str, object]]:
    """What determines a value, as pairs of a label and a further value."""
    kind, bound = type(value), not isinstance(getattr(value, "__self__", None), ModuleType | type | None)
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        yield f"{value.dtype} {tuple(value.shape)}", value.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape}", value.tobytes()
    elif kind in (list, tuple, set, frozenset, dict):
        items = value.items() if kind is dict else sorted(map(fingerprint, value)) if "set" in kind.__name__ else value
        yield from ((f"{kind.__name__} {i}", item) for i, item in enumerate(items))
    elif kind is functools.partial:
        yield "partial", (value.func, value.args, value.keywords)
    elif kind is property:
        yield "property", (value.fget, value.fset)
    elif isinstance(value, FunctionType) and not _is_installed((code := value.__code__).co_filename):
        source = _functions(code.co_filename).get((code.co_name, code.co_firstlineno))
        if source is None:
            raise ValueError("its source is not to be found, or has changed since it was loaded, or it is a lambda")
        yield "code", source
        yield "defaults", (value.__defaults__, value.__kwdefaults__)
        closure = zip(code.co_freevars, value.__closure__ or (), strict=True)
        scope = value.__globals__ | {name: cell.cell_contents for name, cell in closure}
        yield from ((name, scope.get(name)) for name in _names(code))  # None: a builtin, or not there
    elif hasattr(value, "__wrapped__"):  # by a package's decorator, or as a class or static method
        yield kind.__name__, value.__wrapped__
    elif kind is ModuleType or (hasattr(value, "__name__") and hasattr(value, "__module__") and not bound):
        module = value if kind is ModuleType else sys.modules.get(value.__module__ or "builtins")
        home = getattr(module, "__name__", "__main__")
        if home != "__main__" and _is_installed(getattr(module, "__file__", None)):
            yield "installed", f"{home}.{getattr(value, '__qualname__', '')}"
        elif isinstance(value, type):
            yield "bases", value.__bases__
            yield from ((name, item) for name, item in sorted(vars(value).items()) if _is_written(name, item))
        else:
            raise ValueError("import what is needed of it by name" if module is value else "it could be anything")
    elif dataclasses.is_dataclass(value):
        yield "class", kind
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        raise ValueError("it could be anything")


def _is_written(name: str, item) -> bool:
    """Whether an entry of a class does something, and is not Python's book-keeping or display."""
    function = inspect.unwrap(item) if callable(item) or hasattr(item, "__wrapped__") else None
    if isinstance(function, FunctionType):
        file = function.__code__.co_filename  # what dataclasses generate has none, or their own
        generated = file == "<string>" or (name.startswith("__") and _is_installed(file))
        return not generated and not re.fullmatch("__(repr|str|annotate.*)__|_repr_.*_", name)
    return not name.startswith("__") and (isinstance(item, property) or not inspect.isdatadescriptor(item))


@functools.cache
def _names(code: CodeType) -> list[str]:
    """The names that code, and the functions inside it, take from outside."""
    names, codes = {*code.co_freevars}, [code]
    for inner in codes:
        codes += [constant for constant in inner.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(inner):
            if instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME")):
                names.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME":
                raise ValueError(f"it imports {instruction.argval} inside, move that to the top")
    return sorted(names)


@functools.cache
def _is_installed(filename: str | None) -> bool:
    """Whether a file is Python's or a package's (as is what has none), and not the project's or its reader's."""
    own = filename and not filename.startswith(("<frozen", sysconfig.get_path("stdlib")))
    return not own or "site-packages" in filename or "dist-packages" in filename


@functools.cache  # as they were when first asked for: the file may be edited beside a running kernel
def _functions(filename: str) -> dict[tuple[str, int], str]:
    """All functions of a file by name and first line, in words that are the same in every version of Python."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(filename))))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {(node.name, min(n.lineno for n in (node, *node.decorator_list))): _plain(node) for node in found}


def _plain(node) -> str:
    if isinstance(node, list):
        return f"[{' '.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        fields["body"] = node.body[ast.get_docstring(node) is not None :]
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        fields = {"exc": node.exc.func}
    return f"({type(node).__name__} {' '.join(f'{name}:{_plain(value)}' for name, value in fields.items())})"


for _file in (__file__, model_local.__file__):
    _functions(_file)


@dataclass(frozen=True)
class Run:
    """A finished training run.

    ``history`` is tidy: one value a row, with columns step, metric, part, value. The metrics are what the data's
    ``score`` gives (``val_loss``), ``train_loss`` (nats per token, mean since the row before), ``tokens_per_s``, and
    what ``measure`` gives.
    """

    model: LocalGPT
    history: pd.DataFrame
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(repr=False)  # parameters by step

    def at(self, step: int) -> LocalGPT:
        """The model as it was after ``step`` steps; KeyError names the steps that were kept."""
        if step not in self.snapshots:
            raise KeyError(f"step {step} was not kept: choose one of {sorted(self.snapshots)}")
        model = twin(self.model)
        model.load_state_dict(self.snapshots[step], strict=False)  # not strict: feedback matrices never change
        return model

    def series(self, metric: str) -> pd.Series:
        """One metric by step (averaged over its parts)."""
        rows = self.history[self.history["metric"] == metric]
        return rows.groupby("step")["value"].mean()


def alignment(model: LocalGPT, x: Tensor, y: Tensor) -> dict[tuple[str, str], float]:
    """Cosine in [-1, 1] of each parameter's gradient with the one that exact backpropagation gives it here."""
    cosines = gradient_cosines(model, twin(model, **dataclasses.asdict(model.config.exact)), x, y)
    return {("alignment", name): cosine for name, cosine in cosines.items()}


def train(
    config: LocalGPTConfig,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 1337,
    data: Corpus | RecallTask | None = None,
    eval_every: int = 50,
    measure: Callable[[LocalGPT, Tensor, Tensor], Mapping[tuple[str, str], float]] = alignment,
    device: str = "cpu",
    directory: str | os.PathLike | None = DATA / "runs",
    progress: bool = True,
    optimizer: str = "adamw",
) -> Run:
    """Train a LocalGPT, or load the run if it was trained before.

    ``data`` is a corpus (the default one if not given) or a task, ``optimizer`` one of OPTIMIZERS. Every ``eval_every``
    steps the model is scored, and a copy of it measured on one fixed batch: ``measure(model, x, y)`` returns numbers by
    (metric, part).

    The checkpoint's name is a hash of all that determines the run: the arguments, the data, torch's version and the
    code (``training_code``). It is rewritten every ``eval_every`` steps, so that an interrupted run goes on where it
    was; without a ``directory`` nothing is written. Raises TypeError or ValueError on arguments that cannot be, also
    on a ``measure`` whose code cannot be looked at, and FloatingPointError if the run diverges.
    """
    if not isinstance(config, LocalGPTConfig):
        raise TypeError(f"config={config!r} is no LocalGPTConfig: write LocalGPTConfig(method='bp', ...)")
    data = load_corpus() if data is None else data
    if not isinstance(data, Corpus | RecallTask):
        raise TypeError(f"data={data!r} is neither a corpus nor a task: write data=load_corpus() or data=RecallTask()")
    if not callable(measure):
        raise TypeError(f"measure={measure!r} is no function of (model, x, y)")
    if config.vocab_size != data.vocab_size:
        raise ValueError(
            f"config.vocab_size={config.vocab_size} and the data {data.name!r} have {data.vocab_size}: "
            "write LocalGPTConfig(vocab_size=corpus.vocab_size, ...)"
        )
    if optimizer not in list(OPTIMIZERS):
        raise ValueError(f"optimizer={optimizer!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    settings = {"steps": steps, "batch_size": batch_size, "eval_every": eval_every, "seed": seed, "lr": lr}
    for name, value in settings.items():  # NumPy's numbers are welcome, and 500.0 steps
        least = {"seed": 0, "lr": math.nextafter(0, 1)}.get(name, 1)
        number = isinstance(value, Real) and not isinstance(value, bool) and least <= value < math.inf
        if not number or (name != "lr" and (value % 1 or value >= 2**63)):
            expected = "a positive number" if name == "lr" else f"a whole number from {least} up"
            raise ValueError(f"{name}={value!r} is not {expected}")
        settings[name] = float(value) if name == "lr" else int(value)
    try:
        device = str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is unknown to PyTorch: write 'cpu' or 'cuda'") from error
    settings |= {"device": device, "optimizer": optimizer}
    start = settings | {"config": config, "data": data, "measure": measure}
    settings |= {"config": dataclasses.asdict(config), "data": data.sha256}
    settings["code"] = training_code(config, type(data), measure, optimizer)
    settings["torch"] = str(torch.__version__)  # a str of its own class, which the safe loader refuses
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = None
    if directory is not None:
        path = Path(directory) / f"{config.method}-{config.softmax_backward}-{key}.pt"

    saved = _load_checkpoint(path, settings) if path else None
    title = f"{config.method}/{config.softmax_backward}"
    silence = {} if progress else {"disable": True}  # disable=False would overrule TQDM_DISABLE
    with (
        torch.random.fork_rng(devices=[]),  # whoever calls keeps their own random numbers
        tqdm(total=settings["steps"], desc=title, leave=False, **silence) as bar,
    ):
        for model, state in _training(**start, saved=saved, bar=bar):  # noqa: B007 (the last is returned)
            if path and state is not saved:
                # into memory first: torch's writer does not tell a full disk from other errors
                torch.save({"settings": settings, **state}, content := io.BytesIO())
                save_atomically(path, lambda file, content=content: file.write(content.getbuffer()))
    table = pd.DataFrame(state["history"], columns=["step", "metric", "part", "value"])
    return Run(model.eval(), table, state["snapshots"])


def adamw(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) at a constant rate, with PyTorch's betas and weight decay."""
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def sgd(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum 0.9, at a constant rate: no weight's step is rescaled."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _queries_and_keys(model: LocalGPT) -> list[torch.nn.Parameter]:
    """All W_q and W_k."""
    return [p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "k_proj.weight"))]


def adamw_for_qk(
    model: LocalGPT, lr: float, steps: int, factor: float = 1.0, decay: float = 0.01
) -> torch.optim.Optimizer:
    """AdamW by which W_q and W_k have a rate of their own, ``factor * lr``, and a weight decay of their own."""
    qk = _queries_and_keys(model)
    others = [p for p in model.parameters() if not any(p is own for own in qk)]
    return torch.optim.AdamW(
        [{"params": others}, {"params": qk, "lr": factor * lr, "weight_decay": decay}], lr, fused=True
    )


def adamw_held(model: LocalGPT, lr: float, steps: int, pull: float) -> torch.optim.Optimizer:
    """AdamW, and after each step every W_q and W_k is pulled towards the Frobenius norm it began with.

    ``pull`` is the share of the way, of the logarithm, in (0, 1]: 1 holds the norm, less is a slow control of it.
    """
    optimizer, qk = adamw(model, lr, steps), _queries_and_keys(model)
    norms = [weight.norm().item() for weight in qk]

    @torch.no_grad()
    def hold(*_) -> None:
        for weight, norm in zip(qk, norms, strict=True):
            weight.mul_((norm / weight.norm()) ** pull)

    optimizer.register_step_post_hook(hold)
    return optimizer


def adamw_clipped(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW on gradients whose norm, over all weights together, is at most 1."""
    optimizer = adamw(model, lr, steps)

    def clip(*_) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def adamw_scheduled(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW whose rate rises to ``lr`` over the first tenth of ``steps``, then falls to a tenth of it as a cosine."""
    optimizer, warm = adamw(model, lr, steps), max(1, steps // 10)

    def schedule(optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            taken = group.get("taken", 0)
            done = max(0.0, (taken - warm) / max(1, steps - warm))
            group["lr"] = lr * min((taken + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))
            group["taken"] = taken + 1  # in the optimizer's state, for a run that is taken up again

    optimizer.register_step_pre_hook(schedule)
    return optimizer


# how the gradients change the weights: a function of the model, the learning rate and the number of steps
OPTIMIZERS: dict[str, Callable[[LocalGPT, float, int], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "qk_rate_0.3": functools.partial(adamw_for_qk, factor=0.3),
    "qk_rate_0.1": functools.partial(adamw_for_qk, factor=0.1),
    "qk_rate_0.03": functools.partial(adamw_for_qk, factor=0.03),
    "qk_decay": functools.partial(adamw_for_qk, decay=1.0),
    "qk_fixed": functools.partial(adamw_held, pull=1.0),
    "qk_slow": functools.partial(adamw_held, pull=0.01),
    "clip": adamw_clipped,
    "schedule": adamw_scheduled,
}


def training_code(config: LocalGPTConfig, data: type, measure: Callable, optimizer: str = "adamw") -> str:
    """The fingerprint of the code that determines a run; of methods, rules, norms and the like only those it uses.

    How a measure finds the maps that it looks at does not count: tests hold what is captured to what was computed.
    """
    used = [registry[getattr(config, name)] for name, registry in REGISTRIES.items()]
    without = [OPTIMIZERS, *REGISTRIES.values(), capture_attention]
    return fingerprint(_training, data, measure, OPTIMIZERS[optimizer], *used, without=without)


REGISTRIES = {"method": METHODS, "softmax_backward": SOFTMAX_BACKWARD, "attn_mode": ATTN_MODES, "qk_norm": QK_NORM}
STATE = ("step", "history", "snapshots", "model", "optimizer", "batches", "rng")  # what a run goes on from


def _training(
    config, steps, lr, batch_size, seed, data, eval_every, measure, device, optimizer, saved: dict | None, bar
) -> Iterator[tuple[LocalGPT, dict]]:
    """A run, from its start or a ``saved`` state on: model and state every ``eval_every`` steps. See ``train``."""
    torch.manual_seed(seed)
    model = LocalGPT(config).to(device)
    optimizer = OPTIMIZERS[optimizer](model, lr, steps)
    batches = torch.Generator().manual_seed(seed)
    probe = data.batch(config.block_size, batch_size, torch.Generator().manual_seed(-1), device)  # no run's seed
    step, history, snapshots = 0, [], {}

    def record(metrics: dict[str, float]) -> tuple[LocalGPT, dict]:
        values = {(metric, ""): value for metric, value in (metrics | data.score(model)).items()}
        measured = measure(twin(model).eval(), *probe)  # of a copy: to measure must change nothing
        try:  # plain numbers, which the safe loader reads
            values |= {(str(metric), str(part)): float(value) for (metric, part), value in measured.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TypeError(
                f"measure returned {measured!r}: a dict of numbers by (metric, part) was expected"
            ) from error
        history.extend((step, metric, part, value) for (metric, part), value in values.items())
        snapshots[step] = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        parts = model.state_dict(), optimizer.state_dict(), batches.get_state(), torch.get_rng_state()
        return model, dict(zip(STATE, (step, history, snapshots, *parts), strict=True))

    if saved:
        step, history, snapshots = saved["step"], saved["history"], saved["snapshots"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.set_state(saved["batches"])
        torch.set_rng_state(saved["rng"])
        yield model, saved
    else:
        yield record({})
    bar.update(step)
    while step < steps:
        losses, start = [], time.perf_counter()
        for _ in range(min(eval_every, steps - step)):
            _, loss = model(*data.batch(config.block_size, batch_size, batches, device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            bar.update()
            if len(losses) % 10 == 0:  # to look at a loss is to wait for the device
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        step += len(losses)
        train_loss = torch.stack(losses).double().mean().item()
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"the loss is not a number by step {step}: try a smaller lr")
        tokens = len(losses) * batch_size * config.block_size
        yield record({"train_loss": train_loss, "tokens_per_s": tokens / (time.perf_counter() - start)})


@torch.no_grad()
def evaluate(model: LocalGPT, tokens: np.ndarray, n_windows: int = 512, batch_size: int = 64) -> float:
    """Mean cross-entropy in nats per token over ``n_windows`` evenly spaced windows: the same ones at every call."""
    T, device = model.config.block_size, next(model.parameters()).device
    if len(tokens) <= T:
        raise ValueError(f"the validation part has {len(tokens)} tokens: too few for block_size={T}")
    starts = np.unique(np.linspace(0, len(tokens) - T - 1, n_windows).astype(np.int64))[:, None]
    was_training = model.training
    model.eval()
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        total += model(*_windows(tokens, chunk, T, device))[1].item() * len(chunk)
    model.train(was_training)
    return total / len(starts)


def twin(model: LocalGPT, **changes) -> LocalGPT:
    """The same weights (and feedback matrices, where both have them) under changed settings, e.g. ``method="bp"``."""
    with torch.random.fork_rng(devices=[]):
        other = LocalGPT(dataclasses.replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.to(next(model.parameters()).device).train(model.training)


def gradients(model: LocalGPT, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """The gradient of the loss on (x, y) by parameter name (None where none arrives); ``.grad`` stays as it was."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x, y)[1], list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def gradient_cosines(model: LocalGPT, reference: LocalGPT, x: Tensor, y: Tensor) -> dict[str, float]:
    """Cosine in [-1, 1] between the gradients of two models on one batch, by parameter.

    Parameters that either model leaves without a gradient, or with one that is zero, are left out.
    """
    mine, theirs = gradients(model, x, y), gradients(reference, x, y)
    cosines = {}
    for name in mine:
        pair = [g.double().flatten() for g in (mine[name], theirs[name]) if g is not None]
        if len(pair) == 2 and all(g.any() for g in pair):
            cosines[name] = F.cosine_similarity(*pair, dim=0, eps=0).item()
    return cosines


PART = ".localgpt.part"  # how the names of files end that are not yet whole


def save_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write(file)`` fill a temporary neighbour of ``path``, then rename it: readers see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"*{PART}"):  # by writers that were killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        with open(part, "xb") as file:
            write(file)
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(error.errno, f"the disk is full, {path.name} stays as it was", str(path)) from error
        raise


def _load_checkpoint(path: Path, settings: dict) -> dict | None:
    """What ``train`` saved under these settings; None if nothing was, or (with a warning) nothing that can be used."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and does not look at them again
            if archive.testzip() is not None:
                raise ValueError("a checksum does not agree")
        saved = torch.load(path, weights_only=True)  # never unpickles code
        if {"settings", *STATE} - set(saved):
            raise ValueError("it lacks a part")
    except Exception as error:  # a half-written or corrupted archive can fail in any way
        warnings.warn(f"{path.name} is damaged ({type(error).__name__}: {error}): training again", stacklevel=3)
        return None
    if saved["settings"] != settings:
        warnings.warn(f"{path.name} belongs to other settings: training again", stacklevel=3)
        return None
    return saved


# --------------------------------------------------------------------------------------------------
# 3. Capture and energies
# --------------------------------------------------------------------------------------------------


class CapturedAttention:
    """One attention of a model, a softmax over keys, in the passes that a capture has seen.

    ``sums`` are those of all passes whose gradients arrived, see ``head_sums``. Where maps are kept
    in their place, ``scores`` (``-inf`` where the query may not see the key), ``attn``, ``grad`` =
    dL/dA (B, H, T_q, T_k) and ``visible`` (boolean, may be broadcast to that) are those of the pass
    whose gradient arrived last, or of a later forward pass; never parts of two. Reading what was
    not captured is a RuntimeError that says why.
    """

    scores = property(lambda self: self._map("scores"))
    attn = property(lambda self: self._map("attn"))
    visible = property(lambda self: self._map("visible"))
    grad = property(lambda self: self._map("grad"))

    def __init__(self, name: str, keep_maps: bool) -> None:
        self.name, self.keep_maps = name, keep_maps
        self.is_open = True  # gradients that arrive after the 'with' block are not taken in
        self._sums: list[Tensor] = []
        self._maps: dict[str, Tensor] = {}
        self._why_no_grad = ""

    @property
    def sums(self) -> Tensor:
        if self.keep_maps:
            return head_sums(self.attn, self.grad, self.visible)
        if not self._sums:
            raise self._no_grad()
        return torch.cat(self._sums)

    def _map(self, name: str) -> Tensor:
        if not self.keep_maps:
            raise RuntimeError(
                f"the maps of {self.name!r} were not kept: "
                "ask for capture_attention(model, maps=True)")
        if name not in self._maps:
            raise self._no_grad()
        return self._maps[name]

    def _no_grad(self) -> RuntimeError:
        return RuntimeError(
            f"no gradient reached the attention weights of {self.name!r}: {self._why_no_grad}")

    def watch_weights(self, scores: Tensor, attn: Tensor, visible: Tensor) -> Tensor:
        """``attn``, which from here on tells of its gradient."""
        scores = scores.detach() if self.keep_maps else None  # else the graph would keep them alive
        if self.keep_maps:
            self._maps = {"scores": scores, "attn": attn.detach(), "visible": visible}

        def arrived(grad: Tensor, attn: Tensor, visible: Tensor) -> None:
            sees_some = visible.any(-1, keepdim=True)
            if not sees_some.all():  # a padded query, whatever the model makes of it
                attn = attn.masked_fill(~sees_some, 0.0)
            if self.keep_maps:
                self._maps = {"scores": scores, "attn": attn, "visible": visible, "grad": grad}
            else:
                self._sums.append(head_sums(attn, grad, visible))

        return self._watch(attn, arrived, attn.detach(), visible)

    def watch_output(self, out: Tensor, call: _FusedCall) -> Tensor:
        """The same of a fused attention's output: its gradient tells that of the weights."""
        tensors = [x if x is None else x.detach() for x in call[:4]]
        options = call._replace(query=None, key=None, value=None, attn_mask=None)

        def arrived(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
            call = options._replace(query=query, key=key, value=value, attn_mask=mask)
            self._sums.append(sum(head_sums(*tile) for tile in _tiles(call, grad)))

        return self._watch(out, arrived, *tensors)

    def _watch(self, x: Tensor, arrived: Callable[..., None], *seen: Tensor | None) -> Tensor:
        if not x.requires_grad:
            self._why_no_grad = "the forward pass ran under torch.no_grad(), "
            self._why_no_grad += "or every parameter is frozen"
            return x
        self._why_no_grad = "call loss.backward() inside the 'with' block, "
        self._why_no_grad += "on a loss that depends on this layer"
        return _Watched.apply(x, lambda *seen: arrived(*seen) if self.is_open else None, *seen)


class _Watched(torch.autograd.Function):
    """A tensor, unchanged, whose gradient is seen as it passes by: ``arrived(gradient, *seen)``.

    ``seen`` lies in the graph and nowhere else: it is freed, offloaded or recomputed with it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, arrived: Callable[..., None], *seen: Tensor | None) -> Tensor:
        ctx.arrived = arrived
        ctx.save_for_backward(*seen)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        seen = ctx.saved_tensors  # read once: a checkpoint may recompute them for it
        ctx.arrived(grad.detach(), *seen)
        return grad, None, *(None for _ in seen)


class _Softmaxes(TorchFunctionMode):
    """While a module of ``model`` is at work, every softmax over keys in it is made by ``weights``.

    A TorchFunctionMode is offered every call of a PyTorch function, by whatever name the model has
    imported it. It is off inside its own handlers: what these call is seen by an outer mode alone,
    so captures and rules can be nested in any order.
    """

    def __init__(self, model: nn.Module, only: str) -> None:
        super().__init__()
        self.model, self.only = model, only
        self.at_work: list[str] = []  # names of modules, the innermost last
        self.used: Counter[str] = Counter()  # how many attentions a module has had in this pass
        self.has_run = False

    def weights(self, scores, visible, activation, send_back=None) -> Tensor:
        """``activation(scores)``, or with a way back of its own ``attention_weights(...)``."""
        raise NotImplementedError

    @contextmanager
    def attached(self) -> Iterator[None]:
        for name, module in self.model.named_modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl:
                raise ValueError(
                    f"{name or type(module).__name__!r} is compiled, and nothing inside it can be "
                    "seen: use the model as it was before torch.compile")
        with ExitStack() as hooks:  # which takes them off again, whatever happens
            for name, module in self.model.named_modules():
                enter = functools.partial(self._enter, name)
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(self._leave, always_call=True))
            hooks.callback(self._end)
            yield

    # The mode is entered and left by hooks, not by one `with` around the block: so it is off for
    # all that is not this model's, and on again where a checkpoint, in the backward pass, calls a
    # module once more to recompute its activations. Between the two hooks there is no block that a
    # `with` could hold, hence the bare __enter__ and __exit__.

    def _enter(self, name: str, module, inputs) -> None:
        if not self.at_work:
            self.used.clear()
            self.has_run = True
            self.__enter__()
        self.at_work.append(name)

    def _leave(self, module, inputs, output) -> None:
        self.at_work.pop()
        if not self.at_work:
            self.__exit__(None, None, None)

    def _end(self) -> None:
        if self.at_work:  # interrupted inside a module: PyTorch calls no hook then
            self.at_work.clear()
            self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if not re.search(self.only, self.at_work[-1]):
            return func(*args, **kwargs)
        # Modes are offered PyTorch's own functions alone; attention_weights, which is ours, offers
        # itself by torch.overrides.handle_torch_function.
        if func is attention_weights:
            return self.weights(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self.fused(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._multi_head(func, *args, **kwargs)
        if name == "softmax":  # of torch, of torch.nn.functional, or of a tensor
            return self._softmax(func, *args, **kwargs)
        return func(*args, **kwargs)

    def fused(self, attention: Callable[..., Tensor], *args, **kwargs) -> Tensor:
        """The output of ``F.scaled_dot_product_attention``, in steps of which this sees each."""
        with self:
            return _attention_step_by_step(*args, **kwargs)

    def _softmax(self, func, input: Tensor, dim: int | None = None, *args, n_heads=None, **kwargs):
        """``n_heads``: of a softmax over scores (B * H, T_q, T_k)."""
        if dim not in (-1, input.dim() - 1) or (input.dim() != 4 and n_heads is None):
            return func(input, dim, *args, **kwargs)  # of a mixture's experts, say: no attention
        scores = input.view(-1, n_heads or input.shape[1], *input.shape[-2:])

        def activation(scores: Tensor) -> Tensor:
            return func(scores, -1, *args, **kwargs)

        return self.weights(scores, scores > MASKED, activation).view_as(input)

    def _multi_head(self, func, query, key, value, embed_dim, num_heads, *args, **kwargs):
        """``F.multi_head_attention_forward``."""
        # It looks the two functions up in F while it runs. This mode is off here, inside its own
        # handler, and would not see them; to switch it on would call this handler again. So for
        # the length of the call the two names lead back here. An outer mode may have put its own
        # there before: that is what they then go on to.
        softmax, attention = F.softmax, F.scaled_dot_product_attention

        def own_softmax(*args, **kwargs) -> Tensor:
            return self._softmax(softmax, *args, n_heads=num_heads, **kwargs)

        def own_attention(*args, **kwargs) -> Tensor:
            with self:
                return attention(*args, **kwargs)

        own = {"softmax": own_softmax, "scaled_dot_product_attention": own_attention}
        with mock.patch.multiple(F, **own):
            return func(query, key, value, embed_dim, num_heads, *args, **kwargs)


MASKED = torch.finfo(torch.float16).min / 2  # a score below hides its key: -inf, or a type's least
TILE = 2**21  # pairs of a query and a key whose maps are made at once: 8 MB each in float32


class _FusedCall(NamedTuple):
    """What ``F.scaled_dot_product_attention`` is called with: see there for the arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def cast(self) -> _FusedCall:
        """To the type that autocast would choose."""
        device = self.query.device.type
        if self.query.dtype == torch.float64 or not torch.is_autocast_enabled(device):
            return self
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in self[:3])
        return self._replace(query=query, key=key, value=value)

    def in_full(self) -> _FusedCall:
        """As the kernels compute: in float32 at least, and each head of queries with its keys."""
        query, key, value = (x.float() if torch.finfo(x.dtype).bits < 32 else x for x in self[:3])
        if self.enable_gqa:  # query heads 0, 1, ... share the first head of the keys, and so on
            n = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(n, dim=-3), value.repeat_interleave(n, dim=-3)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return self._replace(query=query, key=key, value=value, scale=scale, enable_gqa=False)

    def scores(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of the queries in ``rows``, masked by ``-inf``, and which keys they see."""
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
                scores, visible = scores + mask, visible & (mask > MASKED)
        return scores.masked_fill(~visible, -math.inf), visible


@torch.no_grad()
def _tiles(call: _FusedCall, grad_out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights, their gradient and the visible keys, of as many queries at a time as ``TILE`` holds.

    Both maps follow from what a fused attention is given: ``A = softmax(scores)`` and
    ``dL/dA = dO V^T``. Weights end where a causal mask hides all further keys, dL/dA does not.
    """
    query, key, value, grad_out = (  # (B, H, T, D), also of an attention without a batch
        x[(None,) * (4 - x.dim())] for x in (*call.in_full()[:3], grad_out))
    call = call.in_full()._replace(query=query, key=key, value=value)
    B, H, T_q, _ = query.shape
    n = max(1, TILE // (B * H * key.shape[-2]))
    for start in range(0, T_q, n):
        rows = slice(start, start + n)
        with torch.autocast(query.device.type, enabled=False):
            scores, visible = call.scores(rows)
            attn, grad = _softmax_or_nothing(scores), grad_out[:, :, rows].to(value) @ value.mT
        yield attn, grad, visible


def _attention_step_by_step(*args, **kwargs) -> Tensor:
    """``F.scaled_dot_product_attention``, by way of scores and weights that can be seen."""
    call = _FusedCall(*args, **kwargs).cast()
    with torch.autocast(call.query.device.type, enabled=False):
        full = call.in_full()
        scores, visible = full.scores()
        batched = scores[(None,) * (4 - scores.dim())]
        attn = attention_weights(batched, visible, _softmax_or_nothing).view_as(scores)
        return (F.dropout(attn, call.dropout_p) @ full.value).to(call.value.dtype)


def _softmax_or_nothing(scores: Tensor) -> Tensor:
    """A query that may see no key, as in padding, attends to none."""
    return scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


class _Capture(_Softmaxes):
    """Shows every attention to a ``CapturedAttention``, by the name of the module at work."""

    def __init__(self, model: nn.Module, only: str, maps: bool) -> None:
        super().__init__(model, only)
        self.maps = maps
        self.layers: list[CapturedAttention] = []

    def weights(self, scores, visible, activation, send_back=None):
        if send_back is None:
            attn = activation(scores)
        else:
            attn = attention_weights(scores, visible, activation, send_back)
        return self._layer().watch_weights(scores, attn, visible)

    def fused(self, attention, *args, **kwargs):
        call = _FusedCall(*args, **kwargs).cast()
        if self.maps or call.dropout_p > 0:  # what dropout left, the kernel tells nobody
            return super().fused(attention, *args, **kwargs)
        return self._layer().watch_output(attention(**call._asdict()), call)

    def _layer(self) -> CapturedAttention:
        name = self.at_work[-1]
        self.used[name] += 1
        if self.used[name] > 1:  # a module that is used again in the same pass is a further layer
            name = f"{name} ({self.used[name]})"
        for layer in self.layers:
            if layer.name == name:
                return layer
        self.layers.append(CapturedAttention(name, self.maps))
        return self.layers[-1]


@contextmanager
def capture_attention(
    model: nn.Module, maps: bool = False, only: str = ""
) -> Iterator[list[CapturedAttention]]:
    """Record every attention of ``model``, a PyTorch transformer; yields a list that fills.

    An attention is a softmax over keys that runs in one of the model's modules, by
    ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, or any of PyTorch's softmax
    functions on scores (B, H, T_q, T_k); layers are named after the module and come in their order
    of use. Each keeps what ``energy_table`` needs of every backward pass inside the block, or if
    ``maps`` the maps of the last one. ``only`` is a regular expression that names are to match.

    Weights and gradients are those of the pass itself. A fused attention stays fused, but for maps,
    with dropout and under a ``softmax_rule``: then it is computed by the same formulas in steps.
    On leaving, also after an exception, the model and PyTorch are as they were. Raises ValueError
    on a model that torch.compile has made a program of, RuntimeError if no attention was found.

    >>> model = LocalGPT(LocalGPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=8))
    >>> idx = torch.arange(8)[None]
    >>> with capture_attention(model, maps=True) as layers:
    ...     model(idx, idx)[1].backward()
    >>> [(layer.name, tuple(layer.grad.shape)) for layer in layers]
    [('blocks.0.attn.attn_weights', (1, 2, 8, 8))]
    """
    capture = _Capture(model, only, maps)
    try:
        with capture.attached():
            yield capture.layers
    finally:
        for layer in capture.layers:
            layer.is_open = False
    if not capture.layers:
        why = "none of PyTorch's softmaxes was called on scores (B, H, T_q, T_k)"
        why = why if capture.has_run else "no module was called"
        where = f" in a module whose name matches {only!r}" if only else ""
        raise RuntimeError(
            f"{type(model).__name__}: no attention was seen inside the 'with' block: {why}{where}. "
            "A fused kernel that is called directly cannot be seen: choose the model's eager or "
            "sdpa implementation")


class _Rule(_Softmaxes):
    """Every attention sends its error back by ``rule``."""

    def __init__(self, model: nn.Module, only: str, rule: Rule) -> None:
        super().__init__(model, only)
        self.rule = rule

    def weights(self, scores, visible, activation, send_back=None):
        return attention_weights(scores, visible, activation, self._sent)

    @torch.no_grad()
    def _sent(self, attn: Tensor, grad: Tensor, visible: Tensor) -> Tensor | None:
        sent = self.rule(attn, grad, visible)
        return sent if sent is None else sent.masked_fill(~visible.any(-1, keepdim=True), 0.0)


@contextmanager
def softmax_rule(model: nn.Module, name: str, only: str = "") -> Iterator[None]:
    """Inside the block all attentions of ``model`` send errors back by a ``SOFTMAX_BACKWARD``.

    See ``capture_attention`` for what is an attention, for ``only`` and for what is refused;
    ValueError also on a rule that is not known, or that has a memory.

    >>> attention = nn.MultiheadAttention(4, 2, batch_first=True)
    >>> x = torch.randn(1, 3, 4)
    >>> with softmax_rule(attention, "none"):
    ...     attention(x, x, x)[0].sum().backward()
    >>> queries, keys, values = attention.in_proj_weight.grad.chunk(3)
    >>> bool(queries.any()), bool(keys.any()), bool(values.any())
    (False, False, True)
    """
    rules = {key: rule for key, rule in SOFTMAX_BACKWARD.items() if not hasattr(rule, "start")}
    if name not in rules:
        raise ValueError(f"{name!r} is no rule without a memory: choose one of {', '.join(rules)}")
    with _Rule(model, only, rules[name]).attached():
        yield


def capture_batch(model: LocalGPT, x: Tensor, y: Tensor) -> list[CapturedAttention]:
    """Capture the maps of one pass on (x, y), leaving every parameter's ``.grad`` as it was."""
    with capture_attention(model, maps=True) as layers:
        gradients(model, x, y)
    return layers


class SoftmaxGradient(NamedTuple):
    """The softmax's backward pass in parts, ``full = diag + offdiag``, shaped as the weights."""

    full: Tensor
    diag: Tensor
    offdiag: Tensor


def split_softmax_gradient(attn: Tensor, grad: Tensor) -> SoftmaxGradient:
    """Split ``f = J g``, ``J = diag(a) - a a^T``, into what a key knows and what it must be told.

    These are ``d = a (1 - a) g`` and ``o_i = -a_i sum_{j != i} a_j g_j``. attn: weights
    (..., T_q, T_k), rows over the last axis; grad: dL/dA of the same shape. Each part is computed
    from its own formula and none by subtraction, so that their sum is a check.

    >>> parts = split_softmax_gradient(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]]))
    >>> parts.full, parts.diag, parts.offdiag
    (tensor([[ 0.5000, -0.5000]]), tensor([[ 0.2500, -0.2500]]), tensor([[ 0.2500, -0.2500]]))
    """
    if attn.shape != grad.shape:
        raise ValueError(
            f"attn has shape {tuple(attn.shape)} and grad {tuple(grad.shape)}: they must agree")
    weighted = attn * grad
    minus_others = weighted - weighted.sum(-1, keepdim=True)  # the sum without the key's own term
    visible = torch.ones((), dtype=torch.bool)  # neither rule needs it: a masked key has a = 0
    exact, diag = full(attn, grad, visible), diagonal(attn, grad, visible)
    return SoftmaxGradient(exact, diag, attn * minus_others)


ROUNDING = 0.01  # the share of |f| that rounding may account for: beyond, a head is not defined
EPS64 = 16 * np.finfo(float).eps  # of a sum of products in float64
# The columns of head_sums: inner products over (query, key) pairs, e being g on the visible keys;
# sums of entropy and attn_max over queries that see several keys, and how many these are; how many
# queries see a key, visible pairs, and what rounding may make of |f|^2.
SUMS = ["ff", "dd", "df", "ee", "gg", "gf"]
SUMS += ["entropy", "attn_max", "several", "rows", "pairs", "noise"]


@torch.no_grad()
def head_sums(attn: Tensor, grad: Tensor, visible: Tensor) -> Tensor:
    """The sums that ``head_energy`` is made of: (B, H, len(SUMS)) in float64.

    Those of further queries add to them, those of further sequences are appended. ``attn`` may end
    before ``grad`` does: all keys behind are masked. ValueError on what is no softmax of attention.
    """
    # float32 at least, which holds half precision without loss; the kernel wants four axes
    maps = [x if x.dtype == torch.float64 else x.float() for x in (attn, grad)]
    seen = visible[(None,) * (4 - visible.dim())]
    seen = seen.expand(*seen.shape[:3], attn.shape[-1]).contiguous().view(torch.uint8)
    arrays = [x.cpu().contiguous().numpy() for x in (*maps, seen)]
    sums, off, hidden = (torch.from_numpy(x) for x in _map_sums(*arrays))
    if not off.max() <= 2**-7:  # what bfloat16 leaves of a sum of 1; NaN fails too
        raise ValueError("the rows of attn are not weights that sum to 1: expected a softmax's")
    if hidden.any():
        raise ValueError("attn is not zero on masked keys: pass the visible keys the model used")
    if not sums.isfinite().all():
        raise ValueError("grad holds values that are not finite, or whose squares are not")

    # What rounding makes of f = J g: relative errors u of g give
    # u^2 sum_k |J's column k|^2 g_k^2 <= 2 u^2 |d|^2, those of a, whose rows sum to 1, 2 u^2 |f|^2.
    # Near zero errors are absolute, the smallest step of the type. float64 adds its own.
    types = [torch.finfo(x.dtype) for x in (attn, grad)]
    u = max(off.max().item(), types[0].eps / 2, types[1].eps / 2)
    step_a, step_g = (each.smallest_normal * each.eps for each in types)
    ff, dd, ee, rows = (sums[..., SUMS.index(name)] for name in ("ff", "dd", "ee", "rows"))
    noise = 2 * u**2 * (ff + dd) + (step_a**2 + EPS64**2) * ee + step_g**2 / 8 * rows
    return torch.cat([sums, noise[..., None]], dim=-1)


# fastmath without "nnan" and "ninf": NaN and infinity have to come through to be refused
@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _map_sums(attn, grad, visible):
    """One reading of the maps (B, H, T_q, T_k), a row at a time, in float64.

    visible: 0 or 1, (B or 1, H or 1, T_q or 1, T_k). Returns, by sequence and head, the columns of
    ``SUMS`` but the noise, how far a row is from weights that sum to 1 at the most, and the sizes
    of the weights on masked keys.
    """
    B, H, T_q, T_k = attn.shape
    sums, off, hidden = np.zeros((B, H, 11)), np.zeros((B, H)), np.zeros((B, H))
    for n in numba.prange(B * H):
        b, h = n // H, n % H
        for i in range(T_q):
            a, g = attn[b, h, i], grad[b, h, i]
            # an axis of length 1 is for all: cheaper than a mask that is copied for each head
            seen = visible[min(b, len(visible) - 1), min(h, visible.shape[1] - 1),
                           min(i, visible.shape[2] - 1)]
            # behind the last visible key, half of a causal map, only two sums are to be made
            end = T_k
            while end > 0 and not seen[end - 1]:
                end -= 1

            # first reading: the row's sum, with which a is scaled to sum to 1, and b = a . g
            row, sizes, lateral, masked, gg, n_seen, top = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
            for j in range(end):
                a_j, g_j = np.float64(a[j]), np.float64(g[j])
                row += a_j
                sizes += abs(a_j)
                lateral += a_j * g_j
                masked += abs(a_j) * (1 - seen[j])
                gg += g_j * g_j
                n_seen += seen[j]
                # positive numbers are ordered as their bits are, and of integers, unlike floats,
                # which may be NaN, the compiler takes the maximum of several at a time
                top = max(top, np.float64(a_j).view(np.int64))
            for j in range(end, T_k):
                masked += abs(np.float64(a[j]))
            for j in range(end, len(g)):
                gg += np.float64(g[j]) * np.float64(g[j])
            wrong = abs(row - min(n_seen, 1)) + (sizes - row)
            if wrong > off[b, h] or np.isnan(wrong):  # once NaN, always
                off[b, h] = wrong
            hidden[b, h] += masked

            # second reading, of a row that is in the cache by now: products and entropy
            row = row if row else 1.0
            lateral /= row
            ff, dd, df, ee, gf, entropy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for j in range(end):
                a_j, g_j = np.float64(a[j]) / row, np.float64(g[j])
                f, d, e = a_j * (g_j - lateral), a_j * (1 - a_j) * g_j, g_j * seen[j]
                ff, dd, df, ee, gf = ff + f * f, dd + d * d, df + d * f, ee + e * e, gf + g_j * f
                entropy -= a_j * _log(max(a_j, 1e-300))
            sums[b, h, :6] += np.array((ff, dd, df, ee, gg, gf))
            if n_seen > 1:  # a query with a single key has a = 1 and J = 0: it carries nothing
                sums[b, h, 6] += entropy / np.log(n_seen)
                sums[b, h, 7] += np.int64(top).view(np.float64) / row
                sums[b, h, 8] += 1
            sums[b, h, 9] += min(n_seen, 1)
            sums[b, h, 10] += n_seen
    return sums, off, hidden


@numba.njit(inline="always")
def _log(x):
    """The natural logarithm of a normal float64 to 13 digits, of four at a time.

    A library's is a call, which the compiler cannot do for several numbers at once. Here
    ``x = 2^n m`` is taken apart by its bits, with m within a factor of sqrt(2) of 1, and
    ``log m = 2 artanh((m - 1) / (m + 1))`` is its series.
    """
    half = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
    bits = np.float64(x).view(np.int64)
    n = (bits - half) >> 52
    m = np.int64(bits - (n << 52)).view(np.float64)
    r = (m - 1) / (m + 1)
    z = r * r
    series = 1 / 15
    for k in (13, 11, 9, 7, 5, 3, 1):
        series = series * z + 1 / k
    return 2 * r * series + n * 0.6931471805599453


def head_energy(
    attn: Tensor, grad: Tensor, visible: Tensor | None = None, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How much of the softmax's backward pass is diagonal and how much lateral, one row a head.

    attn: softmax weights (B, H, T_q, T_k); grad: dL/dA of the same shape; visible: boolean, of a
    shape that broadcasts to theirs, (T, T) and causal if not given.

    ========================== =========================================================== =========
    column                     meaning                                                     range
    ========================== =========================================================== =========
    r_diag, r_offdiag, r_cross |d|^2, |o|^2 and 2<d, o>, each over |f|^2; their sum is 1   >=0,>=0,R
    one_minus_r_diag           off-diagonal *plus* cross term: often negative, no energy   <= 1
    cos_diag, cos_ste          cosine of d, and of g on the visible keys, with f           [-1, 1]
    cos_ste_unmasked           the same with g on all keys: what naive code measures       [-1, 1]
    entropy                    of a row, over the log of its number of visible keys        [0, 1]
    attn_max, attn_mean        largest weight of a row; mean weight over visible keys      [0, 1]
    defined                    False where rounding may decide: ratios, cosines are NaN
    ========================== =========================================================== =========

    Energies are summed over a sequence's (query, key) pairs, averaged over sequences, then divided:
    a ratio of means. Cosines are taken per sequence over the flattened map, then averaged (without
    sequences that have no gradient). ``entropy`` and ``attn_max`` leave out queries with one key.
    ``*_lo`` and ``*_hi`` bound the 95 % bootstrap interval over the B sequences: of width 0 for a
    single one, NaN where a resample held none with a gradient. Sums run in float64, rows of attn
    are scaled to sum to 1, and no absolute epsilon enters: the scale of grad is free, as long as
    its squares fit a float64.

    A head is ``defined`` where the rounding of attn and grad to their types moves f by no more than
    ``ROUNDING`` = 1 % of |f|: the ratios are then right to 2 % of the largest of them, cosines to
    0.01, and NaN as well where a single sequence fails this. Half precision that was stored as
    float32 counts as float32: pass it in its own type. Raises ValueError where attn is not a
    softmax over the visible keys, and on values that are not finite.

    >>> a = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double()[None, None]
    >>> row = head_energy(a, torch.tensor([[1.0, 0.0], [1.0, -1.0]]).double()[None, None]).iloc[0]
    >>> row[["r_diag", "r_offdiag", "r_cross", "cos_diag"]].astype(float).round(9).tolist()
    [0.25, 0.25, 0.5, 1.0]
    """
    visible = _check_attention(attn, grad, visible)
    return _energy_figures(head_sums(attn, grad, visible), n_boot, seed)


def attention_energy(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, attn_mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    n_boot: int = 1000, seed: int = 0,
) -> pd.DataFrame:
    """``head_energy`` of an attention whose maps nobody has made, one row a head.

    query: (B, H, T_q, D); key: (B, H, T_k, D); value: (B, H, T_k, D_v); grad_out: dL/dO, the
    gradient at the output, (B, H, T_q, D_v); all of one type. The others are what
    ``F.scaled_dot_product_attention`` was called with: see there. Maps are made for some queries at
    a time, in float32 at least, so memory is linear in T_q and T_k. Raises ValueError where shapes,
    types or mask do not fit, and on values that are not finite.

    >>> zeros, values = torch.zeros(1, 1, 2, 2), torch.eye(2)[None, None]  # so dL/dA is dL/dO
    >>> grad_out = torch.tensor([[1.0, 0.0], [1.0, -1.0]])[None, None]
    >>> row = attention_energy(zeros, zeros, values, grad_out, is_causal=True).iloc[0]
    >>> row[["r_diag", "r_offdiag", "r_cross", "cos_diag"]].astype(float).round(9).tolist()
    [0.25, 0.25, 0.5, 1.0]
    """
    call = _FusedCall(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    _check_fused(call, grad_out)
    sums = sum(head_sums(*tile) for tile in _tiles(call, grad_out))
    return _energy_figures(sums, n_boot, seed)


def energy_table(
    layers: Iterable[CapturedAttention], n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """``head_energy`` of captured layers and all their passes, one row a (layer, head)."""
    tables = [_energy_figures(layer.sums, n_boot, seed) for layer in layers]
    if not tables:
        raise ValueError("no layer was given: a table needs one or more")
    for i, table in enumerate(tables):
        table.insert(0, "layer", i)
    return pd.concat(tables, ignore_index=True)


def _energy_figures(sums: Tensor, n_boot: int, seed: int) -> pd.DataFrame:
    """The columns of ``head_energy`` from those of ``head_sums``."""
    if not isinstance(n_boot, Integral) or n_boot < 1:
        raise ValueError(f"n_boot={n_boot}: an interval needs resamples, a thousand or so")
    B, H, _ = sums.shape
    columns = np.moveaxis(sums.numpy(), -1, 0)  # (B, H) each
    ff, dd, df, ee, gg, gf, entropy, attn_max, several, rows, pairs, noise = columns

    # a sequence that rounding decides leaves the mean cosine undefined: one of the others would be
    # that of a selection
    known = ff > noise / ROUNDING**2
    known &= ~((gg > 0) & ~known).any(0)
    energies = {"r_diag": dd, "r_offdiag": ff - 2 * df + dd, "r_cross": 2 * (df - dd)}
    energies["one_minus_r_diag"] = ff - dd
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where there is nothing to average
        means = {
            "cos_diag": df / np.sqrt(dd) / np.sqrt(ff),
            "cos_ste": gf / np.sqrt(ee) / np.sqrt(ff),
            "cos_ste_unmasked": gf / np.sqrt(gg) / np.sqrt(ff),
        }
        means = {name: np.where(known, cosine, np.nan) for name, cosine in means.items()}
        means["entropy"], means["attn_max"] = entropy / several, attn_max / several
        means["attn_mean"] = rows / pairs

    # row 0 weighs every sequence once, the others are bootstrap resamples of the sequences
    resamples = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=n_boot)
    weights = np.vstack([np.ones(B), resamples])

    def mean(values: np.ndarray) -> np.ndarray:
        """Over the sequences that have one: (B, H) to (1 + n_boot, H)."""
        finite = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return weights @ np.where(finite, values, 0) / (weights @ finite)

    energy = mean(ff)
    energy[energy <= mean(noise) / ROUNDING**2] = np.nan
    draws = {name: mean(values) / energy for name, values in energies.items()}
    draws |= {name: mean(values) for name, values in means.items()}

    columns = {"head": range(H), "defined": np.isfinite(energy[0])}
    for name, draw in draws.items():
        low, high = np.quantile(draw[1:], [0.025, 0.975], axis=0)
        columns |= {name: draw[0], f"{name}_lo": low, f"{name}_hi": high}
    return pd.DataFrame(columns)


def _check_attention(attn: Tensor, grad: Tensor, visible: Tensor | None) -> Tensor:
    """Refuse what cannot be maps of attention; return the map of visible keys."""
    shape = "floating-point torch tensors of one shape (B, H, T_q, T_k), no axis of length 0"
    _expect(_are_floats(attn, grad) and attn.shape == grad.shape, shape, attn=attn, grad=grad)
    pairs = attn.shape[2:]
    if visible is None:
        _expect(pairs[0] == pairs[1], "a map of visible keys: there is no causal one", attn=attn)
        return torch.ones(pairs, dtype=torch.bool, device=attn.device).tril()
    fits = _is_mask(visible, attn.shape) and visible.dtype == torch.bool
    _expect(fits, f"a boolean torch tensor that broadcasts to {tuple(attn.shape)}", visible=visible)
    return visible


def _check_fused(call: _FusedCall, grad_out: Tensor) -> None:
    """Refuse what cannot be an attention's inputs and the gradient at its output."""
    query, key, value, mask = call[:4]
    given = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    fits = _are_floats(*given.values()) and len({x.dtype for x in given.values()}) == 1
    _expect(fits, "floating-point torch tensors of one type, four axes, none of length 0", **given)
    (B, H, T_q, D), (_, H_kv, T_k, D_v) = query.shape, value.shape
    shapes = {"key": (B, H_kv, T_k, D), "value": (B, H_kv, T_k, D_v), "grad_out": (B, H, T_q, D_v)}
    fits = all(given[name].shape == shape for name, shape in shapes.items())
    _expect(fits, f"shapes that fit each other, {shapes}", **given)
    fits = H_kv == H or (call.enable_gqa and H % H_kv == 0)
    _expect(fits, f"keys for {H} heads, or with enable_gqa for a divisor of it", key=key)
    fits = mask is None or _is_mask(mask, (B, H, T_q, T_k))
    pairs = (B, H, T_q, T_k)
    _expect(fits, f"a mask, boolean or of scores, that broadcasts to {pairs}", attn_mask=mask)


def _expect(fits: bool, what: str, **given) -> None:
    if not fits:
        kinds = {
            name: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            for name, x in given.items()}
        raise ValueError(f"expected {what}, got " + ", ".join(map(" ".join, kinds.items())))


def _are_floats(*maps) -> bool:
    tensors = [x for x in maps if isinstance(x, Tensor) and x.dim() == 4 and x.numel()]
    return len(tensors) == len(maps) and all(x.is_floating_point() for x in tensors)


def _is_mask(x, shape: tuple[int, ...]) -> bool:
    if not isinstance(x, Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
        return False
    axes = zip(x.shape[::-1], shape[::-1], strict=False)
    return x.dim() <= len(shape) and all(n in (1, m) for n, m in axes)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The experiment: what goes wrong under a rule, and what it costs
# ---------------------------------------------------------------------------------------------------------------------


def symptoms(model: LocalGPT, x: Tensor, y: Tensor) -> dict[tuple[str, str], float]:
    """What could make a rule fail, as means over layers, heads and sequences; a ``measure`` for ``train``.

    ``cos_scores``, ``cos_q``, ``cos_k``: cosine in [-1, 1] of what the rule sends with the exact pass, at the scores
    and at the gradients of W_q and W_k (missing where it sends nothing). ``row_sum``: |sum| over the sum of sizes of
    what a query's keys receive, in [0, 1]; 0 for the exact softmax. ``radial_q``, ``radial_k``: the same of its
    products with the scores, summed over a query's keys and over a key's queries, which is what makes the norms of
    queries and keys grow. ``common_mode``: root mean square of the mean score of a query, which the softmax does not
    see. ``q_norm``, ``k_norm``: root mean square of the entries of Q and K, before any norm. ``entropy``: of a row of
    attention, over the log of its number of keys, in [0, 1]. ``score_max``: a row's largest score, less its mean.
    """
    norms: dict[str, list[float]] = {"q": [], "k": []}

    def keep(name: str):
        return lambda module, inputs, output: norms[name].append(output.detach().square().mean().item())

    handles = []
    for block in model.blocks:
        handles.append(block.attn.q_proj.register_forward_hook(keep("q")))
        handles.append(block.attn.k_proj.register_forward_hook(keep("k")))
    try:
        layers = capture_batch(model, x, y)
    finally:
        for handle in handles:
            handle.remove()

    values = {name: [] for name in SYMPTOMS}
    for layer in layers:
        visible = layer.scores[0, 0].isfinite()
        n_visible = visible.sum(-1)
        scores = layer.scores.masked_fill(~visible, 0)
        mean_score = scores.sum(-1) / n_visible
        entropy = torch.special.entr(layer.attn).sum(-1)[..., 1:] / n_visible[1:].log()  # the first query sees one key
        values["common_mode"].append(mean_score.square().mean().sqrt().item())
        values["entropy"].append(entropy.mean().item())
        values["score_max"].append((layer.scores.amax(-1) - mean_score)[..., 1:].mean().item())
        sent = model.get_submodule(layer.name).send_back(layer.attn, layer.grad, visible)
        if sent is None:
            continue
        exact = sent if model.config.attn_mode == "sigmoid" else full(layer.attn, layer.grad, visible)
        cosine = F.cosine_similarity(sent.double().flatten(2), exact.double().flatten(2), dim=-1, eps=0)
        values["cos_scores"].append(cosine.nanmean().item())
        radial = sent * scores
        for name, part, dim in (("row_sum", sent, -1), ("radial_q", radial, -1), ("radial_k", radial, -2)):
            values[name].append((part.sum(dim).abs().sum() / part.abs().sum()).item())
    values |= {f"{name}_norm": [math.sqrt(np.mean(squares))] for name, squares in norms.items()}
    exact = twin(model, **dataclasses.asdict(dataclasses.replace(model.config.exact, method=model.config.method)))
    cosines = gradient_cosines(model, exact, x, y)
    for name in "qk":
        values[f"cos_{name}"] = [cosine for part, cosine in cosines.items() if part.endswith(f"{name}_proj.weight")]
    return {(metric, ""): float(np.mean(found)) for metric, found in values.items() if found}


SYMPTOMS = ["cos_scores", "cos_q", "cos_k", "row_sum", "radial_q", "radial_k"]
SYMPTOMS += ["common_mode", "q_norm", "k_norm", "entropy", "score_max"]


class Harm(NamedTuple):
    """``harm`` with its 95 % interval, and the verdict on it."""

    harm: float
    low: float
    high: float
    verdict: str


TOLERABLE, CATASTROPHIC = 0.25, 1.0  # bounds on harm, fixed before the runs


def harm(rule: Iterable[float], full: Iterable[float], none: Iterable[float], confidence: float = 0.95) -> Harm:
    """``(L_rule - L_full) / (L_none - L_full)`` over paired seeds: 0 for the exact pass, 1 for untrained Q and K.

    rule, full, none: final validation losses, in the same order of seeds (two or more), inf for a run that diverged.
    The ratio is that of means, its interval Fieller's (1954), which is exact for normal differences. The verdict, in
    this order:

    ``undecided``     the interval of ``L_none - L_full`` touches zero or lies below, or one of the two diverged
    ``catastrophic``  a run of the rule diverged, or the lower end of the ratio's interval is at least 1
    ``tolerable``     its upper end is at most 0.25
    ``undetermined``  it reaches from below 0.25 to above 1
    ``costly``        otherwise

    >>> full, none = [2.0, 2.1, 1.9], [3.0, 3.1, 2.9]
    >>> [harm(losses, full, none).verdict for losses in ([2.05, 2.1, 2.0], [2.4, 2.6, 2.5], [3.5, 3.6, 3.4])]
    ['tolerable', 'costly', 'catastrophic']
    >>> harm([2.0, 2.1, 2.0], full, [2.1, 2.0, 1.9]).verdict, harm([2.0, 3.1, 2.6], full, none).verdict
    ('undecided', 'undetermined')
    """
    losses = [np.asarray(list(values), dtype=float) for values in (rule, full, none)]
    rule, full, none = losses
    n = len(full)
    if not len(rule) == n == len(none) or n < 2:
        raise ValueError(f"harm needs the same seeds, two or more, of each: got {len(rule)}, {n} and {len(none)}")
    if np.isnan(losses).any():
        raise ValueError("a loss is NaN: leave a missing seed out of all three, and write inf where a run diverged")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not a probability between 0 and 1, such as 0.95")
    if not np.isfinite([full, none]).all():
        return Harm(math.nan, math.nan, math.nan, "undecided")
    scale = none - full
    t = student_t.ppf((1 + confidence) / 2, n - 1)
    if not scale.mean() > t * scale.std(ddof=1) / math.sqrt(n):
        return Harm(math.nan, math.nan, math.nan, "undecided")
    if not np.isfinite(rule).all():
        return Harm(math.inf, math.inf, math.inf, "catastrophic")
    excess = rule - full
    # Fieller: all h for which mean(excess - h scale) is within t standard errors of zero, a quadratic in h
    (vee, ves), (_, vss) = np.cov(excess, scale) * t**2 / n
    a = scale.mean() ** 2 - vss
    b = excess.mean() * scale.mean() - ves
    c = excess.mean() ** 2 - vee
    root = math.sqrt(max(b * b - a * c, 0))
    low, high = (b - root) / a, (b + root) / a
    if low >= CATASTROPHIC:
        verdict = "catastrophic"
    elif high <= TOLERABLE:
        verdict = "tolerable"
    else:
        verdict = "undetermined" if low < TOLERABLE and high > CATASTROPHIC else "costly"
    return Harm(excess.mean() / scale.mean(), low, high, verdict)


TASKS = {  # what is learnt, by which shape of model, for how long
    "shakespeare": {"data": "shakespeare_char", "batch_size": 32, "steps": 500, "eval_every": 100, "shape": {}}
}
TASKS |= {
    name: {
        "data": data,
        "batch_size": 64,
        "steps": 3000,
        "eval_every": 150,
        "shape": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": data.block_size},
    }
    for name, data in {
        "recall": RecallTask(),
        "recall_8": RecallTask(n_keys=16, n_pairs=8, n_queries=8),
        "recall_16": RecallTask(n_keys=32, n_pairs=16, n_queries=16),
    }.items()
}
# the table of runs: what determines one, how it ended, what made it
KEY = {"task": str, "method": str, "softmax_backward": str, "attn_mode": str, "qk_norm": str, "score_scale": float}
KEY |= {"optimizer": str, "feedback_scale": float, "lr": float, "steps": int, "seed": int}
OUTCOMES = ["val_loss", "accuracy", *SYMPTOMS]
COLUMNS = [*KEY, "status", *OUTCOMES, "losses", "accuracies", "data", "code", "seconds", "machine", "torch"]
RESULTS = DATA / "results.csv"  # of the first edition, but for what the second has run anew
SECOND_EDITION = DATA / "second_edition.csv"  # where data/sweep.py adds rows
GROUP = ["task", "method", "attn_mode", "qk_norm", "score_scale", "optimizer", "steps"]  # a rule is compared within it
MAKERS = ["task", "softmax_backward", "method", "attn_mode", "qk_norm", "optimizer"]  # what a row's code depends on
TUNING_SEEDS = range(100, 200)  # they chose the learning rate; all others are tests


def row_code(task: str, optimizer: str = "adamw", **rules: str) -> str:
    """The fingerprint of a task and of the code by which a run under these ``MAKERS`` would be made now."""
    data = TASKS[task]["data"]
    kind = Corpus if isinstance(data, str) else type(data)
    return fingerprint(training_code(LocalGPTConfig(**rules), kind, symptoms, optimizer), TASKS[task])[:12]


def made_by(results: pd.DataFrame) -> pd.Series:
    """What made each run of the table: "this" code, "other" code, or "unknown" code (before rows named it)."""
    made = pd.Series("unknown", index=results.index, dtype=object)
    for makers, runs in results[results["code"] != ""].groupby(MAKERS):
        try:
            now = row_code(**dict(zip(MAKERS, makers, strict=True)))
        except (KeyError, ValueError):  # a task or a rule that is not here
            now = None
        made[runs.index] = np.where(runs["code"] == now, "this", "other")
    return made


def provenance(results: pd.DataFrame) -> str:
    """A sentence on which code made the runs; to be shown wherever their numbers are.

    >>> provenance(pd.DataFrame([dict.fromkeys([*KEY, "code"], "")] * 2))
    '2 runs: 2 from before runs named their code'
    """
    words = {"this": "by this code", "other": "by OTHER code", "unknown": "from before runs named their code"}
    counts = made_by(results).value_counts()
    return f"{len(results)} runs: " + ", ".join(f"{counts[made]} {words[made]}" for made in words if made in counts)


def load_results(path: Path = RESULTS) -> pd.DataFrame:
    """The table that data/sweep.py fills in: one row a run, the tuning runs included.

    ``status`` is ok, diverged (``val_loss`` is inf) or failed (and why; ``val_loss`` is NaN). ``code`` is the
    fingerprint of the code that made the row, empty in rows from before there was one. Raises FileNotFoundError where
    there is no table, and ValueError on what is none, see also ``check_results``.
    """

    def damaged(what: str) -> ValueError:
        return ValueError(f"{path.name} is damaged: {what}; correct it, take it from git again, or delete it")

    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: take it from git again, or make it with 'make sweep' (hours)")
    text = path.read_text()
    reader = csv.DictReader(io.StringIO(text))
    if sorted(reader.fieldnames or []) != sorted(COLUMNS):
        odd = sorted({*COLUMNS}.symmetric_difference(reader.fieldnames or []))
        raise damaged(f"it is empty, or its columns are not those of data/sweep.py: look for {', '.join(odd)}")
    if not text.endswith("\n"):
        raise damaged("its last line is cut off")
    rows = []
    for row in reader:
        needed = [*KEY, "status", "data", "seconds", "machine", "torch"]
        if None in row or None in row.values() or not all(row[name] for name in needed):
            raise damaged(f"line {reader.line_num} has too many or too few values")
        try:
            row |= {name: kind(row[name]) for name, kind in KEY.items()}
            row |= {name: float(row[name] or "nan") for name in ("seconds", *OUTCOMES)}
        except ValueError as error:
            raise damaged(f"in line {reader.line_num}, {error}") from error
        rows.append(row)
    results = pd.DataFrame(rows, columns=COLUMNS).astype(KEY)
    results["val_loss"] = results["val_loss"].astype(float).where(results["status"] != "diverged", math.inf)
    return check_results(results)


def usual_runs(results: pd.DataFrame) -> pd.DataFrame:
    """Those of softmax attention with scores of scale 1, by AdamW, for as many iterations as their task has."""
    usual = {"attn_mode": "softmax", "score_scale": 1.0, "optimizer": "adamw"}
    steps = results["task"].map(lambda task: TASKS[task]["steps"])
    return results[(results[[*usual]] == pd.Series(usual)).all(axis=1) & (results["steps"] == steps)]


def runs_without_norms() -> pd.DataFrame:
    """What 05 and 06 judge, each group from one table: recall of the first edition, Tiny Shakespeare of the second."""
    second = usual_runs(load_results(SECOND_EDITION)).query("task == 'shakespeare' and qk_norm == 'off'")
    return pd.concat([load_results(), second], ignore_index=True)


def check_results(results: pd.DataFrame) -> pd.DataFrame:
    """The table as it is; ValueError names a run that is there twice, or on other data, or without what it claims."""

    def refuse(wrong: pd.Series, what: str) -> None:
        for row in results[wrong].itertuples():
            run = ", ".join(f"{name}={getattr(row, name)}" for name in KEY)
            raise ValueError(f"the table of results holds a run that {what}: {run}; delete that row")

    refuse(results.duplicated([*KEY]), "is there twice")
    usual = results.groupby("task")["data"].transform(lambda data: data.mode().iloc[0])
    refuse(results["data"] != usual, "is of other data than the other runs of its task")
    codes = results.groupby([*GROUP, "softmax_backward"])["code"]
    refuse(codes.transform("nunique") > 1, "was not made by the same code as others of its rule")
    failed = results["status"].str.startswith("failed")
    refuse(~failed & ~results["status"].isin(["ok", "diverged"]), "is neither ok nor diverged nor failed")
    expected = {"ok": np.isfinite, "diverged": np.isposinf}
    for status, holds in expected.items():
        refuse((results["status"] == status) & ~holds(results["val_loss"]), f"is {status} and has another loss")
    refuse(failed & results["val_loss"].notna(), "failed and has a loss")
    return results


class Settings(NamedTuple):
    """What tuning chooses, and the mean validation loss it had there."""

    feedback_scale: float
    lr: float
    loss: float


SOLVED = 0.99  # the accuracy from which on a run has solved recall


def best_settings(tuning: pd.DataFrame) -> Settings:
    """Feedback scale and learning rate by which most runs solved their task, then those of the lowest mean loss.

    A run that diverged has the loss inf; where one is missing (NaN: it failed), nothing can be chosen, and all is NaN.
    Where runs have no accuracy none is solved, so the loss decides alone.

    >>> losses = [2.1, 2.3, 2.0, math.inf]
    >>> best_settings(pd.DataFrame({"feedback_scale": 1.0, "lr": [1e-3, 1e-3, 3e-3, 3e-3], "val_loss": losses}))
    Settings(feedback_scale=1.0, lr=0.001, loss=2.2)
    """
    solved = tuning["accuracy"] >= SOLVED if "accuracy" in tuning else False
    settings = tuning.assign(solved=solved).groupby(["feedback_scale", "lr"])
    choice = settings["solved"].mean().to_frame().assign(loss=settings["val_loss"].mean(skipna=False))
    if choice.empty or choice["loss"].isna().any():
        return Settings(math.nan, math.nan, math.nan)
    best = choice.sort_values(["solved", "loss"], ascending=[False, True]).iloc[0]
    return Settings(*map(float, best.name), float(best["loss"]))


def shared_control(qk_norm: str) -> str:
    """The setting whose ``none`` is also that of ``qk_norm``.

    Where no gradient arrives at Q and K it makes no difference what would become of it at their norms.
    """
    return LocalGPTConfig(qk_norm=qk_norm).exact.qk_norm


class Judged(NamedTuple):
    """The test runs that a rule is judged by, indexed by seed, and those of ``full`` and ``none`` beside them."""

    group: dict[str, object]  # by the names of GROUP
    rule: str
    feedback_scale: float
    lr: float
    tried: pd.Series  # the learning rates of tuning
    runs: pd.DataFrame
    full: pd.DataFrame
    none: pd.DataFrame

    def losses(self) -> list[pd.Series] | None:
        """Validation losses of rule, ``full`` and ``none`` on the seeds that all three have; None without two such."""
        parts = self.runs, self.full, self.none
        seeds = functools.reduce(pd.Index.intersection, (part.index for part in parts))
        losses = [part["val_loss"][seeds] for part in parts]
        return None if len(seeds) < 2 or pd.concat(losses).isna().any() else losses

    @property
    def solved(self) -> tuple[int, int, int, int]:
        """Runs that solved their task and runs: of the rule, then of ``full``."""
        counts = (((part["accuracy"] >= SOLVED).sum(), len(part)) for part in (self.runs, self.full))
        return tuple(int(count) for pair in counts for count in pair)


def judged(results: pd.DataFrame, at: str = "own") -> Iterator[Judged]:
    """Every rule of every ``GROUP`` by its test runs, at the learning rate that tuning seeds chose.

    ``at`` says whose rate is used: the rule, ``full`` and ``none`` each at their ``own``, all three at that of
    ``full``, or all three at that of the ``rule``. The feedback scale is everywhere that which ``full`` chose.
    """
    if at not in ("own", "full", "rule"):
        raise ValueError(f"at={at!r} is not whose learning rate is used: choose 'own', 'full' or 'rule'")
    for values, runs in check_results(results).groupby(GROUP, sort=False):
        group = dict(zip(GROUP, values, strict=True))
        if (control := shared_control(group["qk_norm"])) != group["qk_norm"]:
            shared = group | {"qk_norm": control, "softmax_backward": "none"}
            runs = pd.concat([runs, results[(results[[*shared]] == pd.Series(shared)).all(axis=1)]])
        chose = runs["seed"].isin(TUNING_SEEDS)
        tuning, tests = runs[chose], runs[~chose]
        scale = best_settings(tuning[tuning["softmax_backward"] == "full"]).feedback_scale
        if not math.isnan(scale):
            tuning = tuning[tuning["feedback_scale"] == scale]
        rules = dict.fromkeys([*tuning["softmax_backward"], *tests["softmax_backward"]])
        tried = {rule: tuning[tuning["softmax_backward"] == rule] for rule in rules}
        best = {rule: best_settings(tried[rule]).lr for rule in tried}
        for rule in tried:
            lrs = best if at == "own" else dict.fromkeys([rule, "full", "none"], best.get(rule if at == "rule" else at))
            parts = []
            for name in (rule, "full", "none"):
                wanted = (tests["softmax_backward"] == name) & (tests["feedback_scale"] == scale)
                parts.append(tests[wanted & (tests["lr"] == lrs.get(name))].set_index("seed").sort_index())
            yield Judged(group, rule, scale, lrs[rule], tried[rule]["lr"], *parts)


def harm_table(results: pd.DataFrame, at: str = "own") -> pd.DataFrame:
    """One row a rule within its ``GROUP``: seeds, learning rate, loss, harm, verdict and symptoms, see ``judged``.

    Losses and symptoms are means over the rule's test seeds (``loss_sd``: standard deviation), ``solved`` is how many
    of them solved the task, harm comes with its interval, over the seeds that ``full`` and ``none`` have too. The
    verdict is ``missing`` where there are no two such seeds, or a run failed.
    """
    rows = []
    for case in judged(results, at):
        result = Harm(math.nan, math.nan, math.nan, "missing")
        if losses := case.losses():
            result = harm(*losses)
            if case.rule in ("full", "none") and result.verdict != "undecided":
                result = result._replace(verdict="reference")
        row = case.group | {"rule": case.rule, "seeds": len(case.runs)}
        row |= {"feedback_scale": case.feedback_scale, "lr": case.lr}
        ends = case.tried.min(), case.tried.max()
        row |= {"lr_tried": "{:g} to {:g}".format(*ends) if len(case.tried) else "", "lr_at_end": case.lr in ends}
        loss = case.runs["val_loss"]
        with np.errstate(invalid="ignore"):  # a diverged run's loss is inf, and has no deviation
            row |= {"loss": loss.mean(), "loss_sd": loss.std(), "solved": case.solved[0], **result._asdict()}
        rows.append(row | case.runs[["accuracy", *SYMPTOMS]].mean().to_dict())
    return pd.DataFrame(rows)


def headline_table(results: pd.DataFrame) -> pd.DataFrame:
    """``harm_table`` with each rule at its own learning rate or, where none was tuned for it, at that of ``full``."""
    tables = [harm_table(results, at).query("verdict != 'missing'") for at in ("own", "full")]
    return pd.concat(tables).sort_index(kind="stable").drop_duplicates([*GROUP, "rule"], ignore_index=True)


def share_interval(solved: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) interval for a share, the score interval: it keeps its level also near 0 and 1.

    >>> [round(end, 3) for end in share_interval(24, 24)]
    [0.862, 1.0]
    """
    return tuple(map(float, binomtest(solved, runs).proportion_ci(confidence, method="wilson")))


# A number as prose has it: 0.43, -0.22, 1,003,854, 10^{-3}, 3\cdot10^{-5}; not 1/4, H100 or x_1.
NUMBER = re.compile(
    r"(?<![\w.^/])(?<!\d,)-?(?:[\d.]+\\cdot)?(?:10\^\{?-?\d+\}?|\d+(?:,\d{3})*(?:\.\d+)?)(?![\w/]|\.\d)"
)


def claim(sentence: str, *values: float | bool, within: float | None = None, corpus: Corpus | None = None) -> None:
    """Hold a sentence of the text against what was computed; AssertionError says what in it is not so.

    The numbers in ``sentence``, in order, must be the ``values``: to the digits printed, or to ``within`` where trained
    runs differ from machine to machine. A value that is True or False stands for no number, but for what the words say.
    With a ``corpus`` that is not Tiny Shakespeare nothing is claimed: give it where the sentence is about that text.
    notebooks/tests/test_prose.py makes sure that the text has the sentence, and no result that is in no sentence here.

    >>> claim("harm stays below 0.25: 0.05 [0.04, 0.06]", 0.25, 0.0512, 0.0433, 0.0589, 0.0589 < 0.25)
    >>> claim("harm is 0.07 on 656 runs", 0.0512, 656)
    Traceback (most recent call last):
        ...
    AssertionError: 0.07 should be 0.0512 in: harm is 0.07 on 656 runs
    """
    if corpus is not None and not corpus.is_shakespeare:
        return

    def hold(so: bool, otherwise: str) -> None:
        if not so:
            raise AssertionError(f"{otherwise} in: {sentence}")

    written = [re.sub(r"[,{}]", "", n).replace(r"\cdot10^", "e").replace("10^", "1e") for n in NUMBER.findall(sentence)]
    truths = [value for value in values if isinstance(value, (bool, np.bool_))]
    values = [value for value in values if not isinstance(value, (bool, np.bool_))]
    hold(len(written) == len(values), f"{len(values)} numbers given, and {len(written)}")
    hold(truths or values, "nothing given that could support what is said")
    hold(all(truths), "what is said does not hold")
    for number, value in zip(map(Decimal, written), values, strict=True):
        reach = 0.5 * 10.0 ** number.as_tuple().exponent if within is None else within  # half of the last digit
        hold(abs(value - float(number)) <= reach * (1 + 1e-9), f"{number:f} should be {value:.6g}")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Figures
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colour-blind-safe palette; one colour for one thing on every page
COLORS = {
    "bp": "#0072B2",
    "fa": "#D55E00",
    "sign_sym": "#009E73",
    "dfa": "#CC79A7",
    "full": "#333333",
    "diag": "#0072B2",
    "offdiag": "#D55E00",
    "cross": "#009E73",
    "ste": "#CC79A7",
}
# the softmax's rules in plain words, as a reader meets them
RULE_NAMES = {
    "full": "minus the lateral sum: exact",
    "diagonal": "own error only",
    "zero": "no baseline",
    "mean": "minus the plain mean",
    "diagonal_mean": "own slope, minus the mean",
    "diagonal_lateral": "own slope, minus the sum",
    "balanced_evenly": "balanced evenly",
    "balanced_by_attention": "balanced by attention",
    "ste": "passed straight through",
    "none": "nothing sent back",
}
# energies; signed quantities, centred on zero. Nothing has the page's colour, in the dark scheme, too.
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"


def set_style() -> None:
    """The look of every figure and table in the report; called once a notebook."""
    pd.set_option("display.max_rows", None, "display.max_columns", None)
    inline = InlineBackend.instance()
    inline.print_figure_kwargs = {"bbox_inches": "tight", "metadata": {"Date": None, "Creator": None}}
    inline.figure_formats = {"svg"}
    sns.set_theme(context="notebook", style="ticks", palette=list(COLORS.values()))
    plt.rcParams.update(
        {
            "figure.figsize": (7, 4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "report",  # with no date in it, the same figure is the same bytes
            "svg.fonttype": "none",  # text stays text: half the bytes of outlines
            "mathtext.fontset": "stix",  # every machine has a serif face as wide
        }
    )


def printable(text: str) -> list[str]:
    """The characters of ``text`` as labels: space and newline visible, what has no shape as Python writes it.

    >>> printable("a b\\n\\0\\u200b")
    ['a', '␣', 'b', '⏎', '\\\\x00', '\\\\u200b']
    """
    shapes = {" ": "␣", "\n": "⏎"}
    return [shapes.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text]


def head_names(table: pd.DataFrame) -> list[str]:
    """How figures and tables name the heads in the rows of ``table``, by their layer and their number in it.

    >>> head_names(pd.DataFrame({"layer": [0, 1], "head": [3, 0]}))
    ['L0H3', 'L1H0']
    """
    return [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]


def plot_head_map(
    values: Tensor,
    text: str | None = None,
    ax: Axes | None = None,
    norm: Normalize | None = None,
    cmap: str = SEQUENTIAL,
) -> Axes:
    """One (query, key) map (T, T), queries down and keys across; keys that a query may not see stay blank.

    ``text`` (T characters) labels both axes; without it the axes count positions. Raises ValueError on other shapes.
    """
    ax = ax or plt.gca()
    T = len(values)
    if values.shape != (T, T) or T == 0 or len(text or values) != T:
        labels = "no text" if text is None else f"a text of {len(text)} characters"
        raise ValueError(f"a map is (T, T) and its text has T characters; here are {tuple(values.shape)} and {labels}")
    shown = np.ma.masked_where(~np.tri(T, dtype=bool), values.cpu().numpy())
    ax.imshow(shown, cmap=cmap, norm=norm, interpolation="none")
    ticks, labels = (range(0, T, max(1, T // 4)), None) if text is None else (range(T), printable(text))
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    if text is not None:
        ax.tick_params(labelsize=9, length=0)
        ax.set(xlabel="key", ylabel="query")
    return ax


def plot_split(attn: Tensor, grad: Tensor, keys: Iterable[str], ax: Axes | None = None) -> Axes:
    """A row's gradient as a sum, key by key: a bar d from zero, o on from where d ends, and f = d + o from zero.

    attn, grad: the weights of one query's keys and the errors that arrive at them, (n,) each; keys: n labels.
    """
    ax = ax or plt.gca()
    f, d, o = (part.numpy() for part in split_softmax_gradient(attn, grad))
    for i, (name, height, bottom) in enumerate((("diag", d, 0), ("offdiag", o, d), ("full", f, 0))):
        ax.bar(np.arange(len(f)) + 0.27 * (i - 1), height, 0.25, bottom, color=COLORS[name], label="dof"[i])
    ax.use_sticky_edges = False  # else no room is left where bars end
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.set_xticks(range(len(f)), keys)
    ax.set(xlabel="key", ylabel="gradient at the score")
    ax.legend(ncols=3)
    return ax


def signed_scale(maps: Tensor, linear: float = 0.01) -> SymLogNorm:
    """A scale for signed values, centred on zero: logarithmic beyond the fraction ``linear`` of the largest size."""
    high = torch.where(maps.isfinite(), maps.abs(), 0).max().item() or 1.0  # maps of zeros have a scale, too
    return SymLogNorm(linear * high, vmin=-high, vmax=high)


VERDICT_COLORS = {"tolerable": COLORS["sign_sym"], "costly": "#9A6700", "catastrophic": COLORS["offdiag"]}
VERDICT_COLORS["undetermined"] = "#777777"


def verdict_table(table: pd.DataFrame, digits: int = 3) -> str:
    """The HTML of a table whose column ``verdict`` has the colours of ``plot_harm``.

    Numbers have so many ``digits`` after the point, learning rates (``lr``) five.

    >>> table = verdict_table(pd.DataFrame({"lr": [3e-5], "harm": [0.0125], "verdict": ["undetermined"]}), digits=2)
    >>> [part in table for part in (">0.00003<", ">0.01<", "background: #77777740")]
    [True, True, True]
    """
    shown = table.style.format(precision=digits, na_rep="").format("{:.5f}", subset=["lr"])
    colors = {verdict: f"background: {color}40" for verdict, color in VERDICT_COLORS.items()}
    shown = shown.map(lambda verdict: colors.get(verdict, ""), subset=["verdict"])
    return shown.set_uuid("verdicts").set_table_attributes('class="dataframe"').to_html()


def plot_harm(table: pd.DataFrame) -> np.ndarray:
    """Harm of every rule (rows of ``harm_table``) with its interval and the two bounds of the verdict.

    A panel a group, one below the other, in a figure of their own, and an array of their axes; groups and rules without
    a verdict are left out. Raises ValueError where that leaves none.
    """
    shown = table[~table["rule"].isin(["full", "none"]) & table["harm"].notna()]
    if shown.empty:
        raise ValueError("no rule in this table has a harm to draw: it needs test runs of a rule, of full and of none")
    groups = list(shown.groupby(GROUP, sort=False))
    heights = [len(part) + 1.2 for _, part in groups]
    size = (9, 0.27 * sum(heights) + 0.8)
    _, axes = plt.subplots(len(groups), 1, figsize=size, sharex=True, squeeze=False, height_ratios=heights)
    axes = axes[:, 0]
    markers = {"tolerable": "o", "costly": "s", "catastrophic": "X", "undetermined": "D"}  # not by colour alone
    usual = dataclasses.asdict(LocalGPTConfig()) | {"optimizer": "adamw"}
    unusual = {
        "attn_mode": "{} attention",
        "qk_norm": "qk_norm {}",
        "score_scale": "scores times {:g}",
        "optimizer": "{}",
    }
    for ax, (values, part) in zip(axes, groups, strict=True):
        group = dict(zip(GROUP, values, strict=True))
        part = part.sort_values("harm", ascending=False)
        for position, row in enumerate(part.itertuples()):
            style = {"color": VERDICT_COLORS[row.verdict]}
            if math.isinf(row.harm):  # a seed diverged: at the edge, beyond every scale
                edge = ax.get_yaxis_transform()
                ax.plot(1, position, ">", transform=edge, clip_on=False, **style)
                place = {"xytext": (-8, 0), "textcoords": "offset points", "va": "center", "ha": "right"}
                ax.annotate("diverged", (1, position), xycoords=edge, fontsize="small", **place, **style)
                continue
            ax.plot([row.low, row.high], [position] * 2, linewidth=2, **style)
            face = "white" if row.lr_at_end else style["color"]  # a rate beyond might have been better
            ax.plot(row.harm, position, markers[row.verdict], markerfacecolor=face, **style)
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(row.verdict, (max(row.high, 1), position), fontsize="small", **place, **style)
        for bound in (TOLERABLE, CATASTROPHIC):
            ax.axvline(bound, color="0.6", linewidth=1, linestyle="--", zorder=0)
        ax.axvline(0, color="0.8", linewidth=1, zorder=0)
        ax.set_yticks(range(len(part)), part["rule"])
        ax.set_ylim(-0.6, len(part) - 0.4)
        words = [group["task"], group["method"]]
        words += [said.format(group[name]) for name, said in unusual.items() if group[name] != usual[name]]
        ax.set_title(f"{', '.join(words)}, {group['steps']:,} iterations", fontsize="small")
        ax.margins(x=0.2)  # for the words
    axes[-1].set_xlabel("harm (0: full, 1: Q and K never trained)")
    return axes
