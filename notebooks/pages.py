"""What Sphinx does to the report's pages beyond its theme: a local extension, see conf.py."""

import ast
import base64
import html
import io
import logging
import re
import shutil
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from urllib.parse import urljoin

import nbformat
import numpy as np
from docutils import nodes
from fontTools import subset
from PIL import Image
from scour import scour
from sphinx import addnodes
from sphinx.errors import ExtensionError

HERE = Path(__file__).parent
FACES = {("normal", 400): "Regular", ("italic", 400): "It", ("normal", 600): "Semibold", ("italic", 600): "SemiboldIt"}
# Latin letters for names, punctuation, arrows, and the minus and the comparisons of running text
LETTERS = [*range(0x20, 0x17F), *range(0x2010, 0x2034), *range(0x2190, 0x2194), 0x2212, 0x2248, 0x2260, 0x2264, 0x2265]
PLAIN = re.compile(r'<span class="[npw]">([^<]*)</span>')  # in code, what is coloured as the text around it
EXPLAINED = re.compile(r"\b(glossary|references)\b[^#]*#([^#]+)$")  # links to these are explained on the spot


def package(name: str) -> Path:
    return Path(find_spec(name).origin).parent  # not imported: some names have hyphens


# ---- files beside the pages ----


def font_face(file: Path, style: str, weight: int) -> str:
    """A rule of CSS with the font in it. Its licence wants another name for what is only a part of it."""
    options = subset.Options(flavor="woff", name_IDs=[0, 13, 14], hinting=False)
    font = subset.load_font(file, options)
    part = subset.Subsetter(options)
    part.populate(unicodes=LETTERS)
    part.subset(font)
    stored = io.BytesIO()
    subset.save_font(font, stored, options)
    address = f"data:font/woff;base64,{base64.b64encode(stored.getvalue()).decode()}"
    return (
        f'@font-face {{ font-family: "Report Serif"; font-style: {style}; font-weight: {weight}; font-display: swap; '
        f'src: url({address}) format("woff") }}\n'
    )


def add_assets(app):
    """Copy what comes out of packages or was made by a notebook; the rest is in _static."""
    explorer = HERE.parent / "data" / "explorer-data.js"
    if not explorer.exists():
        raise ExtensionError(f"{explorer} is missing, which 07_explore writes: make clean report")
    # MathJax's package would copy all of its 15 MB.
    mathjax = package("sphinx-mathjax-offline") / "static" / "mathjax"
    fonts = package("font_source_serif_pro") / "files"
    static = Path(app.outdir, "_static")
    static.mkdir(parents=True, exist_ok=True)
    for script in (mathjax / "tex-svg.js", *explorer.parent.glob("explorer-*.js")):
        shutil.copyfile(script, static / script.name)
    faces = [font_face(fonts / f"SourceSerifPro-{name}.otf", *face) for face, name in FACES.items()]
    (static / "fonts.css").write_text("".join(faces), encoding="ascii")


def add_sources(app):
    """The notebooks as they were before they were executed, and the licence: what the foot of each page links to."""
    folder = Path(app.outdir, "sources")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(HERE.parent / "LICENSE", folder / "LICENSE.txt")
    for name in app.env.found_docs:
        source = Path(app.env.doc2path(name))
        if source.suffix != ".ipynb":
            shutil.copyfile(source, folder / source.name)
            continue
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / source.name)


def preview_card(path: Path) -> None:
    """The picture that goes with a link to the report: the question, and a panel of Figure 5.1."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    import helpers

    helpers.set_style()
    table = helpers.harm_table(helpers.runs_without_norms().query("task == 'recall' and method == 'bp'"))
    helpers.plot_harm(table)
    figure = plt.gcf()
    figure.set_size_inches(12, 6.3)
    figure.get_layout_engine().set(rect=(0.04, 0.05, 0.92, 0.7))  # room at the edges
    figure.suptitle(
        "Is the backward pass\nof softmax attention local?", x=0.04, y=0.95, ha="left", va="top", fontsize=34
    )
    figure.savefig(path, dpi=100, pil_kwargs={"quantize": True})
    plt.close(figure)


def with_palette(address: re.Match) -> str:
    """The same picture: a colour map has no more colours than a byte can name."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address[1]))).convert("RGBA"))
    colours, places = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256:
        return address[0]
    named = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8), "P")
    named.putpalette(colours[:, :3].tobytes())
    stored = io.BytesIO()
    named.save(stored, "PNG", optimize=True, transparency=colours[:, 3].tobytes())
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"


def shrink(svg: str) -> str:
    """The same figure without what a renderer does not read, a hundredth of a pixel apart at most."""
    options = scour.sanitizeOptions()
    options.digits, options.cdigits, options.newlines, options.indent_type = 5, 5, False, "none"
    options.strip_ids = options.shorten_ids = options.strip_comments = options.strip_xml_prolog = True
    options.remove_metadata = options.group_create = True
    svg = scour.scourString(svg, options)
    svg = re.sub(r"data:image/png;base64,\s*([^\"]+)", with_palette, svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = re.sub(r'(?<=\.\d\d)\d+(?=")', "", svg)  # where text stands
    if family := re.search(r' font-family="[^"]*sans-serif"', svg):  # once will do
        svg = svg.replace(family[0], "").replace("<svg", "<svg" + family[0], 1)
    return svg


def narrow_version(app, name: str) -> Path:
    """Where a figure has its version for a phone, if it has one; ``name``: of the figure's own file."""
    return Path(app.srcdir, "narrow", name)


def with_narrow(app, page: str) -> str:
    """The same HTML, with the narrow versions of its figures beside them."""

    def both(image: re.Match) -> str:
        if not narrow_version(app, f"{image[2]}.svg").exists():
            return image[0]
        return (
            f'<picture><source media="(max-width: 40em)" srcset="{image[1]}{image[2]}-narrow.svg">{image[0]}</picture>'
        )

    return re.sub(r'<img [^>]*src="(_images/)(\w+)\.svg"[^>]*>', both, page)


def finish(app, exception):
    if exception:
        return
    images = Path(app.outdir, "_images")
    if app.builder.name == "html":
        for svg in list(images.glob("*.svg")):
            if (narrow := narrow_version(app, svg.name)).exists():
                shutil.copyfile(narrow, svg.with_stem(f"{svg.stem}-narrow"))
    for svg in images.glob("*.svg"):
        svg.write_text(shrink(svg.read_text(encoding="utf-8")), encoding="utf-8")
    if app.builder.name == "html":
        add_sources(app)
        preview_card(Path(app.outdir, "_static", "card.png"))


# ---- what is in the pages ----


def solutions() -> dict[str, str]:
    """By the exercise's number: the code of its solution, without the examples in its docstring."""
    found = {}
    for path in sorted((HERE / "solutions").glob("s*.py")):
        text = path.read_text(encoding="utf-8")
        parts = {}
        for node in ast.parse(text).body:
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            if isinstance(node, ast.FunctionDef):
                told = node.body[0]
                parts[node.name] = lines[: told.lineno - node.lineno] + lines[told.end_lineno - node.lineno + 1 :]
            elif isinstance(node, ast.Assign):
                above = reversed(text.splitlines()[: node.lineno - 1])
                parts[node.targets[0].id] = [*reversed(list(takewhile(lambda line: line[:1] == "#", above))), *lines]
        for number, name in re.findall(r'>>> check\("(\d\.\d)", (\w+)\)\n *Exercise \1: right', text):
            found.setdefault(number, "\n".join(parts[name]))
    return found


def efforts() -> dict[str, str]:
    """By the exercise's number: how hard it is, and how long it takes."""
    text = (HERE / "exercises.py").read_text(encoding="utf-8")
    found = re.findall(r'^@exercise\("(\d\.\d)", "(\w+)", minutes=(\d+)\)', text, re.MULTILINE)
    return {number: f"{level}, about {minutes} minutes" for number, level, minutes in found}


def complete_exercises(app, doctree):
    """Under each exercise its solution, folded; beside its number, what it asks for."""
    for block in list(doctree.findall(nodes.literal_block)):
        if match := re.fullmatch(r'check\("(\d\.\d)", \w+\)', block.astext().strip()):
            cell = block.parent.parent
            opening = f'<details class="solution"><summary>A solution of {match[1]}</summary>'
            code = app.solutions[match[1]]
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
        if title and number.astext() in app.efforts:
            what = nodes.inline("", f" ({app.efforts[number.astext()]})", classes=["effort"])
            title.parent.insert(title.parent.index(title) + 1, what)


def put_notice_first(app, doctree):
    """That a page was made from another text than its sentences are about stands under its title, whoever says it."""
    for quote in list(doctree.findall(nodes.block_quote)):
        if quote.astext().startswith("Not Tiny Shakespeare"):
            quote.parent.remove(quote)
            title = doctree.next_node(nodes.title)
            title.parent.insert(title.parent.index(title) + 1, nodes.note("", *quote.children, classes=["other-text"]))
            return


def name_equations(app, doctree):
    """An equation is found under its number, as a figure is; MyST would call it something else each time."""
    for equation in doctree.findall(nodes.math_block):
        if match := re.search(r"\\tag\{(\d+)\.(\d+)\}", equation.astext()):
            equation["ids"] = [f"equation-{match[1]}-{match[2]}"]


def with_colours(page: str) -> str:
    """The same HTML, with the letters d and o of its formulas in classes of theirs: the colours that figures give them.

    In a notebook formulas stay as they are, since not all that show one know a command for it.

    >>> print(with_colours(r'<span class="math notranslate">d_i, \\mathrm{d}O</span> of d'))
    <span class="math notranslate">\\mmlToken{mi}[class="diag"]{d}_i, \\mathrm{d}O</span> of d
    """

    def letter(match: re.Match) -> str:
        return rf'\mmlToken{{mi}}[class="{"diag" if match[0] == "d" else "offdiag"}"]{{{match[0]}}}'

    def formula(match: re.Match) -> str:
        return re.sub(r"(?<![A-Za-z\\])(?<!\\mathrm{)[do](?![A-Za-z])", letter, match[0])

    return re.sub(r'<(span|div) class="(?:amsmath )?math .*?</\1>', formula, page, flags=re.DOTALL)


def name_sections(app, doctree):
    """A numbered section is found under its page's number and its own, as section-8-9, whatever its words."""
    page = re.match(r"\d+", app.env.docname)
    for section in doctree.findall(nodes.section):
        number = re.match(r"(\d+)\. ", section.next_node(nodes.title).astext())
        if page and number:
            name = f"section-{int(page[0])}-{number[1]}"
            section["ids"].append(name)
            app.env.domains.standard_domain.anonlabels[name] = app.env.docname, name


def explanations(app, doctree) -> str:
    """What the glossary and the list of references say of what a page links to, for under the pointer."""
    found = {}
    for link in doctree.findall(nodes.reference):
        if match := EXPLAINED.search(link.get("refuri", "")):
            page, anchor = match.groups()
            node = app.env.get_doctree(page).ids.get(anchor)
            if isinstance(node, nodes.term):
                node = node.parent.next_node(nodes.definition)
            if isinstance(node, nodes.paragraph | nodes.definition):
                found[anchor] = node
    parts = []
    for anchor, node in sorted(found.items()):
        for inner in node.findall(nodes.Element):
            inner["ids"] = []
        for link in list(node.findall(addnodes.pending_xref)):
            link.replace_self(link.children)  # nobody could reach it
        opening = f'<div class="explanation" id="explains-{anchor}" popover="manual" role="tooltip">'
        parts.append(f"{opening}{app.builder.render_partial(node)['fragment']}</div>")
    return "\n".join(parts)


def add_to_page(app, pagename, templatename, context, doctree):
    for part in ("furo_navigation_tree", "toc"):  # Sphinx gives captions of contents no level
        if part in context:
            context[part] = context[part].replace('role="heading">', 'role="heading" aria-level="2">')
    if doctree is None:  # a page that Sphinx makes itself, such as the search
        return
    paragraphs = [
        p for p in doctree.findall(nodes.paragraph) if len(p.astext()) > 60 and not isinstance(p.parent, nodes.note)
    ]
    said = " ".join(paragraphs[0].astext().removeprefix("Question.").split()) if paragraphs else context["title"]
    if len(said) > 200:
        said = said[:200].rsplit(" ", 1)[0] + " …"
    site = app.config.html_baseurl
    properties = {
        "title": re.sub("<.*?>", "", html.unescape(context["title"])),
        "description": said,
        "type": "article",
        "image": urljoin(site and site.rstrip("/") + "/", "_static/card.png"),
    }
    tags = [f'<meta name="description" content="{html.escape(said)}">']
    tags += [f'<meta property="og:{name}" content="{html.escape(value)}">' for name, value in properties.items()]
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])
    context["body"] = PLAIN.sub(r"\1", with_colours(context["body"] + explanations(app, doctree)))
    if app.builder.name == "html":  # a page that is one file has one of each figure
        context["body"] = with_narrow(app, context["body"])


def setup(app):
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    app.solutions, app.efforts = solutions(), efforts()
    app.connect("builder-inited", add_assets)
    app.connect("doctree-read", complete_exercises)
    app.connect("doctree-read", put_notice_first)
    app.connect("doctree-read", name_equations)
    app.connect("doctree-read", name_sections)
    app.connect("html-page-context", add_to_page, priority=900)  # after the theme
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True}
