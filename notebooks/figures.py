"""The look of the report, and what it draws: heads and windows. Numbers come from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib_inline.config import InlineBackend
from torch import Tensor

from data.experiment import TASKS, RecallTask
from helpers import split_softmax_gradient

# Okabe and Ito's colour-blind-safe palette; one colour for one thing on every page
COLORS = {"bp": "#0072B2", "fa": "#D55E00", "sign_sym": "#009E73", "dfa": "#CC79A7",
          "full": "#333333", "diag": "#0072B2", "offdiag": "#D55E00", "cross": "#009E73",
          "ste": "#CC79A7"}
# energies; signed quantities, centred on zero. Nothing has the page's colour, also a dark page's.
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"


def set_style() -> None:
    """The look of every figure and table in the report; called once a notebook."""
    pd.set_option("display.max_rows", None, "display.max_columns", None)
    inline = InlineBackend.instance()
    inline.figure_formats = {"svg"}
    # Without a date and with a fixed salt, the same figure is the same bytes.
    undated = {"Date": None, "Creator": None}
    inline.print_figure_kwargs = {"bbox_inches": "tight", "metadata": undated}
    sns.set_theme(context="notebook", style="ticks", palette=list(COLORS.values()), rc={
        "figure.figsize": (7, 4), "figure.dpi": 100, "figure.constrained_layout.use": True,
        "axes.titlelocation": "left", "axes.titlesize": "medium",
        "xtick.labelsize": 12, "ytick.labelsize": 12,  # so that exponents can be read, too
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "svg.hashsalt": "report", "svg.fonttype": "none",  # text stays text: half the bytes
        "mathtext.fontset": "stix",  # every machine has a serif face as wide
    })


# the softmax's rules in plain words, as a reader meets them
RULE_NAMES = {
    "full": "exact pass", "diagonal": "own error only", "zero": "no baseline",
    "mean": "minus the plain mean", "diagonal_mean": "own slope, minus the mean",
    "diagonal_lateral": "own slope, minus the sum", "balanced_evenly": "balanced evenly",
    "balanced_by_attention": "balanced by attention", "ste": "passed straight through",
    "none": "never trained"}
RULE_LABELS = {rule: f"{name} ({rule})" for rule, name in RULE_NAMES.items()}
# the settings of data.experiment.arms in plain words
ARM_NAMES = {
    "off": "as usual", "start": "larger weights at first", "held": "the same, their size held",
    "cap": "scores capped", "cap, slope 1": "the same, slope taken as 1",
    "cap and start": "capped, larger weights at first", "cut": "norm, cut in the backward pass",
    "tangent": "tangent in the backward pass", "exact": "norm with its own backward pass"}


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


def plot_windows(table: pd.DataFrame, ax: Axes | None = None,
                 names: Iterable[str] | None = None) -> Axes:
    """``share`` at every rate (rows of ``windows`` with a column ``name``); windows are framed.

    A line of cells per ``name``, in the order of ``names`` or else of the table, a column per rate.
    Of recall the cells have the counts, of text the share; what was not run, or cannot be told,
    stays blank.
    """
    ax = ax or plt.gca()
    names = [*(names or dict.fromkeys(table["name"]))]
    rates = sorted(table["lr"].unique())
    shares = table.pivot(index="name", columns="lr", values="share").reindex(index=names)[rates]
    ax.imshow(shares.clip(0, 1), cmap="Greens", vmin=0, vmax=1.6, aspect="auto")  # to write on
    for cell in table.dropna(subset="share").itertuples():
        x, y = rates.index(cell.lr), names.index(cell.name)
        on_recall = isinstance(TASKS[cell.task].data, RecallTask)
        words = f"{cell.solved}/{cell.runs}" if on_recall else f"{cell.share:.2f}"
        ax.text(x, y, words, ha="center", va="center", fontsize="small")
        if cell.inside:
            frame = {"fill": False, "edgecolor": "black", "linewidth": 1.5}
            ax.add_patch(plt.Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **frame))
    ax.set_xticks(range(len(rates)), [f"{rate:.0e}".replace("e-0", "e-") for rate in rates])
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.set_xlabel("learning rate")
    return ax
