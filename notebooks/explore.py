"""What one head sends back through its softmax, and what changes it: behind ``09_explore.ipynb``.

Numbers come first, by functions of a ``State`` that know nothing of widgets; then the picture that
shows them, and the widgets by which a reader moves the state.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from math import isnan

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from figures import COLORS, DIVERGING, RULE_LABELS, SEQUENTIAL, printable
from helpers import (Corpus, Run, capture_batch, energy_table, head_energy, split_softmax_gradient,
                     train, twin)
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig

# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------

STEPS, SEED = 500, 1337  # as in 02, which has trained the first two
TRAINED = {
    "feedback alignment": {"method": "fa"},
    "backpropagation": {"method": "bp"},
    "own error only": {"method": "bp", "softmax_backward": "diagonal"},
    "own error only, with a norm": {"method": "bp", "softmax_backward": "diagonal",
                                    "qk_norm": "exact"},
}
MEASURES = {"cosine of d with f": "cos_diag", "energy of d / energy of f": "r_diag",
            "energy of o / energy of f": "r_offdiag"}


@dataclass(frozen=True)
class State:
    """What is looked at, and how it is changed. Layers, heads, characters count from 0."""

    text: str  # each character predicts the next one, so the last is only predicted
    trained: str = "feedback alignment"  # one of TRAINED
    step: int = 50  # of training
    rule: str = "full"  # what every softmax sends back, one of SOFTMAX_BACKWARD
    layer: int = 1
    head: int = 0
    query: int = 20
    temperature: float = 1.0
    constant: float = 0.0  # added to g on every key, in standard deviations of the head's g
    by_hand: tuple[int, float] | None = None  # a key of this query, and the weight that it gets


def set_weight(scores: Tensor, query: int, key: int, weight: float) -> Tensor:
    """Scores (T, T) that give a key this weight (0 to below 1), the others' proportions kept."""
    changed = scores.clone()
    changed[query, key] = -torch.inf
    logit = torch.tensor(weight, dtype=scores.dtype).logit()
    changed[query, key] = changed[query].logsumexp(-1) + logit
    return changed


def change(scores: Tensor, g: Tensor, temperature: float = 1.0, constant: float = 0.0,
           by_hand: tuple[int, int, float] | None = None) -> tuple[Tensor, Tensor]:
    """Weights and error (T, T) after three changes; ``by_hand`` is (query, key, weight)."""
    scores = scores / temperature
    if by_hand is not None:
        scores = set_weight(scores, *by_hand)
    return scores.softmax(-1), torch.where(scores.isfinite(), g + constant, 0)


def trained_run(name: str, corpus: Corpus) -> Run:
    """One of ``TRAINED``; where it was never trained before, that takes a minute or two."""
    config = LocalGPTConfig(vocab_size=corpus.vocab_size, **TRAINED[name])
    return train(config, STEPS, seed=SEED, data=corpus)


def captured(model: LocalGPT, ids: Tensor) -> tuple[Tensor, Tensor, pd.DataFrame]:
    """A model on one text: scores and g = dL/da (L, H, T, T), and its ``energy_table``."""
    layers = capture_batch(model, ids[None, :-1], ids[None, 1:])
    scores = torch.stack([layer.scores[0] for layer in layers]).double()
    g = torch.stack([layer.grad[0] for layer in layers]).double().tril()
    return scores, g, energy_table(layers, n_boot=1)  # of a single text: no interval


def head_maps(scores: Tensor, g: Tensor, state: State) -> dict[str, Tensor]:
    """All that is shown of the state's head after its changes, from what was ``captured``.

    By name, each (T, T); errors and gradients in millionths of a nat.
    """
    scores, g = scores[state.layer, state.head], 1e6 * g[state.layer, state.head]
    spread = g[scores.isfinite()].std(correction=0)
    by_hand = state.by_hand and (state.query, *state.by_hand)
    a, g = change(scores, g, state.temperature, state.constant * spread, by_hand)
    f, d, o = split_softmax_gradient(a, g)
    visible = torch.ones(a.shape, dtype=torch.bool).tril()
    sent = SOFTMAX_BACKWARD[state.rule](a, g, visible)
    sent = torch.zeros_like(a) if sent is None else sent
    return {"a": a, "g": g, "a g": a * g, "d": d, "o": o, "f": f, "sent": sent}


def head_numbers(maps: dict[str, Tensor], query: int) -> dict[str, float]:
    """Of a query its sums over keys (that of ``a g`` is b); of the head cosines and energies."""
    sums = {"b": "a g", "sum of d": "d", "sum of o": "o", "sum of what is sent": "sent"}
    numbers = {title: maps[name][query].sum().item() for title, name in sums.items()}
    # in single precision, as captured: head_energy then says where rounding would decide
    a, g = (maps[name].float()[None, None] for name in "ag")
    row = head_energy(a, g, n_boot=1).iloc[0]
    numbers |= {title: float(row[column]) for title, column in MEASURES.items()}
    sent, f = maps["sent"].flatten(), maps["f"].flatten()
    cosine = torch.cosine_similarity(sent, f, dim=0, eps=0).item()
    return numbers | {"cosine of what is sent with f": cosine if row["defined"] else torch.nan}


def lines_of_code(state: State) -> str:
    """A program that makes the same table, maps and numbers, to go on with."""
    return f"""from explore import State, captured, head_maps, head_numbers, trained_run
from helpers import load_corpus, twin

state = {state}
corpus = load_corpus()
run = trained_run(state.trained, corpus)  # a Run of helpers.train
model = twin(run.at(state.step), softmax_backward=state.rule)
scores, g, table = captured(model, corpus.encode(state.text))
maps = head_maps(scores, g, state)
print(head_numbers(maps, state.query))
table"""


# --------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------

TITLES = {"a": "weights a", "g": "error g = dL/da", "a g": "a g: rows sum to b",
          "d": "d = a (1 − a) g", "o": "o = f − d", "f": "f = d + o, exact",
          "sent": "sent by the rule"}
# bars of a query's row: their panel, place beside a key, width (of a key's share) and colour
BARS = {"a": ("a", 0, 0.6, "0.5"), "g": ("g", 0, 0.6, "0.5"),
        "d": ("parts", -0.3, 0.2, COLORS["diag"]), "o": ("parts", -0.1, 0.2, COLORS["offdiag"]),
        "f": ("parts", 0.1, 0.2, COLORS["full"]), "sent": ("parts", 0.3, 0.2, COLORS["ste"])}


def full_colours(maps: dict[str, Tensor]) -> dict[str, float]:
    """The size that has a map's full colour; the gradients share theirs, so that they compare."""
    sizes = {name: values.abs().max().item() or 1.0 for name, values in maps.items()}
    return sizes | dict.fromkeys(["d", "o", "f", "sent"], max(sizes[name] for name in "dof"))


class Picture:
    """Seven maps of a head and a row of them as bars: made once, then only filled anew."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(8, 6), dpi=100)
        FigureCanvasAgg(self.figure)
        panels = [["a", "g", "a g", "words"], ["d", "o", "f", "sent"]]
        panels += [[f"row {name}"] * 4 for name in ("a", "g", "parts")]
        self.axes = self.figure.subplot_mosaic(panels, gridspec_kw={
            "height_ratios": [10, 10, 2, 2, 5], "left": 0.08, "right": 0.995, "top": 0.96,
            "bottom": 0.04, "hspace": 0.25, "wspace": 0.05})
        self.images, self.marks, self.bars, self.text = {}, {}, {}, None
        for name, title in TITLES.items():
            ax, colors = self.axes[name], SEQUENTIAL if name == "a" else DIVERGING
            self.images[name] = ax.imshow(np.eye(2), cmap=colors, vmin=-(name != "a"), vmax=1)
            self.marks[name] = ax.plot([], [], "s", mfc="none", mec=COLORS["sign_sym"], ms=6)[0]
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=10, loc="left", pad=4)
        for name, (panel, _, _, color) in BARS.items():
            ax = self.axes[f"row {panel}"]
            self.bars[name] = ax.plot([], [], color=color, label=name, solid_capstyle="butt")[0]
            ax.axhline(0, color="0.7", linewidth=0.8)
            ax.tick_params(labelsize=8, length=0)
            ax.set_ylabel("" if panel == "parts" else panel, rotation=0, va="center")
        self.axes["words"].axis("off")
        self.words = self.axes["words"].text(0, 1, "", fontsize=9, va="top")
        self.axes["words"].legend(handles=[self.bars[name] for name in TITLES if name in BARS][2:],
                                  fontsize=9, loc="lower left", ncols=2, frameon=False)

    def draw(self, text: str, maps: dict[str, Tensor], sizes: dict[str, float], query: int,
             key: int) -> bytes:
        """A PNG. text: T characters; sizes: ``full_colours``, of the head before its changes."""
        T, hidden = len(text), ~np.tri(len(text), dtype=bool)
        for name, image in self.images.items():
            values = maps[name].numpy() / sizes[name]
            roots = np.sign(values) * np.sqrt(np.abs(values))  # so that small ones show
            image.set_data(np.ma.masked_where(hidden, roots))
            image.set_extent((-0.5, T - 0.5, T - 0.5, -0.5))
            self.marks[name].set_data([key], [query])
        self.words.set_text(
            f"Full colours\na: {sizes['a']:.2g}\ng: ±{sizes['g']:,.5g}\na g: ±{sizes['a g']:,.5g}\n"
            f"d, o, f, sent: ±{sizes['f']:,.5g}\nShades follow the root.\nBelow: query {query}")

        # A bar is a thick line from zero; between two of them there is no number.
        x, gap = np.arange(query + 1), np.full(query + 1, np.nan)
        points = self.axes["row a"].get_window_extent().width * 72 / self.figure.dpi / T
        for name, (_, place, width, _) in BARS.items():
            row = maps[name][query, : query + 1].numpy()
            lines = np.stack([x + place, x + place, gap]), np.stack([0 * x, row, gap])
            self.bars[name].set_data(*(part.T.ravel() for part in lines))
            self.bars[name].set_linewidth(width * points)
        for panel in ("row a", "row g", "row parts"):
            ax = self.axes[panel]
            if text != self.text:
                ax.set_xticks(range(T), printable(text))
                ax.tick_params(labelbottom=panel == "row parts")
                ax.set_xlim(-0.6, T - 0.4)
            ax.relim()
            ax.autoscale_view(scalex=False)
        self.text = text
        file = io.BytesIO()
        self.figure.canvas.print_png(file, pil_kwargs={"compress_level": 1})
        return file.getvalue()


# --------------------------------------------------------------------------------------------------
# The widgets
# --------------------------------------------------------------------------------------------------


class Explorer(widgets.VBox):
    """Controls on the left, the picture on the right; ``state`` is what they are set to."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.runs, self.picture = corpus, {}, Picture()
        self.layer, self.head = State.layer, State.head
        self.seen, self.asked, self.busy = None, None, False
        self.shown_text = ""  # the last one that can be shown

        def control(kind: type, name: str, **options) -> widgets.Widget:
            chosen = kind(description=name, style={"description_width": "initial"}, **options)
            chosen.observe(self.show, "value")
            return chosen

        # What was trained, when, on what text it is shown, and what its softmaxes send back.
        self.trained = control(widgets.Dropdown, "Trained by", options=[*TRAINED])
        self.step = control(widgets.SelectionSlider, "Iteration", value=State.step,
                            options=range(0, STEPS + 1, 50))
        rules = {label: rule for rule, label in RULE_LABELS.items()}
        self.rule = control(widgets.Dropdown, "Rule", options=rules)
        self.text = control(widgets.Text, "Text", layout={"width": "99%"},
                            value=corpus.decode(corpus.val[:41]).replace("\n", "⏎"))

        # Which head, which of its queries, and the three changes.
        self.measure = control(widgets.Dropdown, "Heads by", options=MEASURES)
        size = LocalGPTConfig()
        self.cells = []
        for place in range(size.n_layer * size.n_head):
            cell = widgets.Button(layout={"width": "auto", "margin": "0"})
            cell.on_click(lambda _, place=place: self.pick(*divmod(place, size.n_head)))
            self.cells.append(cell)
        last = size.block_size - 1
        self.query = control(widgets.IntSlider, "Query", value=State.query, max=last)
        self.key = control(widgets.IntSlider, "Key", value=0, max=last)
        self.temperature = control(widgets.FloatLogSlider, "Temperature", min=-2, max=2, value=1)
        self.constant = control(widgets.FloatSlider, "Constant in g", min=-3, max=3)
        self.by_hand = control(widgets.Checkbox, "This key's weight by hand", indent=False)
        self.weight = control(widgets.FloatSlider, "Weight", value=0.5, max=0.99, step=0.01)
        self.code = control(widgets.ToggleButton, "Lines of code", icon="code")
        undo = widgets.Button(description="Undo changes")
        undo.on_click(lambda _: self.undo())

        self.image, self.progress = widgets.Image(), widgets.Output()
        self.numbers, self.said, self.lines = widgets.HTML(), widgets.HTML(), widgets.Textarea()
        self.image.layout = {"width": "100%", "max_width": "860px"}
        self.lines.layout = {"width": "99%", "height": "250px"}
        named = [widgets.HTML(f"H{head}" if head >= 0 else "") for head in range(-1, size.n_head)]
        for layer in range(size.n_layer):
            of_layer = self.cells[layer * size.n_head : (layer + 1) * size.n_head]
            named += [widgets.HTML(f"L{layer}"), *of_layer]
        grid = widgets.GridBox(named, layout={"grid_gap": "2px", "grid_template_columns":
                                              f"auto repeat({size.n_head}, 1fr)"})
        left = [self.measure, grid, self.query, self.key, self.temperature, self.constant,
                self.by_hand, self.weight, widgets.HBox([undo, self.code])]
        left = widgets.VBox(left, layout={"flex": "0 0 310px"})
        right = widgets.VBox([self.image, self.numbers], layout={"flex": "1 1 0", "min_width": "0",
                                                                "overflow": "hidden"})
        top = widgets.HBox([self.trained, self.step, self.rule], layout={"grid_gap": "12px"})
        super().__init__([top, self.text, self.said, self.progress, widgets.HBox([left, right]),
                          self.lines])
        self.show()

    @property
    def state(self) -> State:
        by_hand = (self.key.value, self.weight.value) if self.by_hand.value else None
        return State(self.shown_text, self.trained.value, self.step.value,
                     self.rule.value, self.layer, self.head, self.query.value,
                     self.temperature.value, self.constant.value, by_hand)

    def pick(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head
        self.show()

    def undo(self) -> None:
        self.temperature.value, self.constant.value = 1.0, 0.0
        self.by_hand.value, self.weight.value = False, 0.5

    def ids(self) -> Tensor:
        """The text's ids; of one that cannot be shown, those of the text before."""
        text, self.said.value = self.text.value.replace("⏎", "\n"), ""
        try:
            ids = self.corpus.encode(text)
            if not 3 <= len(ids) <= LocalGPTConfig().block_size + 1:
                raise ValueError(f"{len(ids)} characters: 3 to 65 are needed")
        except ValueError as error:
            self.said.value = f"<b style='color: #b00020'>{error}</b>. Below is the text before."
            return self.corpus.encode(self.shown_text)
        self.shown_text = text
        return ids

    def model(self, state: State) -> LocalGPT:
        """The trained model with the chosen rule; one that nobody has asked for yet is trained."""
        if state.trained not in self.runs:
            with self.progress:  # its bar
                print("Where it was never trained before, this takes a minute or two.")
                self.runs[state.trained] = trained_run(state.trained, self.corpus)
            self.progress.clear_output()
        return twin(self.runs[state.trained].at(state.step), softmax_backward=state.rule)

    def show(self, *_) -> None:
        """All that follows from the controls; a capture only where a move asks for another one."""
        if self.busy:
            return
        self.busy = True  # what is set here moves nothing
        try:
            self.weight.disabled = not self.by_hand.value
            ids, state = self.ids(), self.state
            asked = state.text, state.trained, state.step, state.rule
            if asked != self.asked:
                self.seen, self.asked = captured(self.model(state), ids), asked
            self.query.max = len(state.text) - 2
            self.key.max = self.query.value  # a query sees no key after it
            self.fill(self.state)
        finally:
            self.busy = False

    def fill(self, state: State) -> None:
        """Picture, numbers, heads and lines of code of a state whose capture is there."""
        scores, g, table = self.seen
        before = replace(state, temperature=1.0, constant=0.0, by_hand=None)
        sizes, maps = full_colours(head_maps(scores, g, before)), head_maps(scores, g, state)
        self.image.value = self.picture.draw(state.text[:-1], maps, sizes, state.query,
                                             self.key.value)
        rows = ""
        for name, value in head_numbers(maps, state.query).items():
            shown = "not defined" if isnan(value) else f"{round(value, 4) + 0:.4g}"  # no -1e-14
            rows += f"<div>{name}: <b>{shown}</b></div>"
        self.numbers.value = f"<div style='columns: 2; line-height: 1.4'>{rows}</div>"
        self.lines.layout.display = "" if self.code.value else "none"
        self.lines.value = lines_of_code(state)

        values = table[self.measure.value].to_numpy()
        shares = np.nan_to_num(values / max(1.0, np.nanmax(values))).clip(0, 1)
        names = table[["layer", "head"]].itertuples(index=False, name=None)
        for cell, value, share, name in zip(self.cells, values, shares, names, strict=True):
            cell.description = "–" if isnan(value) else f"{value:.2f}"
            cell.tooltip = f"layer {name[0]}, head {name[1]}: {self.measure.label}"
            cell.style.button_color = to_hex(colormaps[SEQUENTIAL](0.75 * share))
            cell.style.text_color = "white" if share > 0.55 else "black"
            picked = name == (state.layer, state.head)
            cell.layout.border = f"3px solid {COLORS['bp'] if picked else 'transparent'}"
