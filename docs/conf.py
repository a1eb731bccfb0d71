"""Sphinx configuration. The catalogue and a page per mechanism are generated from the registry before every build."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import refattn  # noqa: E402

project = "refattn"
author = "the refattn developers"
copyright = "2026, the refattn developers"
release = version = refattn.__version__

extensions = ["myst_parser", "sphinx.ext.viewcode", "flow"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"refattn {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["refattn.css"]

generate.pages(HERE / "reference")
