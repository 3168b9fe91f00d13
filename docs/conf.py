# SPDX-License-Identifier: Apache-2.0
"""Configuration of the documentation site. No page loads anything from other hosts."""

import os
import sys
from pathlib import Path

import asgd_optax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "ext"))
# For the kernels that execute the pages.
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MATPLOTLIBRC"] = str(ROOT / "examples" / "style.mplstyle")

project = "asgd_optax"
author = "The asgd_optax authors"
project_copyright = author
release = asgd_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "sphinx_design",
    "public_symbols",
    "repository_links",
    "signatures",
    "symbol_links",
]

# Pages with `file_format: mystnb` in their header are executed. The cache keeps the
# output of pages whose code did not change.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "jupyter_cache")
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Link our names in code. The cells of a page share their imports.
codeautolink_autodoc_inject = False
codeautolink_concat_default = True

templates_path = ["_templates"]

# As in optax, docstrings put code in single backticks. It becomes a link if it is ours.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
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

# Do not copy prompts.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
# The theme's own dark style underlines modules like links.
pygments_dark_style = "github-dark"
html_title = "asgd_optax"
# The second folder is the result of `make mathjax`.
html_static_path = ["_static", "../build/static"]
html_css_files = ["custom.css"]
mathjax_path = "mathjax/es5/tex-mml-chtml.js"
html_show_sphinx = False
