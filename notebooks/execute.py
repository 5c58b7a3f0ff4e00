"""Execute notebooks with progress to look at, each in its own folder: execute.py NOTEBOOK... [--output-dir DIR]

Without --output-dir they are executed in place. A folder stands for the pages of the report in it. Standard output
gets a line a notebook: its name and how long it took. A notebook is written when all of its cells have run, or not.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm
from traitlets.config import Config

WIDGET = "application/vnd.jupyter.widget-view+json"
LOG_EVERY = 30  # seconds between two states of a cell's progress bar where no terminal redraws it
# For the bars in the kernels: never cut off, whatever the terminal's width, so that BAR finds where they end.
KERNEL_BARS = {"TQDM_NCOLS": "1000", "TQDM_BAR_FORMAT": "{l_bar}{bar:20}{r_bar}"}
# A carriage return and what tqdm draws after it, a bar up to its "[00:01<00:05, 9it/s]" or blanks; a move upwards.
BAR = re.compile(r"(\r(?:[^\r\n]*?\[\d+:\d\d[^\]\r\n]*\])? *|\x1b\[A)")


class Client(NotebookClient):
    """Shows the progress bars of cells instead of storing them, and joins the pieces in which a stream arrives."""

    def __init__(self, nb, source, narrow=None):
        super().__init__(
            nb,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": source.parent}},
            config=Config(KernelManager={"transport_encryption": "auto"}),  # else each kernel warns that it has none
            extra_arguments=[f"--IPKernelApp.exec_lines=import narrow; narrow.install({narrow!r})"] if narrow else [],
            on_notebook_start=self.take_interrupts,
            on_cell_start=self.start_cell,
        )
        # disable=None: no bars where there is no terminal.
        layout = "{desc} {bar} {n} of {total} cells, {elapsed}"
        self.cells = tqdm(total=len(nb.cells), desc=source.stem, bar_format=layout, leave=False, disable=None)
        self.inner = tqdm(bar_format="{desc}", leave=False, disable=None)
        self.logged = time.monotonic()

    def take_interrupts(self, notebook):
        # nbclient would end the kernel under its own feet. So Ctrl-C is a KeyboardInterrupt; the kernel ends at exit.
        with contextlib.suppress(NotImplementedError):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    def start_cell(self, cell, cell_index):
        self.cells.update(cell_index - self.cells.n)
        self.show(None)

    def show(self, state):
        self.state = state  # of the cell's own bar; None: it has had none, "": it was erased or has finished
        self.inner.set_description_str(state or "")
        if self.inner.disable and state and time.monotonic() > self.logged + LOG_EVERY:
            self.note(state)

    def note(self, text, end="\n"):
        tqdm.write(text, file=sys.stderr, end=end)
        self.logged = time.monotonic()

    def output(self, outs, msg, display_id, cell_index):
        content = msg["content"]
        if msg["msg_type"] == "stream":
            if content["name"] == "stderr":
                content["text"] = self.take_bars(content["text"])
                if not content["text"]:
                    return None
                self.note(content["text"], end="")
            if outs and outs[-1].get("name") == content["name"]:
                outs[-1]["text"] += content["text"]
                return outs[-1]
        return super().output(outs, msg, display_id, cell_index)

    def take_bars(self, text):
        """Show the bars in a piece of stderr, and return the rest of it: a warning may sit between two of them."""
        rest = ""
        for piece in filter(None, BAR.split(text)):
            if piece.startswith("\r"):
                self.show(piece.strip())
            elif piece.startswith("\n") and self.state is not None:
                if "100%" in self.state:
                    self.note(self.state)
                self.show("")
                rest += piece.lstrip("\n")
            elif piece != "\x1b[A":
                rest += piece
        return rest

    async def _async_check_alive(self):  # nbclient asks once a second while a cell runs
        await super()._async_check_alive()
        self.cells.refresh()


def execute(source, target):
    nb = nbformat.read(source, as_version=4)
    start = time.monotonic()
    client = Client(nb, source, None if target == source else str(target.parent.absolute() / "narrow"))
    if client.cells.disable:
        client.note(f"{source.stem}: {len(nb.cells)} cells")
    try:
        client.execute(env=os.environ | KERNEL_BARS)
    except CellExecutionError as error:
        sys.exit(f"\n{error}\n{source}: a cell failed, see above")
    except DeadKernelError:
        sys.exit(f"\n{source}: its kernel died (out of memory?)")
    except KeyboardInterrupt:
        client.shutdown_kernel = "immediate"  # it is at work, and would complain that it cannot report
        raise
    finally:
        client.inner.close()
        client.cells.close()
    # What differs from one machine to the next stays out of the file.
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.language_info.pop("version", None)
    nb.metadata.pop("widgets", None)  # their ids are random, and no page can use them
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    unfinished = target.with_suffix(".tmp")
    nbformat.write(nb, unfinished)
    os.replace(unfinished, target)
    if target == source:
        keep_files(nb, source.parent)
    print(f"{source.stem:<32}{time.monotonic() - start:6.0f} s", flush=True)


def keep_files(nb, folder):
    """Figures that are wanted outside the report, too: those of cells whose metadata name a ``file`` for them."""
    for cell in nb.cells:
        if "file" in cell.metadata:
            (output,) = (output for output in cell.outputs if "data" in output)
            path = folder / cell.metadata["file"]
            path.with_suffix(".tmp").write_text(output["data"]["image/svg+xml"], encoding="utf-8")
            os.replace(path.with_suffix(".tmp"), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args()
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.notebooks:
        # the numbered ones and the index, not what a reader may have left there
        for source in sorted(path.glob("[0-9i]*.ipynb")) if path.is_dir() else [path]:
            execute(source, (args.output_dir or source.parent) / source.name)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the next call goes on with this notebook")
