"""What the local rules, the visible attention, its capture and its analysis cost on this machine's CPU: make bench.

Everything is timed in turn, round after round, each round there and back in a new order: a machine that slows down
slows all of it. A ratio is the median over rounds of the ratio of two times in one round, and half of the rounds lie
between its quartiles. Nothing fails here: what is over its bound is marked; wide quartiles mean a busy machine.

The second table is about the capture of other models, of PyTorch and, where it is installed, of the transformers
library, at a length where attention maps are most of what is in memory. Peaks are those of a process of its own each.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import helpers
from model_local import LocalGPT, LocalGPTConfig

BATCH_SIZE = 32  # the report's, as are LocalGPTConfig's defaults


class PlainBlock(nn.Module):
    """nanoGPT's block: one matrix for Q, K and V, and PyTorch's fused attention, whose weights nobody sees."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = (nn.LayerNorm(n_embd, bias=False) for _ in range(2))
        self.qkv_proj = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)
        up_proj, down_proj = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)
        self.mlp = nn.Sequential(up_proj, nn.GELU(), down_proj)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.qkv_proj(self.ln_1(x)).split(C, dim=2))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.o_proj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """LocalGPT's shape as one would write it for speed, trained by autograd."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(config.n_embd, config.n_head) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=False)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(idx) + self.position_embedding(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Shapes(TorchDispatchMode, set):
    """The shapes of all tensors that are made inside the ``with`` block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.update(leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    # a rate of zero: all of the work, and every round has the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def interleave(variants: dict[str, Callable], seconds: float, desc: str) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, the mean of its two turns."""
    times = {name: [] for name in variants}
    start = now = time.perf_counter()
    with tqdm(total=seconds, desc=desc, bar_format="{desc} {percentage:3.0f}% {bar} {elapsed}", leave=False) as bar:
        while now < start + seconds or len(min(times.values())) < 4:
            order = random.sample(sorted(variants), len(variants))
            taken = dict.fromkeys(variants, 0.0)
            for name in (*order, *reversed(order)):
                before, _ = time.perf_counter(), variants[name]()
                now = time.perf_counter()
                taken[name] += 1000 * (now - before) / 2
            for name in variants:
                times[name].append(taken[name])
            bar.update(min(seconds, now - start) - bar.n)
    return {name: series[1:] for name, series in times.items()}  # the first round warmed up


# --- the capture of other models -------------------------------------------------------------------------------------

B, T, C, H, L, V = 4, 512, 128, 4, 4, 256
WAYS = {  # what is around a forward and backward pass
    "without": lambda model: nullcontext(),
    "streaming": helpers.capture_attention,
    "maps": functools.partial(helpers.capture_attention, maps=True),
}


class Case(NamedTuple):
    """A model and its loss on a batch; ``fuse()`` has it use PyTorch's fused attention from then on."""

    model: nn.Module
    loss: Callable[[], Tensor]
    fuse: Callable[[], None] = lambda: None


def of_pytorch(model: nn.Module) -> Case:
    x, y = torch.randn(2, B, T, C)
    forward = model
    if isinstance(model, nn.MultiheadAttention):
        forward = lambda x: model(x, x, x, need_weights=False)[0]  # noqa: E731
    return Case(model, lambda: F.mse_loss(forward(x), y))  # the square alone would be a constant after a LayerNorm


def of_transformers(auto: str, kind: str, implementation: str, **sizes: int) -> Case:
    import transformers  # an extra

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes)
    model = getattr(transformers, auto).from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(V, (B, T))
    return Case(model, lambda: model(input_ids=ids, labels=ids).loss, lambda: model.set_attn_implementation("sdpa"))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 4 * C, dropout=0.0, batch_first=True), L)


CASES = {
    "nn.MultiheadAttention": lambda: of_pytorch(nn.MultiheadAttention(C, H, batch_first=True)),
    "nn.TransformerEncoder": lambda: of_pytorch(encoder()),
    "nanoGPT's block, sdpa": lambda: of_pytorch(nn.Sequential(*(PlainBlock(C, H) for _ in range(L)))),
}
if importlib.util.find_spec("transformers"):
    gpt2 = {"n_embd": C, "n_head": H, "n_layer": L, "n_positions": T}
    llama = {"hidden_size": C, "num_attention_heads": H, "num_key_value_heads": H // 2, "num_hidden_layers": L}
    llama |= {"intermediate_size": 4 * C}
    t5 = {"d_model": C, "d_kv": C // H, "d_ff": 4 * C, "num_heads": H, "num_layers": L, "decoder_start_token_id": 0}
    t5 |= {"pad_token_id": 0}
    for implementation in ("eager", "sdpa"):
        CASES |= {
            f"{name}, {implementation}": functools.partial(of_transformers, auto, kind, implementation, **sizes)
            for name, auto, kind, sizes in (
                ("GPT-2", "AutoModelForCausalLM", "gpt2", gpt2),
                ("Llama, grouped queries", "AutoModelForCausalLM", "llama", llama),
                ("T5, encoder and decoder", "AutoModelForSeq2SeqLM", "t5", t5),
            )
        }


def one_pass(case: Case, way: str) -> list[helpers.CapturedAttention] | None:
    case.model.zero_grad()
    with WAYS[way](case.model) as layers:
        case.loss().backward()
    return layers


def from_outputs(case: Case) -> list[Tensor]:
    """What should arrive at the weights of each attention, by another way: ``dO V^T`` at PyTorch's fused attention."""
    case.fuse()
    fused, seen = F.scaled_dot_product_attention, []

    def seeing(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        out = fused(query, key, value, *args, **kwargs)
        out.retain_grad()
        seen.append((out, value))
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", seeing):
        one_pass(case, "without")
    return [out.grad @ value.repeat_interleave(out.shape[1] // value.shape[1], 1).mT for out, value in seen]


def deviation(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest, as a share of the largest value in its layer."""
    pairs = zip(found, expected, strict=True)
    return max(((one - other).abs().amax() / other.abs().amax()).item() for one, other in pairs)


def peak(name: str, way: str) -> float:
    """MiB that a pass needs beyond what there was before it. Linux only, in a process that did nothing before."""

    def most() -> int:
        # getrusage's maximum would be that of the calling process, where it has used more
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].removesuffix("kB"))

    case = CASES[name]()
    before = most()
    one_pass(case, way)
    return (most() - before) / 1024


def capture_table(seconds: float) -> None:
    print(f"\nCapture in a forward and backward pass: {L} layers, {H} heads, {C} channels, batch ({B}, {T}).")
    print("deviation: of the captured gradient from dO V^T, over the largest; time: over a pass without, quartiles\n")
    row = "{:31} {:>5} {:>9} {:>19} {:>19} {:>8} {:>9} {:>7}"
    print(row.format("model", "heads", "deviation", "time, streaming", "time, maps=True", "MiB", "streaming", "maps"))
    servers = multiprocessing.get_context("forkserver")  # has imported what is needed, and run nothing yet
    with ProcessPoolExecutor(1, mp_context=servers, max_tasks_per_child=1) as pool:
        for name, build in CASES.items():
            peaks = [pool.submit(peak, name, way).result() for way in WAYS]
            torch.manual_seed(0)
            case = build()
            times = interleave({way: functools.partial(one_pass, case, way) for way in WAYS}, seconds, name)
            ratios = []
            for way in ("streaming", "maps"):
                pairs = zip(times[way], times["without"], strict=True)
                low, ratio, high = quantiles((a / b for a, b in pairs), n=4)
                ratios.append(f"{ratio:.2f} ({low:.2f}-{high:.2f})")
            layers = one_pass(case, "maps")
            off = deviation([layer.grad for layer in layers], from_outputs(case))
            heads = sum(layer.attn.shape[1] for layer in layers)
            print(row.format(name, heads, f"{off:.1e}", *ratios, *(f"{mib:.0f}" for mib in peaks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long to measure; a round takes about one second")
    seconds = parser.parse_args().seconds

    config = LocalGPTConfig()
    x, y = torch.randint(config.vocab_size, (2, BATCH_SIZE, config.block_size))  # what the tokens say does not matter
    bp, fa = (LocalGPT(LocalGPTConfig(method=method)) for method in ("bp", "fa"))
    layers = helpers.capture_batch(fa, x, y)

    def uncaptured() -> None:
        fa.zero_grad()
        fa(x, y)[1].backward()

    def captured() -> None:
        with helpers.capture_attention(fa):
            uncaptured()

    variants = {"plain": PlainGPT(config), "bp": bp, "fa": fa}
    variants = {name: training_step(model, x, y) for name, model in variants.items()}
    variants |= {"uncaptured": uncaptured, "captured": captured, "energy": lambda: helpers.energy_table(layers)}
    times = interleave(variants, seconds, "bench")
    with Shapes() as shapes:
        n_heads = len(helpers.energy_table(layers))

    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads, medians of {len(times['bp'])} rounds;")
    print(f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, batch {tuple(x.shape)}\n")
    row = "{:51} {:>6} {:>12} {:>6} {:>7} {:>7}  {}"
    print(row.format("what (a over b)", "ratio", "quartiles", "bound", "ms a", "ms b", ""))
    for what, a, b, bound in (
        ("training step, fa over bp", "fa", "bp", 1.05),
        ("training step, bp over a plain GPT, attention fused", "bp", "plain", 1.0),
        ("forward and backward, with capture over without", "captured", "uncaptured", 1.3),
    ):
        low, ratio, high = quantiles((ta / tb for ta, tb in zip(times[a], times[b], strict=True)), n=4)
        ms = [f"{median(times[name]):.1f}" for name in (a, b)]
        print(row.format(what, f"{ratio:.3f}", f"{low:.3f}-{high:.3f}", f"{bound:.2f}", *ms, "OVER" * (ratio > bound)))
    energy = median(times["energy"])
    what = f"head_energy, {n_heads} heads"
    print(row.format(what, "", "", "50 ms", f"{energy:.1f}", "", "OVER" * (energy > 50)))
    n_cubes = sum(shape.count(config.block_size) > 2 for shape in shapes)
    print(f"\nhead_energy's largest tensor is {tuple(max(shapes, key=torch.Size.numel))}; T x T x T tensors: {n_cubes}")
    capture_table(seconds / 10)


if __name__ == "__main__":
    main()
