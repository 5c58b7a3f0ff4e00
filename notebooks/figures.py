"""Figures of heads: maps, rows and intervals. They only draw; numbers come from ``helpers``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from torch import Tensor

from helpers import COLORS, SEQUENTIAL, split_softmax_gradient

# the softmax's rules in plain words, as a reader meets them
RULE_NAMES = {
    "full": "minus the lateral sum: exact", "diagonal": "own error only", "zero": "no baseline",
    "mean": "minus the plain mean", "diagonal_mean": "own slope, minus the mean",
    "diagonal_lateral": "own slope, minus the sum", "balanced_evenly": "balanced evenly",
    "balanced_by_attention": "balanced by attention", "ste": "passed straight through",
    "none": "nothing sent back"}


def printable(text: str) -> list[str]:
    """The characters of ``text`` as labels: space and newline visible, what has no shape escaped.

    >>> printable("a b\\n\\0\\u200b")
    ['a', '␣', 'b', '⏎', '\\\\x00', '\\\\u200b']
    """
    shapes = {" ": "␣", "\n": "⏎"}
    return [shapes.get(c, c if c.isprintable() else c.encode("unicode_escape").decode())
            for c in text]


def head_names(table: pd.DataFrame) -> list[str]:
    """How figures and tables name the heads in the rows of ``table``: L1H0 is in layer 1."""
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
        raise ValueError("a map is (T, T) and its text has T characters; here are "
                         f"{tuple(values.shape)} and {text!r}")
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
        mean, low, high = table[column], table[f"{column}_lo"], table[f"{column}_hi"]
        ax.errorbar(positions + shift, mean, yerr=np.clip([mean - low, high - mean], 0, None),
                    fmt="os^D"[i], markersize=4, linewidth=1.5, color=COLORS[color], label=column)
    ax.set_xticks(positions, head_names(table))
    ax.tick_params(axis="x", labelsize="small")
    return ax


def plot_split(attn: Tensor, grad: Tensor, keys: Iterable[str], ax: Axes | None = None) -> Axes:
    """A row's gradient as a sum, key by key: d from zero, o from where d ends, f = d + o from zero.

    attn, grad: weights of one query's keys and errors that arrive there, (n,) each; keys: n labels.
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
