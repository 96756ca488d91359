"""The site: `make docs` writes it to docs/_build/html, from the same pages that GitHub shows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # whose docstrings the pages of api/ are

project = "blenet-parity"
author = "The BLeNet parity authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 4  # as GitHub makes them
nitpicky = True
suppress_warnings = ["myst.header"]

# Docstrings need neither framework.
autodoc_mock_imports = ["flax", "jax", "optax", "torch"]
autodoc_typehints = "none"  # Args says what they are, in words
napoleon_use_rtype = False  # what comes back is a sentence
nitpick_ignore_regex = [("py:class", ".* .*|Fix|Place|Shapes|Values")]  # no class's name, and parts of a Diagnosis
