"""Move finished pages to where they are read, in place of those that are there: publish.py HTML REPORT

make goes by REPORT/index.html. It goes first and comes last, so that it is there only while all that belongs to it is.
"""

import os
import shutil
import sys
from pathlib import Path


def publish(html, report):
    (report / "index.html").unlink(missing_ok=True)
    for path in report.glob("[!.]*"):  # the others are make's own
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in sorted(html.glob("[!.]*"), key=lambda path: path.name == "index.html"):
        os.replace(path, report / path.name)


if __name__ == "__main__":
    publish(*map(Path, sys.argv[1:]))
