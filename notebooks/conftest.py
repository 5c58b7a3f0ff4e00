"""For pytest: what notebooks and properties need in order to be tests."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import nbformat
import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Progress bars never come out the same twice.
os.environ["TQDM_DISABLE"] = "1"

# The same examples at every call, however slow the machine.
hypothesis.settings.register_profile("report", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("report")


def pytest_sessionstart():
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            # nbval passes such a cell without comparing anything.
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
                raise pytest.UsageError(f"{path.name}, cell {number}, stores no outputs to compare: make notebooks")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The one browser of all tests that look at the built report."""
    if not CHROMIUM:
        pytest.skip("no browser: install Chromium (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM)
