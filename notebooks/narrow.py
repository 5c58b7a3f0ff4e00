"""Figures for a phone: the same panels, one above the other. ``execute.py`` has the kernels of a report make them."""

import hashlib
import re
import textwrap
from pathlib import Path

WIDTH = 4.8  # inches: on a phone its letters are then as large as those beside it
MANY = 10  # panels: more of them are a picture, not a row
LETTERS = 11  # of the figures' size, on an inch


def install(folder: str) -> None:
    """From now on a figure that is shown leaves its narrow version in ``folder``, under the wide one's SHA-256."""
    from IPython.core import pylabtools

    shown = pylabtools.print_figure
    Path(folder).mkdir(parents=True, exist_ok=True)

    def print_figure(figure, fmt="png", **options):
        wide = shown(figure, fmt, **options)
        if fmt == "svg" and narrow(figure):
            name = hashlib.sha256("\n".join(wide.splitlines()).encode()).hexdigest()
            Path(folder, f"{name}.svg").write_text(shown(figure, fmt, **options), encoding="utf-8")
        return wide

    pylabtools.print_figure = print_figure


def narrow(figure) -> bool:
    """Arrange a figure that was drawn anew, no wider than ``WIDTH``; False, and it stays, where that cannot be.

    Panels in a row come to stand one above the other, two rows of them side by side. Labels that a panel shared with a
    neighbour it then has itself; legends that stood beside a panel stand below all.
    """
    panels = [ax for ax in figure.axes if ax.get_subplotspec() and ax.get_label() != "<colorbar>"]
    width, height = figure.get_size_inches()
    if not panels or len(panels) > MANY or width <= 1.3 * WIDTH:
        return False
    grid = panels[0].get_subplotspec().get_gridspec()
    legends_below(figure, panels)
    for ax in panels:
        share_labels(ax, panels)
    across, down = (2, grid.ncols) if grid.nrows == 2 < grid.ncols else (1, len(panels))
    places = figure.add_gridspec(down, across)
    for i, ax in enumerate(panels):
        ax.set_subplotspec(places[i % down, i // down])
    titles = wrap(figure, panels, int(LETTERS * (WIDTH / across - 0.6)))  # less what numbers take
    below = sum(len(legend.get_texts()) // 2 + 1 for legend in figure.legends)
    each = height / grid.nrows if len(panels) > 1 else height
    figure.set_size_inches(WIDTH, max(1.5, each) * down + 0.2 * (titles + below))
    return True


def legends_below(figure, panels) -> None:
    """Legends that do not stand inside a panel stand below all of them."""
    outside = list(figure.legends)
    for ax in panels:
        if legend := ax.get_legend():
            box = legend.get_window_extent()
            if box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1 + 1:
                outside.append(legend)
    for legend in outside:
        entries = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
        legend.remove()
        figure.legend(
            *entries, loc="outside lower left", fontsize="small", ncols=2, title=legend.get_title().get_text()
        )


def share_labels(ax, panels) -> None:
    """Labels and numbers that it had from the last panel below, and from the first one at its left."""
    place = ax.get_subplotspec()
    for other in panels:
        theirs = other.get_subplotspec()
        if theirs.colspan == place.colspan and not ax.get_xlabel():
            ax.set_xlabel(other.get_xlabel())
        if theirs.rowspan == place.rowspan and not ax.get_ylabel():
            ax.set_ylabel(other.get_ylabel())
    if len(ax.get_shared_x_axes().get_siblings(ax)) > 1:
        ax.tick_params(labelbottom=True)
    if len(ax.get_shared_y_axes().get_siblings(ax)) > 1:
        ax.tick_params(labelleft=True)


def wrap(figure, panels, letters: int) -> int:
    """Break what is longer than a line; returns how many lines the titles have in all."""

    def fill(words: str, letters: int) -> str:
        whole = re.sub(r"\$[^$]*\$", lambda formula: formula[0].replace(" ", "\0"), words)
        return textwrap.fill(whole, letters, break_long_words=False, break_on_hyphens=False).replace("\0", " ")

    lines = 0
    if words := figure.get_suptitle():
        words = fill(words, int(0.95 * LETTERS * WIDTH))
        figure.suptitle(words, x=0.01, ha="left")
        lines += words.count("\n") + 1
    for ax in panels:
        for place in ("left", "center"):
            if words := fill(ax.get_title(place), letters):
                ax.set_title(words, loc=place)
                lines += words.count("\n") + 1
        ax.set_xlabel(fill(ax.get_xlabel(), letters))
    return lines
