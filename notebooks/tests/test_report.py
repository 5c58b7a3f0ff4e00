"""The built report as a reader opens it: from its files, in Chromium, without a network.

make test-report opens every page once for all of its tests; REPORT=FOLDER tests another copy. What
a reader moves in the explorer and on the front page is held against PyTorch.
"""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Locator, Page

import helpers
from conf import moved
from figures import COLORS, RULE_NAMES
from helpers import load_corpus, split_softmax_gradient
from model_local import SOFTMAX_BACKWARD, LocalGPT, LocalGPTConfig
from pages import efforts, solutions

REPORT = Path(os.environ.get("REPORT", Path(__file__).parents[2] / "report")).resolve()
if not (REPORT / "index.html").is_file():
    pytest.fail(f"there is no {REPORT / 'index.html'}: make report first", pytrace=False)
PAGES = sorted({path.name for path in REPORT.glob("*.html")} - {f"{old}.html" for old in moved})
READ = [name for name in PAGES if name not in {"one-file.html", "search.html"}]
# all of it, with the models that the explorer loads when asked; the front page without MathJax
MAX_BYTES, MAX_BYTES_FRONT = 40e6, 3e6

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What the reader's system asks for, the report's own theme button, the window.
VIEWS = {
    "light": ("light", "auto", DESKTOP),
    "dark": ("dark", "auto", DESKTOP),
    "dark by the button, on a phone": ("light", "dark", PHONE),
}
# With what is around it: the beginning of a TeX command, or a delimiter.
RAW_TEX = re.compile(r".{0,40}(?:\\[a-zA-Z()\[\]]|\$[^$]*\$).{0,40}")


class Visit(NamedTuple):
    page: Page
    trouble: list[str]  # grows while the page is open


def visit_page(browser: Browser, address: str, **options) -> Visit:
    """Open a page of the report, wait for its formulas and unfold what it hides."""
    # a context of its own: pages share what they keep in localStorage
    page = browser.new_context(offline=True, viewport=DESKTOP, **options).new_page()
    trouble = []

    def check_request(request):
        if urlsplit(request.url).scheme not in {"file", "data", "blob"}:
            trouble.append(f"from elsewhere: {request.url}")

    def check_console(message):
        if message.type == "error":
            trouble.append(f"console: {message.text}")

    page.on("request", check_request)
    page.on("requestfailed", lambda request: trouble.append(f"{request.failure}: {request.url}"))
    page.on("console", check_console)
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.goto(f"{REPORT.as_uri()}/{address}")
    page.evaluate("window.MathJax?.startup.promise")
    page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
    # colours are measured at once
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    return Visit(page, trouble)


def each(page: Page, selector: str, expression: str) -> list:
    """What JavaScript makes of each element ``e`` that a selector finds."""
    return page.eval_on_selector_all(selector, f"all => all.map(e => {expression})")


@pytest.fixture(scope="module", params=PAGES)
def visit(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = visit_page(browser, request.param)
    yield visit
    visit.page.context.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens addresses of the report; at the end of the test none of them has had trouble."""
    visits = []

    def open_page(address: str, **options) -> Page:
        visits.append(visit_page(browser, address, **options))
        return visits[-1].page

    yield open_page
    for page, trouble in visits:
        assert not trouble
        page.context.close()


# ---- every page ----


@cache
def anchors(path: Path) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', path.read_text(encoding="utf-8")))


def dead_links(page: Page) -> list[str]:
    """The links that lead to no file of the report, or to no anchor in it."""
    here, dead = {"", *each(page, "[id]", "e.id")}, []
    for href in each(page, "a[href]", "e.getAttribute('href')"):
        url = urlsplit(urljoin(page.url, href))
        if url.scheme != "file":
            continue
        path, anchor = Path(unquote(url.path)), unquote(url.fragment)
        if url.path == urlsplit(page.url).path:
            found = anchor in here
        elif path.is_relative_to(REPORT) and path.is_file():
            found = not anchor or anchor in anchors(path)
        else:
            found = False
        if not found:
            dead.append(href)
    return dead


def test_links_lead_somewhere(visit: Visit) -> None:
    assert not dead_links(visit.page)


def test_formulas_are_drawn(visit: Visit) -> None:
    # MathJax's copy of a formula for screen readers stays in: it names unknown commands
    text = visit.page.evaluate("""() => {
        const body = document.body.cloneNode(true)
        body.querySelectorAll("pre, code, script, style").forEach(element => element.remove())
        return body.textContent
    }""")
    # the second: a reference to a label that does not exist, drawn as ???
    errors = each(visit.page, "[data-mjx-error], mjx-container a[href='#']", "e.outerHTML")
    assert not RAW_TEX.findall(text) + errors


def test_images_load_and_are_described(visit: Visit) -> None:
    # myst-nb's alternative text, where a notebook gives none, is the file's name
    found = visit.page.eval_on_selector_all(
        "img",
        r"""all => all.filter(image => !image.naturalWidth || /^\s*$|\.(png|svg)$/.test(image.alt))
            .map(image => image.outerHTML.slice(0, 300))""",
    )
    assert not found


@pytest.mark.parametrize("width", [390, 820, 1024, 1199, 1280, 1440])
def test_no_page_scrolls_sideways(visit: Visit, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 844})
    # furo lets nothing widen a narrow page: all of its text scrolls sideways instead, in .content
    widths = each(visit.page, "html, .content", "[e.scrollWidth, e.clientWidth]")
    suspects = visit.page.evaluate("""() => {
        const scrolls = e => e.tagName != "ARTICLE"
            && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
        return [...document.querySelectorAll("article *")]
            .filter(e => e.getBoundingClientRect().right > innerWidth && !scrolls(e.parentElement))
            .map(e => e.outerHTML.slice(0, 100))
    }""")
    assert all(whole <= shown for whole, shown in widths), (widths, suspects)


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(visit: Visit, view: str) -> None:
    color_scheme, theme, viewport = VIEWS[view]
    visit.page.emulate_media(color_scheme=color_scheme)
    visit.page.evaluate("theme => document.body.dataset.theme = theme", theme)
    visit.page.set_viewport_size(viewport)
    # preload: axe would fetch the style sheets, which a browser refuses to pages from files
    options = {"preload": False, "resultTypes": ["violations"]}
    if visit.page.url.endswith("one-file.html"):  # to look behind each word takes over ten minutes
        options["rules"] = {"color-contrast": {"enabled": False}}  # and colours are the pages' own
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
    assert not visit.trouble


# ---- what is written into the files, which needs no browser ----


@cache
def written(name: str) -> BeautifulSoup:
    return BeautifulSoup((REPORT / name).read_text(encoding="utf-8"), "html.parser")


def test_navigation_lists_every_page_the_story_first_and_evidence_folded() -> None:
    tree = written("index.html").select_one(".sidebar-tree")
    listed = [a["href"] for a in tree.select("ul a")]
    assert sorted(listed) == sorted(set(READ) - {"index.html", "slides.html"})
    story = [a["href"] for a in tree.select_one("ul").select("a")]
    assert story == [name for name in READ if name.startswith("0")]
    folded = tree.select("li:has(> input.toctree-checkbox:not([checked])) > ul a")
    assert {"91_cost.html", "92_one_capture.html", "protocol.html"} <= {a["href"] for a in folded}


@pytest.mark.parametrize("old", moved)
def test_an_old_address_leads_to_a_page(old: str) -> None:
    leads = written(f"{old}.html").select_one("meta[http-equiv=refresh]")["content"]
    assert leads == f"0; url={moved[old]}.html" and f"{moved[old]}.html" in READ


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
    assert len(found) > 20 and len(found) == len(set(found))


def test_exercises_have_a_level_a_time_and_a_folded_solution() -> None:
    answers, asked = {}, {}
    for name in READ:
        for details in written(name).select("details.solution"):
            assert not details.has_attr("open")
            answers[details.summary.text.split()[-1]] = details.select_one("pre").text.strip()
        for effort in written(name).select(".effort"):
            asked[effort.parent.strong.text] = effort.text.strip(" ()")
    assert answers == solutions() and asked == efforts()
    checked = re.findall(r'check\("(\d\.\d)"', "".join(written(name).text for name in READ))
    assert set(checked) == set(answers)


def test_sizes() -> None:
    files = [path for path in REPORT.rglob("*") if path.is_file()]
    files = [path for path in files if path.relative_to(REPORT).parts[0] != ".work"]  # make's own
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    parts = written("index.html").select("script[src], img[src], link[rel=stylesheet]")
    paths = {REPORT / urlsplit(part.get("src") or part["href"]).path for part in parts}
    sizes = [path.stat().st_size for path in paths if path.name != "tex-svg.js"]
    assert sum(sizes) < MAX_BYTES_FRONT


# ---- what a reader does with any page ----


def test_one_switch_shows_all_code_and_is_remembered(browser: Browser) -> None:
    page = browser.new_context(offline=True, viewport=DESKTOP).new_page()

    def states(address: str | None = None) -> tuple[str, set[bool]]:
        if address:
            page.goto(f"{REPORT.as_uri()}/{address}")
        code = page.locator(".cell:not(.tag_hide-cell) > details.hide > .cell_input")
        seen = set(code.evaluate_all("all => all.map(input => input.checkVisibility())"))
        return page.locator(".show-code").text_content(), seen

    assert states("01_softmax_jacobian.html") == ("Show the code", {False})
    assert not page.get_by_text("Code", exact=True).first.is_visible()  # and no fold in its place
    page.locator(".show-code").press("Enter")
    assert states() == ("Hide the code", {True})
    assert states("02_training.html") == ("Hide the code", {True})
    page.locator(".show-code").click()
    assert states() == states("01_softmax_jacobian.html") == ("Show the code", {False})
    page.context.close()


def test_in_class_view_a_class_can_vote_before_it_looks(opened) -> None:
    page = opened("01_softmax_jacobian.html?class")
    page.wait_for_load_state()
    text = page.locator("article").inner_text()  # what is visible of it
    assert "Question." in text and "Answer." not in text
    assert not page.locator("article > section > ul").first.is_visible()  # the answer goes on
    for part in (".sidebar-drawer", ".toc-drawer", ".related-pages"):
        assert not page.locator(part).is_visible()

    pictures = page.locator("figure.align-default img")
    assert pictures.count() > 1
    for i, picture in enumerate(pictures.all()):
        covered = plt.imread(io.BytesIO(picture.screenshot()))
        picture.click()
        shown = plt.imread(io.BytesIO(picture.screenshot()))
        line = int(28 * len(shown) / picture.evaluate("image => image.naturalHeight"))
        assert np.ptp(covered[:line]) < 0.1 < np.ptp(shown[:line])  # one colour, then a title
        changed = np.abs(covered - shown)[3 * line // 2 :].max()
        # below the title nothing, but for how edges are smoothed; of the first, an answer, all
        assert (changed < 0.5) == (i > 0)

    page.locator("article a[href*='02_training']").last.click()
    page.wait_for_url("**/02_training.html?class")
    assert "Answer." not in page.locator("article").inner_text()
    page.goto(f"{REPORT.as_uri()}/index.html?class")
    assert "The answer." not in page.locator("article").inner_text()
    assert not page.locator("#figure-0-1").is_visible()  # which is the answer's picture


def test_page_down_turns_the_slides(opened) -> None:
    page = opened("slides.html")
    tops = each(page, "h1 ~ section", "e.offsetTop")
    assert len(tops) == 9 and min(np.diff(tops)) >= DESKTOP["height"]  # and the title
    for top in tops:
        page.keyboard.press("PageDown")
        page.wait_for_function("top => Math.abs(scrollY - top) < 2", arg=top)
    assert not page.locator(".sidebar-drawer").is_visible()


def test_on_paper_no_figure_is_higher_than_half_a_page(opened) -> None:
    page = opened("09_five_keys.html")
    page.locator("#figure-9-4 .five-keys [role=status]").wait_for()
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 1000})  # A4 without its margins
    pictures = "figure.align-default img, .five-keys .panels"
    heights = each(page, pictures, "e.getBoundingClientRect().height")
    assert 0 < max(heights) < 400
    assert not page.locator(".skip-to-content").is_visible()  # over the text of every page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_and_maps_have_light_paper(opened, theme: str) -> None:
    for address in ("04_energy_split.html", "explorer.html"):
        page = opened(address)
        page.evaluate("theme => document.body.dataset.theme = theme", theme)
        pictures = "figure.align-default img, canvas"
        papers = each(page, pictures, "getComputedStyle(e).backgroundColor")
        filters = each(page, pictures, "getComputedStyle(e).filter")
        dimmed = "none" if theme == "light" else "brightness(0.85)"  # and no colour is turned
        assert {*papers} == {"rgb(255, 255, 255)"} and {*filters} == {dimmed}


@pytest.mark.parametrize("name", ["diag", "offdiag"])
def test_formulas_have_the_colours_of_the_figures(opened, name: str) -> None:
    letters = f"mjx-container svg .{name}"
    fills = each(opened("explorer.html"), letters, "getComputedStyle(e).fill")
    assert set(fills) == {"rgb({}, {}, {})".format(*bytes.fromhex(COLORS[name][1:]))}


def test_search_finds(opened) -> None:
    page = opened("search.html?q=lateral")
    page.locator("#search-results li a").first.wait_for()
    assert not dead_links(page)


# ---- the explorer: what it shows is what PyTorch computes, from the networks of 02 ----

CORPUS = load_corpus()


@cache
def trained(method: str) -> helpers.Run:
    config = LocalGPTConfig(vocab_size=CORPUS.vocab_size, method=method)
    return helpers.train(config, 500, seed=1337, data=CORPUS, progress=False)


def attention_and_error(model: LocalGPT, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and g of every head (L*H, T, T), in float64."""
    ids = CORPUS.encode(text)
    layers = helpers.capture_batch(model, ids[None, :-1], ids[None, 1:])
    a = torch.cat([layer.attn[0] for layer in layers]).double()
    return a, torch.cat([layer.grad[0] for layer in layers]).double().tril()


def known(text: str) -> str:
    return "".join(character for character in text if character in CORPUS.stoi)


def passage(page: Page) -> str:
    """The text of the stored maps, as the models read it."""
    shown, vocabulary = page.evaluate("[EXPLORER.characters, EXPLORER.vocabulary]")
    original = {there: character for character, there in vocabulary}
    start = "".join(original[character] for character in shown)
    validation = CORPUS.decode(CORPUS.val)
    return start + validation[validation.index(start) + len(start)]


def move(slider: Locator, value: float) -> None:
    slider.evaluate(
        """(input, value) => {
            input.value = value
            input.dispatchEvent(new Event("input", {bubbles: true}))
        }""",
        value,
    )


def numbers(words: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"−?[\d.,]*\d", words)]


def table(page: Page, rows: str) -> dict[str, torch.Tensor]:
    """The columns of a table, but for the first."""
    names, *cells = each(page, rows, "[...e.cells].map(cell => cell.textContent)")
    values = [[numbers(cell)[0] for cell in row[1:]] for row in cells]
    return dict(zip(names[1:], torch.tensor(values, dtype=torch.float64).T, strict=True))


def assert_row(page: Page, a: torch.Tensor, g: torch.Tensor, rule: str = "full") -> None:
    """The table shows these weights and errors, and what follows from them, to three digits."""
    found, g = table(page, "#explorer-table tr"), 1e6 * g
    full, diag, offdiag = split_softmax_gradient(a, g)
    expected = {"a": a, "g": g, "ag": a * g, "d": diag, "o": offdiag, "f": full}
    expected["sent"] = SOFTMAX_BACKWARD[rule](a, g, torch.ones(len(a), dtype=torch.bool))
    assert list(found) == list(expected)
    for name, values in expected.items():
        size = values.abs().max()
        if name in {"d", "o", "f", "sent"}:
            size = max(size, full.abs().max())
        torch.testing.assert_close(found[name], values, rtol=6e-3, atol=2e-3 * size.item())


PAGE_RUN = """([texts, method, rule]) => {
    const model = LocalGPT.load(EXPLORER_WEIGHTS[method], EXPLORER)
    return texts.map(text => {
        const {a, g, loss} = LocalGPT.run(model, text, rule)
        const flat = heads => heads.map(rows => rows.flatMap(row => [...row]))
        return {a: flat(a), g: flat(g), loss}
    })
}"""


@pytest.fixture(scope="module")
def models_page(browser: Browser) -> Iterator[Page]:
    page, _ = visit_page(browser, "explorer.html")
    for name in ("model", "bp", "fa"):
        page.add_script_tag(url=f"_static/explorer-{name}.js")
    yield page
    page.context.close()


@pytest.mark.parametrize("method", ["bp", "fa"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_page_s_passes_are_those_of_pytorch(models_page: Page, method: str, rule: str) -> None:
    texts = [known("To be, or not to be, that is the question: 3"), CORPUS.decode(CORPUS.val[:65])]
    model = helpers.twin(trained(method).model, softmax_backward=rule)
    runs = models_page.evaluate(PAGE_RUN, [texts, method, rule])
    for text, found in zip(texts, runs, strict=True):
        rows, columns = torch.tril_indices(len(text) - 1, len(text) - 1)
        for name, maps in zip("ag", attention_and_error(model, text), strict=True):
            exact, computed = maps[:, rows, columns], torch.tensor(found[name], dtype=torch.float64)
            off = (computed - exact).abs().amax(-1) / exact.abs().amax(-1)
            assert off.max() < 1e-3, f"{name} of head {off.argmax()}: {off.max():.1e}"
        ids = CORPUS.encode(text)
        with torch.no_grad():
            loss = model(ids[None, :-1], ids[None, 1:])[1].item()
        assert found["loss"] == pytest.approx(loss, abs=1e-3)


def test_every_change_of_a_stored_head_is_that_of_pytorch(opened) -> None:
    page = opened("explorer.html")
    page.locator("#explorer-presets button").first.click()
    page.locator("#explorer-method label", has_text="backpropagation").click()
    page.locator("#explorer-step label", has_text=re.compile("^200$")).click()
    page.locator("#explorer-head label", has_text="L2H1").click()
    query, key, temperature, times, weight = 21, 5, 10**0.3, -1.5, 0.3
    for name, value in {"query": query, "key": key, "temperature": 0.3, "constant": times}.items():
        move(page.locator(f"#explorer-{name}"), value)
    move(page.locator("#explorer-weight"), weight)
    page.wait_for_timeout(300)

    a, g = (maps[9] for maps in attention_and_error(trained("bp").at(200), passage(page)))
    spread = g[tuple(torch.tril_indices(*g.shape))].std(correction=0)
    row = a[query, : query + 1] ** (1 / temperature)
    row[key] = 0
    row *= (1 - weight) / row.sum()
    row[key] = weight
    errors = g[query, : query + 1] + times * spread
    assert_row(page, row, errors)
    page.locator("#explorer-rule").select_option("mean")  # of a stored head, too
    page.wait_for_timeout(300)
    assert_row(page, row, errors, "mean")
    full, diag, _ = split_softmax_gradient(a, g)

    page.locator("#explorer-reset").click()
    page.wait_for_timeout(300)
    assert_row(page, a[query, : query + 1], g[query, : query + 1], "mean")
    cosine = torch.cosine_similarity(full.flatten(), diag.flatten(), dim=0, eps=0).item()
    shown = page.locator("#explorer-head label").nth(9).text_content()
    assert numbers(shown)[-1] == pytest.approx(cosine, abs=6e-3)


def test_stored_maps_are_off_by_less_than_a_thousandth_of_f(opened) -> None:
    page = opened("explorer.html")
    rows, columns = np.tril_indices(page.evaluate("EXPLORER.characters.length"))
    for method, moments in page.evaluate("EXPLORER.maps").items():
        for step, kept in moments.items():
            exact = attention_and_error(trained(method).at(int(step)), passage(page))
            scale = np.array(kept["scale"])[:, None]
            a, g = (np.frombuffer(base64.b64decode(kept[name]), kind).reshape(len(scale), -1)
                    for name, kind in (("a", "<u2"), ("g", "<i2")))
            found = np.zeros((2, *exact[0].shape))
            found[:, :, rows, columns] = (a / 65535) ** 4, g / 32767 * scale
            found[0] /= found[0].sum(-1, keepdims=True)
            parts = (split_softmax_gradient(*maps) for maps in (exact, torch.from_numpy(found)))
            full = split_softmax_gradient(*exact).full.abs().amax((-2, -1), keepdim=True)
            for x, y in zip(*parts, strict=True):
                assert ((x - y).abs() < 1e-3 * full).all() or not CORPUS.is_shakespeare


def test_the_explorer_begins_where_its_address_says(opened) -> None:
    address = "explorer.html?method=fa&step=200&head=9&query=21&key=5&constant=-1.5&rule=mean"
    page, usual = opened(address), opened("explorer.html")
    words = page.locator("#explorer-readout").text_content()
    assert "L2H1, feedback alignment, iteration 200." in words
    assert "Query 21" in words and "Key 5" in words
    assert page.locator("#explorer-constant").input_value() == "-1.5"
    assert page.locator("#explorer-rule").input_value() == "mean"
    page.goto(f"{REPORT.as_uri()}/explorer.html?step=7&rule=no&head=&weight=&query=x&text=3")
    readouts = [p.locator("#explorer-readout").text_content() for p in (page, usual)]
    assert readouts[0] == readouts[1]  # what it does not know is passed over


def test_one_s_own_text_is_read_or_refused(opened) -> None:
    page, text = opened("explorer.html"), known("To be, or not to be, that is the question: 3")
    said = page.locator("#explorer-said")
    absent = next(character for character in "é{ж" if character not in CORPUS.stoi)
    page.locator("#explorer-text").fill(3 * absent)
    said.get_by_text(f"The models know no “{absent}”.").wait_for()
    assert page.locator("#explorer-maps.stale").count() == 1  # the maps are of another text
    page.locator("#explorer-text").fill(text[:2])
    said.get_by_text("It takes 3 to 65 characters.").wait_for()

    page.locator("#explorer-method label", has_text="feedback").click()
    page.locator("#explorer-text").fill(text)
    said.get_by_text("L = ").wait_for(timeout=60_000)
    assert page.locator("#explorer-maps.stale").count() == 0
    ids, model = CORPUS.encode(passage(page)[:-1]), trained("fa").model
    with torch.no_grad():
        loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    *_, known_text, characters, blind = numbers(said.text_content())
    assert known_text == pytest.approx(loss, abs=6e-3) and characters == CORPUS.vocab_size
    assert blind == pytest.approx(np.log(CORPUS.vocab_size), abs=6e-3)
    page.locator("#explorer-rule").select_option("diagonal")
    page.locator("#explorer-head label").nth(6).click()
    move(page.locator("#explorer-query"), 20)
    page.wait_for_timeout(500)
    model = helpers.twin(trained("fa").model, softmax_backward="diagonal")
    assert_row(page, *(maps[6, 20, :21] for maps in attention_and_error(model, text)), "diagonal")

    page.locator("#explorer-text").fill("‘Tis “so” – they’re " + "so " * 20)  # 80 characters
    said.get_by_text("Read: the first 65 characters.").wait_for(timeout=60_000)
    page.locator("#explorer-text").fill(text[:4])
    page.locator("#explorer-readout", has_text="Query 2").wait_for()
    page.locator("#explorer-text").fill("")
    page.locator("#explorer-readout", has_text="Query 17").wait_for()
    assert not said.text_content()


def test_a_tap_on_a_map_picks_and_all_maps_answer(opened) -> None:
    page = opened("explorer.html", has_touch=True)
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(300)
    before = page.locator("#explorer-map-d canvas").screenshot()
    page.locator("#explorer-map-g").tap(position={"x": 40, "y": 200})
    page.wait_for_timeout(300)
    assert "Query 17" not in page.locator("#explorer-readout").text_content()
    assert page.locator("#explorer-map-d canvas").screenshot() != before
    words = page.locator("#explorer-readout").bounding_box()  # they are where one looks
    assert words["y"] > 0 and words["y"] + words["height"] <= PHONE["height"]


# ---- five keys ----


def descend(s: torch.Tensor, g: torch.Tensor, rule: str) -> torch.Tensor:
    for _ in range(200):
        sent = SOFTMAX_BACKWARD[rule](s.softmax(-1), g, torch.ones(5, dtype=torch.bool))
        s = s if sent is None else s - 0.1 * sent
    return s


def assert_follows(page: Page, scores: list[float], errors: list[float], rule: str) -> None:
    """The table, the sentence and the bars are what these scores and errors make."""
    s, g = torch.tensor(scores, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    a, after = s.softmax(-1), descend(s, g, rule)
    f, d, o = split_softmax_gradient(a, g)
    expected = {"s": s, "a": a, "g": g, "d": d, "o": o, "f": f}
    expected |= {"s after": after, "a after": after.softmax(-1)}
    found = table(page, "#figure-9-4 tr")
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0.0051)
    b, *sums, _, drift, most = numbers(page.locator("#figure-9-4 [role=status]").text_content())
    largest = (after.softmax(-1) - a).abs().max()
    told = [a @ g, d.sum(), o.sum(), f.sum(), (after - s).mean(), largest]
    np.testing.assert_allclose([b, *sums, drift, most], told, rtol=0, atol=0.0051)
    panel = page.locator("#figure-9-4 .panels svg").nth(3)
    scale = next(end for end in (0.5, 1, 2) if end >= torch.stack([d, o, f]).abs().max())
    for name, values in {"d": d, "o": o, "f": f}.items():
        bars = panel.locator(f"rect.{name}:not(.swatch)")
        heights = bars.evaluate_all("all => all.map(bar => bar.height.baseVal.value)")
        expected = values.abs() * 130 / (2 * scale)  # 130 units are the whole axis
        np.testing.assert_allclose(heights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("address", ["09_five_keys.html", "one-file.html"])
def test_every_part_of_the_five_keys_moves(opened, address: str) -> None:
    page = opened(address)
    start = json.loads(page.locator("#five-keys-start").text_content())
    scores, plus = start["scores"], start["errorsPlus"]
    errors = start["errors"]
    rules = page.evaluate("SOFTMAX_RULES")
    assert {rule: told["name"] for rule, told in rules.items()} == RULE_NAMES  # as in the figures
    assert not page.locator("#figure-9-4 img").is_visible()
    assert_follows(page, scores, [g + plus for g in errors], start["rule"])

    def slider(name: str) -> Locator:
        return page.get_by_role("slider", name=name, exact=True)

    slider("score of key 1").press("ArrowUp")
    slider("error of key 5").press("Home")
    scores[0] += 0.1
    errors[4] = -3
    circle = slider("error of key 2").locator("circle")
    circle.scroll_into_view_if_needed()
    box = circle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 3, y + 30, steps=5)
    page.mouse.up()
    page.mouse.move(x, y)  # let go, it stays
    box = circle.bounding_box()
    assert box["y"] + box["height"] / 2 == pytest.approx(y + 30, abs=1)
    value = float(slider("error of key 2").get_attribute("aria-valuenow"))
    assert value < errors[1]
    errors[1] = value
    move(page.locator("input[name=scoresPlus]"), 3)
    move(page.locator("input[name=errorsPlus]"), -3)
    page.locator("#figure-9-4 select").select_option("zero")
    assert_follows(page, [s + 3 for s in scores], [g - 3 for g in errors], "zero")


def test_without_scripts_the_pictures_are_there(browser: Browser) -> None:
    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto(f"{REPORT.as_uri()}/09_five_keys.html")
    assert page.locator("#figure-9-4 img").is_visible()
    page.context.close()
