"""Explore in the real thing: JupyterLab, opened in Chromium. Each reaction's time is printed.

What a reader moves by mouse and keyboard is held against numbers that ``helpers`` computes, and
against a picture that was drawn afresh.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
from playwright.sync_api import Browser, Page

from explore import Picture, State, captured, full_colours, head_maps, trained_run
from helpers import ROOT, capture_batch, head_energy, load_corpus, twin

CORPUS, VIEW = load_corpus(), {"width": 1440, "height": 900}
WATCH = """() => { window.reaction = new Promise(resolve => { let start;
  for (const move of ["pointerdown", "keydown", "input"])
    addEventListener(move, event => start ??= event.timeStamp, {capture: true, once: true});
  const image = document.querySelector("img.widget-image");
  new MutationObserver(() => resolve(performance.now() - start)).observe(
    image, {attributes: true, attributeFilter: ["src"]}) }) }"""
PNG = "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory):
    """JupyterLab on a copy of the notebooks, with settings of its own; opens one by its name."""
    home = tmp_path_factory.mktemp("lab")
    leave = shutil.ignore_patterns("tests", "_site", ".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "notebooks", home / "notebooks", ignore=leave)
    places = {f"JUPYTER{name}_DIR": str(home / name)
              for name in ("_CONFIG", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
    options = ["--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyterlab", home / "notebooks", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | places)
    address = next(filter(None, (re.search(r"http://localhost:\d+", line)
                                 for line in server.stderr)))[0]
    page = browser.new_context(viewport=VIEW).new_page()
    page.set_default_timeout(120_000)

    def visit(name: str) -> Page:
        page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        return page

    yield visit
    page.context.close()
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:  # held up by a kernel that had only begun
        server.kill()
        server.wait()
    server.stderr.close()


def react(page: Page, what: str, action) -> None:
    """Do something, and wait for the picture to change; the time is from the move, in the page."""
    page.evaluate(WATCH)
    action()
    seconds = page.evaluate("reaction") / 1000
    print(f"{what}: {seconds:.2f} s")
    page.wait_for_timeout(500)  # numbers come after the picture


def test_what_is_moved_shows_what_helpers_compute(lab) -> None:
    page = lab("09_explore")
    page.get_by_text("| Idle").wait_for()  # the kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator("img.widget-image").wait_for(timeout=300_000)
    text = CORPUS.decode(CORPUS.val[100:140]).replace("\n", " ")
    react(page, "a head", page.get_by_title(re.compile("layer 2, head 1")).click)
    react(page, "a text", lambda: page.locator(".widget-text input").fill(text))
    slider = page.locator(".widget-slider", has_text="Temperature").get_by_role("slider")
    react(page, "a slider", lambda: slider.press("ArrowRight"))

    model = twin(trained_run("feedback alignment", CORPUS).at(50))
    ids = CORPUS.encode(text)
    layer = capture_batch(model, ids[None, :-1], ids[None, 1:])[2]
    state = State(text, layer=2, head=1, temperature=10**0.1)
    g, scores = layer.grad[0, 1].double().tril(), layer.scores[0, 1].double()
    a = (scores / state.temperature).softmax(-1)
    row = head_energy(a.float()[None, None], g.float()[None, None], n_boot=1).iloc[0]
    rows = page.locator(".widget-html div:has(> b)").all_inner_texts()
    numbers = {name: float(value) for name, value in (row.split(": ") for row in rows)}
    image = bytes(page.locator("img.widget-image").evaluate(PNG))
    assert numbers["b"] == pytest.approx(1e6 * (a[20] @ g[20]).item(), rel=1e-3)
    assert numbers["cosine of d with f"] == pytest.approx(row["cos_diag"], rel=1e-3)
    assert numbers["energy of o / energy of f"] == pytest.approx(row["r_offdiag"], rel=1e-3)
    seen = captured(model, ids)[:2]
    sizes = full_colours(head_maps(*seen, replace(state, temperature=1.0)))
    assert image == Picture().draw(text[:-1], head_maps(*seen, state), sizes, 20, 0)
    assert not page.locator("[data-mime-type$=stderr], [data-mime-type$=error]").count()


@pytest.mark.parametrize("name", ["index", "01_softmax_jacobian", "09_your_own_rule"])
def test_what_the_site_folds_is_folded(lab, name: str) -> None:
    page, notebook = lab(name), nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if "source_hidden" in
                 cell.metadata.get("jupyter", {}))
    page.locator(".jp-InputPlaceholder").first.wait_for()
    line = first.source.splitlines()[-1]
    assert not page.locator(".jp-InputArea-editor:visible", has_text=line).count()
