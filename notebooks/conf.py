"""The report's look: Sphinx turns executed notebooks into pages that need no network."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.errors import ExtensionError

project = "Is the backward pass of softmax attention local?"
author = "LocalGPT contributors"
html_title = project
html_theme = "furo"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_use_index = False

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinxcontrib.bibtex"]
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
exclude_patterns = ["**.ipynb_checkpoints"]
myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"  # make report has executed them, with progress to look at
nb_ipywidgets_js = {}  # scripts from elsewhere
nb_merge_streams = True

html_static_path = ["_static"]
html_css_files = ["report.css"]
html_js_files = ["report.js"]
html_show_search_summary = False  # it would fetch every page found, which a browser refuses to a file

# Formulas as SVG by a script inside the site.
mathjax_path = "tex-svg.js"
mathjax3_config = {"tex": {"tags": "ams"}, "svg": {"fontCache": "global"}}


def add_assets(app):
    """Copy what comes out of packages or was made by a notebook; the rest is in _static."""
    explorer = Path(__file__).parent.parent / "data" / "explorer-data.js"
    if not explorer.exists():
        raise ExtensionError(f"{explorer} is missing, which 07_explore writes: make clean report")
    # MathJax's package would copy all of its 15 MB; its name has hyphens, so it cannot simply be imported.
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    static = Path(app.outdir, "_static")
    static.mkdir(parents=True, exist_ok=True)
    for script in (mathjax / "tex-svg.js", *explorer.parent.glob("explorer-*.js")):
        shutil.copyfile(script, static / script.name)


def setup(app):
    app.connect("builder-inited", add_assets)
