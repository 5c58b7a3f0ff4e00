"""The two figures of the front page that can be moved, in the built report: by mouse and key. make test-report

What they compute is held against model_local's rules, what they draw against the stored runs.
"""

import json
import re

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page
from test_report import PHONE, REPORT, VIEWS, visit_page

from helpers import RULE_NAMES, split_softmax_gradient
from model_local import SOFTMAX_BACKWARD

VISIBLE = torch.ones(5, dtype=torch.bool)
SCORES, ERRORS = [1.5, -2.0, 0.3, 3.0, -0.7], [-1.0, 2.5, 0.4, -3.0, 1.7]


def open_essay(browser: Browser, address: str = "index.html") -> tuple[Page, list[str]]:
    page, trouble = visit_page(browser, address)
    page.locator("#figure-0-2 .essay [role=status]").wait_for()
    return page, trouble


@pytest.fixture(scope="module")
def essay(browser: Browser) -> Page:
    page, _ = open_essay(browser)
    yield page
    page.context.close()


def handle(page: Page, name: str):
    return page.get_by_role("slider", name=name, exact=True)


def shown(page: Page) -> dict[str, torch.Tensor]:
    """The table of the five keys."""
    names, *rows = page.eval_on_selector_all(
        "#figure-0-2 tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent.replace('−', '-')))"
    )
    return dict(
        zip(names, torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64).T, strict=True)
    )


def assert_follows(page: Page, scores: list[float], errors: list[float], rule: str) -> None:
    """The table, the sentence and the bars are what these scores and errors make."""
    s, g = torch.tensor(scores, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    a, after = s.softmax(-1), descend(s, g, rule)
    f, d, o = split_softmax_gradient(a, g)
    expected = {"s": s, "a": a, "g": g, "d": d, "o": o, "f": f, "s after": after, "a after": after.softmax(-1)}
    found = shown(page)
    assert list(found) == ["key", *expected]
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0.0051, msg=lambda m, n=name: f"{n}: {m}")
    numbers = re.findall(r"−?\d+\.\d\d", page.locator("#figure-0-2 [role=status]").text_content())
    b, *sums, drift, most = (float(number.replace("−", "-")) for number in numbers)
    told = [a @ g, d.sum(), o.sum(), f.sum(), (after - s).mean(), (after.softmax(-1) - a).abs().max()]
    np.testing.assert_allclose([b, *sums, drift, most], told, rtol=0, atol=0.0051)
    panel = page.locator("#figure-0-2 .panels svg").nth(3)
    scale = next(end for end in (0.5, 1, 2) if end >= max(part.abs().max() for part in (d, o, f)))  # 130 units are two
    assert panel.locator("text", has_text=re.compile(rf"^{scale:g}$")).count() == 1
    for name, values in {"d": d, "o": o, "f": f}.items():
        heights = panel.locator(f"rect.{name}:not(.swatch)").evaluate_all(
            "all => all.map(bar => bar.height.baseVal.value)"
        )
        np.testing.assert_allclose(heights, values.abs() * 130 / (2 * scale), rtol=1e-6, atol=1e-6)


def descend(s: torch.Tensor, g: torch.Tensor, rule: str) -> torch.Tensor:
    for _ in range(200):
        sent = SOFTMAX_BACKWARD[rule](s.softmax(-1), g, VISIBLE)
        s = s if sent is None else s - 0.1 * sent
    return s


def test_the_rules_have_the_names_that_the_figures_use(essay: Page) -> None:
    names = essay.evaluate("Object.entries(SOFTMAX_RULES).map(([rule, {name}]) => [rule, name])")
    assert dict(map(tuple, names)) == RULE_NAMES


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_scores_descend_by_every_rule_as_in_pytorch(essay: Page, rule: str) -> None:
    rows = torch.tensor(essay.evaluate("([s, g, rule]) => ESSAY.descend(s, g, rule)", [SCORES, ERRORS, rule]))
    s, g = (torch.tensor(values, dtype=torch.float64) for values in (SCORES, ERRORS))
    assert rows.shape == (201, 5) and torch.equal(rows[0].double(), s.float().double())
    torch.testing.assert_close(rows[-1].double(), descend(s, g, rule), rtol=1e-4, atol=1e-4)


def test_it_begins_as_its_picture_and_every_slider_moves_it_by_keys(browser: Browser) -> None:
    page, trouble = open_essay(browser)
    start = json.loads(page.locator("#five-keys").text_content())
    scores, errors = start["scores"], start["errors"]
    rule = start["rule"]
    assert not page.locator("#figure-0-2 img").is_visible()
    assert_follows(page, scores, [g + start["errorsPlus"] for g in errors], rule)
    for key, (name, values, press, by) in enumerate(
        [("score", scores, "ArrowUp", 0.1), ("error", errors, "ArrowDown", -0.1), ("score", scores, "PageDown", -1)]
    ):
        slider = handle(page, f"{name} of key {key + 1}")
        slider.focus()
        slider.press(press)
        values[key] += by
        assert float(slider.get_attribute("aria-valuenow")) == pytest.approx(values[key])
        assert slider.evaluate("slider => slider == document.activeElement")
    handle(page, "error of key 5").press("Home")
    errors[4] = -3
    plus = [page.locator(f"#figure-0-2 input[name={name}]") for name in ("scoresPlus", "errorsPlus")]
    plus[0].press("End")
    plus[1].press("Home")
    page.locator("#figure-0-2 select").select_option("balanced_by_attention")
    assert_follows(page, [s + 3 for s in scores], [g - 3 for g in errors], "balanced_by_attention")
    page.locator("#figure-0-2 button").press("Enter")
    start = json.loads(page.locator("#five-keys").text_content())
    assert_follows(page, start["scores"], [g + start["errorsPlus"] for g in start["errors"]], start["rule"])
    assert not trouble


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE])
def test_a_circle_goes_where_the_pointer_drags_it(browser: Browser, viewport: dict) -> None:
    page, trouble = open_essay(browser)
    page.set_viewport_size(viewport)
    start = json.loads(page.locator("#five-keys").text_content())
    circle = handle(page, "error of key 2").locator("circle")
    circle.scroll_into_view_if_needed()
    box = circle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    assert handle(page, "error of key 2").evaluate("slider => slider == document.activeElement")
    page.mouse.move(x + 3, y + 30, steps=5)
    page.mouse.up()
    page.mouse.move(x, y)  # let go, it stays
    moved = circle.bounding_box()
    assert moved["y"] + moved["height"] / 2 == pytest.approx(y + 30, abs=1)
    value = float(handle(page, "error of key 2").get_attribute("aria-valuenow"))
    assert value < start["errors"][1]
    errors = [g + start["errorsPlus"] for g in start["errors"]]
    errors[1] = value + start["errorsPlus"]
    assert_follows(page, start["scores"], errors, start["rule"])
    assert not trouble


def test_losses_are_those_of_the_iteration_that_the_slider_is_at(browser: Browser) -> None:
    page, trouble = open_essay(browser)
    stored = json.loads(page.locator("#rates").text_content())
    slider = page.locator("#figure-0-6 input[name=iteration]")
    slider.scroll_into_view_if_needed()

    def assert_drawn(now: int) -> None:
        assert page.locator("#figure-0-6 output").text_content() == f"after {stored['iterations'][now]:,} iterations"
        low, high = np.log10(stored["ends"])
        for drawn, panel in zip(page.locator("#figure-0-6 .panels svg").all(), stored["panels"], strict=True):
            assert drawn.get_attribute("aria-label") == panel["title"]
            for rule, curve in panel["curves"].items():
                heights = drawn.locator(f"circle.{rule}").evaluate_all(
                    "all => all.map(point => point.cy.baseVal.value)"
                )
                losses = np.log10(np.clip([losses[now] for losses in curve["losses"]], *stored["ends"]))
                np.testing.assert_allclose(heights, 22 + (high - losses) / (high - low) * 130, rtol=1e-5)

    last = len(stored["iterations"]) - 1
    assert_drawn(last)
    slider.press("ArrowLeft")
    assert_drawn(last - 1)
    slider.press("Home")
    assert_drawn(0)
    assert not trouble


@pytest.mark.parametrize("view", VIEWS)
def test_lines_and_words_stand_out_in_both_schemes_and_fit(browser: Browser, view: str) -> None:
    color_scheme, theme, viewport = VIEWS[view]
    page, _ = open_essay(browser)
    page.emulate_media(color_scheme=color_scheme)
    page.evaluate("theme => document.body.dataset.theme = theme", theme)
    page.set_viewport_size(viewport)
    ground = luminance(page.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor"))
    for mark, quality in {
        "path": "stroke",
        "rect.d": "fill",
        "rect.o": "fill",
        "rect.f": "fill",
        "text": "fill",
    }.items():
        colors = page.eval_on_selector_all(
            f".essay svg {mark}", f"all => all.map(mark => getComputedStyle(mark).{quality})"
        )
        for color in set(colors):
            light, dark = sorted((luminance(color), ground), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > (4.5 if mark == "text" else 3), (mark, color)
    figures = page.locator(".essay")
    assert figures.count() == 2
    assert max(figures.evaluate_all("all => all.map(f => f.getBoundingClientRect().right)")) <= viewport["width"]


def luminance(color: str) -> float:
    """Of a CSS colour, as the Web Content Accessibility Guidelines define it."""
    channels = np.array([float(number) for number in re.findall(r"[\d.]+", color)[:3]]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


def test_they_work_in_the_one_file_report_too(browser: Browser) -> None:
    page, trouble = open_essay(browser, "one-file.html")
    start = json.loads(page.locator("#five-keys").text_content())
    handle(page, "score of key 1").press("End")
    assert_follows(page, [3, *start["scores"][1:]], [g + start["errorsPlus"] for g in start["errors"]], start["rule"])
    page.locator("#figure-0-6 input[name=iteration]").press("Home")
    assert page.locator("#figure-0-6 output").text_content() == "after 0 iterations"
    assert not trouble


def test_without_scripts_the_pictures_are_there(browser: Browser) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{REPORT.as_uri()}/index.html")
    for name in ("figure-0-2", "figure-0-6"):
        assert page.locator(f"#{name} img").is_visible()
    context.close()
