"""The text and the numbers cannot part ways: each result that a page states is in a sentence that a notebook claims.

``claim`` holds the sentences against the values when a notebook is executed; here the pages are read, and no kernel
runs. Every number in them counts as a result, except for single digits without a unit, for what ``UNREAD`` leaves out
and for ``EXEMPT``.
"""

import ast
import re
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import NUMBER, ROOT, claim

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("[0-9i]*.ipynb"))  # not what a reader may have left there
PAGES = [*NOTEBOOKS, *sorted(path.name for path in FOLDER.glob("*.md")), "README.md"]

UNITS = "nats?|steps?|runs?|seeds?|heads?|layers?|keys|values|pairs|channels|times|hours?|minutes?|GB|MB"
UNIT = re.compile(rf"\s*(?:%|(?:{UNITS})\b)")
FORMULA = r"\$[^$]+\$"
NUMBERS_ONLY = re.compile(r"\$(?:[-\d.,()\s]|\\cdot|10\^\{-?\d+\})+\$")
UNREAD = [
    re.compile(pattern, re.MULTILINE | re.DOTALL)
    for pattern in (
        r"^```(?!\{glossary\})[^\n]+\n.*?^```$",  # code, raw HTML, directives
        r"^```(?:\{glossary\})?$",  # what is in it is prose
        r"^ {4}[^\n]+$",  # code
        r"`[^`]+`",  # code
        r"\]\([^)]*\)",  # where a link leads
        r"\\begin\{equation\}.*?\\end\{equation\}",
        FORMULA,  # but see ``is_read``
        r"^#+ \d+|^\s*\d+\. ",  # the number of a page, of a section, in a list
        r"(?:[Ss]ections?|[Ee]xercises?|Figures?|[Pp]lan|Python) \d(?:\.?\d)?(?: (?:and|to) \d(?:\.?\d)?)?",
        r"[Hh]ead \d+\.\d\b",  # layer and head
        r"(?<![\d.])0\d\b(?!\.)|\[[19]0\b",  # a page
        r"\b(?:19|20)\d\d\b",  # a year
        r"\d+ – \d+",  # minutes in a timetable
        r"SHA-256",
        r"CC BY[-A-Z]* \d\.\d",  # a licence
        r"95 % (?=(?:bootstrap )?interval|of the results)",  # the level of all intervals
    )
]
EXEMPT = {  # by page: what no value could be compared with, such as times and disk space
    "README.md": ["2.5 GB of disk", "about 2 minutes", "10 to 25 minutes"],
    "teaching.md": ["2.5 GB of disk", "about 2 minutes", "one session of 90 minutes", "Four times 90 minutes"],
}


class Prose(NamedTuple):
    """A text in one line, and the same with ~ in the place of what no result is looked for in."""

    text: str
    read: str

    @classmethod
    def of(cls, text: str, exempt: list[str]) -> "Prose":
        read = text
        for pattern in UNREAD:
            read = pattern.sub(lambda match: match[0] if is_read(match[0]) else re.sub(r"\S", "~", match[0]), read)
        text, read = (" ".join(t.split()) for t in (text, read))
        hidden = covered(text, exempt)
        return cls(text, "".join("~" if h else c for h, c in zip(hidden, read, strict=True)))

    def results(self) -> list[re.Match]:
        numbers = NUMBER.finditer(self.read)
        return [n for n in numbers if not re.fullmatch(r"-?\d", n[0]) or UNIT.match(self.read, n.end())]


def is_read(found: str) -> bool:
    """A formula that is a number, or has a decimal number in it, may state a result."""
    return bool(re.fullmatch(FORMULA, found) and (NUMBERS_ONLY.fullmatch(found) or re.search(r"\d\.\d", found)))


def covered(text: str, sentences: list[str]) -> list[bool]:
    """For each character of ``text``, whether one of the sentences covers it."""
    found = [False] * len(text)
    for sentence in sentences:
        for match in re.finditer(re.escape(sentence), text):
            found[slice(*match.span())] = [True] * len(match[0])
    return found


@cache
def cells(name: str) -> list[nbformat.NotebookNode]:
    return nbformat.read(FOLDER / name, as_version=4).cells


def first_arguments(name: str, function: str) -> list[ast.expr]:
    trees = [ast.parse(cell.source) for cell in cells(name) if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.args[0] for node in nodes if getattr(node.func, "id", None) == function]


def titles(code: str) -> list[str]:
    """What the figures of a cell are headed by, where it is written out."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    headings = [c.args[0] for c in calls if getattr(c.func, "attr", None) in ("suptitle", "set_title")]
    headings += [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "title"]
    return [heading.value for heading in headings if isinstance(heading, ast.Constant) and heading.value]


@cache
def claims(name: str) -> list[str]:
    return [" ".join(ast.literal_eval(sentence).split()) for sentence in first_arguments(name, "claim")]


CLAIMS = [sentence for name in NOTEBOOKS for sentence in claims(name)]


@cache
def source(name: str) -> tuple[str, str]:
    """The prose of a page, with captions and what the page's code writes as Markdown; and its exercises."""
    if name.endswith(".md"):
        return (ROOT / name if name == "README.md" else FOLDER / name).read_text(encoding="utf-8"), ""
    text = "\n\n".join(cell.source for cell in cells(name) if cell.cell_type == "markdown")
    text, _, exercises = text.partition("\n## Exercises\n")
    for cell in cells(name):
        shown = cell.metadata.get("mystnb", {})
        text += "\n\n" + shown.get("figure", {}).get("caption", "") + "\n\n" + shown.get("image", {}).get("alt", "")
        text += "".join(f"\n\n{title}" for title in (titles(cell.source) if cell.cell_type == "code" else ()))
    for argument in first_arguments(name, "Markdown"):
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        text += "\n\n" + "".join(part.value if isinstance(part, ast.Constant) else "~" for part in parts)
    return text, exercises


@cache
def prose(name: str) -> Prose:
    return Prose.of(source(name)[0], EXEMPT.get(name, []))


def unclaimed(prose: Prose) -> list[str]:
    """The results that are in no claim, each with what is around it."""
    claimed = covered(prose.text, CLAIMS)
    around = [(n.span(), prose.text[max(0, n.start() - 60) : n.end() + 40]) for n in prose.results()]
    return [words for span, words in around if not all(claimed[slice(*span)])]


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("harm 0.43 [-0.22, 1.07], 42 and 57 %; 1,003,854 tokens", "0.43 -0.22 1.07 42 57 1,003,854"),
        ("falls to $-6.7$ at $3\\cdot10^{-5}, 10^{-4}$", "-6.7 3\\cdot10^{-5} 10^{-4}"),
        ("$a = (0.7, 0.2)$ and $\\sigma_B = 0.02$", "0.7 0.2 0.02"),
        ("| 0.77 | 0.83 |\n|---|---|\n* 0.04\n> 12 of them", "0.77 0.83 0.04 12"),
        ("5 layers, 3 % and 7 seeds, but 0: as good, 1: as bad, 2/(T+1), 1/64, W_0, H100", "5 3 7"),
        ("in [0.95](a.md#b12), 95 % intervals, 95 % of heads, 0.05, 05, 2024", "0.95 95 0.05"),
        ("## 12. Title\n\n 3. item 14\n\nsections 2 and 16, Figures 7.1 and 7.2, 17", "14 17"),
        ("a `0.5`\n\n    code 0.5\n\n```python\n0.5\n```\n\n0.25", "0.25"),
        ("```{glossary}\nharm\n  ends at 0.25\n```\n\n```{raw} html\n0.5\n```", "0.25"),
        ("\\begin{equation}\n0.5\n\\end{equation}\n$J_{11} = 16 - n$ 12", "12"),
        ("exempt 0.5 GB here, 0.5 GB there", "0.5"),
    ],
)
def test_what_counts_as_a_result(text: str, results: str) -> None:
    assert [number[0] for number in Prose.of(text, ["exempt 0.5 GB"]).results()] == results.split()


@pytest.mark.parametrize("name", PAGES)
def test_every_result_in_prose_is_claimed(name: str) -> None:
    found = unclaimed(prose(name))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PAGES)
def test_any_number_changed_in_prose_is_noticed(name: str) -> None:
    for number in prose(name).results():
        at = number.start() + re.search(r"\d(?=\D*$)", number[0]).start()  # the last digit
        other = str((int(number.string[at]) + 1) % 10)
        changed = Prose(*(text[:at] + other + text[at + 1 :] for text in prose(name)))
        assert unclaimed(changed), changed.text[max(0, at - 60) : at + 40]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_claim_is_in_the_prose_in_its_own_words(name: str) -> None:
    lost = [sentence for sentence in claims(name) if not any(sentence in prose(page).text for page in PAGES)]
    assert not lost, "\n".join(lost)
    bare = [sentence for sentence in claims(name) if len(re.findall(r"[A-Za-z]{2,}", NUMBER.sub("", sentence))) < 3]
    assert not bare, f"would be found in many places: {bare}"


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if source(name)[1]])
def test_numbers_in_exercises_are_those_that_the_check_uses(name: str) -> None:
    solutions = FOLDER / "solutions" / f"s{name.removesuffix('.ipynb')}.py"
    known = (FOLDER / "exercises.py").read_text(encoding="utf-8") + solutions.read_text(encoding="utf-8")
    asked = source(name)[1].partition("**Without a check**")[0]  # what is only proposed states nothing
    asked = Prose.of(re.sub(r"\*\*\d\.\d\*\*", "", asked), [])
    unknown = [n[0] for n in asked.results() if not re.search(rf"(?<![\d.]){re.escape(n[0])}(?!\.?\d)", known)]
    assert not unknown, unknown


def test_what_is_exempt_is_there() -> None:
    for name, fragments in EXEMPT.items():
        assert not [fragment for fragment in fragments if fragment not in prose(name).text], name


def test_the_readme_shows_the_picture_that_the_front_page_has_drawn() -> None:
    (cell,) = (cell for cell in cells("index.ipynb") if "file" in cell.metadata)
    (drawn,) = (output.data["image/svg+xml"] for output in cell.outputs if "data" in output)
    assert f"](notebooks/{cell.metadata.file})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (FOLDER / cell.metadata.file).read_text(encoding="utf-8") == drawn, "make notebooks writes it"


@given(st.integers(-99_999_999, 99_999_999), st.integers(0, 4), st.floats(-0.499, 0.499))
@example(0, 2, 0.3)  # 0.00
def test_a_claim_holds_to_the_digits_printed_and_not_beyond(digits: int, decimals: int, rest: float) -> None:
    unit = 10**-decimals
    value = (digits + rest) * unit
    for sentence in (f"the loss is {digits * unit:,.{decimals}f} nats", f"a harm of ${digits * unit:.{decimals}f}$."):
        claim(sentence, value)
        for wrong in (value + unit, value - unit):
            with pytest.raises(AssertionError, match="should be"):
                claim(sentence, wrong)


@pytest.mark.parametrize("value", [1e-5, 3e-5, 1e-3, 1e-2])
def test_a_claim_reads_powers_of_ten(value: float) -> None:
    mantissa, power = f"{value:.0e}".split("e")
    written = f"{mantissa}\\cdot10^{{{int(power)}}}".removeprefix("1\\cdot")
    claim(f"at a rate of ${written}$ it learns", value)
    for wrong in (value / 10, 3 * value, 10 * value):
        with pytest.raises(AssertionError, match="should be"):
            claim(f"at a rate of ${written}$ it learns", wrong)


@pytest.mark.parametrize(
    ("sentence", "values"),
    [
        ("the loss falls from 2.4 to 2.1", (2.1, 2.4)),
        ("the loss falls from 2.4 to 2.1", (2.4,)),
        ("the loss falls from 2.4 to 2.1", (2.4, 2.1, 1.0)),
        ("the loss falls from 2.4 to 2.1", (2.4, float("nan"))),
        ("the loss falls", (False,)),
        ("the loss falls from 2.4 to 2.1", (2.4, 2.1, False)),
        ("the loss falls", ()),
    ],
)
def test_a_claim_refuses_what_its_values_do_not_say(sentence: str, values: tuple) -> None:
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        claim(sentence, *values)


def test_a_claim_can_allow_for_other_machines_and_is_silent_about_other_texts() -> None:
    claim("a loss of 2.45", 2.47, within=0.03)
    with pytest.raises(AssertionError):
        claim("a loss of 2.45", 2.49, within=0.03)
    claim("a loss of 2.45", 3.0, False, corpus=SimpleNamespace(is_shakespeare=False))
    with pytest.raises(AssertionError):
        claim("a loss of 2.45", 3.0, corpus=SimpleNamespace(is_shakespeare=True))
