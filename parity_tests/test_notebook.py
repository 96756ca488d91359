"""The notebooks are their pages, and their cells run, one after the other, in a fresh process."""

import json

import pytest

from parity_tests import notebook
from parity_tests.pages import ROOT, alike, outputs, with_outputs

TORCH = pytest.importorskip("torch")
PATHS = [pytest.param(ROOT / "docs" / f"{name}.ipynb", id=name) for name in notebook.PAGES]


@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_page(path):
    assert path.read_text() == notebook.notebook(path.with_suffix(".md").read_text())


@pytest.mark.parametrize("path", PATHS)
def test_its_cells_run(path):
    found = notebook.blocks_of(path.read_text())
    real = dict(outputs(path.name, found))
    shown = [(block, text) for block, text in with_outputs(found) if text]
    assert len(shown) >= 3
    for block, text in shown:
        assert alike(text.text, real[block])


def test_cells():
    """Text and code in turn; an output belongs to the code in front of it, and other blocks to the text."""
    page = "# A\n\nb\n\n```python\nx = 1\nprint(x)\n```\n\n```text\n1\n```\n\nc\n\n```sh\nls\n```\n"
    cells = json.loads(notebook.notebook(page))["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        ("markdown", "# A\n\nb"),
        ("code", "x = 1\nprint(x)"),
        ("markdown", "c\n\n```sh\nls\n```"),
    ]
    assert cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_what_is_not_its_page_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tutorial.md").write_text("# A\n")
    assert notebook.main(["--check"]) == 1
    assert "docs/tutorial.ipynb is not what docs/tutorial.md says" in capsys.readouterr().out
    assert notebook.main([]) == 0
    assert notebook.main(["--check"]) == 0
