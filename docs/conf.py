"""The site: `make docs` writes it to docs/_build/html, from the same pages that GitHub shows."""

project = "blenet-parity"
author = "The BLeNet parity authors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 4  # as GitHub makes them
nitpicky = True
suppress_warnings = ["myst.header"]
