"""For pytest: what the comparison of notebooks' outputs needs in order to mean something."""

import os
from pathlib import Path

import nbformat
import pytest

# Progress bars never come out the same twice.
os.environ["TQDM_DISABLE"] = "1"


def pytest_sessionstart():
    for path in sorted(Path(__file__).parent.glob("*.ipynb")):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            # nbval passes such a cell without comparing anything.
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
                raise pytest.UsageError(f"{path.name}, cell {number}, stores no outputs to compare: make notebooks")
