# SPDX-License-Identifier: Apache-2.0
"""The documentation site. No page of it asks another host for anything."""

import sys
from pathlib import Path

import asgd_optax

sys.path.insert(0, str(Path(__file__).parent / "ext"))

project = "asgd_optax"
author = "The asgd_optax authors"
project_copyright = author
release = asgd_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "public_symbols",
    "repository_links",
]

# Docstrings name code in single backticks, as optax's do: a link where that is ours.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature would be three lines of types
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_preserve_defaults = True

myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 4

# Prompts are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
pygments_dark_style = "github-dark"  # the theme's own underlines modules as if links
html_title = "asgd_optax"
# The second folder is what `make mathjax` has fetched.
html_static_path = ["_static", "../build/static"]
html_css_files = ["custom.css"]
mathjax_path = "mathjax/es5/tex-mml-chtml.js"
html_show_sphinx = False
