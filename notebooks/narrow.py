"""Figures for a phone: the same panels, one above the other. ``execute.py`` has the kernels of a report make them."""

import hashlib
import re
import textwrap
from pathlib import Path

from matplotlib.lines import Line2D

WIDTH = 4.8  # inches: on a phone its letters are then as large as those beside it
MANY = 15  # panels: more of them are a picture, as twice as many words in one are a table, unless they name colours
LETTERS = 11  # of the figures' size, on an inch


def install(folder: str) -> None:
    """From now on a figure that is shown leaves its narrow version in ``folder``, under the wide one's SHA-256."""
    from IPython.core import pylabtools

    shown = pylabtools.print_figure
    Path(folder).mkdir(parents=True, exist_ok=True)

    def print_figure(figure, fmt="png", **options):
        wide = shown(figure, fmt, **options)
        if fmt == "svg":
            path = Path(folder, hashlib.sha256("\n".join(wide.splitlines()).encode()).hexdigest() + ".svg")
            path.unlink(missing_ok=True)  # an earlier one, made by other rules
            if narrow(figure):
                path.write_text(shown(figure, fmt, **options), encoding="utf-8")
        return wide

    pylabtools.print_figure = print_figure


def narrow(figure) -> bool:
    """Arrange a figure that was drawn anew, no wider than ``WIDTH``; False, and it stays, where that cannot be.

    Panels in a row come to stand one above the other, several rows of them side by side. Labels that a panel shared
    with a neighbour it then has itself, legends become one below all, and words that would not fit a line are broken.
    """
    panels = [ax for ax in figure.axes if ax.get_subplotspec() and ax.get_label() != "<colorbar>"]
    width, height = figure.get_size_inches()
    words = max((len(ax.texts) for ax in panels if not (ax.images or ax.collections)), default=0)
    drawing = len(panels) == 1 and not panels[0].axison
    if not panels or drawing or max(len(panels), words / 2) > MANY or width <= 1.3 * WIDTH:
        return False
    grid = panels[0].get_subplotspec().get_gridspec()
    one_legend(figure, panels)
    across, down = (grid.nrows, grid.ncols) if 1 < grid.nrows < grid.ncols else (1, len(panels))
    if across > 1 and len({ax.get_ylabel() for ax in panels if ax.get_subplotspec().is_first_col()}) > 1:
        turn_labels(panels)
    else:
        for ax in panels:
            share_labels(ax, panels)
    places = figure.add_gridspec(down, across)
    for i, ax in enumerate(panels):
        ax.set_subplotspec(places[i % down, i // down])
    titles = wrap(figure, panels, int(LETTERS * (WIDTH / across - 0.6)))  # less what numbers take
    below = sum(len(legend.get_texts()) for legend in figure.legends)
    each = min(height / grid.nrows, 1.2 * WIDTH / across) if len(panels) > 1 else height
    figure.set_size_inches(WIDTH, max(1.5, each) * down + 0.2 * (titles + below))
    return True


def one_legend(figure, panels) -> None:
    """All entries of all legends below all panels, each once; a legend's title is an entry without a mark."""
    legends = [*filter(None, [ax.get_legend() for ax in panels]), *figure.legends]
    marks = {}
    for ax in panels:
        marks |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    entries, columns = {}, 2
    for legend in legends:
        if title := legend.get_title().get_text():
            entries[title], columns = Line2D([], [], linestyle=""), 1
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            entries.setdefault(text.get_text(), marks.get(text.get_text(), handle))
        legend.remove()
    if entries:
        columns = columns if max(map(len, entries)) < LETTERS * WIDTH / 2 - 8 else 1
        figure.legend(entries.values(), entries.keys(), loc="outside lower left", fontsize="small", ncols=columns)


def turn_labels(panels) -> None:
    """Labels as in a table that is turned: what stood beside a row stands above a column, and the other way round."""
    places = {ax: ax.get_subplotspec() for ax in panels}
    above = {at.colspan.start: ax.get_title() or ax.get_title("left") for ax, at in places.items() if at.is_first_row()}
    beside = {at.rowspan.start: ax.get_ylabel() for ax, at in places.items() if at.is_first_col()}
    for ax, place in places.items():
        ax.set_title("", loc="center")
        ax.set_title(beside[place.rowspan.start] if place.is_first_col() else "", loc="left")
        ax.set_ylabel(above[place.colspan.start] if place.is_first_row() else "")
        ax.tick_params(labelleft=place.is_first_row(), labelbottom=place.is_last_col())


def share_labels(ax, panels) -> None:
    """What it had from its neighbours: words and numbers below the last panel, beside and above the first one."""
    place = ax.get_subplotspec()
    for other in panels:
        theirs = other.get_subplotspec()
        if theirs.colspan == place.colspan and not ax.get_xlabel():
            ax.set_xlabel(other.get_xlabel())
        if theirs.colspan == place.colspan and not ax.get_title("left"):
            ax.set_title(other.get_title("left"), loc="left")
        if theirs.rowspan == place.rowspan and not ax.get_ylabel():
            ax.set_ylabel(other.get_ylabel())
    if len(ax.get_shared_x_axes().get_siblings(ax)) > 1:
        ax.tick_params(labelbottom=True)
    if len(ax.get_shared_y_axes().get_siblings(ax)) > 1:
        ax.tick_params(labelleft=True)


def wrap(figure, panels, letters: int) -> int:
    """Break what is longer than a line, turn names that would meet; returns the number of lines of all titles."""

    def fill(words: str, letters: int) -> str:
        whole = re.sub(r"\$[^$]*\$", lambda formula: formula[0].replace(" ", "\0"), words)
        return textwrap.fill(whole, letters, break_on_hyphens=False).replace("\0", " ")

    if len(panels) == 1 and not figure.get_suptitle():  # then it may begin at the left of the numbers
        figure.suptitle(panels[0].get_title("left"))
        panels[0].set_title("", loc="left")
    lines = 0
    if words := figure.get_suptitle():
        words = fill(words, int(0.9 * LETTERS * WIDTH))
        figure.suptitle(words, x=0.01, ha="left")
        lines += words.count("\n") + 1
    for ax in panels:
        for place in ("left", "center"):
            if words := fill(ax.get_title(place), letters):
                ax.set_title(words, loc=place)
                lines += words.count("\n") + 1
        ax.set_xlabel(fill(ax.get_xlabel(), letters))
        names = [label.get_text() for label in ax.get_xticklabels()]
        if sum(len(name) + 1 for name in names if name[:1].isalpha()) > letters:
            ax.tick_params(axis="x", labelrotation=90)
    return lines
