"""What makes the pages: notebooks are executed, solutions added, and all put into one file."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from docutils import nodes
from nbformat.v4 import new_code_cell, new_notebook

from conf import author, moved, project, release
from pages import efforts, name_equations, solutions
from single_file import inline

EXECUTE = Path(__file__).parents[1] / "_site" / "execute.py"


@pytest.fixture
def execute(tmp_path):
    """Write a notebook of these cells and execute it; returns the process and its file."""

    def execute(*sources: str, **options):
        path = tmp_path / "notebook.ipynb"
        cells = [new_code_cell(source, metadata=options) for source in sources]
        nbformat.write(new_notebook(cells=cells), path)
        command = [sys.executable, EXECUTE, path]
        env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False), path

    return execute


def test_a_notebook_is_written_with_its_outputs_and_without_bars(execute) -> None:
    bars = "import tqdm, sys\nfor i in tqdm.tqdm(range(3)):\n    print(i)"
    done, path = execute(bars, "import os; os.path.basename(os.getcwd())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "notebook" and done.stdout.split()[-1] == "s"
    first, second = nbformat.read(path, as_version=4).cells
    assert [(output.name, output.text) for output in first.outputs] == [("stdout", "0\n1\n2\n")]
    assert path.parent.name in second.outputs[0].data["text/plain"]  # in its own folder


def test_a_failing_cell_says_so_and_the_file_stays(execute) -> None:
    done, path = execute("print('a')", "1 / 0", "print('b')")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and not done.stdout
    assert not any(cell.outputs for cell in nbformat.read(path, as_version=4).cells)
    assert [other.name for other in path.parent.iterdir()] == ["notebook.ipynb"]


def test_with_a_folder_for_outputs_nothing_is_written_of_or_after_what_fails(execute) -> None:
    path = execute("print('a')")[1]
    paths, folder = [path, *(path.with_name(f"{name}.ipynb") for name in "bc")], path.parent / "out"
    paths[1].write_text(path.read_text().replace("print('a')", "1 / 0"))
    paths[2].write_text(path.read_text())
    before = [source.read_text() for source in paths]
    folder.mkdir()
    for source in paths[1:]:
        (folder / source.name).write_text("as it was")
    command = [sys.executable, EXECUTE, *paths, "--output-dir", folder]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert [source.read_text() for source in paths] == before and len([*folder.iterdir()]) == 3
    assert [(folder / source.name).read_text() for source in paths[1:]] == ["as it was"] * 2
    assert nbformat.read(folder / path.name, as_version=4).cells[0].outputs[0].text == "a\n"


def test_a_figure_that_is_wanted_elsewhere_is_written_there(execute) -> None:
    source = "from IPython.display import SVG\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')"
    done, path = execute(source, file="answer.svg")
    assert done.returncode == 0, done.stderr
    assert (path.parent / "answer.svg").read_text().startswith("<svg")


def test_every_exercise_has_a_solution_which_is_code_alone() -> None:
    """The examples of its docstring are not shown. That it is folded, test_report sees."""
    answers = solutions()
    assert set(answers) == set(efforts()) and len(answers) > 15
    assert not any(">>>" in code or '"""' in code for code in answers.values())


def test_an_equation_is_found_by_its_number() -> None:
    equation = nodes.math_block("", r"f = d + o \tag{1.2}")
    name_equations(None, nodes.container("", equation))
    assert equation["ids"] == ["equation-1-2"]


def test_one_file_needs_no_other(tmp_path) -> None:
    (tmp_path / "style.css").write_text("p { color: red }")
    (tmp_path / "do.js").write_text('const tag = "</script>"')
    (tmp_path / "a b.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "page.html").write_text(
        '<html><head><link rel="stylesheet" href="style.css"><link rel="icon" href="gone.png">'
        '<script src="do.js" defer></script></head><body><p class="site-only">not here</p>'
        '<img src="a%20b.svg"><img src="c.png"><img src="https://elsewhere.org/c.png">'
        '<a href="#document-page#there">there</a></body></html>'
    )
    page = inline(tmp_path / "page.html")
    assert "p { color: red }" in page and "not here" not in page and "gone.png" not in page
    assert r'const tag = "<\/script>"' in page and "do.js" not in page
    assert page.index("<body>") < page.index("const tag")  # it waited for the page
    assert 'src="data:image/svg+xml,%3Csvg xmlns=%27http://www.w3.org/2000/svg%27/%3E"' in page
    assert "data:image/png;base64,iVBO" in page and 'src="https://elsewhere.org/c.png"' in page
    assert 'href="#there"' in page


def test_what_tools_cite_is_this_report() -> None:
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], cited["version"], cited["license"]) == (project, release, "MIT")
    assert cited["authors"] == [{"name": author}]


@pytest.mark.parametrize("old", moved)
def test_an_old_address_is_gone_and_the_page_that_it_leads_to_is_there(old: str) -> None:
    folder = Path(__file__).parents[1]
    assert [*folder.glob(f"{moved[old]}.*")] and not [*folder.glob(f"{old}.[im]*")]
