"""What the figures show is what the numbers say: the cells that draw them, on numbers where every mix-up shows.

Layers and heads differ in number, maps are not symmetric, no two numbers are the same. Cells are run as they stand.
"""

import ast
import base64
import io
import json
import re
import warnings
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import LogNorm, to_hex

import helpers
from helpers import CATASTROPHIC, COLORS, DIVERGING, GROUP, SEQUENTIAL, TOLERABLE, plot_harm, plot_head_map, printable

NOTEBOOKS = Path(__file__).parents[1]
L, H, B, T = 2, 3, 4, 5
NAMES = {"fa": "feedback alignment", "bp": "backpropagation"}
HEADS = [f"L{layer}H{head}" for layer in range(L) for head in range(H)]
NASTY = "a \n\t\0\x1b\x7f\x85<b>&\u200b$^_\\é"  # every kind of trouble that a text may bring


@pytest.fixture(autouse=True)
def drawing(monkeypatch):
    """No windows, no time spent on layout, and nothing that a figure changes stays changed."""
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.setattr(helpers, "claim", lambda *args, **options: None)  # said of other numbers than these
    with plt.rc_context(), pd.option_context("display.max_rows", 60, "display.max_columns", 20):
        helpers.set_style()
        assert plt.rcParams["figure.constrained_layout.use"] and pd.get_option("display.max_rows") is None
        plt.rcParams["figure.constrained_layout.use"] = False
        monkeypatch.setattr(helpers, "set_style", lambda: None)
        yield
    plt.close("all")


@cache
def code_cells(notebook):
    return [cell for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells if cell.source]


def figure_options(cell):
    return cell.metadata.get("mystnb", {}).get("figure", {})


def find(notebook, what):
    (cell,) = (
        cell
        for cell in code_cells(notebook)
        if cell.cell_type == "code" and (what in (cell.id, figure_options(cell).get("name")) or what in cell.source)
    )
    return ast.parse(cell.source).body


def run(notebook, *wanted, only=ast.stmt, **names):
    """Run the cells that have this figure, this id or this text in them, after the imports, in a namespace of theirs.

    Returns what they name; ``value`` is what the last one would show under it.
    """
    names["__name__"] = __name__  # warnings in cells count as ours
    names.setdefault("corpus", SimpleNamespace(is_shakespeare=False))  # what titles say is not so of these numbers
    body = find(notebook, "set_style()")
    for what in wanted:
        body += [statement for statement in find(notebook, what) if isinstance(statement, only)]
    if isinstance(body[-1], ast.Expr):
        body[-1] = ast.Assign([ast.Name("value", ast.Store())], body[-1].value)
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), f"<{notebook}>", "exec"), names)
    return SimpleNamespace(**names)


def words_over(ax):
    return ax.get_title(loc="left")


def by_title():
    return {words_over(ax): ax for ax in plt.gcf().axes}


def ticks(axis):
    places = axis.get_ticklocs()
    return dict(zip(map(float, places), map(str, axis.get_major_formatter().format_ticks(places)), strict=True))


def lines(ax):
    """The lines by colour: a list of (N, 2) each, without those that go across and those of the legend."""
    found = {}
    for line in ax.lines:
        xy = np.column_stack(line.get_data())
        if len(xy) > 0 and line.get_transform() == ax.transData:
            found.setdefault(to_hex(line.get_color()), []).append(xy)
    return found


def levels(ax, horizontal=True):
    """Where the lines lie that go from one end of the axes to the other."""
    across = [line for line in ax.lines if line.get_transform() == ax.get_yaxis_transform("grid")]
    along = [line for line in ax.lines if line.get_transform() == ax.get_xaxis_transform("grid")]
    return [line.get_ydata()[0] for line in across] if horizontal else [line.get_xdata()[0] for line in along]


def legend(ax):
    found = ax.get_legend()
    return dict(zip([t.get_text() for t in found.get_texts()], found.legend_handles, strict=True))


def title():
    return plt.gcf().get_suptitle()


def head_table(seed, *quantities):
    """As ``energy_table``'s, with intervals that are longer to one side."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame({"layer": np.repeat(range(L), H), "head": np.tile(range(H), L)})
    for name in quantities:
        value = random.uniform(0.1, 0.9, L * H) - 0.4 * (name == "r_cross")
        table[name], table[f"{name}_lo"], table[f"{name}_hi"] = value, value - random.uniform(0.01, 0.1), value + 0.2
    return table


def random_layers(seed=0, size=T, heads=H):
    """Captured layers, attention (B, H, T, T) causal and the error at it, in float64."""
    random = torch.Generator().manual_seed(seed)
    layers = []
    for layer in range(L):
        scores = torch.randn(B, heads, size, size, generator=random, dtype=torch.float64)
        attn = (scores + torch.full((size, size), -torch.inf).triu(1)).softmax(-1)
        grad = torch.randn(attn.shape, generator=random, dtype=torch.float64) * attn.gt(0)
        layers.append(SimpleNamespace(name=f"layer {layer}", attn=attn, grad=grad, scores=scores))
    return layers


# ---- every figure ----


def test_every_figure_has_its_number_a_caption_and_words_for_those_who_cannot_see_it():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = [cell for cell in code_cells(path.stem) if "plt.show()" in cell.source and "file" not in cell.metadata]
        for i, cell in enumerate(cells, start=1):
            number = f"{0 if path.stem == 'index' else int(path.stem[:2])}.{i}"
            options = cell.metadata["mystnb"]
            assert re.match(rf"\*\*Figure {re.escape(number)}\.\*\* \w", options["figure"]["caption"]), cell.id
            assert options["figure"]["name"] == f"figure-{number.replace('.', '-')}"
            assert len(options["image"]["alt"]) > 40
            assert "nbval-ignore-output" in cell.metadata["tags"]  # another matplotlib draws other bytes
            assert "remove-output" not in cell.metadata["tags"]
        drawing = [cell.id for cell in code_cells(path.stem) if "plot_harm(" in cell.source]
        assert set(drawing) <= {cell.id for cell in cells}


def test_figures_that_prose_and_captions_name_are_there():
    existing = {
        figure_options(cell).get("caption", "")[2:].split(".**")[0]
        for p in NOTEBOOKS.glob("*.ipynb")
        for cell in code_cells(p.stem)
    }
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in code_cells(path.stem):
            text = json.dumps([cell.source if cell.cell_type == "markdown" else "", cell.metadata])
            assert set(re.findall(r"Figure \d\.\d+", text)) <= existing


def test_the_same_figure_is_the_same_bytes_and_valid_whatever_the_text():
    pictures = []
    for _ in range(2):
        plt.figure()
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            plot_head_map(torch.rand(len(NASTY), len(NASTY), generator=torch.Generator().manual_seed(0)), NASTY)
        file = io.BytesIO()
        plt.savefig(file, format="svg", **helpers.InlineBackend.instance().print_figure_kwargs)
        plt.close()
        pictures.append(file.getvalue())
    assert pictures[0] == pictures[1]
    ElementTree.fromstring(pictures[0])
    assert helpers.InlineBackend.instance().figure_formats == {"svg"}


def test_no_two_things_of_one_kind_share_a_colour():
    for things in (("bp", "fa", "sign_sym", "dfa"), ("full", "diag", "offdiag", "cross", "ste")):
        assert len({COLORS[thing] for thing in things}) == len(things)


# ---- helpers: maps and scales ----


def test_printable_shows_each_character_and_only_what_can_be_shown():
    shown = printable(NASTY)
    assert len(shown) == len(NASTY) == len(set(shown))
    assert all(label.isprintable() and label.strip() for label in shown)
    assert [shown[NASTY.index(c)] for c in "a<&é"] == list("a<&é")


def test_a_head_map_has_queries_down_and_keys_across():
    values = torch.arange(9.0).reshape(3, 3)
    ax = plot_head_map(values, "xyz")
    shown = ax.images[0].get_array()
    assert shown.tolist() == [[0, None, None], [3, 4, None], [6, 7, 8]]
    assert ticks(ax.xaxis) == ticks(ax.yaxis) == {0: "x", 1: "y", 2: "z"}
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.images[0].get_clim() == (0, 8) and ax.images[0].get_cmap().name == SEQUENTIAL
    assert ax.images[0].get_interpolation() == "none"


@pytest.mark.parametrize(
    ("values", "text"),
    [(torch.ones(2, 3), None), (torch.ones(3, 3), "xy"), (torch.ones(3), None), (torch.ones(0, 0), "")],
)
def test_a_head_map_of_another_shape_is_refused(values, text):
    with pytest.raises(ValueError, match="a map is"):
        plot_head_map(values, text)


@pytest.mark.parametrize("largest", [-4.0, 4.0, 0.0, torch.nan])
def test_signed_scales_are_centred_on_zero_and_hold_every_value(largest):
    maps = torch.tensor([[largest, 0.5 * largest], [-0.25 * largest, 0]])
    norm = helpers.signed_scale(maps)
    assert norm.vmin == -norm.vmax < 0 and norm(0) == 0.5
    if largest:
        assert norm.vmax == 4 or largest != largest
    with warnings.catch_warnings(action="error"):
        plot_head_map(maps, norm=norm, cmap=DIVERGING)
        plt.gcf().canvas.draw()


# ---- helpers: harm ----


def harm_rows(**changes):
    """Two groups as ``harm_table`` gives them, with every verdict."""
    rows = [  # rule, harm, low, high, verdict, lr_at_end
        ("recall", "mean", 0.1, -0.1, 0.2, "tolerable", False),
        ("recall", "zero", 0.6, 0.2, 0.9, "costly", True),
        ("recall", "ste", 1.7, 1.2, 2.9, "catastrophic", False),
        ("shakespeare", "running", 0.5, 0.1, 1.3, "undetermined", True),
        ("shakespeare", "full", 0.0, 0.0, 0.0, "reference", False),
        ("shakespeare", "lateral", np.nan, np.nan, np.nan, "missing", False),
        ("shakespeare", "diagonal", np.nan, np.nan, np.nan, "undecided", False),
    ]
    table = pd.DataFrame(rows, columns=["task", "rule", "harm", "low", "high", "verdict", "lr_at_end"])
    recall = table["task"] == "recall"
    table["method"], table["attn_mode"] = np.where(recall, "fa", "bp"), np.where(recall, "softmax", "sigmoid")
    table["qk_norm"], table["score_scale"] = np.where(recall, "off", "cut_k"), np.where(recall, 1.0, 0.5)
    table["optimizer"] = np.where(recall, "adamw", "sgd")
    return table.assign(steps=np.where(recall, 3000, 500), **changes)


def drawn_harm(axes):
    """What a reader takes from the figure: one row a rule, by its place on the axis."""
    rows = []
    for ax in axes:
        rules = {position: rule for position, rule in ticks(ax.yaxis).items()}
        words = {text.xy[1]: text for text in ax.texts}
        for bar, point in zip(lines_of_length(ax, 2), lines_of_length(ax, 1), strict=True):
            (low, y), (high, same) = np.column_stack(bar.get_data())
            assert y == same == point.get_ydata()[0] and bar.get_color() == point.get_color() == words[y].get_color()
            rows.append((words_over(ax), rules[y], *point.get_xdata(), low, high, words[y].get_text(), point))
            assert words[y].xy[0] >= high  # the word does not cover the bar
    return pd.DataFrame(rows, columns=["group", "rule", "harm", "low", "high", "verdict", "point"])


def lines_of_length(ax, n):
    return [line for line in ax.lines if len(line.get_xdata()) == n and line.get_transform() == ax.transData]


def test_harm_stands_at_its_rule_with_its_interval_word_colour_and_marker():
    table = harm_rows()
    axes = plot_harm(table)
    drawn = drawn_harm(axes)
    groups = ["recall, fa, 3,000 iterations"] * 3
    groups += ["shakespeare, bp, sigmoid attention, qk_norm cut_k, scores times 0.5, sgd, 500 iterations"]
    assert drawn["group"].tolist() == groups
    expected = table[:4].set_index("rule")
    columns = ["harm", "low", "high", "verdict"]
    pd.testing.assert_frame_equal(drawn.set_index("rule")[columns].sort_index(), expected[columns].sort_index())
    assert drawn["rule"].tolist() == ["ste", "zero", "mean", "running"]  # the best is on top
    looks = {"tolerable": ("#009e73", "o"), "costly": ("#9a6700", "s"), "catastrophic": ("#d55e00", "X")}
    looks["undetermined"] = ("#777777", "D")
    for row in drawn.itertuples():
        color, marker = looks[row.verdict]
        assert to_hex(row.point.get_color()) == color and row.point.get_marker() == marker
        at_end = expected.loc[row.rule, "lr_at_end"]
        assert to_hex(row.point.get_markerfacecolor()) == ("#ffffff" if at_end else color)
    for ax in axes:
        assert sorted(levels(ax, horizontal=False)) == [0, TOLERABLE, CATASTROPHIC]
        dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        assert sorted(dashed) == [TOLERABLE, CATASTROPHIC]
        assert not ax.yaxis_inverted() and ax.get_xlim() == axes[0].get_xlim()
        assert ax.get_xlim()[0] < table["low"].min() and ax.get_xlim()[1] > table["high"].max()
        assert ax.get_ylim()[0] < 0 and ax.get_ylim()[1] > len(ticks(ax.yaxis)) - 1
    assert axes[-1].get_xlabel().startswith("harm (0: full, 1: Q and K never trained")


def test_a_rule_that_diverged_stands_at_the_edge():
    table = harm_rows()
    ax = plot_harm(
        table.assign(**{c: table[c].where(table["rule"] != "ste", np.inf) for c in ("harm", "low", "high")})
    )[0]
    (mark,) = (line for line in ax.lines if line.get_marker() == ">")
    assert ticks(ax.yaxis)[mark.get_ydata()[0]] == "ste" and mark.get_transform() == ax.get_yaxis_transform()
    assert mark.get_xdata()[0] == 1 and to_hex(mark.get_color()) == "#d55e00"
    (word,) = (text for text in ax.texts if text.get_text() == "diverged")
    assert word.xy[1] == mark.get_ydata()[0] and len(lines_of_length(ax, 2)) == 2
    plt.gcf().canvas.draw()


def test_equal_harms_are_drawn():
    assert len(drawn_harm(plot_harm(harm_rows(harm=0.5, low=0.5, high=0.5, verdict="costly")))) == 6


@pytest.mark.parametrize("table", [harm_rows(harm=np.nan), harm_rows()[:0], harm_rows(rule="none")])
def test_a_table_without_any_harm_is_refused_in_words(table):
    with pytest.raises(ValueError, match="no rule in this table has a harm"):
        plot_harm(table)


@pytest.fixture(scope="module")
def real():
    """What the stored results say: the table of harm, each row under its settings."""
    return helpers.headline_table(helpers.runs_without_norms())


def assert_draws(axes, table):
    table = table[~table["rule"].isin(["full", "none"]) & table["harm"].notna()]
    kinds = [
        f"{r.task}, {r.method}, {'sigmoid attention, ' * (r.attn_mode == 'sigmoid')}{r.steps:,} iterations"
        for r in table.itertuples()
    ]
    columns = ["group", "rule", "harm", "low", "high", "verdict"]
    expected = table.assign(group=kinds)[columns].sort_values(columns[:2], ignore_index=True)
    drawn = drawn_harm(axes)[columns].sort_values(columns[:2], ignore_index=True)
    pd.testing.assert_frame_equal(drawn, expected, check_dtype=False)


def essay(*wanted, **names):
    """Cells of the front page, after both of its cells of imports."""
    return run("index", "cell-1", *wanted, **names)


def test_the_essay_s_five_keys_are_those_of_their_start_and_of_the_descent():
    shown = essay("figure-0-2")
    s, g = (torch.tensor(shown.start[name], dtype=torch.float64) for name in ("scores", "errors"))
    without, with_constant, alone, exact = plt.gcf().axes
    for ax, constant in ((without, 0), (with_constant, 2)):
        parts = dict(zip("fdo", split(s.softmax(-1), g + constant), strict=True))
        for bars, name in zip(ax.containers, "fdo", strict=True):
            assert bars.get_label() == name
            np.testing.assert_allclose([bar.get_height() for bar in bars], parts[name])
            assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == [1, 2, 3, 4, 5]
    for ax, rule in ((alone, helpers.diagonal), (exact, helpers.full)):
        rows = [s]
        for _ in range(200):
            rows.append(rows[-1] - 0.1 * rule(rows[-1].softmax(-1), g + 2, torch.ones(5, dtype=torch.bool)))
        np.testing.assert_allclose([line.get_ydata() for line in ax.lines], torch.stack(rows).T)
        moved = (rows[-1].softmax(-1) - s.softmax(-1)).abs().max()
        assert words_over(ax).endswith(f"weights move by {moved:.2f} at most")


def split(a, g):
    f = a * (g - (a * g).sum(-1, keepdim=True))
    d = a * (1 - a) * g
    return f, d, f - d


def test_the_essay_shows_the_head_whose_lateral_part_is_largest(monkeypatch):
    found = {step: random_layers(step, 30) for step in (0, 50, 500)}
    monkeypatch.setattr(helpers, "capture_batch", lambda model, x, y: found[model])
    runs = {"fa": SimpleNamespace(at=lambda step: step)}
    essay("figure-0-3", runs=runs, x=None, y=None)
    shares = {}
    for layer, maps in enumerate(found[50]):
        f, _, o = split(maps.attn, maps.grad)
        for head in range(H):
            shares[layer, head] = (o[:, head].square().sum() / f[:, head].square().sum()).item()
    layer, head = max(shares, key=shares.get)
    assert title().startswith(f"L{layer}H{head}:")
    axes = np.reshape(plt.gcf().axes, (3, 5))
    assert [ax.get_title() for ax in axes[0]] == list("agdof")
    for row, step in zip(axes, found, strict=True):
        a, g = (part[0, head, :24, :24] for part in (found[step][layer].attn, found[step][layer].grad))
        f, d, o = split(a, g)
        for ax, part in zip(row, (a, g, d, o, f), strict=True):
            (image,) = ax.images
            drawn = image.get_array()
            assert (drawn.mask == ~np.tri(24, dtype=bool)).all()
            np.testing.assert_allclose(drawn.compressed(), part[np.tri(24, dtype=bool)])
        limits = [ax.images[0].get_clim() for ax in row]
        assert limits[2] == limits[3] == limits[4] and all(-low == high > 0 for low, high in limits[1:])
        assert [ax.images[0].get_cmap().name for ax in row] == [SEQUENTIAL] + 4 * [DIVERGING]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["at the beginning", "early: iteration 50", "at the end"]


def test_the_essay_s_lines_are_the_heads_cosines_with_each_baseline(monkeypatch):
    found = {method: random_layers(seed, 64) for seed, method in enumerate(("fa", "bp"))}
    monkeypatch.setattr(helpers, "capture_batch", lambda model, x, y: found[model])
    runs = {method: SimpleNamespace(model=method) for method in found}
    essay("figure-0-4", runs=runs, x=None, y=None, config=SimpleNamespace(n_layer=L))
    for ax, method in zip(plt.gcf().axes, ("bp", "fa"), strict=True):
        assert words_over(ax) == NAMES[method] and len(ax.lines) == L * H + 1
        heads = np.array([line.get_ydata() for line in ax.lines[:-1]])
        seen = torch.ones(64, 64).tril()
        for (layer, head), drawn in zip(product(range(L), range(H)), heads, strict=True):
            a, g = (getattr(found[method][layer], name)[:, head] for name in ("attn", "grad"))
            exact = split(a, g)[0]
            plain, lateral = ((g * weights).sum(-1, keepdim=True) for weights in (seen / seen.sum(-1, keepdim=True), a))
            for value, c in zip(drawn, (0, plain, lateral), strict=True):
                sent = a * (1 - a) * (g - c)
                cosine = torch.cosine_similarity(sent.flatten(1), exact.flatten(1), dim=1).mean().item()
                assert value == pytest.approx(cosine)
        np.testing.assert_allclose(ax.lines[-1].get_ydata(), heads.mean(0))
        assert [*ticks(ax.xaxis).values()] == ["nothing", "plain mean", "lateral sum b"]


def test_the_essay_s_arrows_lead_from_each_letter_to_its_number():
    shown = essay("figure-0-5")
    ax = plt.gca()
    boxes = {text.get_position()[0]: text.get_text() for text in ax.texts if text.get_bbox_patch()}
    assert [*boxes.values()] == shown.words and len(shown.words) == 12
    answers = {text.get_position()[0]: text.get_text() for text in ax.texts if text.get_position()[1] == -1}
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 4
    places = [*boxes]
    for arrow in arrows:
        end, begin = arrow.xy[0], arrow.xyann[0]
        assert boxes[places[places.index(end) - 1]] == boxes[begin] and boxes[end] == answers[begin]


@pytest.fixture(scope="module")
def essay_runs():
    """The runs that the front page draws, as they are stored, backpropagation alone."""
    runs = helpers.load_results(helpers.SECOND_EDITION)
    runs = runs.query("method == 'bp' and attn_mode == 'softmax' and score_scale == 1 and optimizer == 'adamw'")
    runs = runs[runs["steps"] == runs["task"].map(lambda task: helpers.TASKS[task]["steps"])]
    return runs[runs["softmax_backward"].isin(helpers.RULE_NAMES)]


def test_the_essay_s_losses_are_means_of_the_stored_runs_and_its_slider_has_their_curves(essay_runs):
    shown = essay("SETTINGS = {", "figure-0-6", core=essay_runs)
    tuning = essay_runs.query("task == 'recall' and 100 <= seed < 200")
    for ax, panel, norm in zip(plt.gcf().axes, shown.page["panels"], ("off", "cut", "exact"), strict=True):
        assert words_over(ax) == panel["title"]
        for line, rule in zip(ax.lines, ("full", "diagonal", "zero", "none"), strict=True):
            assert line.get_label() == f"{helpers.RULE_NAMES[rule]} ({rule})"
            where = "exact" if (norm, rule) == ("cut", "none") else norm
            runs = tuning[(tuning["qk_norm"] == where) & (tuning["softmax_backward"] == rule)]
            for rate, drawn, stored in zip(*line.get_data(), panel["curves"][rule]["losses"], strict=True):
                of_rate = runs.loc[np.isclose(runs["lr"], rate), "losses"].str.split(expand=True).astype(float)
                assert len(of_rate) == 4 and of_rate.shape[1] == len(shown.page["iterations"]) == 21
                np.testing.assert_allclose(stored, of_rate.mean(), atol=6e-5)
                assert drawn == pytest.approx(np.clip(of_rate.mean().iloc[-1], 3e-4, 4), abs=6e-5)


def test_the_essay_draws_every_run_by_its_drift(essay_runs):
    essay("figure-0-7", core=essay_runs, task=SimpleNamespace(best_guess=0.4))
    ax = plt.gca()
    groups = [("off", ["diagonal", "zero"]), ("exact", ["diagonal", "zero"]), ("off", ["full"])]
    labels = ["no norm, local rules", "norm with its own backward pass, local rules", "no norm, exact gradient"]
    for points, (norm, rules), label in zip(ax.collections, groups, labels, strict=True):
        runs = essay_runs[(essay_runs["task"] == "recall") & (essay_runs["qk_norm"] == norm)]
        runs = runs[runs["softmax_backward"].isin(rules)]
        assert points.get_label() == label and len(runs) > 20
        np.testing.assert_array_equal(points.get_offsets(), runs[["common_mode", "accuracy"]])
    assert levels(ax) == [0.4]


def test_the_essay_s_matrix_has_every_verdict_in_its_place(essay_runs):
    at_full = helpers.harm_table(essay_runs, at="full").set_index(["task", "qk_norm", "rule"])
    settings = {"off": "", "cut": "", "exact": ""}
    essay("matrix-entries", "figure-0-8", at_full=at_full, SETTINGS=settings)
    ax = plt.gca()
    rules = [re.search(r"\((\w+)\)", label)[1] for label in ticks(ax.yaxis).values()]
    assert ax.yaxis_inverted() and not {"full", "none"} & {*rules}
    words = {text.get_position(): text for text in ax.texts if not hasattr(text, "xyann")}
    fills = {(p.get_x() + 0.48, round(p.get_y() + 0.46)): to_hex(p.get_facecolor()) for p in ax.patches}
    drawn = 0
    for (x, (task, norm)), (y, rule) in product(
        enumerate(product(("recall", "shakespeare"), settings)), enumerate(rules)
    ):
        if (task, norm, rule) not in at_full.index or not at_full.loc[(task, norm, rule), "seeds"]:
            assert (x, y) not in words
            continue
        row, drawn = at_full.loc[(task, norm, rule)], drawn + 1
        if task == "recall":
            low, high = helpers.share_interval(row.solved, row.seeds)
            text, good, bad = f"{row.solved} of {row.seeds}", low > 0.5, high < 0.5
        else:
            text, good, bad = f"{row.harm:.2f}", row.high <= TOLERABLE, row.low >= CATASTROPHIC
        assert words[x, y].get_text() == text and (words[x, y].get_weight() == "bold") == good
        (fill,) = (fill for (at, line), fill in fills.items() if abs(at - x) < 1e-6 and line == y)
        assert fill == ("#b7e1cd" if good else "#f6cdb8" if bad else "#eeeeee")
    assert drawn == len(words) == len(fills) > 30


def test_the_readme_s_picture_has_each_head_s_energies_and_each_share_solved(essay_runs, monkeypatch):
    found = random_layers(0, 64)
    monkeypatch.setattr(helpers, "capture_batch", lambda *args: found)
    index = ["task", "qk_norm", "rule"]
    at_own, at_full = (helpers.harm_table(essay_runs, at=whose).set_index(index) for whose in ("own", "full"))
    names = {"runs": {"bp": SimpleNamespace(model=None)}, "config": SimpleNamespace(n_layer=L, n_head=H)}
    essay("energies-by-head", "in-a-picture", at_own=at_own, at_full=at_full, x=None, y=None, **names)
    known, told, learnt = plt.gcf().axes
    for ax, part in ((known, 1), (told, 2)):
        words = {text.get_position(): text.get_text() for text in ax.texts}
        for layer, head in product(range(L), range(H)):
            parts = [p.square().sum() for p in split(found[layer].attn[:, head], found[layer].grad[:, head])]
            share = (parts[part] / parts[0]).item()
            assert words[head, layer] == f"{share:.2f}"
            assert ax.images[0].get_array()[layer, head] == pytest.approx(share)
    assert learnt.yaxis_inverted()
    networks = {"exact gradient": ("off", "full"), "own error only": ("off", "diagonal")}
    networks |= {"with a norm, cut": ("cut", "diagonal"), "with an exact norm": ("exact", "diagonal")}
    expected, filled = [], []
    for place, cell in ticks(learnt.yaxis).items():
        for whose in (at_full, at_own):
            row = whose.loc[("recall", *networks[cell])]
            expected.append((row.solved / row.seeds, place + (0.12 if whose is at_own else -0.12)))
            filled.append(whose is at_own)
    np.testing.assert_allclose([points.get_offsets()[0] for points in learnt.collections], expected)
    assert [to_hex(points.get_facecolor()[0]) != "#ffffff" for points in learnt.collections] == filled


# ---- 01 ----


def test_figure_1_1_takes_a_row_apart_without_and_with_a_constant():
    shown = run("01_softmax_jacobian", "figure-1-1", "numbers-1-1")
    a, panels = shown.row, shown.axes
    for (above, below), constant in zip(panels.T, (0, 2), strict=True):
        g = shown.row_errors + constant
        b = (a * g).sum()
        f, d, o = a * (g - b), a * (1 - a) * g, -a * (b - a * g)
        assert_row(below, f, d, o, "12345", atol=1e-6)  # in float32 here
        (points,) = (line for line in above.lines if line.get_label() == "error g")
        np.testing.assert_allclose(points.get_ydata(), g)
        np.testing.assert_allclose([bar.get_height() for bar in above.containers[0]], a)
        np.testing.assert_allclose(levels(above), [b], rtol=1e-6)
        numbers = shown.value.loc[constant]
        for name, part in {"a": a, "g": g, "d": d, "o": o, "f": f}.items():
            np.testing.assert_allclose(numbers[name], part, atol=6e-4)
    assert [words_over(above) for above in panels[0]][1].endswith("with a constant added to all errors")
    assert set(legend(panels[0, 1])) == {"weight a", "error g", "lateral sum b"}


def test_figure_1_2_shows_the_jacobians_on_one_scale_that_holds_them():
    shown = run(
        "01_softmax_jacobian",
        "def jacobian(",
        "by_autograd = torch.autograd.functional",
        "figure-1-2",
        "numbers-1-2",
        N_KEYS=4,
    )
    for name, s in shown.scores.items():
        a = s.softmax(-1)
        expected = [[float(a[i] * (int(i == j) - a[j])) for j in range(len(a))] for i in range(len(a))]
        ax = by_title()[name]
        mesh = ax.collections[0]
        np.testing.assert_allclose(mesh.get_array().reshape(len(a), -1), expected, atol=1e-6)
        np.testing.assert_allclose(shown.value.loc[name].to_numpy()[:, : len(a)], expected, atol=6e-4)
        assert mesh.get_clim() == (-0.2, 0.2) and np.abs(expected).max() < 0.2 and mesh.get_cmap().name == DIVERGING
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("key j", "key i") and ax.yaxis_inverted()


def test_figure_1_3_draws_the_ratios_over_the_constant():
    torch.manual_seed(0)
    attn = random_layers(heads=1)[0].attn
    names = {"attn": attn, "errors": torch.randn(B, T, T), "as_maps": lambda rows: rows[:, None].double()}
    ratios = ["r_diag", "r_offdiag", "r_cross", "one_minus_r_diag"]
    shown = run("01_softmax_jacobian", "figure-1-3", "numbers-1-3", **names, ratios=ratios)
    ax = plt.gca()
    label_of = {"one_minus_r_diag": "1 - r_diag"}
    by_label = {line.get_label(): np.column_stack(line.get_data()) for line in ax.lines}
    for i in (0, 13, 40):
        row = helpers.head_energy(attn, names["as_maps"](names["errors"] + shown.shifts[i]), n_boot=2).iloc[0]
        for name in ratios:
            assert by_label[label_of.get(name, name)][i].tolist() == [shown.shifts[i], row[name]]
            assert abs(shown.value[name].iloc[i] - row[name]) < 6e-4
    for name, color in {"r_diag": "diag", "r_offdiag": "offdiag", "r_cross": "cross"}.items():
        assert to_hex(legend(ax)[name].get_color()) == COLORS[color].lower()
    assert shown.value.index.tolist() == shown.shifts.tolist()
    assert ax.get_xlabel().startswith("constant added to g") and ax.get_ylabel() == "energy / energy of f"


# ---- 02 ----


def test_figure_2_1_has_each_rule_s_way_back():
    shown = run("02_training", "figure-2-1")
    for ax, (method, words) in zip(shown.axes, shown.title.items(), strict=True):
        assert words_over(ax) == words
        forwards = [(a.xyann[0], a.xy[0]) for a in ax.texts if a.get_text() == "" and a.xy[1] > 0]
        backwards = [(a.xyann[0], a.xy[0]) for a in ax.texts if a.get_text() == "" and a.xy[1] < 0]
        assert sorted(forwards) == [(0, 1), (1, 2), (2, 3)]
        assert sorted(backwards) == ([(3, 0), (3, 1), (3, 2)] if method == "dfa" else [(1, 0), (2, 1), (3, 2)])
        colors = {to_hex(a.arrow_patch.get_edgecolor()) for a in ax.texts if a.get_text() == "" and a.xy[1] < 0}
        assert colors == {COLORS[method].lower()}


def test_figure_2_2_draws_each_method_s_loss_and_the_lines_to_compare_it_with():
    losses = {"fa": pd.Series([4.0, 3.0, 2.5], [0, 50, 100]), "bp": pd.Series([4.1, 2.0, 1.5], [0, 50, 100])}
    runs = {method: SimpleNamespace(series={"val_loss": loss}.get) for method, loss in losses.items()}
    shown = run("02_training", "figure-2-2", "numbers-2-2", runs=runs, references={"unigram": 3.3, "bigram": 2.4})
    ax = plt.gca()
    for method, loss in losses.items():
        (line,) = lines(ax)[COLORS[method].lower()]
        assert line.tolist() == [list(pair) for pair in loss.items()]
        assert to_hex(legend(ax)[NAMES[method]].get_color()) == COLORS[method].lower()
        pd.testing.assert_series_equal(shown.value[method], loss, check_names=False)
    assert levels(ax) == [3.3, 2.4]
    assert {text.get_text(): text.xy[1] for text in ax.texts} == {"unigram 3.30": 3.3, "bigram 2.40": 2.4}
    assert ax.get_xlabel() == "iteration" and ax.get_ylabel() == "validation loss (nats per token)"


def test_figure_2_3_averages_over_maps_on_the_left_and_over_blocks_on_the_right():
    maps = ["q_proj", "k_proj", "v_proj"]
    inside = pd.DataFrame(product((0, 50), "01", maps), columns=["step", "block", "map"])
    inside["value"] = inside["step"] + 10 * inside["block"].astype(int) + inside["map"].map(maps.index) ** 2
    shown = run("02_training", "figure-2-3", "numbers-2-3", inside=inside, config=SimpleNamespace(n_layer=2))
    left, right = plt.gcf().axes
    assert words_over(left).startswith("mean over the six maps") and "blocks" in words_over(right)
    for ax, column in ((left, "block"), (right, "map")):
        for label, handle in legend(ax).items():
            if label in set(inside[column]):
                (line,) = lines(ax)[to_hex(handle.get_color())]
                mean = inside[inside[column] == label].groupby("step")["value"].mean()
                np.testing.assert_allclose(line, list(mean.items()))
        assert len(lines(ax)) == inside[column].nunique()
    assert shown.value.loc[50, ("1", "v_proj")] == 64 and left.get_ylim() == right.get_ylim()
    assert left.get_xlabel() == "iteration" and left.get_ylabel() == "cosine of FA's gradient with BP's"


# ---- 03 ----


def test_figure_3_1_leads_the_way_back_to_the_hook_and_not_to_the_copy():
    shown = run("03_capture", "figure-3-1")
    names = {place: name for name, place in shown.places.items()}
    arrows = {"#000000": set(), "#999999": set()}
    for a in shown.ax.texts:
        if a.get_text() == "":
            ends = (tuple(np.rint(np.multiply(4, end)) / 4) for end in (a.xyann, a.xy))
            arrows[to_hex(a.arrow_patch.get_edgecolor())].add(tuple(names[end] for end in ends))
    chain = set(zip(shown.chain, shown.chain[1:], strict=False))
    assert arrows["#999999"] == chain | {("weights A", "clone of A")}
    assert arrows["#000000"] == {pair[::-1] for pair in chain} | {("weights A", "hook")}


# ---- 04 ----


INTERVALS = {
    "figure-4-2": {"r_diag": "diag", "r_offdiag": "offdiag", "r_cross": "cross"},
    "figure-4-4": {"cos_diag": "diag", "cos_ste": "ste", "cos_ste_unmasked": "full"},
}


def assert_intervals(ax, table, quantities):
    assert [bars.get_label() for bars in ax.containers] == list(quantities)
    assert list(ticks(ax.xaxis).values()) == HEADS
    places, markers = [], set()
    for (quantity, color), (points, _, (bars,)) in zip(quantities.items(), ax.containers, strict=True):
        x, y = points.get_data()
        assert y.tolist() == table[quantity].tolist()
        assert (np.rint(x) == np.arange(L * H)).all()  # beside its own tick
        for place, low, high, bar in zip(
            x, table[f"{quantity}_lo"], table[f"{quantity}_hi"], bars.get_segments(), strict=True
        ):
            np.testing.assert_allclose(bar, [(place, low), (place, high)])
        assert {to_hex(points.get_color()), *map(to_hex, bars.get_colors())} == {COLORS[color].lower()}
        places += x.tolist()
        markers.add(points.get_marker())
    assert len(set(places)) == len(places) and len(markers) == len(quantities)  # nothing hides behind another


@pytest.mark.parametrize("figure", INTERVALS)
def test_intervals_stand_at_their_head_from_their_lower_to_their_upper_end(figure):
    quantities = INTERVALS[figure]
    tables = {"fa": head_table(1, *quantities), "bp": head_table(2, *quantities)}
    function = vars(run("04_energy_split", "figure-4-2", only=ast.FunctionDef))
    numbers = ["numbers-4-4"] if figure == "figure-4-4" else []
    shown = run("04_energy_split", figure, *numbers, **{**function, "tables": tables, "names": NAMES})
    axes = by_title()
    for method, name in NAMES.items():
        assert_intervals(axes[name], tables[method], quantities)
        assert axes[name].get_ylim() == axes[NAMES["fa"]].get_ylim()
    assert list(legend(axes[NAMES["fa"]])) == list(quantities)
    assert axes[NAMES["bp"]].get_xlabel() == "layer and head"
    if figure == "figure-4-2":
        assert levels(axes[NAMES["fa"]]) == [0, 1] and axes[NAMES["fa"]].get_ylabel() == "energy / energy of f"
    else:
        assert axes[NAMES["fa"]].get_ylim() == (0, 1) and axes[NAMES["fa"]].get_ylabel() == "cosine with f"
        expected = tables["bp"]["cos_ste_unmasked_hi"].round(3).tolist()
        numbers = shown.value.loc["bp", "cos_ste_unmasked_hi"]
        assert numbers.tolist() == expected and numbers.index.tolist() == HEADS


def test_intervals_of_four_quantities_draw():
    quantities = {"r_diag": "diag", "r_offdiag": "offdiag", "r_cross": "cross", "cos_diag": "ste"}
    table = head_table(1, *quantities)
    cell = run("04_energy_split", "figure-4-2", only=ast.FunctionDef)
    _, ax = plt.subplots()
    cell.plot_head_intervals(table, quantities, ax)
    assert_intervals(ax, table, quantities)


def test_figure_4_3_shows_the_head_whose_parts_cancel_most_on_its_text():
    size = 14
    layers = random_layers(size=size)
    table = head_table(1, "r_cross").assign(r_cross=[-0.1, -0.2, -0.3, -0.4, -0.9, -0.5])  # L1H1
    text = "To be, or not:"
    names = {"tables": {"fa": table}, "captured": {"fa": layers}, "x": torch.arange(size)[None]}
    corpus = SimpleNamespace(is_shakespeare=False, decode=lambda ids: "".join(text[i] for i in ids))
    shown = run("04_energy_split", "figure-4-3", "numbers-4-3", corpus=corpus, **names)
    a, g = layers[1].attn[0, 1], layers[1].grad[0, 1]
    tri = torch.ones(size, size).tril().bool()
    d = a * (1 - a) * g
    parts = {"attention a": a, "diagonal d": d, "full f = d + o": a * (g - (a * g).sum(-1, keepdim=True))}
    parts["off-diagonal o"] = parts["full f = d + o"] - d
    signed = torch.stack([part for label, part in parts.items() if label != "attention a"])
    for label, part in parts.items():
        ax = by_title()[label]
        np.testing.assert_allclose(ax.images[0].get_array().filled(0), part, atol=1e-12)
        assert list(ticks(ax.xaxis).values()) == list(ticks(ax.yaxis).values()) == printable(text)
        low, high = ax.images[0].get_clim()
        if label == "attention a":
            assert (low, high) == (0, 1) and ax.images[0].get_cmap().name == SEQUENTIAL
        else:
            assert high == -low == pytest.approx(signed[:, tri].abs().max())
            assert ax.images[0].get_cmap().name == DIVERGING
        numbers = shown.value.loc[label].astype(float)
        np.testing.assert_allclose(numbers, part, atol=1e-3 * part.abs().max())
        assert numbers.index.tolist() == numbers.columns.tolist() == printable(text)
    assert title().startswith("FA head L1H1:")
    bars = [ax.get_xlabel() for ax in plt.gcf().axes[4:]]
    assert bars == ["weight", "gradient at the score (nats)"]


def test_figure_4_1_has_a_point_a_head_and_a_dash_at_the_mean():
    choices = ["nothing", "plain mean of g", "lateral sum b"]
    columns = ["method", "layer", "subtracted from g", "head"]
    centred = pd.DataFrame(product(NAMES.values(), ["layer 0", "layer 1"], choices, range(H)), columns=columns)
    centred["cosine"] = np.random.default_rng(0).uniform(0.5, 1, len(centred))
    shown = run("04_energy_split", "figure-4-1", "numbers-4-1", centred=centred)
    ax = plt.gca()
    assert list(ticks(ax.xaxis).values()) == choices
    points, dashes = {}, {}
    for collection in ax.collections:
        for (x, y), color in zip(
            collection.get_offsets(), np.resize(collection.get_facecolors(), (99, 4)), strict=False
        ):
            points.setdefault((round(float(x)), to_hex(color)), []).append(y)
    for line in ax.lines:
        for x, y in zip(*line.get_data(), strict=True):
            dashes[round(float(x)), to_hex(line.get_color())] = y
    for (method, choice), part in centred.groupby(["method", "subtracted from g"]):
        (key,) = (key for key, name in NAMES.items() if name == method)
        place = choices.index(choice), COLORS[key].lower()
        assert sorted(points[place]) == sorted(part["cosine"])
        assert dashes[place] == pytest.approx(part["cosine"].mean())
        assert to_hex(legend(ax)[method].get_color()) == COLORS[key].lower()
        for layer, mean in part.groupby("layer")["cosine"].mean().items():
            assert abs(shown.value.loc[(method, layer), choice] - mean) < 6e-4
    low, high = ax.get_ylim()
    assert low == 0 and high >= 1 and ax.get_ylabel() == "cosine of the diagonal part with f"


def test_figure_4_5_draws_the_mean_over_heads_and_a_band_that_holds_them_all():
    quantities = ["r_diag", "cos_diag", "common_mode", "entropy"]
    moments = list(product(NAMES, (0, 50, 100)))
    tables = [head_table(i, *quantities).assign(method=m, step=step) for i, (m, step) in enumerate(moments)]
    over_training = pd.concat(tables)
    run("04_energy_split", "figure-4-5", over_training=over_training)
    for ax, quantity in zip(plt.gcf().axes, quantities, strict=True):
        words = {"r_diag": "r_diag", "cos_diag": "cosine", "common_mode": "common mode", "entropy": "entropy"}
        assert words[quantity] in ax.get_ylabel() and (ax.get_yscale() == "log") == (quantity == "r_diag")
        for method, part in over_training.groupby("method"):
            (line,) = lines(ax)[COLORS[method].lower()]
            by_step = part.groupby("step")[quantity]
            np.testing.assert_allclose(line, list(by_step.mean().items()))
            (band,) = (b for b in ax.collections if to_hex(b.get_facecolor()[0]) == COLORS[method].lower())
            ends = pd.DataFrame(band.get_paths()[0].vertices).groupby(0)[1]
            np.testing.assert_allclose(ends.min(), by_step.min())
            np.testing.assert_allclose(ends.max(), by_step.max())
    assert {name: to_hex(h.get_color()) for name, h in legend(plt.gcf().axes[0]).items()} == {
        m: COLORS[m].lower() for m in NAMES
    }


# ---- 05 and 06, from the stored results ----


@pytest.fixture(scope="module")
def verdict(real):
    groups = ["task", "method", "attn_mode", "steps"]  # in all else the stored groups are alike
    results = helpers.runs_without_norms()
    at_full = helpers.harm_table(results, at="full").query("seeds > 0")
    return {"results": results, "table": real, "at_full": at_full, "GROUP": groups}


def test_figures_5_1_and_6_1_draw_their_tables(real):
    core = real[real["rule"].isin(["full", "diagonal", "ste", "none"])]
    run("05_verdict", "figure-5-1", core=core)
    assert_draws(plt.gcf().axes, core)
    plt.close("all")
    bp = real.query("method == 'bp' and attn_mode == 'softmax'")
    run("06_local_surrogates", "figure-6-1", table=bp)
    assert_draws(plt.gcf().axes, bp)


RULES = {"full": COLORS["full"], "none": "#777777", "diagonal": COLORS["diag"], "ste": COLORS["ste"]}


def runs_by_rule(verdict, chosen):
    """The runs of the stored table, at the feedback scale (and the rate) of the table of harm, by panel and rule."""
    results, table = verdict["results"], verdict["table"].rename(columns={"rule": "softmax_backward"})
    runs = results.merge(table[[*GROUP, "softmax_backward", *chosen]])
    runs = runs[runs["attn_mode"] == "softmax"]
    return dict(iter(runs.groupby(["task", "method", "steps", "softmax_backward"])))


def test_figure_5_2_draws_each_rule_s_loss_over_its_rates(verdict):
    shown = run("05_verdict", "figure-5-2", "numbers-5-2", **verdict)
    tuning = runs_by_rule(verdict, ["feedback_scale"])
    colors = {rule: to_hex(handle.get_color()) for rule, handle in legend(plt.gcf().axes[2]).items()}
    assert colors == {rule: color.lower() for rule, color in RULES.items()}
    for ax, (task, method, steps) in zip(plt.gcf().axes, shown.panels, strict=True):
        for rule, color in colors.items():
            part = tuning[task, method, steps, rule]
            mean = part[part["seed"].isin(helpers.TUNING_SEEDS)].groupby("lr")["val_loss"].mean()
            if mean.empty:
                assert color not in lines(ax)
                continue
            (line,) = lines(ax)[color]
            np.testing.assert_allclose(line, list(mean.items()))
            np.testing.assert_allclose(shown.value.loc[(task, method, steps, rule)].dropna(), mean, atol=6e-4)
        assert words_over(ax) == f"{task}, {method}" and ax.get_xscale() == "log"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "validation loss (nats)")


def test_figure_5_3_draws_every_seed_s_curve_in_the_colour_of_its_rule(verdict):
    panels = [("recall", "bp", 3000), ("recall", "fa", 3000), ("shakespeare", "bp", 500), ("shakespeare", "fa", 500)]
    names = verdict | {"rule_colors": RULES, "panels": panels[:3]}
    shown = run("05_verdict", "curves = []", "figure-5-3", "numbers-5-3", **names)
    tests = runs_by_rule(verdict, ["feedback_scale", "lr"])
    for ax, (task, method, steps) in zip(plt.gcf().axes, panels, strict=True):
        for rule, color in RULES.items():
            if (task, method, steps, rule) not in tests:
                assert color.lower() not in lines(ax)
                continue
            part = tests[task, method, steps, rule]
            curves = [
                [float(loss) for loss in curve.split()]
                for curve in part["losses"][~part["seed"].isin(helpers.TUNING_SEEDS)]
            ]
            drawn = lines(ax)[color.lower()]
            assert sorted(line[:, 1].tolist() for line in drawn) == sorted(curves)
            assert all(line[0, 0] == 0 and line[-1, 0] == steps for line in drawn)
            numbers = shown.value.loc[(task, steps), (method, rule)].dropna()
            np.testing.assert_allclose(numbers, np.mean(curves, axis=0), atol=6e-4)
        exact = np.mean(
            [line[:, 1] for line in lines(plt.gcf().axes[0 if task == "recall" else 2])[RULES["full"]]], axis=0
        )
        np.testing.assert_allclose(lines(ax)["#000000"][0][:, 1], exact)  # dotted: bp, full
        assert words_over(ax) == f"{task}, {method}"
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("iteration", "validation loss (nats)")
        if task == "shakespeare":
            assert sorted(levels(ax)) == [2.482, 3.347]
            assert {text.get_text(): text.xy[1] for text in ax.texts} == {"bigram": 2.482, "unigram": 3.347}


def test_figure_5_4_has_a_point_a_run_in_the_colour_of_its_rate(verdict):
    shown = run("05_verdict", "def row(", "figure-5-4", "numbers-5-4", core=verdict["table"][:0], **verdict)
    ax = plt.gca()
    results = verdict["results"].query("task == 'recall' and method == 'bp' and attn_mode == 'softmax'")
    expected = results[results["softmax_backward"] != "none"]
    (points,) = (c for c in ax.collections if len(c.get_offsets()) == len(expected))
    np.testing.assert_allclose(points.get_offsets(), expected[["common_mode", "accuracy"]])
    colors = plt.get_cmap("viridis")(LogNorm(1e-5, 1e-2)(expected["lr"].to_numpy()))
    np.testing.assert_allclose(points.get_facecolors()[:, :3], colors[:, :3], atol=1e-6)
    assert ax.get_xscale() == "log" and ax.get_xlabel().startswith("common mode")
    assert ax.get_ylabel() == "recall accuracy" and levels(ax) == [shown.row("recall", "bp", "none", 3000).accuracy]
    for (rule, lr), part in expected.groupby(["softmax_backward", "lr"]):
        numbers = shown.value.loc[(rule, lr)].astype(float)
        wanted = [part[name].agg(end) for name in ("accuracy", "common_mode") for end in ("min", "max")]
        np.testing.assert_allclose(numbers, wanted, rtol=6e-3)


def test_figure_5_5_draws_harm_against_the_cosine_and_the_row_sum(verdict):
    shown = run("05_verdict", "figure-5-5", "numbers-5-5", **verdict)
    table = pd.concat([verdict["table"].query("task == 'recall'"), verdict["at_full"].query("task == 'shakespeare'")])
    table = table[~table["rule"].isin(["full", "none"]) & table["harm"].notna()].reset_index(drop=True)
    left, right = plt.gcf().axes
    colors = {task: to_hex(handle.get_color()) for task, handle in legend(right).items() if task in set(table["task"])}
    for ax, quantity in ((left, "cos_scores"), (right, "row_sum")):
        (points,) = (c for c in ax.collections if len(c.get_offsets()) == len(table))
        np.testing.assert_allclose(points.get_offsets(), table[[quantity, "harm"]])
        assert [to_hex(color) for color in points.get_facecolors()] == table["task"].map(colors).tolist()
        assert levels(ax) == [TOLERABLE, CATASTROPHIC]
    assert "cosine" in left.get_xlabel() and "row sum" in right.get_xlabel() and left.get_ylabel() == "harm"
    numbers = shown.value.reset_index()
    for name in ("cos_scores", "row_sum", "harm"):
        np.testing.assert_allclose(numbers[name], table[name], atol=6e-4)
    assert numbers["verdict"].tolist() == table["verdict"].tolist()


# ---- 07 and the explorer ----


def captured_text(size, heads=H):
    """A stand-in for 07's ``capture_text``: other maps (L, H, size, size) for each method and step."""

    def capture(text, method, step):
        layers = random_layers(seed=1000 * len(method) + ord(method[0]) + step, size=size, heads=heads)
        scores = torch.stack([layer.scores[0] for layer in layers])
        g = torch.stack([layer.grad[0] for layer in layers])
        return scores + torch.full((size, size), -torch.inf).triu(1), g

    return capture


def parts_of(scores, g):
    a = scores.softmax(-1)
    b = (a * g).sum(-1, keepdim=True)
    return a, a * (g - b), a * (1 - a) * g, -a * (b - a * g)


def assert_row(ax, f, d, o, text, atol=1e-12):
    """Bars: d from zero, o from where d ends, f from zero; side by side at their key, in their colours."""
    shown = {bars.get_label(): bars for bars in ax.containers}
    at = np.arange(len(f))
    places = []
    for name, color, start, end in (("d", "diag", 0 * d, d), ("o", "offdiag", d, f), ("f", "full", 0 * f, f)):
        bars = shown[name].patches
        np.testing.assert_allclose([bar.get_y() for bar in bars], start, atol=atol)
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in bars], end, atol=atol)
        assert {to_hex(bar.get_facecolor()) for bar in bars} == {COLORS[color].lower()}
        centres = np.array([bar.get_x() + bar.get_width() / 2 for bar in bars])
        assert (np.rint(centres) == at).all()
        places.append(centres)
    assert (np.diff(places, axis=0) > 0.2).all()
    assert list(ticks(ax.xaxis).values()) == printable(text) and ax.get_xlabel() in ("key", "")
    assert ax.get_ylabel() in ("gradient at the score", "")
    torch.testing.assert_close(f, d + o)


def test_figure_7_1_takes_a_row_apart_with_three_constants():
    text = (NASTY + "the quick brown fox jumps over")[:40]
    capture = captured_text(40)
    names = {"capture_text": capture, "text": text, "layer": 1, "head": 0, "method": "fa", "step": 50}
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        n = run("07_explore", "figure-7-1", **names).n
    scores, g = (maps[1, 0] for maps in capture(text, "fa", 50))
    spread = g[scores.isfinite()].std(correction=0)
    for ax, times in zip(plt.gcf().axes, (-1, 0, 1), strict=True):
        _, f, d, o = parts_of(scores, torch.where(scores.isfinite(), g + times * spread, 0))
        assert_row(ax, f[n - 1, :n], d[n - 1, :n], o[n - 1, :n], text[:n])
        cosine = torch.cosine_similarity(f.flatten(), d.flatten(), dim=0).item()
        assert words_over(ax) == f"constant {times} x the spread of g: cosine of d with f {cosine:.2f}"
        assert ax.get_ylim() == plt.gcf().axes[0].get_ylim()
        low, high = ax.get_ylim()
        assert low < min(d[n - 1].min(), f[n - 1].min(), 0) and high > max(d[n - 1].max(), f[n - 1].max(), 0)


def test_the_explorer_s_data_decode_to_every_head_in_its_order(tmp_path):
    text = NASTY[:T] + "more"
    capture = captured_text(T)
    config = SimpleNamespace(n_layer=L, n_head=H, n_embd=16, block_size=T, softmax_backward="full")
    runs = {method: SimpleNamespace(model=SimpleNamespace(config=config)) for method in NAMES}
    rows, columns = np.tril_indices(T)
    names = {"runs": runs, "MOMENTS": (0, 50), "T": T, "text": text, "rows": rows, "columns": columns}
    names |= {"capture_text": capture, "STEPS": 50, "opening": {}, "settled": {}}
    names["corpus"] = SimpleNamespace(
        is_shakespeare=False, name="a", stoi={c: i for i, c in enumerate(sorted(set(text)))}
    )

    shown = run("07_explore", "def quantise(", "def pack(", **names)
    exec(
        compile(ast.Module(find("07_explore", 'DATA / "explorer-data.js"'), []), "<07>", "exec"),
        vars(shown) | {"DATA": tmp_path},
    )
    script = (tmp_path / "explorer-data.js").read_text()
    assert "</script" not in script.lower() and "\0" not in script
    page = json.loads(script.removeprefix("const EXPLORER = ").removesuffix(";\n"))
    assert (page["layers"], page["heads"], page["characters"]) == (L, H, printable(text[:T]))
    assert page["vocabulary"] == [
        [c, shape] for c, shape in zip(sorted(set(text)), printable(sorted(set(text))), strict=True)
    ]

    n = T * (T + 1) // 2
    for method in NAMES:
        assert list(page["maps"][method]) == ["0", "50"]
        for step, stored in page["maps"][method].items():
            scores, g = capture(text, method, int(step))
            weights = np.frombuffer(base64.b64decode(stored["a"]), "<u2").reshape(L * H, n)
            errors = np.frombuffer(base64.b64decode(stored["g"]), "<i2").reshape(L * H, n)
            for layer in range(L):
                for head in range(H):
                    i = H * layer + head
                    a = scores[layer, head].softmax(-1)
                    for k, (query, key) in enumerate((q, k) for q in range(T) for k in range(q + 1)):
                        assert abs(weights[i, k] / 65535 - a[query, key] ** 0.25) <= 0.51 / 65535
                        largest = g[layer, head].abs().max().item()
                        assert stored["scale"][i] == pytest.approx(largest)
                        assert (
                            abs(errors[i, k] / 32767 * largest - g[layer, head, query, key]) <= 0.51 / 32767 * largest
                        )


@pytest.fixture(scope="module")
def mending():
    """What the figures of 08 are drawn from."""
    shown = run(
        "08_what_mends_it", "import itertools", "from sweep import", "def complete", set_style=helpers.set_style
    )
    return vars(shown) | {"local": ("diagonal", "zero")}


def test_figure_8_1_has_both_outcomes_at_both_rates(mending):
    run("08_what_mends_it", "figure-8-1", **mending)
    expected = {"recall": set(), "shakespeare": set()}
    ends = {"recall": set(), "shakespeare": set()}
    for whose, rule, (place, arm) in product(
        ("own", "full"), ("diagonal", "zero"), enumerate(["exact", "cut_q", "cut_k", "cut", "off"])
    ):
        y = round(place + (0.15 if rule == "diagonal" else -0.15), 2)
        color = COLORS["diag" if rule == "diagonal" else "offdiag"].lower()
        for task in expected:
            row = mending["tables"][whose].loc[task, arm, rule]
            share = row.solved / row.seeds
            value = share if task == "recall" else min(row.harm, 1.6)  # what lies beyond is drawn at the edge
            low, high = helpers.share_interval(row.solved, row.seeds) if task == "recall" else (row.low, row.high)
            expected[task].add((round(value, 4), y, color, whose == "own"))
            ends[task].add((round(low, 4), round(high, 4), y))
    for ax, task in zip(plt.gcf().axes, expected, strict=True):
        drawn = set()
        for points in ax.collections:
            ((x, y),) = points.get_offsets()
            drawn.add((round(x, 4), round(y, 2), to_hex(points.get_edgecolors()[0]), len(points.get_facecolors()) > 0))
        assert drawn == expected[task]
        found = {
            (*line[:, 0].round(4), line[0, 1].round(2))
            for rule in lines(ax).values()
            for line in rule
            if len(line) == 2
        }
        assert ends[task] <= found


def test_figure_8_6_has_each_run_in_its_colour(mending):
    trained = {}

    def train(config, *args, **options):
        rule, norm = config.softmax_backward, config.qk_norm
        values = np.random.default_rng(len(trained)).uniform(0.1, 1, (5, 51))
        names = ("accuracy", "entropy", "score_max", "q_norm", "cos_scores")
        trained[rule, norm] = {n: pd.Series(v, range(0, 1001, 20)) for n, v in zip(names, values, strict=True)}
        return SimpleNamespace(series=trained[rule, norm].get)

    task = helpers.TASKS["recall"]["data"]
    run("08_what_mends_it", "figure-8-6", **mending | {"train": train, "task": task})
    halves = {"zero": "offdiag", "zero_row_constant": "cross", "zero_row_rest": "dfa"}
    shown = {(f"full_500_then_{half}", "off"): COLORS[color] for half, color in halves.items()}
    assert set(trained) == set(shown)
    panels = dict(zip(("accuracy", "entropy", "score_max", "q_norm"), plt.gcf().axes, strict=True))
    for (key, color), (metric, ax) in product(shown.items(), panels.items()):
        (line,) = lines(ax)[to_hex(color)]
        np.testing.assert_array_equal(line, trained[key][metric].loc[400:].reset_index())
        assert levels(ax, horizontal=False) == [500]
    assert [words_over(ax) for ax in panels.values()] == [
        *("recall accuracy", "entropy of attention", "largest score", "size of queries")
    ]
    keys = {name: to_hex(handle.get_color()) for name, handle in legend(panels["q_norm"]).items()}
    names = "zero", "its constant half", "its other half"
    assert keys == dict(zip(names, map(to_hex, shown.values()), strict=True))


def test_figure_8_7_has_every_run_at_its_dose(mending):
    colors = {"diagonal": COLORS["diag"], "zero": COLORS["offdiag"]}
    run("08_what_mends_it", "figure-8-7", **mending | {"LINES": colors})
    table = helpers.usual_runs(helpers.load_results(helpers.SECOND_EDITION))
    table = table.query("task == 'recall' and method == 'bp' and lr == 1e-3 and 200 <= seed < 204")
    panels = by_title()
    for norm, title in (("off", "without norms"), ("exact", "under exact norms")):
        ax = panels.pop(title)
        runs = table[table["qk_norm"] == norm].set_index("softmax_backward")
        for points, rule in zip(ax.collections, ("zero", "diagonal"), strict=True):
            names = {0: rule, 1: {"zero": "full", "diagonal": "diagonal_lateral"}[rule]}
            names |= {dose: f"{rule}_{dose:g}b" for dose in (0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2)}
            expected = {(dose, accuracy) for dose, name in names.items() for accuracy in runs.loc[name, "accuracy"]}
            assert {tuple(point) for point in points.get_offsets().tolist()} == expected
            (line,) = lines(ax)[to_hex(colors[rule])]
            means = [(dose, runs.loc[names[dose], "accuracy"].mean()) for dose in sorted(names)]
            np.testing.assert_allclose(line, means)
        assert levels(ax) == [helpers.TASKS["recall"]["data"].best_guess]
    assert not panels


def test_figure_8_8_has_every_run_and_the_harm_of_all_at_each_time(mending):
    colors = {"full": RULES["full"], "none": "0.6", "diagonal": COLORS["diag"], "zero": COLORS["offdiag"]}
    run("08_what_mends_it", "figure-8-8", **mending | {"LINES": colors})
    runs = helpers.load_results(helpers.SECOND_EDITION).query("task == 'shakespeare' and steps == 2000")
    found = {rule: {} for rule in colors}
    for row in runs.itertuples():
        found[row.softmax_backward][row.seed] = [float(loss) for loss in row.losses.split()]
    left, right = plt.gcf().axes
    for rule, color in colors.items():
        expected = [*found[rule].values(), np.mean([*found[rule].values()], axis=0)]
        assert len(expected) == 5
        drawn = lines(left)[to_hex(color)]
        assert sorted(map(tuple, (line[:, 1].round(9) for line in drawn))) == sorted(map(tuple, np.round(expected, 9)))
        assert all((line[:, 0] == range(0, 2001, 100)).all() for line in drawn)
    bands = {to_hex(band.get_facecolor()[0]): band.get_paths()[0].vertices for band in right.collections}
    for rule in ("diagonal", "zero"):
        (line,) = lines(right)[to_hex(colors[rule])]
        for step, value in line:
            seeds = sorted(found[rule])
            at_step = ([found[name][seed][int(step) // 100] for seed in seeds] for name in (rule, "full", "none"))
            expected = helpers.harm(*at_step)
            assert value == pytest.approx(expected.harm)
            band = bands[to_hex(colors[rule])]
            ends = sorted(set(band[band[:, 0] == step][:, 1].round(6)))
            assert {round(expected.low, 6), round(expected.high, 6)} <= set(ends)
        assert [*line[:, 0]] == [*range(100, 2001, 100)]
    assert levels(right) == [TOLERABLE]


def test_figure_8_9_has_a_panel_a_way_and_a_point_a_rate(mending):
    colors = {"full": RULES["full"], "diagonal": COLORS["diag"], "zero": COLORS["offdiag"]}
    run("08_what_mends_it", "figure-8-9", **mending | {"LINES": colors})
    runs = helpers.load_results(helpers.SECOND_EDITION)
    runs = runs.query(
        "task == 'recall' and method == 'bp' and qk_norm == 'off' and seed in (100, 101) and steps == 3000"
    )
    panels = by_title()
    assert set(panels) == set(helpers.OPTIMIZERS)
    for name, rule in product(panels, colors):
        part = runs[(runs["optimizer"] == name) & (runs["softmax_backward"] == rule)]
        means = part.groupby("lr")["val_loss"].mean()
        (line,) = lines(panels[name])[to_hex(colors[rule])]
        np.testing.assert_allclose(line, means.reset_index())
        assert panels[name].get_xscale() == panels[name].get_yscale() == "log"
        low, high = panels[name].get_xlim()
        assert low < means.index.min() and means.index.max() < high
