# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx: `make docs`. The source is the repository's root, so that a link from a page to another,
or to a notebook, is the same here and where the files are only looked at."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pyro_fusion import __version__

project = "pyro_fusion"
author = "Contributors to the pyro_fusion project"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "tutorials/*.ipynb",
    "benchmarks/README.md",
    "README.md",
    "tutorials/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["docs/_build", ".*", "build", "dist"]
html_theme = "sphinx_rtd_theme"
html_title = f"pyro_fusion {__version__}"
# The root document is a folder down: this is what a browser is given first.
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks, and compare what they print

# References to what is ours must lead somewhere, but for what users never make themselves.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|enum|os|pyro|torch)\..*"),
    # Annotations as they stand.
    ("py:class", r"ArrayLike|Axes|Dims|Figure|NDArray|np\.float64|Tensor|Transform"),
    # Parameters that share a line.
    ("py:class", r"concentration|dispersions|local|low|max_iterations|num_draws|p|posteriors"),
    ("py:class", r"prior|restarts|seed|solver|weights"),
    ("py:class", r"pyro_fusion\.([\w.]+\._\w+|readers\.registry\.R)"),
    ("py:class", r"pyro_fusion\.families\.(member\.Member|factor\.Side|masked\.Masked)"),
    ("py:class", r"pyro_fusion\.fusion\.(links\.LinkedSite|parties\.(LabelProblem|Parties))"),
    ("py:class", r"pyro_fusion\.(pooling\.components\.Components|posterior\.guide\.FactorParams)"),
]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
