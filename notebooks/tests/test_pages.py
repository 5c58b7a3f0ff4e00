"""The steps of make report that must not be left half done, and the page that is one file."""

import base64
import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from conf import author, project, release
from helpers import set_style
from narrow import WIDTH, narrow
from pages import shrink
from publish import publish
from single_file import inline

ALONE = Path(__file__).parents[1] / "alone.py"


def fill(folder, pages):
    for name in pages:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(folder.name)


def pages(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = {"a.html": "html", "index.html": "html", "z/style.css": "html"}
OLD = dict.fromkeys(["index.html", "z/script.js", *(f"{i}.html" for i in range(9))], "report")


def test_a_kill_at_any_step_never_leaves_an_index_without_its_pages(tmp_path, monkeypatch):
    html, report = tmp_path / "html", tmp_path / "report"
    steps_left = 0

    def mortal(function):
        def or_die(*args, **options):
            nonlocal steps_left
            steps_left -= 1
            if steps_left < 0:
                raise KeyboardInterrupt
            return function(*args, **options)

        return or_die

    def kill_after(steps):
        nonlocal steps_left
        steps_left = steps
        fill(html, NEW)
        fill(report, [*OLD, ".lock"])
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            with contextlib.suppress(KeyboardInterrupt):
                publish(html, report)
        left = pages(report)
        assert left.pop(".lock") == "report"
        assert "index.html" not in left or left in (OLD, NEW)
        shutil.rmtree(html)
        fill(html, NEW)
        publish(html, report)  # make sees that the page it goes by is missing or old, and builds again
        assert pages(report) == NEW | {".lock": "report"}
        shutil.rmtree(report)
        return steps_left

    needed = 1000 - kill_after(1000)
    assert needed == 14
    for steps in range(needed):
        assert kill_after(steps) < 0


@pytest.fixture
def start(tmp_path):
    """Start a Python program under the lock; whatever still runs at the end is ended."""
    pytest.importorskip("fcntl")
    running = []

    def start(program):
        command = [sys.executable, ALONE, tmp_path / "new folder" / "lock", sys.executable, "-c", program]
        running.append(subprocess.Popen(command, cwd=tmp_path, stdin=-1, stdout=-1, stderr=-1, text=True))
        return running[-1]

    yield start
    for process in running:
        with process:
            process.kill()


HOLD = "print('held', flush=True); input(); open('log', 'a').write('first ')"
NEXT = "open('log', 'a').write('second')"


def test_two_at_once_come_one_after_the_other(start, tmp_path):
    first = start(HOLD)
    assert first.stdout.readline() == "held\n"
    second = start(NEXT)
    assert "waiting" in second.stderr.readline()
    assert second.poll() is None and not (tmp_path / "log").exists()
    first.communicate("\n")
    second.communicate()
    assert (tmp_path / "log").read_text() == "first second"


def test_a_kill_frees_the_lock(start, tmp_path):
    first = start(HOLD)
    assert first.stdout.readline() == "held\n"
    second = start(NEXT)
    assert "waiting" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=60) == 0
    assert (tmp_path / "log").read_text() == "second"


def test_the_lock_is_held_until_the_last_program_under_it_has_ended(start, tmp_path):
    # as make, killed while its recipe goes on
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD!r}], close_fds=False)"
    first = start(program)
    assert first.stdout.readline() == "held\n" and first.wait(timeout=60) == 0
    second = start(NEXT)
    assert "waiting" in second.stderr.readline() and second.poll() is None
    first.stdin.close()  # input() in the child fails, which ends it
    assert second.wait(timeout=60) == 0


def test_a_failing_command_fails(start):
    assert start("raise SystemExit(3)").wait(timeout=60) == 3


def test_one_file_needs_no_other(tmp_path):
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


def test_what_tools_cite_is_this_report():
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], cited["version"], cited["license"]) == (project, release, "MIT")
    assert cited["authors"] == [{"name": author}] and cited["cff-version"] == "1.2.0" and cited["message"]


def test_a_figure_shrinks_and_stays_the_same(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 20))
    with plt.rc_context({"svg.fonttype": "none", "mathtext.fontset": "stix"}):
        figure, ax = plt.subplots()
        ax.imshow(np.ma.masked_less(values, -1), interpolation="none")
        ax.set(title="Maps of $r_b$", xlabel="a <key> & more")
        figure.savefig(tmp_path / "figure.svg")
        plt.close(figure)
    before = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    after = shrink(before)
    assert len(after) < 0.6 * len(before)

    def parts(svg):
        pictures = re.findall(r"data:image/png;base64,\s*([^\"]+)", svg)
        pixels = [plt.imread(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
        texts = re.findall(r">([^<>]+)</t", svg)
        return [text for text in texts if text.strip()], pixels

    assert "a &lt;key&gt; &amp; more" in parts(after)[0]
    assert parts(before)[0] == parts(after)[0]
    np.testing.assert_array_equal(parts(before)[1], parts(after)[1])
    assert len(parts(after)[1]) == 1


# ---- narrow figures -----------------------------------------------------------------------------------------------


def boxes(figure, artists):
    renderer = figure.canvas.get_renderer()
    return [artist.get_tightbbox(renderer) for artist in artists]


def a_row(rows, columns, width=11.0):
    set_style()
    figure, axes = plt.subplots(rows, columns, figsize=(width, 3 * rows), sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat:
        ax.plot([0, 1], label="a line")
    for ax in axes[:, 0]:
        ax.set_ylabel("up")
    axes[0, 0].set_title("a title that takes more than one line where there is only half of a narrow figure")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("a sentence of whose lines the first ends in $a = b + c$ and more", x=0.01, ha="left")
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("rows, columns, across", [(1, 3, 1), (2, 2, 1), (2, 4, 2)])
def test_a_narrow_figure_has_its_panels_below_each_other_and_nothing_overlaps(rows, columns, across):
    figure = a_row(rows, columns)
    lines = [line for ax in figure.axes for line in ax.lines]
    assert narrow(figure)
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == WIDTH and [line for ax in figure.axes for line in ax.lines] == lines
    down = rows * columns // across
    for column in range(across):
        places = [ax.get_position() for ax in figure.axes[column * down : (column + 1) * down]]
        assert all(above.y0 > below.y1 for above, below in pairwise(places))
        assert max(place.x0 for place in places) - min(place.x0 for place in places) < 1e-3
    for ax in figure.axes:
        assert ax.get_ylabel() == "up" and any(label.get_text() for label in ax.get_yticklabels())
        assert ax.get_legend() is None and ax.yaxis.get_tick_params()["labelleft"]
        assert ax.xaxis.get_tick_params()["labelbottom"]
    assert len(figure.legends) == 1 and "$a = b + c$" in figure.get_suptitle() and "\n" in figure.get_suptitle()
    parts = boxes(figure, [*figure.axes, *figure.legends, figure._suptitle])
    for i, part in enumerate(parts):
        assert part.x1 <= figure.bbox.x1 + 1 and not any(part.overlaps(other) for other in parts[i + 1 :])
    plt.close(figure)


def test_the_labels_of_a_grid_are_turned_with_it():
    set_style()
    figure, axes = plt.subplots(3, 5, figsize=(11, 7), sharex=True, sharey=True)
    for ax, title in zip(axes[0], "agdof", strict=True):
        ax.set_title(title, loc="center")
    for ax, moment in zip(axes[:, 0], ("early", "later", "late"), strict=True):
        ax.set_ylabel(moment)
    figure.canvas.draw()
    assert narrow(figure)
    figure.canvas.draw()
    assert [ax.get_title("left") for ax in axes[:, 0]] == ["early", "later", "late"]
    assert [ax.get_ylabel() for ax in axes[0]] == [*"agdof"]
    assert not any(ax.get_ylabel() or ax.yaxis.get_tick_params()["labelleft"] for ax in axes[1:].flat)
    assert all(ax.get_title() == "" for ax in axes.flat) and not any(ax.get_title("left") for ax in axes[:, 1:].flat)
    places = np.array([[ax.get_position().p0 for ax in row] for row in axes])
    assert np.ptp(places[:, :, 0], axis=1).max() < 1e-3 and (np.diff(places[:, :, 1], axis=1) < 0).all()
    plt.close(figure)


def test_a_figure_that_is_narrow_or_a_picture_of_many_stays():
    for figure in (a_row(1, 1, width=5), a_row(3, 6)):
        before = figure.get_size_inches().tolist(), [ax.get_subplotspec() for ax in figure.axes], figure.get_suptitle()
        assert not narrow(figure)
        assert before == (
            figure.get_size_inches().tolist(),
            [ax.get_subplotspec() for ax in figure.axes],
            figure.get_suptitle(),
        )
        plt.close(figure)


def test_legends_become_one_with_every_entry_once_and_names_that_would_meet_are_turned():
    figure = a_row(1, 2)
    left, right = figure.axes
    right.plot([1, 0], label="another")
    left.legend(title="of the left")
    right.legend()
    left.set_xticks(np.linspace(0, 1, 16), [f"L{i // 4}H{i % 4}" for i in range(16)])
    figure.canvas.draw()
    assert narrow(figure)
    assert not left.get_legend() and not right.get_legend()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["of the left", "a line", "another"]
    assert {label.get_rotation() for label in left.get_xticklabels()} == {90}
    plt.close(figure)
