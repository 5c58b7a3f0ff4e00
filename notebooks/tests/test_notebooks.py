"""The notebooks as pages: executed, each figure in words too, and no result that nothing holds.

Results that a reader takes away (the Answer, figures' titles, the front page, the README) are in a
sentence that ``claim`` holds against its values whenever the notebook is executed, in one cell a
page. Here the pages are read, and no kernel runs. Then ``claim`` itself, and what draws figures.
"""

import ast
import io
import re
from functools import cache
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib_inline.config import InlineBackend

from claims import NUMBER, claim
from figures import (plot_head_intervals, plot_head_map, plot_split, printable, set_style,
                     signed_scale)
from helpers import ROOT

FOLDER = ROOT / "notebooks"
# not what a reader left there
NAMES = sorted([*(path.stem for path in FOLDER.glob("[0-9]*.ipynb")), "index"])
HEADING = "What this page says, checked"
MACHINE_PATH = re.compile(r"(?<![\w.~/:])/(?:home|root|work|tmp|mnt|Users)/[\w.-]+")

FORMULA = r"\$[^$]+\$"
SAYS_A_NUMBER = re.compile(r"\$(?:[-\d.,()\s]|\\cdot|10\^\{-?\d+\})+\$|\$[^$]*\d\.\d[^$]*\$")
UNIT = re.compile(r"\s*(?:%|(?:nats?|runs?|seeds?|heads?|layers?|keys|values|pairs|times)\b)")
UNREAD = [re.compile(pattern, re.MULTILINE | re.DOTALL) for pattern in (
    r"^```[^\n]*\n.*?^```$|^ {4}[^\n]+$|`[^`]+`",  # code, raw HTML, directives
    r"\]\([^)]*\)",  # where a link leads
    r"\\begin\{equation\}.*?\\end\{equation\}",
    FORMULA,  # but for those that say a number
    r"^#+ \d+|^\s*\d+\. ",  # the number of a page, of a section, in a list
    r"(?:[Ss]ections?|[Ee]xercises?|Figures?|[Hh]ead|Python) \d+(?:\.\d+)?"
    r"(?: (?:and|to) \d+(?:\.\d+)?)?",
    r"\[[09]\d\b|(?<![\d.])0\d\b(?!\.)",  # a page
    r"\b(?:19|20)\d\d\b|SHA-256|CC BY[-A-Z]* \d\.\d",  # a year, a hash, a licence
    r"(?:[\d.]+ to )?[\d.]+ (?:minutes?|hours?|seconds?|MB|GB)\b",  # differ between machines
    r"95 % (?=(?:bootstrap )?interval)",  # the level of all intervals
)]

# ---- what a page says ----


@cache
def cells(name: str, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def is_figure(cell: nbformat.NotebookNode) -> bool:
    """Whether a code cell shows a picture."""
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    return bool(kinds & {"image/svg+xml", "image/png"})


def calls(name: str) -> list[tuple[ast.Module, ast.Call]]:
    """Each call in a notebook, with the cell that it is in."""
    trees = [ast.parse(cell.source) for cell in cells(name, "code")]
    return [(tree, n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]


@cache
def claims(name: str) -> list[str]:
    found = [call.args[0] for _, call in calls(name) if getattr(call.func, "id", "") == "claim"]
    computed = [ast.unparse(node) for node in found if not isinstance(node, ast.Constant)]
    assert not computed, f"{name}: write out the sentences of these claims: {computed}"
    return [" ".join(sentence.value.split()) for sentence in found]


def texts(tree: ast.Module, node: ast.expr) -> list[str]:
    """The texts in an expression of a cell, and in what was given to its names there."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    nodes = [node] + [n.value for n in assigned if getattr(n.targets[0], "id", None) in names]
    constants = [n.value for part in nodes for n in ast.walk(part) if isinstance(n, ast.Constant)]
    return [text for text in constants if isinstance(text, str)]


@cache
def titles(name: str) -> str:
    """What the figures of a notebook are headed by, but for what is put in when they are drawn."""
    found = []
    for tree, call in calls(name):
        headings = [keyword.value for keyword in call.keywords if keyword.arg == "title"]
        if getattr(call.func, "attr", None) in ("suptitle", "set_title"):
            headings += call.args[:1]
        found += [text for heading in headings for text in texts(tree, heading)]
    return "\n\n".join(found)


@cache
def page(name: str, only_what_is_taken_away: bool = False) -> str:
    """What a page tells its reader, or that part of it whose results have to be claimed."""
    if name == "README":
        return (ROOT / "README.md").read_text(encoding="utf-8")
    prose = [cell.source for cell in cells(name, "markdown")]
    if only_what_is_taken_away:
        return "\n\n".join([titles(name), *(prose if name == "index" else prose[:1])])
    options = [cell.metadata.get("mystnb", {}) for cell in cells(name, "code")]
    prose += [option.get("figure", {}).get("caption", "") for option in options]
    prose += [option.get("image", {}).get("alt", "") for option in options]
    for tree, call in calls(name):
        prose += texts(tree, call.args[0]) if getattr(call.func, "id", "") == "Markdown" else []
    return "\n\n".join([titles(name), *prose])


def unclaimed(text: str, sentences: list[str]) -> list[str]:
    """The results in ``text`` that no sentence covers, each with what is around it.

    A number is a result, but for single digits without a unit and what ``UNREAD`` leaves out.
    """
    read = text
    for pattern in UNREAD:
        read = pattern.sub(
            lambda m: m[0] if SAYS_A_NUMBER.fullmatch(m[0]) else re.sub(r"\S", "~", m[0]), read)
    text, read = " ".join(text.split()), " ".join(read.split())  # of the same length
    covered = [m.span() for sentence in sentences for m in re.finditer(re.escape(sentence), text)]
    found = []
    for number in NUMBER.finditer(read):
        is_result = not re.fullmatch(r"-?\d", number[0]) or UNIT.match(read, number.end())
        start, end = number.span()
        if is_result and not any(first <= start and end <= last for first, last in covered):
            found.append(text[max(0, start - 60) : end + 40])
    return found


# ---- every notebook ----


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_as_it_was_executed_in_cells_that_can_be_read(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    run = [cell for cell in cells(name, "code") if cell.source.strip()]
    counts = [cell.execution_count for cell in run]
    assert counts == [*range(1, len(counts) + 1)], f"{name}: execute it in one go"
    for cell in cells(name, "code"):
        for output in cell.outputs:
            failed = output.output_type == "error" or output.get("name") == "stderr"
            assert not failed, f"{cell.id} in {name}: {output}"
            assert "widget" not in str([*output.get("data", {})]), f"{cell.id} in {name}"
            shown = [text for kind, text in output.get("data", {}).items() if "image" not in kind]
            path = MACHINE_PATH.search(f"{shown} {output.get('text', '')} {cell.source}")
            assert not path, f"{cell.id} in {name} names a folder of one machine: {path[0]}"
        body = ast.parse(cell.source).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        lines = len(cell.source.splitlines()) - sum(n.end_lineno - n.lineno + 1 for n in imports)
        assert lines <= 30, f"{cell.id} in {name} has {lines} lines, without imports: split it"


HIDES = {"input": "source_hidden", "output": "outputs_hidden"}  # of the site, of JupyterLab


@pytest.mark.parametrize("name", NAMES)
def test_what_the_site_folds_jupyterlab_folds(name: str) -> None:
    for cell in cells(name, "code"):
        tags = {tag.replace("remove-", "hide-") for tag in cell.metadata.get("tags", [])}
        folded = {key for part, key in HIDES.items() if {f"hide-{part}", "hide-cell"} & tags}
        stored = cell.metadata.get("jupyter", {})
        assert stored == dict.fromkeys(folded, True), f"{cell.id} in {name}, jupyter: {folded}"


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_number_a_caption_and_words_for_who_cannot_see_it(name: str) -> None:
    number = 0 if name == "index" else int(name[:2])
    first = {"09_your_own_rule": 2, "09_five_keys": 4}.get(name, 1)  # page 09 has three notebooks
    for i, cell in enumerate(filter(is_figure, cells(name, "code")), start=first):
        options, where = cell.metadata.get("mystnb", {}), f"metadata of {cell.id} in {name}, mystnb"
        figure, alt = options.get("figure", {}), options.get("image", {}).get("alt", "")
        begins = figure.get("caption", "").startswith(f"**Figure {number}.{i}.** ")
        assert begins, f"{where}: figure.caption should begin with **Figure {number}.{i}.**"
        assert figure.get("name") == f"figure-{number}-{i}", f"{where}: figure.name"
        assert len(alt) > 40, f"{where}: image.alt should say in a sentence what is to be seen"
        ignored = {"nbval-ignore-output", "nbval-skip"} & {*cell.metadata.get("tags", [])}
        assert ignored, f"tags of {cell.id} in {name}: nbval-ignore-output, for drawings differ"


SKETCHES = {  # titles of what was not computed, and of the reader's own model
    "Instead of asking each other, keys can be sent one number by their query",
    "To name the number, the letter has to be looked up", "a little model with random weights"}


@pytest.mark.parametrize("name", NAMES)
def test_a_title_that_is_a_sentence_is_held_by_a_claim_with_or_without_numbers(name: str) -> None:
    for cell in cells(name, "code"):
        tree, over_all, of_panels = ast.parse(cell.source), [], []
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            method = getattr(call.func, "attr", None)
            over_all += call.args[:1] if method == "suptitle" else []
            of_panels += call.args[:1] if method == "set_title" else []
            of_panels += [keyword.value for keyword in call.keywords if keyword.arg == "title"]
        for title in (text for node in over_all or of_panels for text in texts(tree, node)):
            title = " ".join(title.split()).strip(": ")
            held = any(title in sentence or sentence in title for sentence in claims(name))
            assert held or len(title.split()) < 5 or title in SKETCHES, f"{name} claims no: {title}"


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_figures_that_are_spoken_of_are_there(name: str) -> None:
    captions = "".join(page(other) for other in NAMES)
    missing = set(re.findall(r"Figure \d+\.\d+", page(name)))
    missing -= set(re.findall(r"\*\*(Figure \d+\.\d+)\.\*\*", captions))
    assert not missing, f"{name} speaks of {sorted(missing)}"


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_every_result_that_a_reader_takes_away_is_claimed(name: str) -> None:
    sentences = [s for other in (NAMES if name == "README" else [name]) for s in claims(other)]
    missing = unclaimed(page(name, True), sentences)
    pages = "any page" if name == "README" else f"{name} itself"
    assert not missing, f"no claim of {pages} has the numbers in:\n" + "\n".join(missing)


def test_what_the_readme_says_is_to_be_changed_is_there():
    readme = (ROOT / "README.md").read_text()
    table = readme.split("## Where do I change ...")[1].split("\n\n    ")[0]
    sources = "".join(path.read_text() for folder in (".", "data", "notebooks", "notebooks/_site")
                      for path in (ROOT / folder).glob("*.py"))
    for name in re.findall(r"`([^`]+)`", table):
        name = name.split(" --")[0]
        files = [(ROOT / folder / name).exists()
                 for folder in (".", "notebooks/tests", "notebooks/_site")]
        assert name in sources or any(files), f"README names {name}, which is nowhere"


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_at_the_end_and_say_what_the_page_says(name: str) -> None:
    with_claims = [c for c in cells(name, "code") if re.search(r"^\s*claim\(", c.source, re.M)]
    for cell in with_claims:
        assert cell.source.startswith(f"# {HEADING}"), f"{cell.id}: begin with '# {HEADING}'"
        assert {"hide-input", "remove-input"} & {*cell.metadata.get("tags", [])}, f"{cell.id}: tags"
        below = cells(name, "code")[cells(name, "code").index(cell) :]
        assert not any(map(is_figure, below)), f"{cell.id} in {name} belongs at the page's end"
    told = " ".join(f"{page(name)} {page('README')}".split())
    lost = [sentence for sentence in claims(name) if sentence not in told]
    assert not lost, f"neither {name} nor the README has the words:\n" + "\n".join(lost)


def test_the_readme_shows_the_picture_that_the_front_page_has_drawn() -> None:
    for cell in (cell for cell in cells("index", "code") if "file" in cell.metadata):
        (drawn,) = (output.data["image/svg+xml"] for output in cell.outputs if "data" in output)
        assert f"](notebooks/{cell.metadata.file})" in page("README")
        assert (FOLDER / cell.metadata.file).read_text(encoding="utf-8") == drawn, "make notebooks"


@pytest.mark.parametrize(("text", "results"), [
    ("harm 0.43 [-0.22, 1.07], 42 %; 1,003,854 tokens", 5),
    ("falls to $-6.7$ at $3\\cdot10^{-5}, 10^{-4}$, with $\\sigma_B = 0.02$", 4),
    ("5 layers and 7 seeds, but 0: as good, 1/64, W_0, H100, $16 - n$", 2),
    ("[0.95](a.md#b12), 95 % intervals, 95 % of heads, [05](05_x), 2024, 2 minutes, `0.5`", 2),
    ("## 12. Title\n\n 3. item 14, Figures 7.1 and 7.2\n\n    code 0.5", 1),
    ("claimed 0.5 times here, but the harm is 0.5 there and 0.6 here", 2),
])
def test_what_counts_as_a_result(text: str, results: int) -> None:
    assert len(unclaimed(text, ["the harm is 0.5"])) == results


# ---- claim ----


@given(st.integers(-99_999_999, 99_999_999), st.integers(0, 4), st.floats(-0.499, 0.499))
def test_a_claim_holds_to_the_digits_printed_and_not_beyond(digits, decimals, rest) -> None:
    unit = 10**-decimals
    value = (digits + rest) * unit
    claim(f"the loss is {digits * unit:,.{decimals}f} nats", value)
    for wrong in (value + unit, value - unit):
        with pytest.raises(AssertionError, match="should be"):
            claim(f"a harm of ${digits * unit:.{decimals}f}$.", wrong)


def test_a_claim_reads_powers_allows_for_other_machines_and_refuses_all_else() -> None:
    mine, shakespeare = SimpleNamespace(is_shakespeare=False), SimpleNamespace(is_shakespeare=True)
    claim("at a rate of $3\\cdot10^{-5}$ it learns", 3e-5)
    claim("a loss of 2.4", 2.42, within=0.03)
    claim("a loss of 2.4", 3.0, False, corpus=mine)
    for values in ((3.0,), (2.4, 2.4), (np.nan,), (2.4, False), ()):
        with pytest.raises(AssertionError, match="in: a loss of"):
            claim("a loss of 2.4", *values, within=0.03, corpus=shakespeare)


# ---- figures ----


@pytest.fixture
def figures():
    """Figures without windows; neither they nor a style outlive the test."""
    with plt.rc_context(), pd.option_context("display.max_rows", 60, "display.max_columns", 20):
        plt.switch_backend("agg")
        yield
    plt.close("all")


def test_in_the_style_a_figure_is_the_same_bytes_and_valid_whatever_the_text(figures) -> None:
    set_style()
    assert pd.get_option("display.max_rows") is None
    inline = InlineBackend.instance()
    assert inline.figure_formats == {"svg"}
    text = "a \n\t\0\x1b\x7f\x85<b>&\u200b_\\é"
    assert all(label.isprintable() and label.strip() for label in printable(text))
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        ax = plot_head_map(torch.ones(len(text), len(text)), text, plt.figure().gca())
        ax.figure.savefig(file, format="svg", **inline.print_figure_kwargs)
    assert files[0].getvalue() == files[1].getvalue()
    ElementTree.fromstring(files[0].getvalue())


def test_a_head_map_has_queries_down_and_only_the_keys_that_they_see(figures) -> None:
    ax = plot_head_map(torch.arange(9.0).reshape(3, 3), "xyz")
    assert ax.images[0].get_array().tolist() == [[0, None, None], [3, 4, None], [6, 7, 8]]
    assert ax.yaxis_inverted() and (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


@pytest.mark.parametrize(
    ("shape", "text"), [((2, 3), None), ((3, 3), "xy"), ((3,), None), ((0, 0), "")])
def test_a_head_map_of_another_shape_is_refused(figures, shape, text) -> None:
    with pytest.raises(ValueError, match="a map is"):
        plot_head_map(torch.ones(shape), text)


@pytest.mark.parametrize(("largest", "end"), [(-4.0, 4), (4.0, 4), (0.0, 1), (torch.nan, 2)])
def test_signed_scales_are_centred_on_zero_and_hold_every_value(largest: float, end: int) -> None:
    norm = signed_scale(torch.tensor([largest, 2.0 if largest else 0.0]))
    assert (norm.vmin, norm.vmax, norm(0)) == (-end, end, 0.5)


def test_a_split_stands_key_by_key_as_a_sum(figures) -> None:
    attn, grad = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0, -2.0, 4.0])  # so b = 1
    ax = plot_split(attn, grad, "xyz")
    d, o, f = ([(bar.get_y(), bar.get_height()) for bar in bars] for bars in ax.containers)
    assert d == [(0, 0.25), (0, -0.375), (0, 0.75)] and f == [(0, 0), (0, -0.75), (0, 0.75)]
    assert o == [(0.25, -0.25), (-0.375, -0.375), (0.75, 0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]


def test_intervals_stand_at_their_head_from_their_lower_to_their_upper_end(figures) -> None:
    table = pd.DataFrame({"layer": [0, 1], "head": [2, 0], "r_diag": [1.0, 0.5]})
    ax = plot_head_intervals(table.assign(r_diag_lo=[0.8, 0.4], r_diag_hi=[1.1, 0.9]),
                             {"r_diag": "diag"})
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments(), [[[0, 0.8], [0, 1.1]], [[1, 0.4], [1, 0.9]]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["L0H2", "L1H0"]
