"""README.md and docs/ are run: outputs, commands and links hold; and what runs them sees what does not."""

import importlib.util
import re
import subprocess
import sys
import types

import pytest

import jax_bn
import parity
import torch_bn
from parity_tests.pages import ROOT, alike, asked, blocks, faults, options_missing, outputs, pages, refreshed

LONG = pytest.mark.thorough


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.name, marks=() if p.name == "README.md" else LONG) for p in pages()],
)
def test_page(path):
    assert faults(path, path.read_text()) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_is_in_the_site():
    index = (ROOT / "docs/index.md").read_text().splitlines()
    docs = ROOT / "docs"
    names = {p.relative_to(docs).with_suffix("").as_posix() for p in pages() if docs in p.parents}
    assert names - {"index"} <= set(index)


@pytest.mark.parametrize("package", [jax_bn, parity, torch_bn], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    """Each function and class; by its full name, in the page of its package."""
    page = (ROOT / f"docs/api/{package.__name__}.md").read_text()
    named = set(re.findall(r"^\.\. auto(?:function|class):: (\S+)$", page, re.MULTILINE))
    public = {name for name in package.__all__ if not isinstance(getattr(package, name), types.ModuleType)}
    assert {name.rpartition(".")[2] for name in named} >= public
    assert public


@LONG
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("furo", "myst_parser", "sphinx")),
    reason="what builds the site is not installed; make docs has it",
)
def test_the_site_is_built(tmp_path):
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PAGE = """
<!-- python
a = 2
-->

Text with `make nothing`.

```python
print(a / 3, "of", a)
```

```text
0.5 of 2
```

<!-- raises: ValueError -->
```python
# saved.py
b = a + 1
if __name__ == "page":
    raise ValueError
```

```sh
python -c "import saved; print(1); print(2); print(3)"
```

```text
1
...
4
```

<!-- not run: it never ends -->
```python
while True:
    pass
```

[a page](limits.md#no-such-heading), [none](nowhere.md)
"""


def page(text):
    """The prelude for what `saved.py` takes from the page."""
    return text.replace("b = a + 1", "b = 3")


def test_blocks():
    found = blocks(PAGE)
    assert [block.kind for block in found] == ["python", "python", "text", "python", "sh", "text", "python"]
    assert [block.run for block in found] == [True] * 6 + [False]
    lines = PAGE.splitlines()
    for block in found:
        assert lines[block.line - 1] == block.text.splitlines()[0]


def test_what_does_not_hold_is_told():
    path = ROOT / "docs/made_up.md"
    wrong = faults(path, page(PAGE))
    assert [w.removeprefix("docs/made_up.md: ").splitlines()[0] for w in wrong] == [
        "13: the output is",
        "29: the output is",
        wrong[2].removeprefix("docs/made_up.md: "),
        "limits.md#no-such-heading: no such heading",
        "nowhere.md: no such file",
    ]
    assert wrong[0].endswith("\n0.6666666666666666 of 2")
    assert wrong[1].endswith("\n1\n...\n3")
    assert "make nothing: nothing is no target; allowed: " in wrong[2]


def test_refreshed():
    new = refreshed(page(PAGE), "docs/made_up.md")
    assert "\n0.6666666666666666 of 2\n" in new
    assert "\n1\n...\n3\n" in new
    assert refreshed(new, "docs/made_up.md") == new


def test_a_block_that_fails():
    with pytest.raises(RuntimeError, match=r'made_up.md", line 3, in <module>\n.*NameError'):
        outputs("docs/made_up.md", blocks("\n```python\nnothing\n```\n"))
    with pytest.raises(RuntimeError, match="KeyError is not raised"):
        outputs("docs/made_up.md", blocks("<!-- raises: KeyError -->\n```python\nprint()\n```\n"))


@pytest.mark.parametrize(
    ("shown", "real", "same"),
    [
        ("error 1.2e-05", "error   1.3e-05\n", True),
        ("error 1.2e-05", "error 1.5e-05", False),
        ("error 3.1e-16 ok", "error 0 ok", True),
        ("error 3.1e-07 ok", "error 9.9e-08 ok", True),
        ("error 3.1e-05 ok", "error 0 ok", False),
        ("at [4, 7]", "at [4, 8]", False),
        ("2.09076 here", "2.09077 here", True),
        ("2.09076 here", "2.0909 here", False),
        ("ok", "differs", False),
        ("a\nb", "a", False),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nb\nc", False),
    ],
)
def test_alike(shown, real, same):
    assert alike(shown, real) is same


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make test ARGS='--all -n 0' PYTHON=python3.12  # all", ""),
        ("make trane", "trane is no target; allowed: help, train"),
        ("make test ARG=--all", "ARG is no variable of the Makefile"),
        ("make clean ARGS=--all", "clean takes no ARGS"),
        ("pip install -c constraints.txt '.[torch,tpu]'", ""),
        ("pip install '.[torhc]'", "torhc is no extra"),
        ("pip install -c constraint.txt .", "constraint.txt is no file"),
        ("cd x && conda install y", "conda is no program that is known here"),
    ],
)
def test_what_a_command_starts(command, wrong):
    programs, lacking = asked(command)
    assert lacking == [] if not wrong else lacking[0].startswith(f"{command}: {wrong}")
    assert wrong or [p.options for p in programs] == ([("--all", "-n")] if "test" in command else [])


def test_programs_and_their_options():
    """One process is asked for all: the programs, and what they have not."""
    programs = [
        *asked("parity check a.py:b a.py:c --eval --shpae 8,3")[0],
        *asked("torchrun --nproc-per-node 2 -m torch_bn.training --epochs 2 --epoch 2")[0],
        *asked("srun python train_jax.py --devices 2 --device 2")[0],
        *asked("python -m parity_tests.no_such_module")[0],
    ]
    wrong = options_missing(programs)
    assert wrong[:3] == [
        "-m parity check has no option --shpae",
        "-m torch_bn.training has no option --epoch",
        "train_jax.py has no option --device",
    ]
    assert len(wrong) == 4
    assert "no_such_module" in wrong[3]
