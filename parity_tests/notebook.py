"""A page of docs/ as a Jupyter notebook: its text, its code, and the outputs that it shows.

    python -m parity_tests.notebook                                the notebooks are made anew
    python -m parity_tests.notebook --check                        exit status 1 where one is not what its page says

The page is what is written, and `parity_tests/pages.py` runs it; of a notebook the cells are run, too, by
`parity_tests/test_notebook.py`. The form is nbformat 4.5: https://nbformat.readthedocs.io/en/latest/format_description.html
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

from bn_common.files import write_whole
from parity_tests.pages import ROOT, Block, blocks

PAGES = ("tutorial",)

Cell = dict[str, Any]


def notebook(page: str) -> str:
    """The notebook of a page, as JSON."""
    cells, lines, begin = list[Cell](), page.splitlines(), 0
    for block in blocks(page):
        fence = block.line - 2  # where it is opened, from 0
        end = block.line - 1 + len(block.text.splitlines())
        if block.kind == "python":
            _add_text(cells, lines[begin:fence])
            cells.append(_cell("code", block.text, execution_count=None, outputs=[]))
        elif block.kind == "text" and cells and cells[-1]["cell_type"] == "code" and not any(lines[begin:fence]):
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": _lines(block.text)}]
        else:
            continue
        begin = end + 1
    _add_text(cells, lines[begin:])
    for number, cell in enumerate(cells):
        cell["id"] = hashlib.sha256(f"{number} {cell['source']}".encode()).hexdigest()[:8]
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def blocks_of(notebook: str) -> list[Block]:
    """The code of a notebook, and the outputs in it, as `parity_tests.pages` has them of a page."""
    found, line = list[Block](), 1
    for cell in json.loads(notebook)["cells"]:
        if cell["cell_type"] == "code":
            found.append(Block("python", line, "".join(cell["source"]) + "\n"))
            line += len(cell["source"])
            found += [Block("text", line, "".join(output["text"])) for output in cell["outputs"]]
    return found


def _add_text(cells: list[Cell], lines: list[str]) -> None:
    if text := "\n".join(lines).strip():
        cells.append(_cell("markdown", text))


def _cell(kind: str, text: str, **more: Any) -> Cell:
    return {"cell_type": kind, "metadata": {}, "source": _lines(text.rstrip("\n")), **more}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(args: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.notebook", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where one is another")
    options = parser.parse_args(args)
    other = 0
    for name in PAGES:
        page, path = ROOT / "docs" / f"{name}.md", ROOT / "docs" / f"{name}.ipynb"
        made = notebook(page.read_text())
        if path.exists() and path.read_text() == made:
            continue
        if options.check:
            print(f"{path.relative_to(ROOT)} is not what docs/{name}.md says; made by: python -m parity_tests.notebook")
            other = 1
        else:
            write_whole(path, made.encode())
    return other


if __name__ == "__main__":
    sys.exit(main())
