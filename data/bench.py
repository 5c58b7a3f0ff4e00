"""What the learning rules, the capture and the split cost on this machine's CPU: make bench writes data/bench.csv.

    python data/bench.py                       about seven minutes on two cores; other work beside it spoils the times
    python data/bench.py --nanogpt FOLDER      the training step also against nanoGPT's, from a checkout of it

A row a measurement. What is compared is timed in turn, round after round, each round there and back in a new order: a
machine that slows down slows all of it. A ratio is the median over rounds of the ratio of two times in one round, and
half of the rounds lie between its quartiles ``low`` and ``high``; ``ms`` and ``ms_over`` are medians. Peaks of memory,
in MiB, are beyond what there was before, in a process of their own (Linux only).
"""

import argparse
import functools
import importlib.util
import io
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
from context import FusedAttention, LongGPT
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import helpers
from model_local import LocalGPT, LocalGPTConfig

BENCH = helpers.DATA / "bench.csv"
COLUMNS = ["part", "model", "what", "over", "B", "H", "T", "C", "L", "workers", "ratio", "low", "high", "bound"]
COLUMNS += ["ms", "ms_over", "mib", "heads", "deviation"]
BOUNDS = {  # what a ratio should not exceed, by what is measured, over what, and the length of the sequences
    ("bp", "nanoGPT", 64): 1.0,
    ("fa", "nanoGPT", 64): 1.0,
    ("head_energy", "reading A and g", 512): 5.0,
    ("head_energy", "a loop over heads", 512): 1 / 8,
    ("head_energy's peak", "the size of A", 512): 0.1,
    ("streaming", "without", 512): 1.1,
    ("maps", "without", 512): 1.1,
}


@dataclass(frozen=True)
class Plan:
    """What is measured; the model and the batch are the report's."""

    seconds: float = 30  # for what is timed together
    config: LocalGPTConfig = field(default_factory=lambda: LocalGPTConfig(method="bp"))
    batch: int = 32
    nanogpt: Path | None = None
    maps: tuple[tuple[int, int, int], ...] = ((32, 16, 64), (8, 8, 512), (1, 8, 2048))  # (B, H, T)
    jacobian: tuple[int, int, int] = (8, 4, 64)
    long: int = 16_384  # tokens
    growth: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("T", (32, 128, 256)),
        ("H", (1, 16)),
        ("B", (8, 64)),
        ("L", (1, 8)),
        ("C", (64, 256)),
    )


# --- how it is measured ----------------------------------------------------------------------------------------------


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


def compared(times: dict[str, list[float]], over: Iterable[str], **about) -> list[dict]:
    """A row for each variant over each of those in ``over``."""
    rows = []
    for base in over:
        for what in (name for name in times if name != base):
            low, ratio, high = quantiles((a / b for a, b in zip(times[what], times[base], strict=True)), n=4)
            row = {"what": what, "over": base, "ratio": ratio, "low": low, "high": high}
            rows.append(about | row | {"ms": median(times[what]), "ms_over": median(times[base])})
    return rows


def apart(function: Callable, *args):
    """What ``function`` returns in a process that did nothing before."""
    servers = multiprocessing.get_context("forkserver")  # has imported what is needed, and run nothing yet
    with ProcessPoolExecutor(1, mp_context=servers) as pool:
        return pool.submit(function, *args).result()


def peak(work: Callable[[], object]) -> float:
    """MiB that ``work`` needs beyond what there is before it. Linux only."""

    def status(name: str) -> int:
        # getrusage's maximum would be that of the calling process, where it has used more
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].removesuffix("kB"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is in memory now
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


# --- a training step -------------------------------------------------------------------------------------------------


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


def nanogpt(folder: Path, config: LocalGPTConfig) -> nn.Module:
    """The same shape by the ``model.py`` of a nanoGPT checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    with redirect_stdout(io.StringIO()):  # it prints how many parameters it has
        return module.GPT(module.GPTConfig(bias=False, **{name: getattr(config, name) for name in names}))


def products(config: LocalGPTConfig, batch: int) -> Callable[[], None]:
    """The matrix products of a step and nothing else: of each linear map and attention, forwards and backwards."""
    N, T, C, H, V = batch * config.block_size, config.block_size, config.n_embd, config.n_head, config.vocab_size
    pairs = []
    for n_in, n_out in config.n_layer * (4 * [(C, C)] + [(C, 4 * C), (4 * C, C)]) + [(C, V)]:
        x, weight, error = torch.randn(N, n_in), torch.randn(n_out, n_in), torch.randn(N, n_out)
        pairs += [(x, weight.T), (error, weight), (error.T, x)]
    for _ in range(config.n_layer):
        (q, k, v, do), (a, ds) = torch.randn(4, batch * H, T, C // H), torch.randn(2, batch * H, T, T)
        pairs += [(q, k.mT), (a, v), (do, v.mT), (a.mT, do), (ds, k), (ds.mT, q)]

    def multiply() -> None:
        for x, y in pairs:
            x @ y

    return multiply


def step(model: nn.Module, vocab_size: int, B: int, T: int) -> Callable[[], None]:
    # a rate of zero: all of the work, and every round has the same weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    x, y = torch.randint(vocab_size, (2, B, T))  # what the tokens say does not matter

    def take() -> None:
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return take


def sizes(config: LocalGPTConfig, batch: int) -> dict[str, int]:
    return {"B": batch, "H": config.n_head, "T": config.block_size, "C": config.n_embd, "L": config.n_layer}


def training(plan: Plan) -> list[dict]:
    """By each method, and by backpropagation under some rules, over other implementations and over ``bp``."""
    config, over = plan.config, ["PyTorch's layers", "matrix products", "bp"]
    models = {over[0]: PlainGPT(config)}
    if plan.nanogpt:
        over.insert(0, "nanoGPT")
        models["nanoGPT"] = nanogpt(plan.nanogpt, config)
    models["bp, fused"] = LongGPT(config)  # the same layers, and attention that nobody can see
    models |= {method: LocalGPT(replace(config, method=method)) for method in ("bp", "fa", "sign_sym", "dfa")}
    rules = ("diagonal", "ste", "none", "mean", "running")
    models |= {rule: LocalGPT(replace(config, softmax_backward=rule)) for rule in rules}
    steps = {name: step(model, config.vocab_size, plan.batch, config.block_size) for name, model in models.items()}
    steps["matrix products"] = products(config, plan.batch)
    rows = compared(interleave(steps, 2 * plan.seconds, "training"), over, part="training", **sizes(config, plan.batch))
    return [row for row in rows if row["what"] not in over[:-1] or row["over"] == "matrix products"]


def growth(plan: Plan) -> list[dict]:
    """A step of backpropagation, alone and captured, in larger and smaller models and batches over the report's."""
    fields = {"T": "block_size", "H": "n_head", "L": "n_layer", "C": "n_embd"}
    cases = [("", 0), *((axis, value) for axis, values in plan.growth for value in values)]
    steps, about = {}, {}
    for axis, value in cases:
        config = replace(plan.config, **{fields[axis]: value} if axis in fields else {})
        B, model = value if axis == "B" else plan.batch, LocalGPT(config)
        take = step(model, config.vocab_size, B, config.block_size)

        def captured(model: nn.Module = model, take: Callable = take) -> None:
            with helpers.capture_attention(model) as layers:
                take()
            helpers.energy_table(layers)

        for what, work in (("bp", take), ("bp, captured, table", captured)):
            name = f"{what}, {axis} {value}" if axis else what
            steps[name], about[name] = work, {"what": what} | sizes(config, B)
    rows = compared(interleave(steps, plan.seconds, "growth"), ["bp"], part="growth")
    return [row | about[row["what"]] for row in rows]


def ms_a_step(config: LocalGPTConfig, batch: int, start: float, seconds: float) -> float:
    """Of one process with one thread; all processes start at once."""
    torch.set_num_threads(1)
    take = step(LocalGPT(config), config.vocab_size, batch, config.block_size)
    take()
    time.sleep(max(0.0, start - time.time()))
    taken, begun = 0, time.perf_counter()
    while taken < 1 or time.perf_counter() < begun + seconds:
        take()
        taken += 1
    return 1000 * (time.perf_counter() - begun) / taken


def workers(plan: Plan) -> list[dict]:
    """Time a step where several runs are trained at once, as the sweep does: one process a core, one thread each."""
    rounds, counts = 5, range(1, (os.cpu_count() or 1) + 1)
    times = {n: [] for n in counts}
    with ProcessPoolExecutor(max(counts), mp_context=multiprocessing.get_context("forkserver")) as pool:
        for _ in range(rounds):
            for n in counts:
                when = time.time() + 1, plan.seconds / rounds / len(counts)
                works = [pool.submit(ms_a_step, plan.config, plan.batch, *when) for _ in range(n)]
                times[n].append(1 / sum(1 / work.result() for work in works))
    about = {"part": "workers", **sizes(plan.config, plan.batch)}
    rows = compared({f"{n} runs": series for n, series in times.items()}, ["1 runs"], **about)
    return [row | {"what": "bp", "over": "one run", "workers": int(row["what"].split()[0])} for row in rows]


# --- the split -------------------------------------------------------------------------------------------------------


def maps(B: int, H: int, T: int) -> tuple[Tensor, Tensor]:
    """Causal attention weights and a gradient, (B, H, T, T) in float32."""
    attn = torch.randn(B, H, T, T).masked_fill_(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return attn, 1e-5 * torch.randn(B, H, T, T)


def by_loop(attn: Tensor, grad: Tensor) -> list[Tensor]:
    """What one would write first: per head both parts, their energies and a cosine, in the maps' own precision."""
    out = []
    for a, g in zip(attn.unbind(1), grad.unbind(1), strict=True):
        f = a * (g - (a * g).sum(-1, keepdim=True))
        d = a * (1 - a) * g
        energies = (part.square().sum((1, 2)).mean() for part in (f, d, f - d))
        out.append(torch.stack([*energies, F.cosine_similarity(d.flatten(1), f.flatten(1)).mean()]))
    return out


def by_jacobian(attn: Tensor, grad: Tensor) -> Tensor:
    """f, from each query's own Jacobian, made by PyTorch from the softmax and multiplied with g."""
    scores = attn.log()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: row.softmax(-1)), chunk_size=512)
    return jacobian(scores.flatten(0, 2)) @ grad.flatten(0, 2)[..., None]


def reading(attn: Tensor, grad: Tensor) -> Tensor:
    return attn.sum() + grad.sum()


def split_peak(B: int, H: int, T: int) -> float:
    helpers.head_energy(*maps(1, 1, 2))  # compiled
    attn, grad = maps(B, H, T)
    return peak(lambda: helpers.head_energy(attn, grad))


def long_peak(H: int, T: int, D: int) -> tuple[float, float]:
    """MiB, and milliseconds, of the table of one long sequence; of its inputs 4 H T D numbers are there before."""
    helpers.head_energy(*maps(1, 1, 2))
    inputs = torch.randn(4, 1, H, T, D)
    start = time.perf_counter()
    mib = peak(lambda: helpers.attention_energy(*inputs, is_causal=True))
    return mib, 1000 * (time.perf_counter() - start)


def split(plan: Plan) -> list[dict]:
    """The table of all heads over other ways to it, its peak memory, and the cost of a context too long for maps."""
    rows = []
    works = {"head_energy": helpers.head_energy, "a loop over heads": by_loop, "reading A and g": reading}
    for shape in (*plan.maps, plan.jacobian):
        about, inputs = {"part": "split"} | dict(zip("BHT", shape, strict=True)), maps(*shape)
        ways = works | ({"explicit Jacobians": by_jacobian} if shape == plan.jacobian else {})
        variants = {name: functools.partial(way, *inputs) for name, way in ways.items()}
        timed = compared(interleave(variants, plan.seconds / 3, f"split {shape}"), list(ways)[1:], **about)
        rows += [row for row in timed if row["what"] == "head_energy"]
        size = inputs[0].numel() * 4 / 2**20
        mib = apart(split_peak, *shape)
        rows.append(about | {"what": "head_energy's peak", "over": "the size of A", "mib": mib, "ratio": mib / size})
    mib, ms = apart(long_peak, plan.config.n_head, plan.long, plan.config.n_embd // plan.config.n_head)
    about = {"B": 1, "H": plan.config.n_head, "T": plan.long, "mib": mib, "ms": ms}
    return [*rows, {"what": "attention_energy"} | about]


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


def of_the_report() -> Case:
    config = LocalGPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C, method="bp")
    model, ids = LocalGPT(config), torch.randint(V, (B, T))

    def fuse() -> None:
        for block in model.blocks:
            weights, block.attn = block.attn.state_dict(), FusedAttention(config)
            block.attn.load_state_dict(weights)

    return Case(model, lambda: model(ids, ids)[1], fuse)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, 4 * C, dropout=0.0, batch_first=True), L)


CASES = {
    "the report's model": of_the_report,
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


def capture_peak(name: str, way: str) -> float:
    case = CASES[name]()
    return peak(lambda: one_pass(case, way))


def capture(plan: Plan) -> list[dict]:
    """Forward and backward passes that are captured, streaming or with their maps, over such that are not.

    The deviation is of the captured gradient from ``dO V^T``, as a share of the largest value.
    """
    rows, about = [], {"part": "capture", "B": B, "H": H, "T": T, "C": C, "L": L}
    for name, build in CASES.items():
        torch.manual_seed(0)
        case = build()
        works = {way: functools.partial(one_pass, case, way) for way in WAYS}
        timed = compared(interleave(works, plan.seconds / 4, name), ["without"], **about)
        layers = one_pass(case, "maps")
        found = {"model": name, "deviation": deviation([layer.grad for layer in layers], from_outputs(case))}
        found["heads"] = sum(layer.attn.shape[1] for layer in layers)
        rows += [row | found for row in [*timed, about | {"what": "without"}]]
    return [row | {"mib": apart(capture_peak, row["model"], row["what"])} for row in tqdm(rows, "peaks", leave=False)]


# ---------------------------------------------------------------------------------------------------------------------


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()


PARTS = {part.__name__: part for part in (training, growth, workers, split, capture)}


def table(plan: Plan, part: str) -> pd.DataFrame:
    """The rows of a part, each with what it was measured on."""
    rows = pd.DataFrame(PARTS[part](plan)).reindex(columns=COLUMNS).assign(part=part)
    rows["bound"] = [BOUNDS.get(key, np.nan) for key in zip(rows["what"], rows["over"], rows["T"], strict=True)]
    machine = {"torch": str(torch.__version__), "processor": processor(), "threads": torch.get_num_threads()}
    return rows.assign(**machine).astype({name: "Int64" for name in ("B", "H", "T", "C", "L", "workers", "heads")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these, of {', '.join(PARTS)}; other rows stay")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="for each group of what is timed together")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="of a nanoGPT checkout, to compare with")
    parser.add_argument("--output", type=Path, default=BENCH)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    print(f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads")
    for part in args.parts or PARTS:
        found = table(Plan(seconds=args.seconds, nanogpt=args.nanogpt), part)
        shown = found.drop(columns=["part", "torch", "processor", "threads"]).dropna(axis=1, how="all")
        shown["over its bound"] = np.where(found["ratio"] > found["bound"], "OVER", "")
        print(f"\n{part}\n{shown.to_string(index=False, na_rep='', float_format='{:.3g}'.format)}", flush=True)
        if args.output.exists():
            old = pd.read_csv(args.output)
            found = pd.concat([old[old["part"] != part], found])
        text = found.to_csv(index=False, float_format="%.4g", lineterminator="\n")
        helpers.save_atomically(args.output, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    main()
