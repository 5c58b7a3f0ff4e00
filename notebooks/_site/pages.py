"""What Sphinx does to the report's pages beyond its theme: a local extension, see conf.py."""

import ast
import re
from pathlib import Path

from docutils import nodes

NOTEBOOKS = Path(__file__).parents[1]
RIGHT = re.compile(r'>>> check\("(\d\.\d)", (\w+)\)\n *Exercise \1: right')  # in solutions
EFFORT = re.compile(r'^@exercise\("(\d\.\d)", "(\w+)", minutes=(\d+)\)', re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="(?:amsmath )?math .*?</\1>', re.DOTALL)
LETTER = re.compile(r"(?<![A-Za-z\\])(?<!\\mathrm{)[do](?![A-Za-z])")  # d and o, but not of dO


def solutions() -> dict[str, str]:
    """By the exercise's number: the code of its solution, without the examples in its docstring."""
    found = {}
    for path in sorted((NOTEBOOKS / "solutions").glob("s*.py")):
        text = path.read_text(encoding="utf-8")
        # What each name is: the lines of its definition, and the comments above it.
        lines, code, start = text.splitlines(), {}, 0
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                code[node.name] = lines[start : node.end_lineno]
                if ast.get_docstring(node):
                    told = node.body[0]
                    del code[node.name][told.lineno - 1 - start : told.end_lineno - start]
            elif isinstance(node, ast.Assign):
                code[node.targets[0].id] = lines[start : node.end_lineno]
            start = node.end_lineno
        # A solution is what the examples check and find right, the first one where there are two.
        for number, name in RIGHT.findall(text):
            found.setdefault(number, "\n".join(code[name]).strip())
    return found


def efforts() -> dict[str, str]:
    """By the exercise's number: how hard it is, and how long it takes."""
    text = (NOTEBOOKS / "exercises.py").read_text(encoding="utf-8")
    found = EFFORT.findall(text)
    return {number: f"{level}, about {minutes} minutes" for number, level, minutes in found}


def complete_exercises(app, doctree):
    """Under each exercise its solution, folded; beside its number, what it asks for."""
    answers, asked = solutions(), efforts()
    for block in list(doctree.findall(nodes.literal_block)):
        if match := re.fullmatch(r'check\("(\d\.\d)", \w+\)', block.astext().strip()):
            opening = f'<details class="solution"><summary>A solution of {match[1]}</summary>'
            code = answers[match[1]]
            cell = block.parent.parent
            cell.parent.insert(
                cell.parent.index(cell) + 1,
                [
                    nodes.raw("", opening, format="html"),
                    nodes.literal_block(code, code, language="python"),
                    nodes.raw("", "</details>", format="html"),
                ],
            )
    for number in list(doctree.findall(nodes.strong)):
        title = number.next_node(nodes.emphasis, siblings=True, descend=False)
        if title and number.astext() in asked:
            effort = nodes.inline("", f" ({asked[number.astext()]})", classes=["effort"])
            title.parent.insert(title.parent.index(title) + 1, effort)


def name_equations(app, doctree):
    """An equation is found under its number; MyST would call it something else each time."""
    for equation in doctree.findall(nodes.math_block):
        if match := re.search(r"\\tag\{(\d+)\.(\d+)\}", equation.astext()):
            equation["ids"] = [f"equation-{match[1]}-{match[2]}"]


def name_sections(app, doctree):
    """A numbered section is found under its page's number and its own, as section-8-9."""
    page = re.match(r"\d+", app.env.docname)
    for section in doctree.findall(nodes.section):
        number = re.match(r"(\d+)\. ", section.next_node(nodes.title).astext())
        if page and number:
            name = f"section-{int(page[0])}-{number[1]}"
            section["ids"].append(name)
            app.env.domains.standard_domain.anonlabels[name] = app.env.docname, name


def with_colours(page: str) -> str:
    """The same HTML, the letters d and o of its formulas in classes: the colours of the figures.

    In a notebook formulas stay as they are: not all that show one know a command for it.

    >>> print(with_colours(r'<span class="math notranslate">d_i, \\mathrm{d}O</span> of d'))
    <span class="math notranslate">\\mmlToken{mi}[class="diag"]{d}_i, \\mathrm{d}O</span> of d
    """

    def coloured(letter: re.Match) -> str:
        name = {"d": "diag", "o": "offdiag"}[letter[0]]
        return rf'\mmlToken{{mi}}[class="{name}"]{{{letter[0]}}}'

    return FORMULA.sub(lambda formula: LETTER.sub(coloured, formula[0]), page)


def change_html(app, pagename, templatename, context, doctree):
    """Colours in formulas; and a level for captions of contents, to which Sphinx gives none."""
    for part in ("furo_navigation_tree", "toc"):
        if part in context:
            context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')
    if doctree is not None:  # else a page that Sphinx makes itself, such as the search
        context["body"] = with_colours(context["body"])


def setup(app):
    for change in (complete_exercises, name_equations, name_sections):
        app.connect("doctree-read", change)
    app.connect("html-page-context", change_html, priority=900)  # after the theme
    return {"parallel_read_safe": True}
