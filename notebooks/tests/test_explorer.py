"""The explorer in the built report: it shows what PyTorch computes, by mouse, key and address. make test-report

What a reader types is held against the models themselves, which are loaded from data/runs as the notebooks left them.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page
from test_report import PHONE, REPORT, VIEWS, visit_page

from helpers import Run, capture_batch, load_corpus, split_softmax_gradient, train, twin
from model_local import LocalGPT, LocalGPTConfig

STEPS, SEED = 500, 1337  # as in 07_explore
CORPUS = load_corpus()


@cache
def trained(method: str) -> Run:
    config = LocalGPTConfig(vocab_size=CORPUS.vocab_size, method=method)
    return train(config, STEPS, seed=SEED, data=CORPUS, progress=False)


def attention_and_error(model: LocalGPT, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and g of every head (L*H, T, T), in float64."""
    ids = CORPUS.encode(text)
    layers = capture_batch(model, ids[None, :-1], ids[None, 1:])
    a, g = (torch.cat([getattr(layer, name)[0] for layer in layers]).double() for name in ("attn", "grad"))
    return a, g.tril()


def passage() -> str:
    """The text of the stored maps, as the models read it."""
    script = (REPORT / "_static" / "explorer-data.js").read_text(encoding="utf-8")
    data = json.loads(script.removeprefix("const EXPLORER = ").removesuffix(";\n"))
    original = {shown: character for character, shown in data["vocabulary"]}
    start = "".join(original[shown] for shown in data["characters"])
    validation = CORPUS.decode(CORPUS.val)
    return start + validation[validation.index(start) + len(start)]


def open_explorer(browser: Browser, fragment: str = "") -> tuple[Page, list[str]]:
    page, trouble = visit_page(browser, f"explorer.html{fragment}")
    page.locator("#explorer-readout p").first.wait_for()
    return page, trouble


def type_text(page: Page, text: str, answer: str = " ms") -> str:
    """What the page says once it has read the text."""
    page.locator("#explorer-text").fill(text)
    said = page.locator("#explorer-said", has_text=answer)
    said.wait_for(timeout=60_000)
    return said.text_content()


def row_shown(page: Page) -> dict[str, torch.Tensor]:
    """The table of the picked row: A, g, d, o, f."""
    names, *rows = page.eval_on_selector_all(
        "#explorer-table tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    values = [[float(cell.replace("−", "-").replace(",", "")) for cell in row[1:]] for row in rows]
    return dict(zip(names[1:], torch.tensor(values, dtype=torch.float64).T, strict=True))


def assert_row(page: Page, a: torch.Tensor, g: torch.Tensor, within: float = 2e-3) -> None:
    """The table shows these weights and errors (query + 1), and what follows from them, up to its three digits."""
    shown, g = row_shown(page), 1e6 * g
    full, diag, offdiag = split_softmax_gradient(a, g)
    expected = {"a": a, "g": g, "ag": a * g, "d": diag, "o": offdiag, "f": full}
    assert list(shown) == list(expected)
    for name, values in expected.items():
        size = max(values.abs().max().item(), full.abs().max().item() if name in "dof" else 0)
        torch.testing.assert_close(
            shown[name], values, rtol=6e-3, atol=within * size, msg=lambda m, n=name: f"{n}: {m}"
        )


PAGE_RUN = """([texts, method, rule]) => {
    const model = LocalGPT.load(EXPLORER_WEIGHTS[method], EXPLORER)
    return texts.map(text => {
        const {a, g, loss} = LocalGPT.run(model, text, rule)
        const flat = heads => heads.map(rows => rows.flatMap(row => [...row]))
        return {a: flat(a), g: flat(g), loss}
    })
}"""
TEXTS = ["To be, or not to be, that is the question: 3", "zzzzzzzzzzzzzzzzzzzz!", "abc"]


@pytest.fixture(scope="module")
def models_page(browser: Browser) -> Page:
    page, _ = open_explorer(browser)
    for name in ("model", "bp", "fa"):
        page.add_script_tag(url=f"_static/explorer-{name}.js")
    yield page
    page.context.close()


@pytest.mark.parametrize("method", ["bp", "fa"])
@pytest.mark.parametrize(
    "rule", ["full", "diagonal", "zero", "mean", "diagonal_mean", "diagonal_lateral", "balanced_evenly",
             "balanced_by_attention", "ste", "none"]
)  # fmt: skip
def test_the_page_s_passes_are_those_of_pytorch(models_page: Page, method: str, rule: str) -> None:
    texts = [*TEXTS, CORPUS.decode(CORPUS.val[:65])]
    texts = ["".join(c for c in text if c in CORPUS.stoi) for text in texts]
    model = twin(trained(method).model, softmax_backward=rule)
    for text, found in zip(texts, models_page.evaluate(PAGE_RUN, [texts, method, rule]), strict=True):
        rows, columns = torch.tril_indices(len(text) - 1, len(text) - 1)
        for name, maps in zip("ag", attention_and_error(model, text), strict=True):
            expected, computed = maps[:, rows, columns], torch.tensor(found[name], dtype=torch.float64)
            off = (computed - expected).abs().amax(-1) / expected.abs().amax(-1)
            assert off.max() < 1e-3, f"{name} of head {off.argmax()} on {text!r}: {off.max():.1e}"
        ids = CORPUS.encode(text)
        with torch.no_grad():
            assert found["loss"] == pytest.approx(model(ids[None, :-1], ids[None, 1:])[1].item(), abs=1e-3)


def test_every_rule_of_the_page_is_tested(models_page: Page) -> None:
    tested = next(m for m in test_the_page_s_passes_are_those_of_pytorch.pytestmark if m.args[0] == "rule").args[1]
    offered = models_page.eval_on_selector_all("#explorer-rule option", "all => all.map(option => option.value)")
    assert offered == models_page.evaluate("Object.keys(SOFTMAX_RULES)") == tested


def test_one_s_own_text_is_shown_head_by_head(browser: Browser) -> None:
    page, trouble = open_explorer(browser)
    text = "".join(c for c in "To be, or not to be, that is the question: 3" if c in CORPUS.stoi)
    said = type_text(page, text)
    page.locator("#explorer-rule").select_option("diagonal")
    page.wait_for_url("**rule=diagonal*")
    model = twin(trained("fa").model, softmax_backward="diagonal")
    a, g = attention_and_error(model, text)
    ids = CORPUS.encode(text)
    loss = model(ids[None, :-1], ids[None, 1:])[1].item()
    assert float(re.search(r"L = ([\d.]+)", said)[1]) == pytest.approx(loss, abs=6e-3)
    page.locator("#explorer-query").fill("20")
    for head in (0, 6, 15):
        page.locator("#explorer-head label").nth(head).click()
        page.wait_for_timeout(300)
        assert_row(page, a[head, 20, :21], g[head, 20, :21])
    assert not trouble, "\n".join(trouble)


def drawn(page: Page) -> list[str]:
    return page.eval_on_selector_all("#explorer-maps canvas", "all => all.map(canvas => canvas.toDataURL())")


def test_a_text_that_cannot_be_read_is_refused_and_the_maps_stay(browser: Browser) -> None:
    page, trouble = open_explorer(browser)
    absent = next(c for c in "é{ж" if c not in CORPUS.stoi)
    maps = drawn(page)
    type_text(page, 3 * absent, f"The models know no “{absent}”.")
    type_text(page, 2 * CORPUS.itos[len(CORPUS.itos) - 1], "2 characters: it takes 3 to 65.")
    page.wait_for_timeout(300)
    assert drawn(page) == maps
    page.locator("#explorer-text").fill("")
    page.wait_for_function("document.querySelector('#explorer-said').textContent == ''")
    assert not trouble, "\n".join(trouble)


def test_changes_are_those_of_07(browser: Browser) -> None:
    a, g = attention_and_error(trained("bp").at(200), passage())
    head, query, key, temperature, times, weight = 9, 21, 5, 2.0, -1.5, 0.3
    address = f"#method=bp&step=200&head=L2H1&query={query}&key={key}&temperature={temperature}&constant={times}"
    page, trouble = open_explorer(browser, f"{address}&weight={weight}")
    rows, columns = torch.tril_indices(*a.shape[1:])
    spread = g[head][rows, columns].std(correction=0)
    row = a[head, query, : query + 1] ** (1 / temperature)
    row[key] = 0
    row *= (1 - weight) / row.sum()
    row[key] = weight
    assert_row(page, row, g[head, query, : query + 1] + times * spread)
    assert page.url.endswith(f"{address}&weight={weight}".removeprefix("#").replace("temperature=2.0", "temperature=2"))
    page.locator("#explorer-reset").click()
    page.wait_for_timeout(300)
    assert_row(page, a[head, query, : query + 1], g[head, query, : query + 1])
    assert "temperature" not in page.url
    assert not trouble, "\n".join(trouble)


def test_it_names_its_text(browser: Browser) -> None:
    page, _ = open_explorer(browser)
    name = "Tiny Shakespeare" if CORPUS.is_shakespeare else CORPUS.name
    assert f"on a passage of {name} that they were not" in page.locator("article p").first.inner_text()


def test_it_opens_where_the_lateral_part_is_largest(browser: Browser) -> None:
    page, trouble = open_explorer(browser)
    shares, text = {}, passage()
    for method in ("bp", "fa"):
        for step in (50, 100, 200, 350, 500):
            full, _, offdiag = split_softmax_gradient(*attention_and_error(trained(method).at(step), text))
            for head, share in enumerate(offdiag.square().sum((1, 2)) / full.square().sum((1, 2))):
                shares[method, str(step), str(head)] = share.item()
    opened = tuple(page.locator(f"[name={name}]:checked").get_attribute("value") for name in ("method", "step", "head"))
    assert opened == max(shares, key=shares.get)
    assert not trouble, "\n".join(trouble)


def test_the_grid_names_each_head_by_its_place_and_its_cosine(browser: Browser) -> None:
    page, trouble = open_explorer(browser)
    page.locator("#explorer-step label", has_text=re.compile("^100$")).click()
    page.wait_for_timeout(300)
    shown = page.eval_on_selector_all(
        "#explorer-head label", "all => all.map(label => label.textContent.trim().split(/\\s+/))"
    )
    full, diag, _ = split_softmax_gradient(*attention_and_error(trained("fa").at(100), passage()))
    cosines = torch.cosine_similarity(full.flatten(1), diag.flatten(1), dim=1, eps=0)
    assert [name for name, _ in shown] == [f"L{layer}H{head}" for layer in range(4) for head in range(4)]
    assert [float(cosine.replace("−", "-")) for _, cosine in shown] == pytest.approx(cosines.tolist(), abs=6e-3)
    assert not trouble, "\n".join(trouble)


def settled(picture: Locator) -> bytes:
    """Its screenshot, once two in a row are the same: a picture may be drawn a while after what caused it."""
    before, now = None, picture.screenshot()
    while now != before:
        picture.page.wait_for_timeout(300)
        before, now = now, picture.screenshot()
    return now


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda page: page.locator("#explorer-head label").last.click(), id="click on a head"),
        pytest.param(lambda page: page.locator("#explorer-head :checked").press("ArrowDown"), id="key on a head"),
        pytest.param(lambda page: page.locator("#explorer-map-f").press("ArrowUp"), id="key on another map"),
        pytest.param(
            lambda page: page.locator("#explorer-map-f").click(position={"x": 30, "y": 90}), id="click on another map"
        ),
        pytest.param(lambda page: page.locator("#explorer-constant").press("ArrowRight"), id="key on a slider"),
        pytest.param(lambda page: page.locator("#explorer-beside").select_option("other"), id="another beside it"),
        pytest.param(lambda page: page.locator("#explorer-presets button").last.click(), id="click on a preset"),
        pytest.param(lambda page: page.evaluate("location.hash = '#step=500'"), id="another address"),
    ],
)
def test_the_picture_answers(browser: Browser, act: Callable[[Page], None]) -> None:
    page, trouble = open_explorer(browser)
    picture = page.locator("#explorer-map-d")  # never in focus here: a mere focus ring is no answer
    before = settled(picture)
    act(page)
    answered = settled(picture) != before
    assert answered, "\n".join(["the picture stays as it was", *trouble])
    assert not trouble, "\n".join(trouble)


def scales(page: Page) -> list[str]:
    return page.eval_on_selector_all(
        "#explorer-maps figure:not([hidden]) .bar", "all => all.map(bar => bar.textContent)"
    )


def test_locked_scales_stay_and_two_heads_share_theirs(browser: Browser) -> None:
    page, trouble = open_explorer(browser)
    before = scales(page)
    page.locator("#explorer-lock").check()
    page.locator("#explorer-step label").last.click()
    page.wait_for_timeout(300)
    assert scales(page) == before
    page.locator("#explorer-lock").uncheck()
    page.wait_for_timeout(300)
    assert scales(page) != before
    page.locator("#explorer-beside").select_option("L3H3")
    page.wait_for_timeout(300)
    shown = scales(page)
    assert len(shown) == 2 * len(before) and shown[::2] == shown[1::2]
    titles = page.locator("#explorer-maps figure:not([hidden]) figcaption > span").all_text_contents()
    assert [title.split(" · ")[1] for title in titles[:2]] == ["L1H0, FA", "L3H3, FA"] or not CORPUS.is_shakespeare
    assert not trouble, "\n".join(trouble)


def test_the_address_holds_everything(browser: Browser) -> None:
    address = (
        "#method=bp&step=100&head=L2H3&query=30&key=7&beside=L0H1&temperature=0.5&constant=2"
        "&weight=0.25&lock=1,2,3,4,5,6"
    )
    page, trouble = open_explorer(browser, address)
    picture, words = settled(page.locator("#explorer-maps")), page.locator("#explorer-readout").text_content()
    assert "L2H3, backpropagation, iteration 100. Query 30" in words
    again, _ = open_explorer(browser, "#" + page.url.partition("#")[2])
    assert settled(again.locator("#explorer-maps")) == picture
    assert again.locator("#explorer-readout").text_content() == words
    wrong, trouble_of_wrong = open_explorer(
        browser, "#method=x&step=7&head=L9H9&query=-4&key=a&weight=3&temperature=0&z=1"
    )
    assert wrong.locator("#explorer-readout").text_content() and "#" not in wrong.url.partition("#query=0")[0]
    assert not trouble + trouble_of_wrong, "\n".join(trouble + trouble_of_wrong)


def test_controls_and_maps_are_in_view_together(browser: Browser) -> None:
    page, _ = open_explorer(browser)
    page.set_viewport_size({"width": 1440, "height": 900})
    page.wait_for_timeout(300)
    boxes = [page.locator(place).bounding_box() for place in ("#explorer-controls", "#explorer-maps")]
    assert all(box["y"] >= 0 and box["y"] + box["height"] <= 900 for box in boxes)
    tops = {round(figure.bounding_box()["y"]) for figure in page.locator("#explorer-maps figure:not([hidden])").all()}
    assert len(tops) == 2  # rows, of three
    page.mouse.wheel(0, 200)
    page.wait_for_timeout(300)
    assert page.locator("#explorer-controls").bounding_box()["y"] >= 0


@pytest.mark.parametrize("name", ["a", "f"])
def test_maps_have_the_ground_of_the_page(browser: Browser, name: str) -> None:
    """A weight of nearly nothing is drawn in the page's own colour, in both schemes."""
    page, _ = open_explorer(browser, "#temperature=0.01")
    for scheme, *_ in (VIEWS["light"], VIEWS["dark"]):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        cell, ground = page.evaluate(
            """(name) => {
            const map = document.querySelector(`#explorer-map-${name}`), canvas = map.querySelector("canvas")
            const scale = canvas.width / map.clientWidth, context = canvas.getContext("2d")
            const shown = [...context.getImageData(16 * scale, canvas.height - 40 * scale, 1, 1).data].slice(0, 3)
            return [shown, getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)]
        }""",
            name,
        )
        assert max(abs(x - y) for x, y in zip(cell, ground, strict=True)) < 40
        assert (sum(ground) < 384) == (scheme == "dark")


def test_a_tap_picks_on_a_phone(browser: Browser) -> None:
    context = browser.new_context(offline=True, viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"{REPORT.as_uri()}/explorer.html")
    before = page.locator("#explorer-readout p").last.text_content()
    page.locator("#explorer-map-g").tap(position={"x": 40, "y": 200})
    page.wait_for_timeout(300)
    assert page.locator("#explorer-readout p").last.text_content() != before
    context.close()


def test_any_text_is_written_as_text(browser: Browser, tmp_path: Path) -> None:
    hostile = [
        "<img src=x onerror=alert(1)>",
        "<script>document.title = 'taken'</script>",
        "&amp;",
        "$$x$$",
        '"',
        "\\x00",
    ]
    for path in REPORT.iterdir():
        if path.name != "_static":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "_static").mkdir()
    for path in (REPORT / "_static").iterdir():
        (tmp_path / "_static" / path.name).symlink_to(path)
    script = (REPORT / "_static" / "explorer-data.js").read_text(encoding="utf-8")
    data = json.loads(script.removeprefix("const EXPLORER = ").removesuffix(";\n"))
    data["characters"] = (hostile * len(data["characters"]))[: len(data["characters"])]
    (tmp_path / "_static" / "explorer-data.js").unlink()
    (tmp_path / "_static" / "explorer-data.js").write_text(f"const EXPLORER = {json.dumps(data)};\n", encoding="utf-8")
    (tmp_path / "explorer.html").unlink()
    shutil.copy(REPORT / "explorer.html", tmp_path)

    page, trouble = visit_page(browser, "explorer.html", tmp_path)
    for key in range(len(hostile)):
        page.locator("#explorer-key").fill(str(key))
        page.wait_for_timeout(100)
        assert f"Key {key} {hostile[key]}: A" in page.locator("#explorer-readout").text_content()
    assert page.locator("#explorer-table th[scope=row]").first.text_content() == f"0 {hostile[0]}"
    page.locator("#explorer-map-f").hover(position={"x": 60, "y": 120})  # the values under the pointer
    page.wait_for_timeout(500)
    assert page.locator("#explorer [src=x], #explorer script").count() == 0 and page.title() != "taken"
    assert not trouble, "\n".join(trouble)
