"""What is imported is declared in pyproject.toml, and what is declared is pinned in constraints.txt."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALLED = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
FOLDERS = sorted(path.name for path in ROOT.iterdir() if any(path.glob("*.py")))
OWN = {Path(name).stem for name in (*INSTALLED, *FOLDERS)}
# Folder -> the extras that its imports may come from, beside the dependencies.
EXTRAS = dict.fromkeys(INSTALLED, ()) | {
    "jax_bn": ("export",),
    "parity": ("torch",),
    "torch_bn": ("torch",),
    "benchmarks": ("bench",),
}
EXTRAS |= {"bn_common": ("onnx", "tensorboard"), "parity_tests": ("test", "browser")}
# Where a distribution is called otherwise than the module.
DISTRIBUTIONS = {"PIL": "pillow", "haiku": "dm-haiku", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}
OF_TESTS = {"convert_models", "nets_of_a_test", "no_such_module", "transformers"}
"""Modules that a test makes, that are not there, or that `make published` alone installs, apart from all others."""


def imported(tree: ast.AST) -> set[str]:
    """The top-level modules that are imported anywhere in a file, by `importlib.import_module("...")` too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in found} - OWN - OF_TESTS - set(sys.stdlib_module_names)


def name_of(requirement: str) -> str:
    """Of a distribution, as registries compare them: "ml_dtypes>=0.5" is "ml-dtypes"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def declared(*extras: str) -> set[str]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = {name_of(line) for line in lines} - {project["name"]}
    within = re.findall(rf"{project['name']}\[([\w,]+)\]", " ".join(lines))
    return names | (declared(*",".join(within).split(",")) if within else set())


@pytest.mark.parametrize("place", sorted({*INSTALLED, *FOLDERS}))
def test_imports_are_declared(place):
    path = ROOT / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    allowed = declared(*EXTRAS.get(place, ("test",)))
    missing = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module in imported(ast.parse(file.read_text()))
        if name_of(DISTRIBUTIONS.get(module, module)) not in allowed
    }
    assert missing == set()


def test_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert declared(*PYPROJECT["project"]["optional-dependencies"]) <= {name_of(line) for line in pins}
