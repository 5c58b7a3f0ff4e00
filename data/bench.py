"""What learning rules, the capture and the split cost on this machine's CPU: data/bench.csv.

    python data/bench.py     about four minutes on two cores; other work beside it spoils the times

A row a measurement. What is compared is timed in turn, round after round, each round there and
back in a new order: a machine that slows down slows all of it. A ratio is the median over rounds
of the ratio of two times in one round, and half of the rounds lie between its quartiles ``low``
and ``high``; ``ms`` and ``ms_over`` are medians. Peaks of memory, in MiB, are beyond what there
was before, in a process of their own (Linux only).
"""

import functools
import multiprocessing
import platform
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.context import LongGPT
from helpers import DATA, attention_energy, capture_attention, head_energy, save_atomically
from model_local import LocalGPT, LocalGPTConfig

BENCH = DATA / "bench.csv"
COLUMNS = ["part", "model", "what", "over", "B", "H", "T", "ratio", "low", "high"]
COLUMNS += ["ms", "ms_over", "mib", "torch", "processor", "threads"]
SECONDS = 60  # for the training steps; for others a part of it
REPORT = LocalGPTConfig(method="bp")  # the report's model


# --- how it is measured -----------------------------------------------------------------------


def interleave(works: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each work in each round, the mean of its two turns."""
    times = {name: [] for name in works}
    start = time.perf_counter()
    while time.perf_counter() < start + seconds or len(min(times.values())) < 4:
        # there and back, so that each one's two turns are as late on average
        order = random.sample(sorted(works), len(works))
        taken = dict.fromkeys(works, 0.0)
        for name in order + order[::-1]:
            before = time.perf_counter()
            works[name]()
            taken[name] += 1000 * (time.perf_counter() - before) / 2
        for name in works:
            times[name].append(taken[name])
    return {name: rounds[1:] for name, rounds in times.items()}  # the first one warmed up


def compared(times: dict[str, list[float]], what: str, over: str, **about) -> dict:
    """The row of one work over another: ratios within a round, then their quartiles."""
    ratios = [a / b for a, b in zip(times[what], times[over], strict=True)]
    low, ratio, high = quantiles(ratios, n=4)
    row = about | {"what": what, "over": over, "ratio": ratio, "low": low, "high": high}
    return row | {"ms": median(times[what]), "ms_over": median(times[over])}


def apart(function: Callable, *args):
    """What ``function`` returns in a process that did nothing before."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


def peak(work: Callable[[], object]) -> float:
    """MiB that ``work`` needs beyond what there is before it. Linux only."""

    def kilobytes(name: str) -> int:
        # not getrusage's maximum, which begins with that of the calling process
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is in memory now
    before = kilobytes("VmRSS")
    work()
    return (kilobytes("VmHWM") - before) / 1024


# --- a training step --------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """nanoGPT's block: one matrix for Q, K and V, and fused attention, which shows no weights."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(n_embd, bias=False)
        self.ln_2 = nn.LayerNorm(n_embd, bias=False)
        self.qkv_proj = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)
        up_proj = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp = nn.Sequential(up_proj, nn.GELU(), nn.Linear(4 * n_embd, n_embd, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv_proj(self.ln_1(x)).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """LocalGPT's shape as one would write it for speed, trained by autograd."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        C, V = config.n_embd, config.vocab_size
        self.token_embedding = nn.Embedding(V, C)
        self.position_embedding = nn.Embedding(config.block_size, C)
        blocks = [PlainBlock(C, config.n_head) for _ in range(config.n_layer)]
        self.blocks = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(C, bias=False)
        self.lm_head = nn.Linear(C, V, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step(model: nn.Module, config: LocalGPTConfig, batch: int) -> Callable[[], None]:
    """A training step: forwards, backwards, AdamW."""
    # a rate of zero: all of the work, and every round has the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    x, y = torch.randint(config.vocab_size, (2, batch, config.block_size))

    def take() -> None:
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return take


def training(seconds: float, config: LocalGPTConfig = REPORT, batch: int = 32) -> list[dict]:
    """By each method and some rules, over PyTorch's layers and over backpropagation."""
    # the second of these has the report's layers, and attention that nobody can see
    models = {"PyTorch's layers": PlainGPT(config), "bp, fused": LongGPT(config)}
    for method in ("bp", "fa", "sign_sym", "dfa"):
        models[method] = LocalGPT(replace(config, method=method))
    for rule in ("diagonal", "ste", "none", "mean", "running"):
        models[rule] = LocalGPT(replace(config, softmax_backward=rule))
    times = interleave({name: step(models[name], config, batch) for name in models}, seconds)
    about = {"part": "training", "B": batch, "H": config.n_head, "T": config.block_size}
    rows = [compared(times, name, "PyTorch's layers", **about) for name in [*models][1:]]
    return rows + [compared(times, name, "bp", **about) for name in [*models][1:] if name != "bp"]


# --- the split --------------------------------------------------------------------------------


def maps(B: int, H: int, T: int) -> tuple[Tensor, Tensor]:
    """Causal attention weights and a gradient, (B, H, T, T) in float32."""
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril()
    attn = torch.randn(B, H, T, T).masked_fill_(hidden, -torch.inf).softmax(-1)
    return attn, 1e-5 * torch.randn(B, H, T, T)


def by_loop(attn: Tensor, grad: Tensor) -> list[Tensor]:
    """What one would write first, in single precision: per head |f|^2, |d|^2, |o|^2, cosine."""
    out = []
    for a, g in zip(attn.unbind(1), grad.unbind(1), strict=True):
        f = a * (g - (a * g).sum(-1, keepdim=True))
        d = a * (1 - a) * g
        energies = [part.square().sum((1, 2)).mean() for part in (f, d, f - d)]
        cosine = F.cosine_similarity(d.flatten(1), f.flatten(1)).mean()
        out.append(torch.stack([*energies, cosine]))
    return out


def reading(attn: Tensor, grad: Tensor) -> Tensor:
    return attn.sum() + grad.sum()


def split(seconds: float, shapes=((32, 16, 64), (8, 8, 512), (1, 8, 2048))) -> list[dict]:
    """The table of all heads over other ways to it, on maps of the ``shapes`` (B, H, T)."""
    rows = []
    ways = {"head_energy": head_energy, "a loop over heads": by_loop, "reading A and g": reading}
    for B, H, T in shapes:
        attn, grad = maps(B, H, T)
        works = {name: functools.partial(way, attn, grad) for name, way in ways.items()}
        times = interleave(works, seconds / 6)
        about = {"part": "split", "B": B, "H": H, "T": T}
        rows += [compared(times, "head_energy", over, **about) for over in [*ways][1:]]
    return rows


def long_table(B: int, H: int, T: int, D: int) -> dict:
    """The row of the table of a context that is too long for maps; memory beyond its inputs."""
    head_energy(*maps(1, 1, 2))  # compiled
    inputs = torch.randn(4, B, H, T, D)
    start = time.perf_counter()
    mib = peak(lambda: attention_energy(*inputs, is_causal=True))
    row = {"part": "split", "what": "attention_energy", "B": B, "H": H, "T": T}
    return row | {"mib": mib, "ms": 1000 * (time.perf_counter() - start)}


# --- the capture ------------------------------------------------------------------------------

SIZES = 4, 512, 128, 4, 4  # (B, T, C), heads and layers
MODELS = "the report's model", "nn.TransformerEncoder", "nanoGPT's block, sdpa"
WAYS = {  # what is around a forward and backward pass
    "without": lambda model: nullcontext(),
    "streaming": capture_attention,
    "maps": functools.partial(capture_attention, maps=True),
}


def captured_pass(name: str, B: int, T: int, C: int, H: int, L: int) -> Callable[[str], None]:
    """A function of the way to look: a forward and backward pass of a model by its name."""
    if name == "the report's model":
        sizes = {"block_size": T, "vocab_size": 256, "n_layer": L, "n_head": H, "n_embd": C}
        model, ids = LocalGPT(replace(REPORT, **sizes)), torch.randint(256, (B, T))
        loss = lambda: model(ids, ids)[1]  # noqa: E731
    else:
        model = nn.Sequential(*(PlainBlock(C, H) for _ in range(L)))
        if name == "nn.TransformerEncoder":
            layer = nn.TransformerEncoderLayer(C, H, 4 * C, dropout=0.0, batch_first=True)
            model = nn.TransformerEncoder(layer, L)
        x, y = torch.randn(2, B, T, C)
        loss = lambda: F.mse_loss(model(x), y)  # noqa: E731

    def run(way: str) -> None:
        model.zero_grad()
        with WAYS[way](model):
            loss().backward()

    return run


def capture_peak(name: str, way: str, sizes: tuple[int, ...]) -> float:
    run = captured_pass(name, *sizes)
    return peak(lambda: run(way))


def capture(seconds: float, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """Forward and backward passes that are captured, over such that are not; and their memory."""
    rows = []
    for name in MODELS:
        run = captured_pass(name, *sizes)
        times = interleave({way: functools.partial(run, way) for way in WAYS}, seconds / 8)
        about = {"part": "capture", "model": name, "B": sizes[0], "H": sizes[3], "T": sizes[1]}
        of_model = [compared(times, way, "without", **about) for way in ("streaming", "maps")]
        of_model.append(about | {"what": "without"})
        rows += [row | {"mib": apart(capture_peak, name, row["what"], sizes)} for row in of_model]
    return rows


# ----------------------------------------------------------------------------------------------


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def main() -> None:
    rows = training(SECONDS) + split(SECONDS)
    rows += [apart(long_table, 1, 4, 16_384, 32), *capture(SECONDS)]
    machine = {"torch": str(torch.__version__), "processor": processor()}
    table = pd.DataFrame(rows).assign(**machine, threads=torch.get_num_threads())[COLUMNS]
    print(table.to_string(index=False, na_rep="", float_format="{:.3g}".format))
    text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    save_atomically(BENCH, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
