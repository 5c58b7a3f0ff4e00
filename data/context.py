"""The split against context length, from 64 to 16,384 tokens: the rows of data/context.csv, which notebook 10 draws.

    python data/context.py     trains the model (an hour on two cores; interrupt it whenever you like), then measures it

LocalGPT's explicit attention would need maps of 16,384 x 16,384 weights a head, to be kept until the error comes back.
PyTorch's fused attention computes the same without them, and so do the measurements.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers import (
    DATA,
    OPTIMIZERS,
    REGISTRIES,
    Corpus,
    capture_attention,
    energy_table,
    fingerprint,
    load_corpus,
    save_atomically,
)
from model_local import INIT_STD, METHODS, CausalSelfAttention, LocalGPT, LocalGPTConfig

CONTEXT = DATA / "context.csv"
CHECKPOINT = DATA / "runs" / "context.pt"
LENGTHS = tuple(2**n for n in range(6, 15))
ROUNDS, LR, SEED = 7, 3e-3, 0  # in a round each length comes up to four times, but no more than fill the longest
TOKENS = 4096  # an iteration: TOKENS / T sequences of length T, but at least one
SAVE_EVERY = 10  # iterations
MEASURED = max(LENGTHS)  # tokens of the validation text, at each length


class FusedAttention(CausalSelfAttention):
    """The same attention by PyTorch's fused kernel, which keeps no map; its error goes back by the chain rule."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__(config)
        self.attention = ScaledDotProduct(self.score_scale)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        o = self.attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.resid_drop(self.o_proj(o))


class ScaledDotProduct(nn.Module):
    """Queries, keys and values in, the heads' outputs out, (B, H, T, D) each: where a hook can see them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)


class LongGPT(LocalGPT):
    """A LocalGPT under backpropagation whose memory is linear in the length of the context.

    Its position embeddings are the fixed sinusoids of Vaswani et al. 2017: a far position, which is rarely trained, is
    then no noise.
    """

    def __init__(self, config: LocalGPTConfig) -> None:
        if config != config.exact or config.attn_mode != "softmax" or config.qk_norm != "off":
            raise ValueError(
                f"{config} is not the exact pass of a softmax without norms: there is no kernel for others"
            )
        short = dataclasses.replace(config, block_size=1)  # without a causal mask of T x T
        super().__init__(short)
        self.config = config
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        for block in self.blocks:
            block.attn = FusedAttention(short)
        self._reset_parameters()
        angles = torch.arange(config.block_size)[:, None] * 10_000 ** -torch.linspace(0, 1, (config.n_embd + 1) // 2)
        waves = 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)[:, : config.n_embd]
        self.position_embedding.weight.requires_grad_(False).copy_(INIT_STD * waves)


def trained(corpus: Corpus, rounds: int = ROUNDS, lengths: tuple[int, ...] = LENGTHS) -> LongGPT:
    """A model trained on sequences of all ``lengths``; where its training was interrupted it goes on."""
    code, generator = context_code(corpus, rounds, lengths), torch.Generator().manual_seed(SEED)
    plan = [T for T in lengths for _ in range(rounds * min(4, max(lengths) // T))]
    plan = [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]
    torch.manual_seed(SEED)
    model = LongGPT(LocalGPTConfig(block_size=max(lengths), vocab_size=corpus.vocab_size, method="bp"))
    optimizer, done = OPTIMIZERS["schedule"](model, LR, len(plan)), 0
    if CHECKPOINT.exists() and (saved := torch.load(CHECKPOINT, weights_only=True))["code"] == code:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        done = saved["done"]
    bar = tqdm(plan[done:], initial=done, total=len(plan), desc="training")
    for T in bar:
        loss = model(*corpus.batch(T, max(1, TOKENS // T), generator, "cpu"))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        bar.set_postfix(T=T, loss=f"{loss.item():.3f}")
        if done % SAVE_EVERY == 0 or done == len(plan):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "code": code, "done": done}
            torch.save(state, content := io.BytesIO())
            save_atomically(CHECKPOINT, lambda file, content=content: file.write(content.getbuffer()))
    return model.eval()


def measured(model: LongGPT, corpus: Corpus, T: int, tokens: int) -> pd.DataFrame:
    """``energy_table`` at one length on ``tokens`` of the validation text, and more: a row a (layer, head).

    ``loss`` is in nats. ``told`` and ``untold``: the relative error of the queries' gradient, on the first sequence,
    where a query tells its keys one number, ``dO . O``, and where the diagonal rule tells them nothing.
    """
    starts = np.linspace(0, len(corpus.val) - T - 1, tokens // T).astype(np.int64)
    windows = torch.from_numpy(corpus.val[starts[:, None] + np.arange(T + 1)].astype(np.int64))
    losses = []
    with capture_attention(model) as layers:
        for batch in windows.split(max(1, TOKENS // T)):
            losses.append(model(batch[:, :-1], batch[:, 1:].contiguous())[1])
            losses[-1].backward()
            model.zero_grad()
    table = energy_table(layers)
    table.insert(0, "T", T)
    table["sequences"], table["loss"] = len(windows), torch.stack(losses).mean().item()
    return table.join(pd.DataFrame(messages(model, windows[:1]), columns=["told", "untold"]))


def messages(model: LongGPT, window: Tensor) -> list[tuple[float, float]]:
    """See ``measured``; by layer, then head."""
    seen = []

    def keep(module: ScaledDotProduct, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        for x in (inputs[0], out):
            x.retain_grad()
        seen.append((module.scale, *inputs, out))

    handles = [block.attn.attention.register_forward_hook(keep) for block in model.blocks]
    try:
        model(window[:, :-1], window[:, 1:].contiguous())[1].backward()
    finally:
        for handle in handles:
            handle.remove()
    model.zero_grad()
    return [pair for layer in seen for pair in errors_without_autograd(*layer)]


@torch.no_grad()
def errors_without_autograd(
    scale: float, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int = 256
) -> Iterable[tuple[float, float]]:
    """``told`` and ``untold`` of each head (see ``measured``), some queries at a time; one sequence, (1, H, T, D)."""
    T = q.shape[2]
    b = (out.grad * out).sum(-1, keepdim=True)  # one number a query, formed without any key
    told, untold = [], []
    for some in torch.arange(T).split(rows):
        last = some[-1] + 1
        hidden = torch.arange(last) > some[:, None]
        a = (scale * q[:, :, some] @ k[:, :, :last].mT).masked_fill(hidden, -torch.inf).softmax(-1)
        g = out.grad[:, :, some] @ v[:, :, :last].mT
        for sent, dq in ((a * (g - b[:, :, some]), told), (a * (1 - a) * g, untold)):
            dq.append(scale * sent @ k[:, :, :last])
    norm = functools.partial(torch.linalg.vector_norm, dim=(0, 2, 3))
    errors = [norm(torch.cat(dq, 2) - q.grad) / norm(q.grad) for dq in (told, untold)]
    return zip(*(error.tolist() for error in errors), strict=True)


def context_code(corpus: Corpus, rounds: int = ROUNDS, lengths: tuple[int, ...] = LENGTHS) -> str:
    """What the rows depend on, in twelve digits: the model, the optimizer, the plan and the text; not rules unused."""
    plan = rounds, lengths, TOKENS, LR, SEED
    parts = LongGPT, METHODS["bp"], OPTIMIZERS["schedule"], plan, corpus.sha256
    return fingerprint(*parts, without=REGISTRIES.values())[:12]


def main() -> None:
    corpus = load_corpus()
    with FileLock(CONTEXT.with_suffix(".lock")):
        model, code = trained(corpus), context_code(corpus)
        rows = pd.read_csv(CONTEXT) if CONTEXT.exists() else pd.DataFrame(columns=["T", "code"])
        rows = rows[rows["code"] == code]
        for T in tqdm([T for T in LENGTHS if T not in set(rows["T"])], desc="measuring"):
            rows = pd.concat([rows, measured(model, corpus, T, MEASURED).assign(code=code)])
            text = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n")
            save_atomically(CONTEXT, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("context.py: interrupted; call again to go on")
