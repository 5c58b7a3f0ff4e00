"""The built report, as a reader opens it: from its files, in Chromium, without a network. make test-report

REPORT=FOLDER tests another copy. Every page is opened once, for all of its tests.
"""

import io
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page

from conf import release
from helpers import COLORS, load_corpus
from pages import efforts, solutions

REPORT = Path(os.environ.get("REPORT", Path(__file__).parents[2] / "report")).resolve()
# .work is make's own
FILES = [path for path in REPORT.rglob("*") if path.is_file() and path.relative_to(REPORT).parts[0][0] != "."]
PAGES = sorted(path.relative_to(REPORT).as_posix() for path in FILES if path.suffix == ".html")
# all of it, with the two models that the explorer loads when asked; the front page without fonts and MathJax
MAX_BYTES, MAX_BYTES_FRONT = 20e6, 1.5e6

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What the reader's system asks for, the report's own theme button, the window.
VIEWS = {
    "light": ("light", "auto", DESKTOP),
    "dark": ("dark", "auto", DESKTOP),
    "dark by the button, on a phone": ("light", "dark", PHONE),
}
# With what is around it: the beginning of a TeX command, or a delimiter.
RAW_TEX = re.compile(r".{0,40}(?:\\[a-zA-Z()\[\]]|\$[^$]*\$).{0,40}")

if not (REPORT / "index.html").is_file():
    pytest.fail(f"there is no {REPORT / 'index.html'}: make report first", pytrace=False)


class Visit(NamedTuple):
    page: Page
    trouble: list[str]  # grows while the page is open


def visit_page(browser: Browser, address: str, report: Path = REPORT) -> Visit:
    """Open a page of the report, wait for its formulas and unfold what it hides."""
    # a context of its own: pages share what they keep in localStorage
    page = browser.new_context(offline=True, viewport=DESKTOP).new_page()
    trouble = []

    def check_request(request):
        if urlsplit(request.url).scheme not in {"file", "data", "blob"}:
            trouble.append(f"from elsewhere: {request.url}")

    page.on("request", check_request)
    page.on("requestfailed", lambda request: trouble.append(f"{request.failure}: {request.url}"))
    page.on("console", lambda message: message.type == "error" and trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.goto(f"{report.as_uri()}/{address}")
    page.evaluate("window.MathJax?.startup.promise")
    page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    # colours are measured at once
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    return Visit(page, trouble)


@pytest.fixture(scope="module", params=PAGES)
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = visit_page(browser, request.param)
    yield visit
    visit.page.context.close()


@cache
def anchors(path: Path) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', path.read_text(encoding="utf-8")))


def dead_links(page: Page) -> list[str]:
    """The links that lead to no file of the report, or to no anchor in it."""
    here = {"", *page.eval_on_selector_all("[id]", "all => all.map(element => element.id)")}
    dead = []
    for href in page.eval_on_selector_all("a[href]", "all => all.map(link => link.getAttribute('href'))"):
        url = urlsplit(urljoin(page.url, href))
        if url.scheme != "file":
            continue
        path, anchor = Path(unquote(url.path)), unquote(url.fragment)
        if url.path == urlsplit(page.url).path:
            found = anchor in here
        else:
            found = path.is_relative_to(REPORT) and path.is_file() and (not anchor or anchor in anchors(path))
        if not found:
            dead.append(href)
    return dead


def test_formulas_are_drawn(visit: Visit) -> None:
    # MathJax's copy of each formula for screen readers stays in: it has the names of unknown commands
    text = visit.page.evaluate("""() => {
        const body = document.body.cloneNode(true)
        body.querySelectorAll("pre, code, script, style").forEach(element => element.remove())
        return body.textContent
    }""")
    # the second: a reference to a label that does not exist, drawn as ???
    errors = visit.page.eval_on_selector_all(
        "[data-mjx-error], mjx-container a[href='#']", "all => all.map(element => element.outerHTML)"
    )
    found = RAW_TEX.findall(text) + errors
    assert not found, "\n".join(found)


def test_images_load_and_are_described(visit: Visit) -> None:
    # myst-nb's alternative text, where a notebook gives none, is the file's name
    found = visit.page.eval_on_selector_all(
        "img", r"all => all.filter(i => !i.naturalWidth || /^\s*$|\.(png|svg)$/.test(i.alt)).map(i => i.outerHTML)"
    )
    assert not found, "\n".join(found)


def test_figures_have_a_number_and_a_caption(visit: Visit) -> None:
    figures = visit.page.eval_on_selector_all(
        "figure.align-default", "all => all.map(f => [f.id, f.querySelector('figcaption')?.textContent.trim() ?? ''])"
    )
    found = [
        f for f in figures if not re.match(rf"Figure {f[0].removeprefix('figure-').replace('-', '[.]')}[.] \w", f[1])
    ]
    assert not found
    assert len({identity for identity, _ in figures}) == len(figures)


def test_links_lead_somewhere(visit: Visit) -> None:
    found = dead_links(visit.page)
    assert not found, "\n".join(found)


def test_fits_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size(PHONE)
    # furo lets nothing widen a narrow page: all of its text scrolls sideways instead, in .content
    width = visit.page.eval_on_selector_all("html, .content", "all => Math.max(...all.map(e => e.scrollWidth))")
    suspects = visit.page.evaluate("""() => {
        const scrolls = e => e.tagName != "ARTICLE"
            && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
        return [...document.querySelectorAll("article *")]
            .filter(e => e.getBoundingClientRect().right > innerWidth && !scrolls(e.parentElement))
            .map(e => e.outerHTML.slice(0, 100))
    }""")
    assert width <= PHONE["width"], "\n".join(suspects)


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(visit: Visit, view: str) -> None:
    color_scheme, theme, viewport = VIEWS[view]
    visit.page.emulate_media(color_scheme=color_scheme)
    visit.page.evaluate("theme => document.body.dataset.theme = theme", theme)
    visit.page.set_viewport_size(viewport)
    # preload: axe would fetch the style sheets, which a browser refuses to pages from files
    options = {"preload": False, "resultTypes": ["violations"]}
    if visit.page.url.endswith("one-file.html"):  # to look behind each of its words takes axe over ten minutes
        options["rules"] = {"color-contrast": {"enabled": False}}  # and they are the pages', in the same colours
    results = Axe().run(visit.page, options=options)
    found = [
        f"{violation['id']} at {node['target']}: {' '.join(node['failureSummary'].split())}"
        for violation in results.response["violations"]
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]
    assert not found, "\n".join(found)


def test_nothing_is_missing_or_from_elsewhere(visit: Visit) -> None:
    # the page's last test: what its others have set off counts too
    assert not visit.trouble, "\n".join(visit.trouble)


# ---- what is written into the files, which needs no browser ----

READ = [name for name in PAGES if name not in {"one-file.html", "search.html"}]


@cache
def written(name: str) -> BeautifulSoup:
    return BeautifulSoup((REPORT / name).read_text(encoding="utf-8"), "html.parser")


@pytest.mark.parametrize("name", READ)
def test_a_page_says_what_it_is(name: str) -> None:
    head, foot = written(name).head, written(name).select_one(".imprint")
    (description,) = (tag["content"] for tag in head.select('meta[name="description"]'))
    assert 60 < len(description) <= 202
    said = {tag["property"]: tag["content"] for tag in head.select('meta[property^="og:"]')}
    assert set(said) == {"og:title", "og:description", "og:type", "og:image"} and said["og:description"] == description
    assert "<" not in said["og:title"]
    assert (REPORT / head.select_one('link[rel~="icon"]')["href"]).is_file()
    card = (REPORT / said["og:image"]).read_bytes()
    size = int.from_bytes(card[16:20], "big"), int.from_bytes(card[20:24], "big")  # as PNG has it
    assert card[:4] == b"\x89PNG" and size == (1200, 630)
    assert f"Version {release}, MIT licence" in " ".join(foot.text.split())
    # that they are there, test_links_lead_somewhere says
    assert [a.text for a in foot.select("a")] == ["text of the licence", "source of this page", "how to cite it"]
    assert re.search(r"Last updated on\s+20\d\d-\d\d-\d\d", written(name).select_one(".last-updated").text)


@pytest.mark.parametrize("name", [name for name in READ if re.match("index|0[2457]", name)])
def test_a_page_of_another_text_says_so_under_its_title(name: str) -> None:
    below = written(name).h1.find_next_sibling()
    says_so = "other-text" in below.get("class", []) and "seen on that, not here" in below.text
    assert says_so != load_corpus().is_shakespeare and written(name).text.count("Not Tiny Shakespeare") == says_so


def test_navigation_has_groups() -> None:
    tree = written("index.html").select_one(".sidebar-tree")
    assert len(tree.select(".caption")) >= 4
    listed = [a["href"] for a in tree.select("ul a")]
    assert sorted(listed) == sorted(set(READ) - {"index.html"})


def test_equations_have_names() -> None:
    names = []
    for name in READ:
        for equation in written(name).select("div.math"):
            tags = re.findall(r"\\tag\{(\d+)\.(\d+)\}", equation.text)
            assert [equation.get("id")] == [f"equation-{page}-{number}" for page, number in tags] or not tags
            names += tags
            if tags:
                assert equation.select_one(".headerlink")["href"] == f"#{equation['id']}"
    assert len(names) > 5 and len(names) == len(set(names))


def test_numbered_sections_are_found_by_their_numbers() -> None:
    found = []
    for name in READ:
        page = re.match(r"\d+", name)
        for heading in written(name).select("article h2") if page else ():
            if number := re.match(r"(\d+)\. ", heading.text):
                anchor = f"section-{int(page[0])}-{number[1]}"
                place = written(name).find(id=anchor)
                assert place is heading.parent or place.parent is heading.parent, anchor
                found.append(anchor)
    assert len(found) > 40 and len(found) == len(set(found))
    links = {a["href"].partition("#")[2] for a in written("index.html").select("article a[href*='#section-']")}
    assert len(links) > 10 and links <= set(found)


def test_exercises_have_a_level_a_time_and_a_folded_solution() -> None:
    found, expected = {}, efforts()
    for name in READ:
        for details in written(name).select("details.solution"):
            assert not details.has_attr("open")
            found[details.summary.text.split()[-1]] = details.select_one("pre").text.strip()
        stated = [effort.parent for effort in written(name).select(".effort")]
        for paragraph in stated:
            number = paragraph.strong.text
            assert f"({expected[number]})" in paragraph.text and re.match(r"(easy|medium|hard), ", expected[number])
            del expected[number]
    assert not expected
    assert found == {number: code.strip() for number, code in solutions().items()}
    checked = set(re.findall(r'check\("(\d\.\d)"', "".join(written(name).text for name in READ)))
    assert set(found) == checked


def test_text_in_figures_is_text() -> None:
    figures = sorted(REPORT.glob("_images/*.svg"))
    texts = [path.read_text(encoding="utf-8") for path in figures]
    assert figures and all("<text" in text and "<!--" not in text and "DejaVuSans-" not in text for text in texts)


# ---- what a reader does with them ----


def test_lines_can_be_read_and_contents_seen(browser: Browser) -> None:
    page, _ = visit_page(browser, "index.html")
    lines = page.evaluate("""() => [...document.querySelectorAll("article p")]
        .filter(p => !p.querySelector("mjx-container, code") && !p.closest("details, figure, [popover]"))
        .map(p => [p.textContent.length, p.offsetHeight / parseFloat(getComputedStyle(p).lineHeight)])
        .filter(([, lines]) => lines > 2.5).map(([characters, lines]) => characters / (lines - .4))""")
    assert len(lines) > 2 and 68 <= np.mean(lines) <= 77, lines
    wide = page.eval_on_selector("figure img", "image => image.offsetWidth")
    text = page.eval_on_selector("article p", "p => p.offsetWidth")
    assert wide > 1.2 * text
    box = page.locator(".toc-drawer").bounding_box()
    assert box["width"] > 150 and box["x"] + box["width"] <= DESKTOP["width"]
    assert page.evaluate("document.fonts.check('16px \"Report Serif\"') && document.fonts.size >= 4")


def test_one_switch_shows_all_code_and_is_remembered(browser: Browser) -> None:
    context = browser.new_context(offline=True, viewport=DESKTOP)
    page = context.new_page()

    def states(address: str | None = None) -> tuple[str, set[bool]]:
        if address:
            page.goto(f"{REPORT.as_uri()}/{address}")
        folds = page.locator(".cell:not(.tag_hide-cell) > details.hide:has(> .cell_input)")
        opened = set(folds.evaluate_all("all => all.map(fold => fold.open)"))
        return page.locator(".show-code").get_attribute("aria-pressed"), opened

    assert states("01_softmax_jacobian.html") == ("false", {False})
    page.locator(".show-code").press("Enter")
    assert states() == ("true", {True})
    assert page.locator(".tag_hide-cell > details[open]").count() == 0  # the numbers of figures are no code
    assert states("02_training.html") == ("true", {True})
    page.locator(".show-code").click()
    assert states() == states("01_softmax_jacobian.html") == ("false", {False})
    context.close()


def test_terms_and_citations_are_explained_on_the_spot(browser: Browser) -> None:
    page, trouble = visit_page(browser, "02_training.html")
    links = page.locator("article a[href^='glossary.html#'], article a[href^='references.html#']")
    missing = links.evaluate_all("all => all.filter(a => !a.getAttribute('aria-describedby')).map(a => a.outerHTML)")
    assert links.count() > 5 and not missing
    link = links.first
    text = page.locator(f"#{link.get_attribute('aria-describedby')}")
    assert not text.is_visible() and len(text.text_content()) > 60
    link.hover()
    assert text.is_visible()
    text.hover()  # it stays, so that what is in it can be followed
    page.wait_for_timeout(400)
    assert text.is_visible()
    page.mouse.move(0, 0)
    text.wait_for(state="hidden")
    link.focus()
    assert text.is_visible() and text.bounding_box()["x"] + text.bounding_box()["width"] <= DESKTOP["width"]
    link.press("Escape")
    assert not text.is_visible()
    assert not trouble


def test_code_and_citation_can_be_copied(browser: Browser) -> None:
    for address, block in (("index.html", ".highlight-bibtex"), ("01_softmax_jacobian.html", ".cell_input")):
        page, trouble = visit_page(browser, address)
        code = page.locator(f"{block} div.highlight").first
        code.hover()
        code.locator("button.copybtn").click()
        page.evaluate("document.body.insertAdjacentHTML('afterbegin', '<textarea id=paste></textarea>')")
        page.locator("#paste").press("Control+v")
        assert page.locator("#paste").input_value().strip() == code.locator("pre").text_content().strip()
        assert page.locator(".cell_output .copybtn").count() == 0
        assert not trouble


def test_what_scrolls_on_a_phone_says_so(browser: Browser) -> None:
    page, _ = visit_page(browser, "index.html")
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    boxes = "figure.align-default, div.output.text_html, .table-wrapper, div.math"
    shaded = page.eval_on_selector_all(
        boxes, "all => all.filter(b => b.scrollWidth > b.clientWidth + 2).map(b => [b.matches('.more'), b.tabIndex])"
    )
    assert shaded and all(found == [True, 0] for found in shaded)
    figure = page.locator("#figure-0-8")  # a table, which has no narrow version
    assert "inset" in figure.evaluate("f => getComputedStyle(f).boxShadow")
    figure.evaluate("f => f.scrollLeft = f.scrollWidth")
    page.wait_for_timeout(300)
    assert figure.evaluate("f => !f.matches('.more')")


@pytest.mark.parametrize("name", ["index.html", "08_what_mends_it.html"])
def test_a_wide_figure_has_a_narrow_version_on_a_phone(browser: Browser, name: str) -> None:
    """Its panels stand one above the other, and it fits; on a wide window it is the other one."""
    page, _ = visit_page(browser, name)
    for view, narrow in ((DESKTOP, False), (PHONE, True)):
        page.set_viewport_size(view)
        page.wait_for_timeout(500)
        pictures = page.eval_on_selector_all(
            "figure picture img:not([hidden])",
            """all => all.map(img => ({
                file: img.currentSrc, fits: img.closest("figure").scrollWidth <= img.closest("figure").clientWidth + 1,
                upright: img.naturalHeight / img.naturalWidth, letters: img.clientWidth / img.naturalWidth
            }))""",
        )
        assert len(pictures) >= 4
        for picture in pictures:
            assert picture["file"].endswith("-narrow.svg") == narrow
            if narrow:
                assert picture["fits"] and picture["upright"] > 0.5 and picture["letters"] > 0.6


@pytest.mark.parametrize(
    ("system", "theme", "dark"),
    [("light", "auto", False), ("dark", "auto", True), ("light", "dark", True), ("dark", "light", False)],
)
def test_figures_are_dark_where_the_page_is(browser: Browser, system: str, theme: str, dark: bool) -> None:
    page, _ = visit_page(browser, "index.html")
    page.emulate_media(color_scheme=system)
    page.evaluate("theme => document.body.dataset.theme = theme", theme)
    corner = page.locator("figure.align-default img").first.screenshot()
    around = page.locator("article h1").first.screenshot()
    pixels = [plt.imread(io.BytesIO(picture))[2, -3, :3] for picture in (corner, around)]
    assert np.abs(pixels[0] - pixels[1]).max() < 0.02  # the page's ground
    assert (pixels[0].mean() < 0.3) == dark
    image = plt.imread(io.BytesIO(corner))[..., :3]
    assert image.max() > 0.8 if dark else image.min() < 0.3  # its lines stand out


@pytest.mark.parametrize("name", ["diag", "offdiag"])
def test_formulas_have_the_colours_of_the_figures(browser: Browser, name: str) -> None:
    for address in ("01_softmax_jacobian.html", "explorer.html"):
        page, _ = visit_page(browser, address)
        fills = page.eval_on_selector_all(
            f"mjx-container svg .{name}", "all => all.map(letter => getComputedStyle(letter).fill)"
        )
        assert set(fills) == {"rgb({}, {}, {})".format(*bytes.fromhex(COLORS[name][1:]))}
        page.context.close()


def test_search_finds(browser: Browser) -> None:
    page, trouble = visit_page(browser, "search.html?q=lateral")
    page.locator("#search-results li a").first.wait_for()
    found = dead_links(page) + trouble
    assert not found, "\n".join(found)


def test_size() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES


def test_front_page_is_light() -> None:
    front = written("index.html")
    parts = [tag.get("src") or tag["href"] for tag in front.select("script[src], img[src], link[rel=stylesheet]")]
    files = {REPORT / urlsplit(part).path for part in ["index.html", *parts]}
    weights = {path.name: path.stat().st_size for path in files if path.name not in {"tex-svg.js", "fonts.css"}}
    assert sum(weights.values()) < MAX_BYTES_FRONT, weights
