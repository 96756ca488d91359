"""Type annotations from a user's side: mypy and pyright, both strict, take a program that uses the public face."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import torch
from flax import linen, nnx

import parity
from parity.testing import CheckOptions

ROOT = Path(__file__).parents[1]
# basedpyright is pyright with its Node in the wheel: the package `pyright` downloads itself when it first runs.
PYRIGHT = {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": True}
CHECKERS = {
    "mypy": ["mypy", "--strict", "--config-file=", "--cache-dir=cache", "program.py"],
    "pyright": ["basedpyright", "--pythonpath", sys.executable],
}


@pytest.mark.thorough
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_program(checker, tmp_path):
    """`typed_program.py` outside of the project, to which this project is an installed package."""
    shutil.copy(ROOT / "parity_tests" / "typed_program.py", tmp_path / "program.py")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT | {"include": ["program.py"]}))
    done = subprocess.run(
        [sys.executable, "-m", *CHECKERS[checker]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_says_that_it_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    packages = [name for name in included if (ROOT / name).is_dir()]
    assert packages
    assert [name for name in packages if not (ROOT / name / "py.typed").is_file()] == []


def test_assert_parity_has_the_options_of_check():
    """Same names, same types, none required."""
    # What parity/check.py imports for type checkers only.
    known = vars(inspect.getmodule(parity.check)) | {"torch": torch, "linen": linen, "nnx": nnx}
    hints = typing.get_type_hints(parity.check, localns=known)
    taken = {
        name: hints[name]
        for name, parameter in inspect.signature(parity.check).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert typing.get_type_hints(CheckOptions, localns=known) == taken
    assert CheckOptions.__required_keys__ == frozenset()
