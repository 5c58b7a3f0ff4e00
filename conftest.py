"""For pytest: what notebooks and properties need in order to be tests."""

import os
import shutil
from collections.abc import Iterator

import hypothesis
import pytest
from playwright.sync_api import Browser, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, PROGRAMS)), None)

# Progress bars never come out the same twice.
os.environ["TQDM_DISABLE"] = "1"

# The same examples at every call, however slow the machine.
hypothesis.settings.register_profile("report", derandomize=True, deadline=None,
                                     max_examples=50, database=None)
hypothesis.settings.load_profile("report")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The one browser of all tests that look at the built report."""
    if not CHROMIUM:
        pytest.skip("no browser: install Chromium (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM)
