"""Shared tools of the notebooks, in reading order: data, training, capture, harm, figures.

Numbers come from pure functions, figures from ``plot_*`` functions that only draw. The model and
its learning rules are in ``model_local``; what the experiment trains and judges by is in
``data/experiment.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import textwrap
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
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
from model_local import (SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, Rule, attention_weights,
                         diagonal, full)

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"

# -------------------------------------------------------------------------------------------------
# 1. Data: a corpus is a folder in nanoGPT's layout, made by data/prepare.py
# -------------------------------------------------------------------------------------------------

SHAKESPEARE_SHA256 = "56c25d4855680bb29279a84bcf28065b8053a158bede65b7f57d0c581ba81944"


@dataclass(frozen=True)
class Corpus:
    """A tokenised text, memory-mapped. ``train`` and ``val`` hold token ids (uint16)."""

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
        """Whether this is Tiny Shakespeare, the report's text, whatever its folder's name."""
        return self.sha256 == SHAKESPEARE_SHA256

    def encode(self, text: str) -> Tensor:
        """Token ids (T,) of ``text``; ValueError names a character that it has no token for."""
        for character in text:
            if character not in self.stoi:
                raise ValueError(f"{character!r} does not occur in the corpus {self.name!r}: leave "
                                 "it out")
        return torch.tensor([self.stoi[character] for character in text], dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.itos[int(i)] for i in ids)

    def batch(self, block_size: int, batch_size: int, generator: torch.Generator,
              device: str) -> tuple[Tensor, Tensor]:
        """A random batch of the training part, see ``get_batch``."""
        return get_batch(self.train, block_size, batch_size, generator, device)

    def score(self, model: LocalGPT) -> dict[str, float]:
        """``val_loss``, see ``evaluate``."""
        return {"val_loss": evaluate(model, self.val)}

    def __repr__(self) -> str:
        name = "Tiny Shakespeare" if self.is_shakespeare else self.name
        return (f"Corpus: {name}, {len(self.train):,} training and {len(self.val):,} validation "
                f"tokens, {self.vocab_size} distinct.")

    def _repr_markdown_(self) -> str:
        if self.is_shakespeare:
            return repr(self)
        return (f"{self}\n\n> **Not Tiny Shakespeare**: what the text says of trained models was "
                "seen on that, not here.")


def load_corpus(name: str | None = None, root: Path = DATA) -> Corpus:
    """Open the corpus ``root/name``; by default the environment's CORPUS, else Tiny Shakespeare.

    Raises FileNotFoundError where it is missing and ValueError where it is damaged, saying what to
    do; warns where its files look like those of 4-byte ids.

    >>> load_corpus("my_text")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    FileNotFoundError: data/my_text is missing: 'python data/prepare.py' makes Tiny Shakespeare, ...
    """
    if name is None:
        name = os.environ.get("CORPUS") or "shakespeare_char"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} names no corpus: give the name of a folder in {root.name}/ "
                         "(letters, digits, _, -)")
    make = ("'python data/prepare.py' makes Tiny Shakespeare, with "
            f"'--text FILE --name {name}' a text of your own")
    folder = root / name
    for path in (folder, folder / "train.bin", folder / "val.bin", folder / "meta.pkl"):
        if not path.exists():
            raise FileNotFoundError(f"{path.relative_to(root.parent)} is missing: {make}")
    try:
        itos = _vocabulary((folder / "meta.pkl").read_bytes())
        train, val = (np.memmap(folder / f"{part}.bin", "<u2", "r") for part in ("train", "val"))
        # An id without a character would otherwise fail far from here.
        if (highest := max(train.max(), val.max())) >= len(itos):
            raise ValueError(f"a token id is {highest}, and the vocabulary ends at {len(itos) - 1}")
    except Exception as error:  # a hostile or broken pickle can fail in any way
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{root.name}/{name} is damaged ({why}): {make}") from error
    # A text may be like that, too ("a\nb\n"), and nothing tells the two apart: so it is no error.
    if not (train[1::2].any() or val[1::2].any()):
        warnings.warn(f"every second token of {root.name}/{name} is 0, as in files of 4-byte ids "
                      "(int32): if they are that, write them as 2-byte ids (uint16)", stacklevel=2)
    digest = hashlib.sha256(json.dumps(list(itos.values())).encode())
    digest.update(train.tobytes())
    digest.update(val.tobytes())
    stoi = {character: i for i, character in itos.items()}
    return Corpus(name, train, val, stoi, itos, digest.hexdigest())


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers alone: a pickle could call any program otherwise."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain data is read")


def _vocabulary(pickled: bytes) -> dict[int, str]:
    """A meta.pkl's ``itos``, by id; some exception where it is not as nanoGPT writes it."""
    meta = _PlainUnpickler(io.BytesIO(pickled)).load()
    itos = {i: meta["itos"][i] for i in range(len(meta["itos"]))}
    stoi = {c: i for i, c in itos.items()}
    if (meta["vocab_size"], meta["itos"], meta["stoi"]) != (len(stoi), itos, stoi):
        raise ValueError("vocab_size, stoi and itos do not belong together")
    if len(itos) < 2 or not all(isinstance(c, str) and len(c) == 1 for c in stoi):
        raise ValueError("the vocabulary is not of two or more single characters")
    return itos


def get_batch(tokens: np.ndarray, block_size: int, batch_size: int, generator: torch.Generator,
              device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A random batch: inputs and next-token targets, both (batch_size, block_size), int64.

    ``generator`` alone decides which windows are drawn: the same seed gives the same batches,
    whatever else draws random numbers. Raises ValueError where the text is shorter than a window.

    >>> generator = torch.Generator().manual_seed(0)
    >>> x, y = get_batch(np.arange(100), block_size=4, batch_size=2, generator=generator)
    >>> x.shape, bool((y == x + 1).all())
    (torch.Size([2, 4]), True)
    """
    if len(tokens) <= block_size:
        raise ValueError(f"a window of block_size={block_size} needs {block_size + 1} tokens and "
                         f"this text has {len(tokens)}: choose a smaller one or a longer text")
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator).numpy()
    return _windows(tokens, starts, block_size, device)


def _windows(tokens: np.ndarray, starts: np.ndarray, block_size: int,
             device: str) -> tuple[Tensor, Tensor]:
    """The windows that begin at ``starts`` (B, 1), in one gather from the file."""
    window = tokens[starts + np.arange(block_size + 1)].astype(np.int64)
    window = torch.from_numpy(window).to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()  # nanoGPT's model takes views


def ngram_losses(corpus: Corpus) -> dict[str, float]:
    """Validation cross-entropy in nats of unigram and bigram models (add-one smoothing).

    A model above the unigram line has learnt nothing; one above the bigram line knows less than
    pairs of letters tell.
    """
    V = corpus.vocab_size
    train, val = corpus.train.astype(np.int64), corpus.val.astype(np.int64)
    unigram = np.bincount(train, minlength=V) + 1.0
    unigram /= unigram.sum()
    pairs = train[:-1] * V + train[1:]
    bigram = np.bincount(pairs, minlength=V * V).reshape(V, V) + 1.0
    bigram /= bigram.sum(1, keepdims=True)
    return {
        "unigram": float(-np.log(unigram[val]).mean()),
        "bigram": float(-np.log(bigram[val[:-1], val[1:]]).mean()),
    }


# --------------------------------------------------------------------------------------------------
# 2. Training
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished training run.

    ``history`` is tidy: one value a row, with columns step, metric, part, value. The metrics are
    what the data's ``score`` gives (``val_loss``), ``train_loss`` (nats per token, mean since the
    row before), ``tokens_per_s``, and what ``measure`` gives.
    """

    model: LocalGPT
    history: pd.DataFrame
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(repr=False)  # parameters by step

    def at(self, step: int) -> LocalGPT:
        """The model as it was after ``step`` steps; KeyError names the steps that were kept."""
        if step not in self.snapshots:
            raise KeyError(f"step {step} was not kept: choose one of {sorted(self.snapshots)}")
        model = twin(self.model)
        # not strict: feedback matrices never change, so they are not in a snapshot
        model.load_state_dict(self.snapshots[step], strict=False)
        return model

    def series(self, metric: str) -> pd.Series:
        """One metric by step (averaged over its parts)."""
        rows = self.history[self.history["metric"] == metric]
        return rows.groupby("step")["value"].mean()


def alignment(model: LocalGPT, x: Tensor, y: Tensor) -> dict[tuple[str, str], float]:
    """Cosine in [-1, 1] of each parameter's gradient with that of exact backpropagation."""
    exact = twin(model, **dataclasses.asdict(model.config.exact))
    cosines = gradient_cosines(model, exact, x, y)
    return {("alignment", name): cosine for name, cosine in cosines.items()}


def adamw(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) at a constant rate, with PyTorch's other defaults."""
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def train(
    config: LocalGPTConfig,
    steps: int = 500,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 1337,
    data: Corpus | None = None,
    eval_every: int = 50,
    measure: Callable[[LocalGPT, Tensor, Tensor], Mapping[tuple[str, str], float]] = alignment,
    device: str = "cpu",
    directory: str | os.PathLike | None = DATA / "runs",
    progress: bool = True,
    optimizer: Callable[[LocalGPT, float, int], torch.optim.Optimizer] = adamw,
) -> Run:
    """Train a LocalGPT, or load the run if it was trained before.

    ``data`` is the default corpus if not given, or anything that has ``vocab_size``, ``sha256``,
    ``batch`` and ``score`` as a Corpus has them. ``optimizer`` makes one of (model, lr, steps).
    Every ``eval_every`` steps the model is scored, and a copy of it measured on one fixed batch:
    ``measure(model, x, y)`` returns numbers by (metric, part).

    A finished run is kept in ``directory`` (None: nowhere) under a hash of all that determines it,
    see ``_run_settings``. Raises TypeError or ValueError on arguments that cannot be, and
    FloatingPointError if the run diverges.
    """
    data = load_corpus() if data is None else data
    device = _check_run(config, steps, lr, batch_size, seed, data, eval_every, measure, device,
                        optimizer)
    arguments = config, steps, lr, batch_size, seed, data, eval_every, measure, device, optimizer
    path = settings = None
    if directory is not None:
        settings = _run_settings(*arguments)
        key = hashlib.sha256(settings.encode()).hexdigest()[:12]
        path = Path(directory) / f"{config.method}-{config.softmax_backward}-{key}.pt"
    saved = _load_checkpoint(path, settings) if path else None
    with torch.random.fork_rng(devices=[]):  # whoever calls keeps their own random numbers
        if saved is not None:
            model = LocalGPT(config).to(device)
            model.load_state_dict(saved["model"])
        else:
            model, history, snapshots = _training(*arguments, progress)
            saved = {"settings": settings, "history": history, "snapshots": snapshots,
                     "model": model.state_dict()}
            if path:
                save_atomically(path, lambda file: torch.save(saved, file))
    table = pd.DataFrame(saved["history"], columns=["step", "metric", "part", "value"])
    return Run(model.eval(), table, saved["snapshots"])


def _check_run(config, steps, lr, batch_size, seed, data, eval_every, measure, device,
               optimizer) -> str:
    """Refuse arguments of ``train`` that cannot be; return the device as PyTorch names it."""
    if not isinstance(config, LocalGPTConfig):
        raise TypeError(f"config={config!r} is no LocalGPTConfig: "
                        "write LocalGPTConfig(method='bp', ...)")
    for name in ("vocab_size", "sha256", "batch", "score"):
        if not hasattr(data, name):
            raise TypeError(f"data={data!r} has no {name}: write data=load_corpus() or a task, "
                            "such as data.experiment.RecallTask()")
    for name, function in (("measure", measure), ("optimizer", optimizer)):
        if not callable(function):
            raise TypeError(f"{name}={function!r} is no function: write {name}={name}s_function")
    if config.vocab_size != data.vocab_size:
        raise ValueError(f"config.vocab_size={config.vocab_size} and the data have "
                         f"{data.vocab_size}: write LocalGPTConfig(vocab_size=data.vocab_size, ...)")
    for name, number in (("steps", steps), ("batch_size", batch_size), ("eval_every", eval_every)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f"{name}={number!r} is not a whole number from 1 up")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} is not a whole number from 0 up")
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} is not a positive number")
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is unknown to PyTorch: write 'cpu' or 'cuda'") from error


def _run_settings(config, steps, lr, batch_size, seed, data, eval_every, measure, device,
                  optimizer) -> str:
    """All that determines a run, in words: the arguments, the data, PyTorch and the code.

    The code is that of the model, the training loop, the data, the rule, the measure and the
    optimizer, without comments and docstrings. What these call elsewhere is not followed: delete
    the run where that has changed.
    """
    rule = SOFTMAX_BACKWARD[config.softmax_backward]
    code = [_source(part) for part in (model_local, _training, evaluate, get_batch, type(data),
                                       rule, measure, optimizer)]
    numbers = int(steps), float(lr), int(batch_size), int(seed), int(eval_every), device
    return "\n".join([repr(config), *map(repr, numbers), data.sha256, torch.__version__, *code])


def _source(part) -> str:
    """The code of a module, a class, a function or an instance, without comments and docstrings."""
    given = ""
    if isinstance(part, functools.partial):
        part, given = part.func, repr((part.args, part.keywords))
    if not (inspect.ismodule(part) or inspect.isclass(part) or inspect.isroutine(part)):
        part = type(part)
    try:
        source = textwrap.dedent(inspect.getsource(part))
    except (OSError, TypeError) as error:
        raise ValueError(f"the code of {part!r} cannot be read, so the run cannot be found again: "
                         "define it in a file or a notebook, or say directory=None") from error
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a call
        return source
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_docstring and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + given


def _training(config, steps, lr, batch_size, seed, data, eval_every, measure, device, optimizer,
              progress) -> tuple[LocalGPT, list, dict]:
    """The loop of ``train``: the model, its history as rows, and its parameters by step."""
    torch.manual_seed(seed)
    model = LocalGPT(config).to(device)
    optimizer = optimizer(model, lr, steps)
    batches = torch.Generator().manual_seed(seed)
    probe_seed = torch.Generator().manual_seed(-1)  # no run's
    probe = data.batch(config.block_size, batch_size, probe_seed, device)
    history, snapshots = [], {}

    def record(step: int, metrics: dict[str, float]) -> None:
        values = {(metric, ""): value for metric, value in (metrics | data.score(model)).items()}
        measured = measure(twin(model).eval(), *probe)  # of a copy: to measure changes nothing
        try:  # plain numbers, which the safe loader reads
            for (metric, part), value in measured.items():
                values[str(metric), str(part)] = float(value)
        except (AttributeError, TypeError, ValueError) as error:
            raise TypeError(f"measure returned {measured!r}: "
                            "a dict of numbers by (metric, part) was expected") from error
        history.extend((step, metric, part, value) for (metric, part), value in values.items())
        parameters = model.named_parameters()
        snapshots[step] = {name: p.detach().cpu().clone() for name, p in parameters}

    record(0, {})
    losses, start = [], time.perf_counter()
    title = f"{config.method}/{config.softmax_backward}"
    silence = {} if progress else {"disable": True}  # False would overrule TQDM_DISABLE
    bar = tqdm(range(1, steps + 1), desc=title, leave=False, **silence)
    for step in bar:
        _, loss = model(*data.batch(config.block_size, batch_size, batches, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % eval_every and step < steps:
            continue
        # time to look at the losses, and to measure
        train_loss = torch.stack(losses).double().mean().item()
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"the loss is not a number by step {step}: try a smaller lr")
        tokens = len(losses) * batch_size * config.block_size
        speed = tokens / (time.perf_counter() - start)
        record(step, {"train_loss": train_loss, "tokens_per_s": speed})
        bar.set_postfix(loss=f"{train_loss:.3f}")
        losses, start = [], time.perf_counter()
    return model, history, snapshots


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


def save_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write(file)`` fill a neighbour of ``path``, then rename it: all of it is seen, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _load_checkpoint(path: Path, settings: str) -> dict | None:
    """What ``train`` saved under these settings; None, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True)  # never unpickles code
        if saved["settings"] == settings and {"history", "snapshots", "model"} <= set(saved):
            return saved
        what = "it belongs to other settings"
    except Exception as error:  # a half-written or corrupted archive can fail in any way
        what = f"{type(error).__name__}: {error}"
    warnings.warn(f"{path.name} is damaged ({what}): training again", stacklevel=3)
    return None


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


# --------------------------------------------------------------------------------------------------
# 4. Harm and claims: what a rule costs, and whether a sentence says what was computed
# --------------------------------------------------------------------------------------------------


class Harm(NamedTuple):
    """``harm`` with its 95 % interval, and the verdict on it."""

    harm: float
    low: float
    high: float
    verdict: str


TOLERABLE, CATASTROPHIC = 0.25, 1.0  # bounds on harm, fixed before the runs


def harm(rule: Iterable[float], full: Iterable[float], none: Iterable[float],
         confidence: float = 0.95) -> Harm:
    """``(L_rule - L_full) / (L_none - L_full)`` over paired seeds.

    It is 0 for the exact pass and 1 where Q and K are never trained. rule, full, none: final
    validation losses, in the same order of seeds (two or more), inf for a run that diverged. The
    ratio is that of means, its interval Fieller's (1954), which is exact for normal differences.
    The verdict, in this order:

    ``undecided``     the interval of ``L_none - L_full`` reaches zero, or one of the two diverged
    ``catastrophic``  a run of the rule diverged, or the lower end of the interval is at least 1
    ``tolerable``     its upper end is at most 0.25
    ``undetermined``  it reaches from below 0.25 to above 1
    ``costly``        otherwise

    >>> full, none = [2.0, 2.1, 1.9], [3.0, 3.1, 2.9]
    >>> for losses in ([2.05, 2.1, 2.0], [2.4, 2.6, 2.5], [3.5, 3.6, 3.4], [2.0, 3.1, 2.6]):
    ...     print(harm(losses, full, none).verdict)
    tolerable
    costly
    catastrophic
    undetermined
    """
    losses = [np.asarray(list(values), dtype=float) for values in (rule, full, none)]
    rule, full, none = losses
    n = len(full)
    if not len(rule) == n == len(none) or n < 2:
        raise ValueError("harm needs the same seeds, two or more, of each: "
                         f"got {len(rule)}, {n} and {len(none)}")
    if np.isnan(losses).any():
        raise ValueError("a loss is NaN: leave a missing seed out of all three, "
                         "and write inf where a run diverged")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is no probability between 0 and 1, like 0.95")
    if not np.isfinite([full, none]).all():
        return Harm(math.nan, math.nan, math.nan, "undecided")
    scale = none - full
    t = student_t.ppf((1 + confidence) / 2, n - 1)
    if not scale.mean() > t * scale.std(ddof=1) / math.sqrt(n):
        return Harm(math.nan, math.nan, math.nan, "undecided")
    if not np.isfinite(rule).all():
        return Harm(math.inf, math.inf, math.inf, "catastrophic")
    excess = rule - full
    # Fieller: all h for which mean(excess - h scale) is within t standard errors of zero
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


def share_interval(solved: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) interval for a share: it keeps its level also near 0 and 1.

    >>> [round(end, 3) for end in share_interval(24, 24)]
    [0.862, 1.0]
    """
    interval = binomtest(solved, runs).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


# A number as prose has it: 0.43, -0.22, 1,003,854, 10^{-3}, 3\cdot10^{-5}; not 1/4, H100 or x_1.
NUMBER = re.compile(
    r"(?<![\w.^/])(?<!\d,)-?(?:[\d.]+\\cdot)?"  # a sign and a factor, not within a word
    r"(?:10\^\{?-?\d+\}?|\d+(?:,\d{3})*(?:\.\d+)?)"  # a power of ten, or digits
    r"(?![\w/]|\.\d)"
)


def claim(sentence: str, *values: float | bool, within: float | None = None,
          corpus: Corpus | None = None) -> None:
    """Hold a sentence of the text against what was computed; AssertionError says what is not so.

    The numbers in ``sentence``, in order, must be the ``values``: to the digits printed, or to
    ``within`` where trained runs differ from machine to machine. A value that is True or False
    stands for no number, but for what the words say. With a ``corpus`` that is not Tiny Shakespeare
    nothing is claimed: give it where the sentence is about that text.

    >>> claim("harm stays below 0.25: 0.05 [0.04, 0.06]", 0.25, 0.0512, 0.0433, 0.0589)
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

    written = []
    for number in NUMBER.findall(sentence):
        number = re.sub(r"[,{}]", "", number).replace(r"\cdot10^", "e").replace("10^", "1e")
        written.append(Decimal(number))
    truths = [value for value in values if isinstance(value, (bool, np.bool_))]
    values = [value for value in values if not isinstance(value, (bool, np.bool_))]
    hold(len(written) == len(values), f"{len(values)} numbers given, and {len(written)}")
    hold(truths or values, "nothing given that could support what is said")
    hold(all(truths), "what is said does not hold")
    for number, value in zip(written, values, strict=True):
        half_digit = 0.5 * 10.0 ** number.as_tuple().exponent
        reach = half_digit if within is None else within
        hold(abs(value - float(number)) <= reach * (1 + 1e-9),
             f"{number:f} should be {value:.6g}")


# --------------------------------------------------------------------------------------------------
# 5. Figures
# --------------------------------------------------------------------------------------------------

# Okabe and Ito's colour-blind-safe palette; one colour for one thing on every page
COLORS = {
    "bp": "#0072B2", "fa": "#D55E00", "sign_sym": "#009E73", "dfa": "#CC79A7",
    "full": "#333333", "diag": "#0072B2", "offdiag": "#D55E00", "cross": "#009E73",
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
# energies; signed quantities, centred on zero. Nothing has the page's colour, also a dark page's.
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"


def set_style() -> None:
    """The look of every figure and table in the report; called once a notebook."""
    pd.set_option("display.max_rows", None, "display.max_columns", None)
    # Without a date and with a fixed salt, the same figure is the same bytes.
    inline = InlineBackend.instance()
    undated = {"Date": None, "Creator": None}
    inline.print_figure_kwargs = {"bbox_inches": "tight", "metadata": undated}
    inline.figure_formats = {"svg"}
    sns.set_theme(context="notebook", style="ticks", palette=list(COLORS.values()))
    plt.rcParams.update({
        "figure.figsize": (7, 4),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "report",
        "svg.fonttype": "none",  # text stays text: half the bytes of outlines
        "mathtext.fontset": "stix",  # every machine has a serif face as wide
    })


def printable(text: str) -> list[str]:
    """The characters of ``text`` as labels: space and newline visible, what has no shape escaped.

    >>> printable("a b\\n\\0\\u200b")
    ['a', '␣', 'b', '⏎', '\\\\x00', '\\\\u200b']
    """
    shapes = {" ": "␣", "\n": "⏎"}
    return [shapes.get(c, c if c.isprintable() else c.encode("unicode_escape").decode())
            for c in text]


def head_names(table: pd.DataFrame) -> list[str]:
    """How figures and tables name the heads in the rows of ``table``, by layer and number in it.

    >>> head_names(pd.DataFrame({"layer": [0, 1], "head": [3, 0]}))
    ['L0H3', 'L1H0']
    """
    return [f"L{layer}H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]


def plot_head_map(values: Tensor, text: str | None = None, ax: Axes | None = None,
                  norm: Normalize | None = None, cmap: str = SEQUENTIAL) -> Axes:
    """One (query, key) map (T, T), queries down, keys across; what a query may not see stays blank.

    ``text`` (T characters) labels both axes; without it they count positions. Raises ValueError on
    other shapes.
    """
    ax = ax or plt.gca()
    T = len(values)
    if values.shape != (T, T) or T == 0 or len(text or values) != T:
        labels = "no text" if text is None else f"a text of {len(text)} characters"
        raise ValueError("a map is (T, T) and its text has T characters; "
                         f"here are {tuple(values.shape)} and {labels}")
    shown = np.ma.masked_where(~np.tri(T, dtype=bool), values.cpu().numpy())
    ax.imshow(shown, cmap=cmap, norm=norm, interpolation="none")
    if text is None:
        ticks, labels = range(0, T, max(1, T // 4)), None
    else:
        ticks, labels = range(T), printable(text)
        ax.tick_params(labelsize=9, length=0)
        ax.set(xlabel="key", ylabel="query")
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    return ax


def plot_head_intervals(table: pd.DataFrame, colors: Mapping[str, str],
                        ax: Axes | None = None) -> Axes:
    """A point with its 95 % interval for every head, the heads side by side.

    table: as ``energy_table`` makes it; colors: columns to draw, each with its key in ``COLORS``.
    """
    ax = ax or plt.gca()
    positions = np.arange(len(table))
    for i, (column, color) in enumerate(colors.items()):
        shift = 0.18 * (i - (len(colors) - 1) / 2)
        below = table[column] - table[f"{column}_lo"]
        above = table[f"{column}_hi"] - table[column]
        ax.errorbar(positions + shift, table[column], yerr=np.clip([below, above], 0, None),
                    fmt="os^D"[i], markersize=4, linewidth=1.5, color=COLORS[color], label=column)
    ax.set_xticks(positions, head_names(table))
    ax.tick_params(axis="x", labelsize="small")
    return ax


def plot_split(attn: Tensor, grad: Tensor, keys: Iterable[str], ax: Axes | None = None) -> Axes:
    """A row's gradient as a sum, key by key: d from zero, o from where d ends, f = d + o from zero.

    attn, grad: the weights of one query's keys and the errors that arrive at them, (n,) each;
    keys: n labels.
    """
    ax = ax or plt.gca()
    f, d, o = (part.numpy() for part in split_softmax_gradient(attn, grad))
    positions = np.arange(len(f))
    ax.bar(positions - 0.27, d, 0.25, color=COLORS["diag"], label="d")
    ax.bar(positions, o, 0.25, bottom=d, color=COLORS["offdiag"], label="o")
    ax.bar(positions + 0.27, f, 0.25, color=COLORS["full"], label="f")
    ax.use_sticky_edges = False  # else no room is left where bars end
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.set_xticks(positions, keys)
    ax.set(xlabel="key", ylabel="gradient at the score")
    ax.legend(ncols=3)
    return ax


def signed_scale(maps: Tensor, linear: float = 0.01) -> SymLogNorm:
    """A scale for signed values, centred on zero: logarithmic beyond ``linear`` of the largest."""
    high = torch.where(maps.isfinite(), maps.abs(), 0).max().item() or 1.0  # zeros have one, too
    return SymLogNorm(linear * high, vmin=-high, vmax=high)
