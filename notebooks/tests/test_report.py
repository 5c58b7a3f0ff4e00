"""The built report, as a reader opens it: from its files, in Chromium, without a network. make test-report

REPORT=FOLDER tests another copy. Every page is opened once, for all of its tests.
"""

import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

REPORT = Path(os.environ.get("REPORT", Path(__file__).parents[2] / "report")).resolve()
# .work is make's own
FILES = [path for path in REPORT.rglob("*") if path.is_file() and path.relative_to(REPORT).parts[0][0] != "."]
PAGES = sorted(path.relative_to(REPORT).as_posix() for path in FILES if path.suffix == ".html")
MAX_BYTES = 15e6

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What the reader's system asks for, the report's own theme button, the window.
VIEWS = {
    "light": ("light", "auto", DESKTOP),
    "dark": ("dark", "auto", DESKTOP),
    "dark by the button, on a phone": ("light", "dark", PHONE),
}
# With what is around it: the beginning of a TeX command, or a delimiter.
RAW_TEX = re.compile(r".{0,40}(?:\\[a-zA-Z()\[\]]|\$[^$]*\$).{0,40}")

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser: install Chromium (Debian: apt install chromium)")
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
    page.add_style_tag(content="* { transition: none !important }")  # colours are measured right after a change
    return Visit(page, trouble)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM)


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
    results = Axe().run(visit.page, options={"preload": False, "resultTypes": ["violations"]})
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


def test_search_finds(browser: Browser) -> None:
    page, trouble = visit_page(browser, "search.html?q=lateral")
    page.locator("#search-results li a").first.wait_for()
    found = dead_links(page) + trouble
    assert not found, "\n".join(found)


def test_size() -> None:
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES
