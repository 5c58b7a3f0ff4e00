"""Shared tools of the notebooks, in reading order: data, training, capture and energies."""

from __future__ import annotations

import ast
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
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import BinaryIO, NamedTuple
from unittest import mock

import numba
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints
from tqdm import tqdm

import model_local
from model_local import (SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig, attention_weights, diagonal,
                         full)

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"

# --------------------------------------------------------------------------------------------------
# 1. Data: a corpus is a folder in nanoGPT's layout, made by data/prepare.py
# --------------------------------------------------------------------------------------------------

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
        if unknown := [character for character in text if character not in self.stoi]:
            raise ValueError(f"{unknown[0]!r} does not occur in {self.name!r}: leave it out")
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
        return (f"Corpus: {'Tiny Shakespeare' if self.is_shakespeare else self.name}, "
                f"{len(self.train):,} training and {len(self.val):,} validation tokens, "
                f"{self.vocab_size} distinct.")

    def _repr_markdown_(self) -> str:
        notice = ("\n\n> **Not Tiny Shakespeare**: what sentences and titles of figures say of "
                  "trained models was seen on that, not here.")
        return repr(self) if self.is_shakespeare else repr(self) + notice


def load_corpus(name: str | None = None, root: Path = DATA) -> Corpus:
    """Open the corpus ``root/name``; by default the environment's CORPUS, else Tiny Shakespeare.

    FileNotFoundError where it is missing and ValueError where it is damaged say what to do.
    """
    name = os.environ.get("CORPUS") or "shakespeare_char" if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} names no corpus: only letters, digits, _ and - can be in it")
    folder, make = root / name, ("'python data/prepare.py' makes Tiny Shakespeare, with "
                                 f"'--text FILE --name {name}' a text of your own")
    for path in (folder, folder / "train.bin", folder / "val.bin", folder / "meta.pkl"):
        if not path.exists():
            raise FileNotFoundError(f"{path.relative_to(root.parent)} is missing: {make}")
    try:
        itos = _vocabulary(folder / "meta.pkl")
        train, val = (np.memmap(folder / f"{part}.bin", "<u2", "r") for part in ("train", "val"))
        # An id without a character would otherwise fail far from here.
        if (highest := max(train.max(), val.max())) >= len(itos):
            raise ValueError(f"a token id is {highest}, and the vocabulary ends at {len(itos) - 1}")
    except Exception as error:  # a hostile or broken pickle can fail in any way
        raise ValueError(f"{root.name}/{name} is damaged ({type(error).__name__}: {error}): "
                         f"{make}") from error
    # A text may be like that, too ("a\nb\n"), and nothing tells the two apart: so it is no error.
    if not (train[1::2].any() or val[1::2].any()):
        warnings.warn(f"every second token of {root.name}/{name} is 0, as in files of 4-byte ids "
                      "(int32): if they are that, write them as 2-byte ids (uint16)", stacklevel=2)
    digest = hashlib.sha256(json.dumps(list(itos.values())).encode())
    digest.update(train)
    digest.update(val)
    return Corpus(name, train, val, {c: i for i, c in itos.items()}, itos, digest.hexdigest())


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers alone: a pickle could call any program otherwise."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain data is read")


def _vocabulary(path: Path) -> dict[int, str]:
    """A meta.pkl's ``itos``, by id; some exception where it is not as nanoGPT writes it."""
    meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
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

    ``generator`` alone decides which windows are drawn. ValueError on a text shorter than one.
    """
    if len(tokens) <= block_size:
        raise ValueError(f"a window of block_size={block_size} needs {block_size + 1} tokens and "
                         f"this text has {len(tokens)}: choose a smaller one or a longer text")
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator).numpy()
    return _windows(tokens, starts, block_size, device)


def _windows(tokens: np.ndarray, starts: np.ndarray, T: int, device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of the windows that begin at ``starts`` (B, 1), in one gather."""
    window = torch.from_numpy(tokens[starts + np.arange(T + 1)].astype(np.int64)).to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()  # nanoGPT's model takes views


# --------------------------------------------------------------------------------------------------
# 2. Training
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished training run.

    ``history`` has a value a row, with columns step, metric, part, value. Metrics are what the data
    (``val_loss``) and ``measure`` give, ``train_loss`` (nats per token, mean since the row before)
    and ``tokens_per_s``.
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
        return self.history.query("metric == @metric").groupby("step")["value"].mean()


def alignment(model: LocalGPT, x: Tensor, y: Tensor) -> dict[tuple[str, str], float]:
    """Cosine in [-1, 1] of each parameter's gradient with that of exact backpropagation."""
    cosines = gradient_cosines(model, twin(model, **asdict(model.config.exact)), x, y)
    return {("alignment", name): cosine for name, cosine in cosines.items()}


def adamw(model: LocalGPT, lr: float, steps: int) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) at a constant rate, with PyTorch's other defaults."""
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def train(config: LocalGPTConfig, steps: int = 500, lr: float = 1e-3, batch_size: int = 32,
          seed: int = 1337, data: Corpus | None = None, eval_every: int = 50,
          measure: Callable[..., Mapping[tuple[str, str], float]] = alignment, device: str = "cpu",
          directory: str | os.PathLike | None = DATA / "runs", progress: bool = True,
          optimizer: Callable[[LocalGPT, float, int], torch.optim.Optimizer] = adamw) -> Run:
    """Train a LocalGPT, or load the run if it was trained before.

    ``data`` is the default corpus if not given, or anything that has ``vocab_size``, ``sha256``,
    ``batch`` and ``score`` as a Corpus has them. ``optimizer`` makes one of (model, lr, steps).
    Every ``eval_every`` steps the model is scored, and a copy of it measured on one fixed batch:
    ``measure(model, x, y)`` returns numbers by (metric, part). A finished run is kept in
    ``directory`` (None: nowhere) under a hash of all that determines it. TypeError or ValueError on
    arguments that cannot be, RuntimeError on an unknown device, FloatingPointError on divergence.
    """
    data = load_corpus() if data is None else data
    device = str(torch.device(device))
    _check_run(config, steps, lr, batch_size, seed, data, eval_every, optimizer)
    saved = path = None
    if directory is not None:
        # all that determines a run: arguments, data, PyTorch and code. What that calls elsewhere is
        # not followed: delete the run where it has changed.
        rule = SOFTMAX_BACKWARD[config.softmax_backward]
        parts = model_local, _training, evaluate, get_batch, type(data), rule, measure, optimizer
        numbers = int(steps), float(lr), int(batch_size), int(seed), int(eval_every)
        settings = "\n".join([repr((config, numbers, device)), data.sha256, torch.__version__,
                              *map(_source, parts)])
        key = hashlib.sha256(settings.encode()).hexdigest()[:12]
        path = Path(directory) / f"{config.method}-{config.softmax_backward}-{key}.pt"
        saved = _load_checkpoint(path)
    with torch.random.fork_rng(devices=[]):  # whoever calls keeps their own random numbers
        if saved is None:
            saved = _training(config, steps, lr, batch_size, seed, data, eval_every, measure,
                              device, optimizer, progress)
            if path:
                save_atomically(path, lambda file: torch.save(saved, file))
        model = LocalGPT(config).to(device)
    model.load_state_dict(saved["model"])
    table = pd.DataFrame(saved["history"], columns=["step", "metric", "part", "value"])
    return Run(model.eval(), table, saved["snapshots"])


def _check_run(config, steps, lr, batch_size, seed, data, eval_every, optimizer) -> None:
    """Refuse arguments of ``train`` that cannot be."""
    if not isinstance(config, LocalGPTConfig):
        raise TypeError(f"config={config!r} is no LocalGPTConfig: write LocalGPTConfig(...)")
    if not hasattr(data, "vocab_size"):
        raise TypeError(f"data={data!r} is no corpus: write data=load_corpus() or a task")
    if not callable(optimizer):
        raise TypeError(f"optimizer={optimizer!r} is no function: see OPTIMIZERS in data/sweep.py")
    if config.vocab_size != data.vocab_size:
        raise ValueError(f"config.vocab_size={config.vocab_size} and the data have "
                         f"{data.vocab_size}: write vocab_size=data.vocab_size")
    for name, number, least in (("steps", steps, 1), ("batch_size", batch_size, 1),
                                ("eval_every", eval_every, 1), ("seed", seed, 0)):
        is_whole = isinstance(number, Integral) and not isinstance(number, bool)
        if not is_whole or not least <= number < 2**63:
            raise ValueError(f"{name}={number!r} is not a whole number from {least} up")
    if not isinstance(lr, Real) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} is not a positive number")


def _source(part) -> str:
    """Code without comments and docstrings; of an instance that of its class, and its values."""
    if isinstance(part, functools.partial):
        return "\n".join([_source(part.func), repr(part.args), repr(part.keywords)])
    if not (inspect.ismodule(part) or inspect.isclass(part) or inspect.isroutine(part)):
        values = getattr(part, "__dict__", {}).values()
        held = [_source(value) if callable(value) else repr(value) for value in values]
        return "\n".join([_source(type(part)), *held])
    try:
        source = textwrap.dedent(inspect.getsource(part))
        tree = ast.parse(source)
    except SyntaxError:  # a lambda in the middle of a call
        return source
    except (OSError, TypeError) as error:
        raise ValueError(f"the code of {part!r} cannot be read: define it in a file or a notebook, "
                         "or say directory=None") from error
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_docstring and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _training(config, steps, lr, batch_size, seed, data, eval_every, measure, device, optimizer,
              progress) -> dict:
    """The loop of ``train``: the model's state, its history as rows, its parameters by step."""
    torch.manual_seed(seed)
    model = LocalGPT(config).to(device)
    optimizer = optimizer(model, lr, steps)
    batches = torch.Generator().manual_seed(seed)
    no_runs = torch.Generator().manual_seed(-1)
    probe = data.batch(config.block_size, batch_size, no_runs, device)
    history, snapshots = [], {}

    def record(step: int, metrics: dict[str, float]) -> None:
        values = {(metric, ""): value for metric, value in (metrics | data.score(model)).items()}
        with torch.random.fork_rng(devices=[]):  # to measure changes nothing
            measured = measure(twin(model).eval(), *probe)
        for (metric, part), value in measured.items():  # plain numbers: the safe loader reads them
            values[str(metric), str(part)] = float(value)
        history.extend((step, *key, value) for key, value in values.items())
        snapshots[step] = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}

    record(0, {})
    losses, start = [], time.perf_counter()
    silence = {} if progress else {"disable": True}  # False would overrule TQDM_DISABLE
    title = f"{config.method}/{config.softmax_backward}"
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
    return {"model": model.state_dict(), "history": history, "snapshots": snapshots}


@torch.no_grad()
def evaluate(model: LocalGPT, tokens: np.ndarray, n_windows=512, batch_size=64) -> float:
    """Mean cross-entropy in nats per token over evenly spaced windows, the same at every call."""
    T, device = model.config.block_size, next(model.parameters()).device
    if len(tokens) <= T:
        raise ValueError(f"{len(tokens)} tokens for validation: too few for block_size={T}")
    starts = np.unique(np.linspace(0, len(tokens) - T - 1, n_windows).astype(np.int64))[:, None]
    was_training = model.training
    model.eval()
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        total += model(*_windows(tokens, chunk, T, device))[1].item() * len(chunk)
    model.train(was_training)
    return total / len(starts)


def twin(model: LocalGPT, **changes) -> LocalGPT:
    """The same weights under changed settings, e.g. ``method="bp"``; so for feedback and memory."""
    with torch.random.fork_rng(devices=[]):
        other = LocalGPT(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.to(next(model.parameters()).device).train(model.training)


def gradients(model: LocalGPT, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """The gradient of the loss on (x, y), by parameter (None: none arrives); ``.grad`` stays."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(x, y)[1], list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def gradient_cosines(model: LocalGPT, reference: LocalGPT, x: Tensor, y: Tensor) -> dict:
    """Cosine in [-1, 1] of two models' gradients on one batch, by parameter; none of zero is in."""
    mine, theirs = gradients(model, x, y), gradients(reference, x, y)
    cosines = {}
    for name, g in mine.items():
        if g is not None and theirs[name] is not None and g.any() and theirs[name].any():
            pair = g.double().flatten(), theirs[name].double().flatten()
            cosines[name] = F.cosine_similarity(*pair, dim=0, eps=0).item()
    return cosines


def save_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write(file)`` fill a neighbour of ``path``, then rename it: all is seen, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")
    try:
        with open(part, "xb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _load_checkpoint(path: Path) -> dict | None:
    """A stored run; None where there is none or, with a warning, where it is damaged."""
    try:
        saved = torch.load(path, weights_only=True)  # never unpickles code
        return {part: saved[part] for part in ("model", "history", "snapshots")}
    except FileNotFoundError:
        return None
    except Exception as error:  # a half-written or corrupted archive can fail in any way
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path.name} is damaged ({why}): training again", stacklevel=3)
        return None


# --------------------------------------------------------------------------------------------------
# 3. Capture and energies
# --------------------------------------------------------------------------------------------------

TINY = torch.finfo(torch.float32).tiny  # a weight below this is that of a hidden key


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
        return _FusedCall(*(x.to(torch.get_autocast_dtype(device)) for x in self[:3]), *self[3:])

    def in_full(self) -> _FusedCall:
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
            visible = visible & _visible_keys(scores, self.attn_mask.dtype)
        return scores, visible


def _visible_keys(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Which keys (B, H, T_q, T_k) are not hidden by their scores, masked by numbers of ``dtype``.

    No score hides a key by itself: -10,000 and -100 do, and a model may have -110,000 on a key that
    it sees. But it does by its weight, in float32 at least: half precision has zeros elsewhere. If
    all scores of a query are about the type's least number, it is padding, and sees none.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    log_weights = scores - scores.logsumexp(-1, keepdim=True)
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) / 2
    return ~(log_weights < math.log(TINY)) & ~(scores <= least).all(-1, keepdim=True)


def _softmax_or_nothing(scores: Tensor) -> Tensor:
    """A query that may see no key, as in padding, attends to none."""
    return scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)


class _Softmaxes(TorchFunctionMode):
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
            hooks.enter_context(modules.register_module_forward_pre_hook(self._enter))
            hooks.enter_context(modules.register_module_forward_hook(self._leave, always_call=True))
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
            call = _FusedCall(*args, **kwargs)
            self._admit(max(call[:3], key=Tensor.dim))
            return self.fused(func, call.cast())
        if name in ("softmax", "special_softmax"):  # of torch, torch.nn.functional, or a tensor
            return self._softmax(func, *args, **kwargs)
        if name in ("multi_head_attention_forward", "softmin", "gumbel_softmax"):
            return self._inside(func, *args, **kwargs)
        return func(*args, **kwargs)

    def fused(self, attention: Callable[..., Tensor], given: _FusedCall) -> Tensor:
        """The output of ``F.scaled_dot_product_attention`` by way of weights that can be seen."""
        with torch.autocast(given.query.device.type, enabled=False):
            call = given.in_full()
            scores, visible = call.scores()
            attn = self.weights(scores, visible, _softmax_or_nothing, full)
            return (F.dropout(attn, call.dropout_p) @ call.value).to(given.value.dtype)

    def _softmax(self, func, input: Tensor, dim: int | None = None, *args, **kwargs):
        is_batched = input.dim() == 4
        if dim not in (-1, input.dim() - 1) or not (is_batched or self.n_heads):
            if input.dim() > 2:  # two axes are of classes or of experts
                self.passed[self.at_work[-1]] = tuple(input.shape)
            return func(input, dim, *args, **kwargs)
        scores = input if is_batched else input.unflatten(0, (-1, self.n_heads))
        self._admit(scores)
        attn = self.weights(scores, _visible_keys(scores, scores.dtype),
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



class CapturedAttention:
    """One attention of a model, a softmax over keys, in the passes that a capture has seen.

    ``sums`` are those of all passes whose gradients arrived, see ``head_sums``; ``shape`` is that
    of the last one's scores, (B, H, T_q, T_k). Maps, where kept, are ``scores`` as the model masks
    them, ``attn``, ``grad`` = dL/dA (B, H, T_q, T_k) and ``visible`` (boolean, broadcasts to that)
    of the pass whose gradient arrived last, or of a later forward pass. Reading what was not
    captured is a RuntimeError that says why.
    """

    scores = property(lambda self: self._read("scores"))
    attn = property(lambda self: self._read("attn"))
    visible = property(lambda self: self._read("visible"))
    grad = property(lambda self: self._read("grad"))

    def __init__(self, name: str, keep_maps: bool) -> None:
        self.name, self.keep_maps = name, keep_maps
        self.shape: tuple[int, ...] | None = None
        self.kept: dict = {}  # the maps by name, or a list of sums
        self.why_no_grad = ""

    @property
    def sums(self) -> Tensor:
        if self.keep_maps:
            return head_sums(self.attn, self.grad, self.visible)
        return torch.cat(self._read("sums"))

    def _read(self, name: str) -> Tensor | list[Tensor]:
        if name != "sums" and not self.keep_maps:
            raise RuntimeError(f"no maps of {self.name!r}: say capture_attention(model, maps=True)")
        if name not in self.kept:
            raise RuntimeError(f"no gradient reached the attention weights of {self.name!r}: "
                               f"{self.why_no_grad}")
        return self.kept[name]


class _Watched(torch.autograd.Function):
    """A tensor, unchanged, whose gradient is seen as it passes by: ``arrived(gradient, *seen)``."""

    @staticmethod
    def forward(ctx, x: Tensor, arrived: Callable[..., None], *seen: Tensor | None) -> Tensor:
        ctx.arrived = arrived
        ctx.save_for_backward(*seen)  # in the graph alone: freed or recomputed with it
        return x.detach()  # what follows may change it in place, which a view would not allow

    @staticmethod
    def backward(ctx, grad: Tensor):
        seen = ctx.saved_tensors  # read once: a checkpoint may recompute them for it
        ctx.arrived(grad.detach(), *seen)
        return grad, None, *(None for _ in seen)


TILE = 2**21  # pairs of a query and a key whose maps are made at once: 8 MB each in float32


@torch.no_grad()
def _fused_sums(call: _FusedCall, grad_out: Tensor) -> Tensor:
    """``head_sums`` of a fused attention, of as many queries at a time as ``TILE`` holds.

    Both maps follow from what it is given: ``A = softmax(scores)`` and ``dL/dA = dO V^T``. Weights
    end where a causal mask hides all further keys, dL/dA does not.
    """
    call = call.in_full()
    B, H, T_q, _ = grad_out.shape
    n = max(1, TILE // max(1, B * H * call.key.shape[-2]))
    sums = 0
    with torch.autocast(grad_out.device.type, enabled=False):
        for start in range(0, max(1, T_q), n):
            rows = slice(start, start + n)
            scores, visible = call.scores(rows)
            grad = grad_out[:, :, rows].to(call.value) @ call.value.mT
            # weights that several sequences or heads share have the sum of their gradients
            grad = grad.sum_to_size(*scores.shape[:2], *grad.shape[2:])
            attn = _softmax_or_nothing(scores.masked_fill(~visible, -math.inf))
            sums = sums + head_sums(attn, grad, visible)
    return sums


class _Capture(_Softmaxes):
    """Shows every attention to a ``CapturedAttention``, by the name of the module at work."""

    def __init__(self, model: nn.Module, only: str, maps: bool) -> None:
        super().__init__(model, only, self._watched)
        self.maps = maps
        self.is_open = True  # gradients that arrive after the 'with' block are not taken in
        self.layers: list[CapturedAttention] = []

    def _watched(self, scores, visible, activation, send_back) -> Tensor:
        if send_back is None:
            attn = activation(scores)
        else:
            attn = attention_weights(scores, visible, activation, send_back)
        layer, maps = self._layer(), {}  # without maps, the graph is not to keep scores alive
        if self.maps:
            maps = {"scores": scores.detach(), "attn": attn.detach(), "visible": visible}
            layer.kept = maps

        def arrived(grad: Tensor, attn: Tensor, visible: Tensor) -> None:
            sees_some = visible.any(-1, keepdim=True)
            if not sees_some.all():  # a padded query, whatever the model makes of it
                attn = attn.masked_fill(~sees_some, 0.0)
            layer.shape = tuple(attn.shape)
            if maps:
                layer.kept = maps | {"attn": attn, "grad": grad}
            else:
                layer.kept.setdefault("sums", []).append(head_sums(attn, grad, visible))

        return self._watch(layer, attn, arrived, attn.detach(), visible)

    def fused(self, attention, call: _FusedCall) -> Tensor:
        if self.maps or call.dropout_p > 0:  # what dropout left, the kernel tells nobody
            return super().fused(attention, call)
        layer, options = self._layer(), call[4:]

        def arrived(grad: Tensor, *tensors: Tensor | None) -> None:
            sums = _fused_sums(_FusedCall(*tensors, *options), grad)
            layer.shape = (*sums.shape[:2], tensors[0].shape[-2], tensors[1].shape[-2])
            layer.kept.setdefault("sums", []).append(sums)

        tensors = [x if x is None else x.detach() for x in call[:4]]
        return self._watch(layer, attention(**call._asdict()), arrived, *tensors)

    def _watch(self, layer: CapturedAttention, x: Tensor, arrived, *seen: Tensor | None) -> Tensor:
        def passing(*arguments) -> None:
            if self.is_open and torch.is_grad_enabled():
                raise RuntimeError(f"create_graph=True: the gradient at {layer.name!r} is to be "
                                   "differentiated itself, and then the softmax's Jacobian is not "
                                   "all that links its weights to its scores: take a penalty on "
                                   "gradients outside of the 'with' block")
            if self.is_open:
                arrived(*arguments)

        if x.requires_grad:
            layer.why_no_grad = ("call loss.backward() inside the 'with' block, on a loss that "
                                 "depends on this layer")
            return _Watched.apply(x, passing, *seen)
        layer.why_no_grad = "the pass ran under torch.no_grad(), or every parameter is frozen"
        return x

    def _layer(self) -> CapturedAttention:
        name = self.at_work[-1]
        self.used[name] = self.used.get(name, 0) + 1
        if self.used[name] > 1:  # a module that is used again in the same pass is a further layer
            name = f"{name} ({self.used[name]})"
        for layer in self.layers:
            if layer.name == name:
                return layer
        self.layers.append(CapturedAttention(name, self.maps))
        return self.layers[-1]


@contextmanager
def capture_attention(model: nn.Module, maps=False, only="") -> Iterator[list[CapturedAttention]]:
    """Record every attention of ``model``, a PyTorch transformer; yields a list that fills.

    An attention is a softmax over keys that runs in one of the model's modules, by
    ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, or any of PyTorch's softmax
    functions on scores (B, H, T_q, T_k); layers are named after the module and come in their order
    of use. Each keeps what ``energy_table`` needs of every backward pass inside the block, or if
    ``maps`` the maps of the last one. ``only`` is a regular expression that names are to match.

    A fused attention stays fused, but for maps, with dropout and under a ``softmax_rule``. On
    leaving, also after an exception, the model and PyTorch are as they were. Raises ValueError,
    before the pass goes on, on what is compiled, nested, run by ``torch.func``, or has another
    second axis than the model's heads; RuntimeError if no attention was found, and on a gradient
    that is to be differentiated. Softmaxes of other shapes are let through, a warning names them.
    What has the shape of attention is taken for it: over features, too (as in linear attention),
    with windows in the batch axis, or where positions are as many as heads.

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
        capture.is_open = False


@contextmanager
def softmax_rule(model: nn.Module, name: str, only: str = "") -> Iterator[None]:
    """Inside the block all attentions of ``model`` send errors back by a ``SOFTMAX_BACKWARD``.

    See ``capture_attention`` for what is an attention, for ``only`` and for what is refused;
    ValueError also on a rule that is not known, or that has a memory. In a mixture of softmaxes
    ``none`` cuts off all that stands before its weights.
    """
    rules = {key: rule for key, rule in SOFTMAX_BACKWARD.items() if not hasattr(rule, "start")}
    if name not in rules:
        raise ValueError(f"{name!r} is no rule without a memory: choose one of {', '.join(rules)}")

    @torch.no_grad()
    def send_back(attn: Tensor, grad: Tensor, visible: Tensor) -> Tensor | None:
        sent = rules[name](attn, grad, visible)
        return sent if sent is None else sent.masked_fill(~visible.any(-1, keepdim=True), 0.0)

    def weights(scores, visible, activation, _) -> Tensor:
        return attention_weights(scores, visible, activation, send_back)

    with _Softmaxes(model, only, weights).attached():
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
    (..., T_q, T_k), rows over the last axis; grad: dL/dA of the same shape, else ValueError. Each
    part is computed from its own formula and none by subtraction, so that their sum is a check.

    >>> parts = split_softmax_gradient(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, -1.0]]))
    >>> parts.full, parts.diag, parts.offdiag
    (tensor([[ 0.5000, -0.5000]]), tensor([[ 0.2500, -0.2500]]), tensor([[ 0.2500, -0.2500]]))
    """
    _expect(attn.shape == grad.shape, "maps whose shapes agree", attn=attn, grad=grad)
    weighted = attn * grad
    minus_others = weighted - weighted.sum(-1, keepdim=True)  # the sum without the key's own term
    visible = torch.ones((), dtype=torch.bool)  # neither rule needs it: a masked key has a = 0
    exact, diag = full(attn, grad, visible), diagonal(attn, grad, visible)
    return SoftmaxGradient(exact, diag, attn * minus_others)


ROUNDING = 0.01  # the share of |f| that rounding may account for: beyond, a head is not defined
EPS64 = 16 * np.finfo(float).eps  # of a sum of products in float64
# The columns of head_sums: inner products over (query, key) pairs, e being g on the visible keys;
# entropy and attn_max over queries that see several keys, and how many these are; how many queries
# see a key, visible pairs, and what rounding may make of |f|^2.
SUMS = ["ff", "dd", "df", "ee", "gg", "gf", "entropy", "attn_max", "several", "rows", "pairs",
        "noise"]


@torch.no_grad()
def head_sums(attn: Tensor, grad: Tensor, visible: Tensor) -> Tensor:
    """The sums that ``head_energy`` is made of: (B, H, len(SUMS)) in float64.

    Those of further queries add to them, those of further sequences are appended. ``attn`` may end
    before ``grad`` does: all keys behind are masked. ValueError on what is no softmax of attention;
    where values are not finite, nor are the sums.
    """
    if not attn.numel():
        return torch.zeros(*attn.shape[:2], len(SUMS), dtype=torch.float64)
    # float32 at least, which holds half precision without loss; the kernel wants four axes
    maps = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (attn, grad)]
    seen = visible[(None,) * (4 - visible.dim())]
    seen = seen.expand(*seen.shape[:3], attn.shape[-1]).contiguous().view(torch.uint8)
    arrays = [x.cpu().contiguous().numpy() for x in (*maps, seen)]
    sums, off, hidden = (torch.from_numpy(x) for x in _map_sums(*arrays))
    if (hidden > TINY * max(attn.shape[-2:]) ** 2).any():
        raise ValueError("attn is not zero on masked keys: pass as visible= the keys that queries "
                         "may see in the model, for an encoder torch.ones(T, T, dtype=torch.bool)")
    if (off > 2**-7).any():  # what bfloat16 leaves of a sum of 1
        raise ValueError("the rows of attn are not weights that sum to 1: expected a softmax's")

    # What rounding makes of f = J g: relative errors u of g give
    # u^2 sum_k |J's column k|^2 g_k^2 <= 2 u^2 |d|^2, those of a, whose rows sum to 1, 2 u^2 |f|^2.
    # Near zero errors are absolute, the smallest step of the type. float64 adds its own.
    types = [torch.finfo(x.dtype) for x in (attn, grad)]
    u = max(off.nan_to_num(0.0).max().item(), types[0].eps / 2, types[1].eps / 2)
    step_a, step_g = (each.smallest_normal * each.eps for each in types)
    ff, dd, ee, rows = (sums[..., SUMS.index(name)] for name in ("ff", "dd", "ee", "rows"))
    noise = 2 * u**2 * (ff + dd) + (step_a**2 + EPS64**2) * ee + step_g**2 / 8 * rows
    return torch.cat([sums, noise[..., None]], dim=-1)


# fastmath without "nnan" and "ninf": NaN and infinity have to come through to be refused
@numba.njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _map_sums(attn, grad, visible):
    """One reading of the maps (B, H, T_q, T_k), a row at a time, in float64.

    visible: 0 or 1, (B or 1, H or 1, T_q or 1, T_k). Returns by sequence and head ``SUMS`` without
    noise, how far at most a row is from weights that sum to 1, and what lies on masked keys.
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
    """The natural logarithm of a normal float64 to 13 digits.

    A library's is a call, which the compiler cannot do for several numbers at once. Here bits take
    ``x = 2^n m`` apart, m within a factor of sqrt(2) of 1, and ``log m = 2 artanh((m - 1) /
    (m + 1))`` is its series.
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


def head_energy(attn: Tensor, grad: Tensor, visible: Tensor | None = None, n_boot: int = 1000,
                seed: int = 0) -> pd.DataFrame:
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

    Energies are summed over (query, key) pairs, averaged over sequences, then divided: a ratio of
    means. Cosines are those of flattened maps, averaged over sequences that have a gradient.
    ``entropy`` and ``attn_max`` leave out queries with one key. ``*_lo`` and ``*_hi`` bound the 95
    % bootstrap interval over sequences (of width 0 for a single one, NaN where a resample held none
    with a gradient). Sums run in float64; the scale of grad is free while its squares fit that.

    A head is ``defined`` where the rounding of attn and grad to their types moves f by no more than
    ``ROUNDING`` = 1 % of |f|: ratios are then right to 2 % of the largest, cosines to 0.01, and NaN
    as well where a single sequence fails this. Pass half precision in its own type, not as float32.
    Raises ValueError where attn is no softmax over the visible keys, or a value is not finite.

    >>> a = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double()[None, None]
    >>> row = head_energy(a, torch.tensor([[1.0, 0.0], [1.0, -1.0]]).double()[None, None]).iloc[0]
    >>> row[["r_diag", "r_offdiag", "r_cross", "cos_diag"]].astype(float).round(9).tolist()
    [0.25, 0.25, 0.5, 1.0]
    """
    size = _sizes({"attn": "B H T_q T_k", "grad": "B H T_q T_k"}, attn=attn, grad=grad)
    if visible is None:
        _expect(size["T_q"] == size["T_k"], "a map of visible keys, or T_q = T_k", attn=attn)
        visible = torch.ones(attn.shape[2:], dtype=torch.bool, device=attn.device).tril()
    fits = _is_mask(visible, attn.shape) and visible.dtype == torch.bool
    _expect(fits, f"a boolean torch tensor that broadcasts to {tuple(attn.shape)}", visible=visible)
    return _energies(_finite(head_sums(attn, grad, visible)), n_boot, seed)


def attention_energy(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor,
                     attn_mask: Tensor | None = None, is_causal: bool = False,
                     scale: float | None = None, enable_gqa: bool = False,
                     n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """``head_energy`` of an attention whose maps nobody has made, one row a head.

    query: (B, H, T_q, D); key: (B, H, T_k, D); value: (B, H, T_k, D_v); grad_out: dL/dO (B, H, T_q,
    D_v); all of one type. The others are as ``F.scaled_dot_product_attention`` has them. Maps are
    made for some queries at a time, in float32 at least: memory is linear in T_q and T_k. Raises
    ValueError where shapes, types or mask do not fit, and on values that are not finite.
    """
    given = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    kv = "H_kv" if enable_gqa else "H"
    size = _sizes({"query": "B H T_q D", "key": f"B {kv} T_k D", "value": f"B {kv} T_k D_v",
                   "grad_out": "B H T_q D_v"}, **given)
    _expect(len({x.dtype for x in given.values()}) == 1, "tensors of one type", **given)
    _expect(size["H"] % size[kv] == 0, "a number of heads that those of the keys divide", **given)
    pairs = size["B"], size["H"], size["T_q"], size["T_k"]
    _expect(attn_mask is None or _is_mask(attn_mask, pairs),
            f"a mask, boolean or of scores, that broadcasts to {pairs}", attn_mask=attn_mask)
    call = _FusedCall(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    return _energies(_finite(_fused_sums(call, grad_out)), n_boot, seed)


def energy_table(layers: Iterable[CapturedAttention], n_boot=1000, seed=0) -> pd.DataFrame:
    """``head_energy`` of captured layers and all their passes, one row a (layer, head).

    ``attrs["shapes"]`` are the layers' own. A head that a value reached which is not finite, as in
    the first steps under a GradScaler, is undefined, and a warning says so.
    """
    tables, shapes = [], []
    for i, layer in enumerate(layers):
        sums = layer.sums
        lost = ~sums.isfinite().all(-1).all(0)
        if lost.any():
            warnings.warn(f"layer {i}, heads {lost.nonzero().flatten().tolist()}: weights or "
                          "gradients were not finite in a pass, so their figures are undefined",
                          stacklevel=2)
        table = _energies(sums, n_boot, seed)
        table.insert(0, "layer", i)
        tables.append(table)
        shapes.append(layer.shape)
    if not tables:
        raise ValueError("no layer was given: a table needs one or more")
    table = pd.concat(tables, ignore_index=True)
    table.attrs["shapes"] = shapes
    return table


def _finite(sums: Tensor) -> Tensor:
    if not sums.isfinite().all():
        raise ValueError("attn holds NaN, not weights that sum to 1, or grad values that are not "
                         "finite, or whose squares are not")
    return sums


def _energies(sums: Tensor, n_boot: int, seed: int) -> pd.DataFrame:
    """The columns of ``head_energy`` from those of ``head_sums``."""
    if not isinstance(n_boot, Integral) or n_boot < 1:
        raise ValueError(f"n_boot={n_boot}: an interval needs resamples, a thousand or so")
    B, H, _ = sums.shape
    if not B:
        raise ValueError("no sequence was seen: every batch was empty")
    sums = sums.where(sums.isfinite().all(-1, keepdim=True).all(0), math.nan)
    columns = np.moveaxis(sums.numpy(), -1, 0)  # (B, H) each
    ff, dd, df, ee, gg, gf, entropy, attn_max, several, rows, pairs, noise = columns

    # where rounding decides one sequence, a mean over the others would be that of a selection
    known = ff > noise / ROUNDING**2
    known &= ~((gg > 0) & ~known).any(0)
    energies = {"r_diag": dd, "r_offdiag": ff - 2 * df + dd, "r_cross": 2 * (df - dd),
                "one_minus_r_diag": ff - dd}
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where there is nothing to average
        norm = np.where(known, np.sqrt(ff), np.nan)
        means = {"cos_diag": df / np.sqrt(dd) / norm, "cos_ste": gf / np.sqrt(ee) / norm,
                 "cos_ste_unmasked": gf / np.sqrt(gg) / norm, "entropy": entropy / several,
                 "attn_max": attn_max / several, "attn_mean": rows / pairs}

    # row 0 weighs every sequence once, the others are bootstrap resamples of the sequences
    resamples = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=n_boot)
    weights = np.vstack([np.ones(B), resamples])

    def mean(values: np.ndarray) -> np.ndarray:
        """Over sequences, of energies, cosines and noise alike: (B, H) to (1 + n_boot, H)."""
        finite = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            return weights @ np.where(finite, values, 0) / (weights @ finite)

    energy = mean(ff)
    energy[energy <= mean(noise) / ROUNDING**2] = np.nan
    draws = {name: mean(values) / energy for name, values in energies.items()}
    draws |= {name: mean(values) for name, values in means.items()}

    table = {"head": range(H), "defined": np.isfinite(energy[0])}
    for name, draw in draws.items():
        low, high = np.quantile(draw[1:], [0.025, 0.975], axis=0)
        table |= {name: draw[0], f"{name}_lo": low, f"{name}_hi": high}
    return pd.DataFrame(table)


def _sizes(axes: Mapping[str, str], **given: Tensor) -> dict[str, int]:
    """Lengths of axes by name; refuse tensors in which a name has two lengths, or none."""
    sizes: dict[str, int] = {}
    for name, x in given.items():
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4
        fits = fits and all(0 < n == sizes.setdefault(axis, n)
                            for axis, n in zip(axes[name].split(), x.shape, strict=True))
        _expect(fits, f"floating-point torch tensors {axes}, no axis of length 0", **given)
    return sizes


def _is_mask(x, shape: tuple[int, ...]) -> bool:
    if not isinstance(x, Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
        return False
    axes = zip(x.shape[::-1], shape[::-1], strict=False)
    return x.dim() <= len(shape) and all(n in (1, m) for n, m in axes)


def _expect(fits: bool, what: str, **given) -> None:
    if not fits:
        kinds = [f"{name} {x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else
                 f"{name} {type(x).__name__}" for name, x in given.items()]
        raise ValueError(f"expected {what}, got {', '.join(kinds)}")
