"""The report's look: Sphinx turns executed notebooks into pages that need no network."""

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]  # helpers.py, pages.py

project = "Is the backward pass of softmax attention local?"
author = "LocalGPT contributors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
html_title = project
html_theme = "furo"
html_favicon = "_static/favicon.svg"
html_baseurl = os.environ.get("SITE_URL", "")  # where the report will be found, for previews of links to it
html_last_updated_fmt = "%Y-%m-%d"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_use_index = False

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinxcontrib.bibtex", "pages"]
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
exclude_patterns = ["**.ipynb_checkpoints"]
myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"  # make report has executed them, with progress to look at
nb_ipywidgets_js = {}  # scripts from elsewhere
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "Code"
copybutton_selector = "div.highlight:not(.cell_output *, .solution *) > pre"  # what one would paste elsewhere

html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["fonts.css", "report.css"]
html_js_files = ["report.js"]
html_show_search_summary = False  # it would fetch every page found, which a browser refuses to a file

# Formulas as SVG by a script inside the site.
mathjax_path = "tex-svg.js"
mathjax3_config = {
    "tex": {"tags": "ams"},
    "svg": {"fontCache": "global"},
    "options": {"enableMenu": False},  # its menu would make every formula a stop of the Tab key
}
