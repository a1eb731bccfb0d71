"""Sphinx configuration. The catalogue and a page per mechanism are generated from the registry before every build."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402
import npm  # noqa: E402
import pictures  # noqa: E402
from interactive import build as browser  # noqa: E402
from sphinx.util.logging import getLogger  # noqa: E402

import refattn  # noqa: E402

project = "refattn"
author = "the refattn developers"
copyright = "2026, the refattn developers"
release = version = refattn.__version__

extensions = ["myst_parser", "sphinx.ext.viewcode", "flow"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
locale_dirs, gettext_compact = ["locale"], False  # a catalogue of translations for each page
html_theme = "furo"
html_title = f"refattn {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["refattn.css"]

# --- equations, drawn without a network where npm has the drawer: in one file, since its fonts are paths ----------
MATHJAX, SVG = "mathjax@3.2.2", "es5/tex-svg.js"
SHA256 = "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882"
script = HERE / "_static" / "mathjax.js"
try:
    if not script.exists():
        script.with_suffix(".part").write_bytes(npm.files(MATHJAX, {SVG: SHA256})[SVG])
        script.with_suffix(".part").replace(script)
    mathjax_path = script.name
except npm.NotFetched as error:
    getLogger("refattn").info("equations need a network: %s", error)

generate.pages(HERE / "reference")
pictures.draw(HERE / "drawn")


def python_for_the_browser(app, error):
    """What the interactive page loads, put next to it; no warning where it cannot be had, since the page says so."""
    if error is None and app.builder.format == "html":
        missing = browser.build(app.outdir)
        getLogger("refattn").info("interactive page: %s", missing or "Python is there")


def setup(app):
    app.connect("source-read", pictures.on_derivation_pages)
    app.connect("build-finished", python_for_the_browser)
