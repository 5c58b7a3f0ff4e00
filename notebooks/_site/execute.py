"""Execute notebooks, each in its own folder: execute.py NOTEBOOK... [--output-dir DIR]

Without --output-dir they are executed in place. A folder stands for the pages of the report in it.
Standard output gets a line a notebook: its name and the seconds that it took. A notebook is written
when all of its cells have run; one that fails ends the program, and what was there stays.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm import tqdm
from traitlets.config import Config

BAR = "{desc:<32}{bar} {n} of {total} cells, {elapsed}"


def write(path, content):
    """Write the whole file or nothing."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(content, encoding="utf-8")
    os.replace(unfinished, path)


def execute(source, target):
    nb = nbformat.read(source, as_version=4)
    start = time.monotonic()
    # One width: of two bars that share a line nothing is left over. Without a terminal, no bar.
    cells = tqdm(
        total=len(nb.cells), desc=source.stem, bar_format=BAR, ncols=79, leave=False, disable=None
    )
    client = NotebookClient(
        nb, kernel_name="python3", coalesce_streams=True, record_timing=False,
        resources={"metadata": {"path": source.parent}},
        config=Config(KernelManager={"transport_encryption": "auto"}),  # else it warns
        on_cell_start=lambda cell, cell_index: cells.update(cell_index - cells.n),
    )
    try:
        client.execute(env=os.environ | {"TQDM_DISABLE": "1"})  # bars never come out the same twice
    except CellExecutionError as error:
        sys.exit(f"\n{error}\n{source}: a cell failed, see above")
    except (DeadKernelError, AssertionError):  # the second is nbclient's own answer to Ctrl-C
        sys.exit(f"\n{source}: its kernel died (interrupted, or out of memory?)")
    finally:
        cells.close()

    # What differs from one machine, or call, to the next stays out of the file; so do controls, of
    # which no more than a random name could be stored.
    for cell in nb.cells:
        if any("application/vnd.jupyter.widget-view+json" in out.get("data", {})
               for out in cell.get("outputs", [])):
            cell.outputs = []
    nb.metadata.pop("widgets", None)
    nb.metadata.kernelspec = {
        "display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"
    }
    nb.metadata.language_info.pop("version", None)
    write(target, nbformat.writes(nb) + "\n")

    # In place, figures that are wanted elsewhere too: a cell's metadata name the file.
    for cell in nb.cells:
        if target == source and "file" in cell.metadata:
            (figure,) = (out["data"] for out in cell.outputs if "data" in out)
            write(source.parent / cell.metadata["file"], figure["image/svg+xml"])
    print(f"{source.stem:<32}{time.monotonic() - start:6.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--output-dir", type=Path)
    args = parser.parse_args()
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.notebooks:
        # of a folder: the report's, not what a reader may have left there
        pages = [*path.glob("[0-9]*.ipynb"), path / "index.ipynb"]
        for source in sorted(pages) if path.is_dir() else [path]:
            execute(source, (args.output_dir or source.parent) / source.name)
