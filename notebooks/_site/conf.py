"""The report's look: Sphinx turns executed notebooks into pages that need no network."""

import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))  # for the extension beside this file, pages.py

project = "Is the backward pass of softmax attention local?"
author = "LocalGPT contributors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
html_title = project
html_theme = "furo"
html_favicon = "_static/favicon.svg"
html_last_updated_fmt = "%Y-%m-%d"
html_show_copyright = False
html_use_index = False
html_extra_path = [str(ROOT / "LICENSE")]

extensions = [
    "myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinxcontrib.bibtex", "pages"
]
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
exclude_patterns = ["**.ipynb_checkpoints"]
templates_path = ["templates"]
myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"  # make report has executed them
nb_ipywidgets_js = {}  # scripts from elsewhere
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "Code"
# what one would paste elsewhere
copybutton_selector = "div.highlight:not(.cell_output *, .solution *) > pre"

# Addresses of earlier editions, and the pages that have taken their places.
moved = {
    "05_verdict": "05_training_without_it", "06_local_surrogates": "05_training_without_it",
    "07_explore": "explorer", "08_what_mends_it": "06_what_helps",
    "09_trained_by_others": "08_models_of_others", "10_cost": "91_cost",
    "91_one_capture": "92_one_capture", "explore": "09_explore",
    "your_own_rule": "09_your_own_rule",
}
html_context = {"moved": moved}
html_additional_pages = dict.fromkeys(moved, "moved.html")

# Beside the pages: MathJax, one script of the 15 MB that its package would copy, and what
# explorer.py writes for the explorer. A missing file is a warning, which make takes for an error.
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
EXPLORER = [str(ROOT / "data" / f"explorer-{name}.js") for name in ("data", "bp", "fa")]
html_static_path = ["_static", str(MATHJAX / "tex-svg.js"), *EXPLORER]
html_css_files = ["report.css"]
html_js_files = ["report.js"]
html_show_search_summary = False  # it would fetch pages, which a browser refuses to a file
mathjax_path = "tex-svg.js"
mathjax3_config = {
    "tex": {"tags": "ams"},
    "svg": {"fontCache": "global"},
    "options": {"enableMenu": False},  # its menu would make every formula a stop of the Tab key
}
