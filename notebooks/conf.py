"""The report's look: Sphinx turns executed notebooks into pages that need no network."""

import shutil
from importlib.util import find_spec
from pathlib import Path

project = "Is the backward pass of softmax attention local?"
author = "LocalGPT contributors"
html_title = project
html_theme = "furo"
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_use_index = False

extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["**.ipynb_checkpoints"]
myst_enable_extensions = ["amsmath", "dollarmath"]
nb_execution_mode = "off"  # make report has executed them, with progress to look at
nb_ipywidgets_js = {}  # scripts from elsewhere
nb_merge_streams = True

# Formulas as SVG by a script inside the site.
mathjax_path = "tex-svg.js"
mathjax3_config = {"tex": {"tags": "ams"}, "svg": {"fontCache": "global"}}
html_css_files = ["report.css"]
CSS = """\
/* Lines of code are up to 120 characters long. */
.content { width: 54em }
div.highlight pre { font-size: 75% }
/* A table that is too wide scrolls by itself, not the page. */
div.output.text_html { overflow-x: auto }
table.dataframe td { white-space: nowrap }
/* Formulas are never higher than their box: no scroll bar beside them. */
div.math { overflow-y: hidden }
/* MathJax numbers the equations itself. */
.amsmath .eqno { display: none }
/* References are links, and MathJax draws them in black whatever the theme. */
mjx-container[jax="SVG"] a { fill: currentColor !important; stroke: currentColor !important }
/* Tables of pandas, which come with a border of their own. */
table.dataframe { border: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 85% }
table.dataframe :is(th, td) {
  border: 0; border-bottom: 1px solid var(--color-background-border); padding: .2rem .5rem; text-align: right
}
"""


def add_assets(app):
    # The package would copy all of MathJax, 15 MB of it; its name has hyphens, so it cannot simply be imported.
    package = Path(find_spec("sphinx-mathjax-offline").origin).parent
    static = Path(app.outdir, "_static")
    static.mkdir(parents=True, exist_ok=True)
    shutil.copy(package / "static" / "mathjax" / "tex-svg.js", static)
    (static / "report.css").write_text(CSS, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", add_assets)
