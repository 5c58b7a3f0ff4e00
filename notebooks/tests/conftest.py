"""The one browser of all tests that look at the built report."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from test_report import CHROMIUM  # only where there is a report

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM)
