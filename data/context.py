"""The split against context length, from 64 to 16,384 tokens: data/context.csv, for notebook 91.

    python data/context.py     trains the model, an hour on two cores, then measures it

LocalGPT's explicit attention would need maps of 16,384 x 16,384 weights a head, to be kept until
the error comes back. PyTorch's fused attention computes the same without them, and so do the
measurements.
"""

import dataclasses

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.sweep import OPTIMIZERS
from helpers import DATA, Corpus, capture_attention, energy_table, load_corpus, save_atomically
from model_local import INIT_STD, CausalSelfAttention, LocalGPT, LocalGPTConfig

CONTEXT = DATA / "context.csv"
LENGTHS = tuple(2**n for n in range(6, 15))
# in a round each length comes up to four times, but no more than fill the longest
ROUNDS, LR, SEED = 7, 3e-3, 0
TOKENS = 4096  # an iteration: TOKENS / T sequences of length T, but at least one
MEASURED = max(LENGTHS)  # tokens of the validation text, at each length


class FusedAttention(CausalSelfAttention):
    """The same attention by PyTorch's fused kernel, which keeps no map; exact backward pass."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__(config)
        self.attention = ScaledDotProduct(self.score_scale)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        # (B, H, T, D) each
        q, k, v = (p(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2) for p in projections)
        o = self.attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        return self.resid_drop(self.o_proj(o))


class ScaledDotProduct(nn.Module):
    """Queries, keys and values in, the heads' outputs out, (B, H, T, D) each: for a hook to see."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)


class LongGPT(LocalGPT):
    """A LocalGPT under backpropagation whose memory is linear in the length of the context.

    Its position embeddings are the fixed sinusoids of Vaswani et al. 2017: a far position, which
    is rarely trained, is then no noise. Raises ValueError on another rule, mode or norm.
    """

    def __init__(self, config: LocalGPTConfig) -> None:
        if config != config.exact or config.attn_mode != "softmax" or config.qk_norm != "off":
            raise ValueError(f"{config} is not the exact pass of a softmax without norms: there is "
                             "no kernel for others")
        # built for one token, so without a causal mask of T x T; then the parts that differ
        short = dataclasses.replace(config, block_size=1)
        super().__init__(short)
        self.config = config
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        for block in self.blocks:
            block.attn = FusedAttention(short)
        self._reset_parameters()
        # the sinusoids, as large as the learned embeddings would begin
        rates = 10_000 ** -torch.linspace(0, 1, (config.n_embd + 1) // 2)
        angles = torch.arange(config.block_size)[:, None] * rates
        waves = 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)[:, : config.n_embd]
        self.position_embedding.weight.requires_grad_(False).copy_(INIT_STD * waves)


def trained(corpus: Corpus, rounds: int = ROUNDS, lengths: tuple[int, ...] = LENGTHS) -> LongGPT:
    """A model trained by backpropagation on sequences of all ``lengths``, in random order."""
    generator = torch.Generator().manual_seed(SEED)
    plan = [T for T in lengths for _ in range(rounds * min(4, max(lengths) // T))]
    order = torch.randperm(len(plan), generator=generator)
    torch.manual_seed(SEED)
    vocab_size = corpus.vocab_size
    model = LongGPT(LocalGPTConfig(block_size=max(lengths), vocab_size=vocab_size, method="bp"))
    optimizer = OPTIMIZERS["schedule"](model, LR, len(plan))
    for i in tqdm(order.tolist(), desc="training"):
        x, y = corpus.batch(plan[i], max(1, TOKENS // plan[i]), generator, "cpu")
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    return model.eval()


def measured(model: LongGPT, corpus: Corpus, T: int, tokens: int) -> pd.DataFrame:
    """``energy_table`` at one length on ``tokens`` of the validation text: a row a (layer, head).

    Added columns: ``T``, ``sequences``, ``loss`` in nats, and on the first sequence ``told`` and
    ``untold``, see ``messages``.
    """
    # windows of T tokens and the next one, spread evenly over the text
    starts = np.linspace(0, len(corpus.val) - T - 1, tokens // T).astype(np.int64)
    windows = torch.from_numpy(corpus.val[starts[:, None] + np.arange(T + 1)].astype(np.int64))
    losses = []
    with capture_attention(model) as layers:
        for batch in windows.split(max(1, TOKENS // T)):
            loss = model(batch[:, :-1], batch[:, 1:].contiguous())[1]
            loss.backward()
            model.zero_grad()
            losses.append(loss.item() * len(batch))
    table = energy_table(layers)
    table.insert(0, "T", T)
    table["sequences"], table["loss"] = len(windows), sum(losses) / len(windows)
    table["told"], table["untold"] = zip(*messages(model, windows[:1]), strict=True)
    return table


def messages(model: LongGPT, window: Tensor) -> list[tuple[float, float]]:
    """Relative errors of the queries' gradient, by layer, then head: (told, untold).

    ``told``: a query tells its keys one number, dO . O, and no more; ``untold``: it tells them
    nothing, as under the diagonal rule. window (1, T + 1): token ids.
    """
    seen = []

    def keep(module: ScaledDotProduct, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        inputs[0].retain_grad()
        out.retain_grad()
        seen.append((module.scale, *inputs, out))

    handles = [block.attn.attention.register_forward_hook(keep) for block in model.blocks]
    try:
        model(window[:, :-1], window[:, 1:].contiguous())[1].backward()
    finally:
        for handle in handles:
            handle.remove()
    model.zero_grad()
    return [pair for layer in seen for pair in _errors_without_autograd(*layer)]


@torch.no_grad()
def _errors_without_autograd(
    scale: float, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int = 256
) -> list[tuple[float, float]]:
    """``messages`` of each head of a layer; tensors (1, H, T, D), ``rows`` queries at a time."""
    T = q.shape[2]
    b = (out.grad * out).sum(-1, keepdim=True)  # one number per query, formed without any key
    told, untold = [], []
    for some in torch.arange(T).split(rows):
        # the weights of these queries, and the gradient that arrives at them
        last = some[-1] + 1
        hidden = torch.arange(last) > some[:, None]
        scores = (scale * q[:, :, some] @ k[:, :, :last].mT).masked_fill(hidden, -torch.inf)
        a, g = scores.softmax(-1), out.grad[:, :, some] @ v[:, :, :last].mT
        # what the scores get, with the number and without; from there on to the queries
        told.append(scale * (a * (g - b[:, :, some])) @ k[:, :, :last])
        untold.append(scale * (a * (1 - a) * g) @ k[:, :, :last])
    errors = []
    for grads in (told, untold):
        off = (torch.cat(grads, dim=2) - q.grad)[0].flatten(1).norm(dim=1)  # (H,)
        errors.append((off / q.grad[0].flatten(1).norm(dim=1)).tolist())
    return list(zip(*errors, strict=True))


def main() -> None:
    corpus = load_corpus()
    model = trained(corpus)
    rows = [measured(model, corpus, T, MEASURED) for T in tqdm(LENGTHS, desc="measuring")]
    text = pd.concat(rows).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    save_atomically(CONTEXT, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
