"""Write what the explorer shows, data/explorer-*.js, from the models of 02: -m _site.explorer

Of every head, at six moments of training, it gets the lower triangles of A and g, from which it
computes f, d and o. For a text that is typed there it makes A and g itself, from the models'
weights. ``explorer.md`` says what is rounded, and what that costs.
"""

from __future__ import annotations

import base64
import json

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from explore import STEPS, captured, trained_run
from figures import printable
from helpers import DATA, Corpus, Run, load_corpus, split_softmax_gradient

METHODS = {"fa": "feedback alignment", "bp": "backpropagation"}
MOMENTS = 0, 50, 100, 200, 350, 500  # of training
T = 40  # characters that are shown


def passage(corpus: Corpus, length: int) -> str:
    """The first piece of the validation text that begins a word and has most letters.

    Without signs, if possible.
    """
    text = corpus.decode(corpus.val[:20_000])
    begins = [i for i in range(len(text) - length)
              if text[i].isalpha() and not text[i - 1 : i].isalpha()]
    points = [0 if c == " " else 1 if c.isalpha() else -length for c in text]
    start = max(begins, key=lambda i: sum(points[i : i + length]), default=0)
    return text[start : start + length]


def packed(values: ArrayLike) -> str:
    return base64.b64encode(np.asarray(values).tobytes()).decode()


def rounded_maps(a: Tensor, g: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower triangles of maps (N, T, T), and the largest size of each g (N, 1).

    Of a it is the fourth root, in steps of 1/65535: small weights stay good enough to be made
    larger by a temperature. Steps of g are 1/32767 of the largest.
    """
    rows, columns = np.tril_indices(a.shape[-1])
    a, g = (values.numpy()[:, rows, columns] for values in (a, g))
    largest = np.abs(g).max(-1, keepdims=True)
    roots, errors = np.rint(65535 * a**0.25), np.rint(32767 * g / largest)
    return roots.astype("<u2"), errors.astype("<i2"), largest


def rounded_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Every row in whole numbers of 16 bits, and the size of its step (rows, 1)."""
    values = torch.atleast_2d(values)
    step = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 32767
    return (values / step).round().short(), step


def write_maps(corpus: Corpus, runs: dict[str, Run]) -> None:
    """Weights and errors of all heads on a passage; and where the explorer opens."""
    text, stored, most = passage(corpus, T + 1), {method: {} for method in runs}, (0.0,)
    for method, run in runs.items():
        for step in MOMENTS:
            scores, g, _ = captured(run.at(step), corpus.encode(text))
            a, g = scores.flatten(0, 1).softmax(-1), g.flatten(0, 1)
            roots, errors, largest = rounded_maps(a, g)
            stored[method][step] = {"a": packed(roots), "g": packed(errors),
                                    "scale": largest.ravel().tolist()}

            # It opens where the lateral part has most energy over that of f, after the start; and
            # has another place to begin, the head that at the end puts most weight on one key.
            full, _, offdiag = split_softmax_gradient(a, g)
            shares = offdiag.square().sum((-2, -1)) / full.square().sum((-2, -1))
            if step > 0:
                most = max(most, (shares.max().item(), method, step, shares.argmax().item()))
            if (method, step) == ("bp", STEPS):
                settled = method, step, a.amax(-1).mean(-1).argmax().item()

    config, names = runs["bp"].model.config, ("method", "step", "head")
    page = {
        "corpus": "Tiny Shakespeare" if corpus.is_shakespeare else corpus.name,
        "characters": printable(text[:T]),
        "vocabulary": list(zip(corpus.stoi, printable("".join(corpus.stoi)), strict=True)),
        "layers": config.n_layer, "heads": config.n_head,
        "channels": config.n_embd, "positions": config.block_size,
        "opening": dict(zip(names, most[1:], strict=True)),
        "settled": dict(zip(names, settled, strict=True)), "maps": stored,
    }
    script = f"const EXPLORER = {json.dumps(page, separators=(',', ':'))};\n"
    (DATA / "explorer-data.js").write_text(script, encoding="ascii")


def write_weights(method: str, run: Run) -> None:
    """All weights of a model, and its feedback matrices, each after the weights that it answers."""
    parts = zip(*map(rounded_rows, run.model.state_dict().values()), strict=True)
    whole, steps = (packed(torch.cat([values.flatten() for values in part])) for part in parts)
    page = {"feedback": method == "fa", "values": whole, "steps": steps}
    script = f"(globalThis.EXPLORER_WEIGHTS ??= {{}}).{method} = {json.dumps(page)};\n"
    (DATA / f"explorer-{method}.js").write_text(script, encoding="ascii")


if __name__ == "__main__":
    corpus = load_corpus()
    runs = {method: trained_run(name, corpus) for method, name in METHODS.items()}
    for method, run in runs.items():
        write_weights(method, run)
    write_maps(corpus, runs)  # last: what make looks for
