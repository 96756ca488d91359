"""`import parity`: its names, whatever else was imported, and the modules' older names."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_needs_no_framework():
    """Neither the import nor the names that are there at once."""
    done = python("import sys, parity; parity.check, parity.compare, parity.Report; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "jax", "flax", "optax", "matplotlib", "scipy", "tyro"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("import parity", marks=pytest.mark.thorough),
        "import parity.check, parity.trajectory, parity.weights, parity.offline",
        pytest.param("from parity.check import trace; import parity.evidence.torch", marks=pytest.mark.thorough),
        pytest.param(
            "from parity import weights; import parity.cli.commands; import parity.comparison.bounds",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_functions_are_functions(before):
    """Where a module has the same name, too."""
    names = [
        "check",
        "check_initialisation",
        "assert_parity",
        "to_flax",
        "to_torch",
        "trace",
        "dump",
        "compare",
        "lockstep",
        "register",
    ]
    done = python(
        f"{before}\nimport inspect, types, parity\n"
        f"assert all(inspect.isfunction(getattr(parity, name)) for name in {names})\n"
        "assert isinstance(parity.weights, types.ModuleType)\nassert inspect.isclass(parity.Report)\n"
    )
    assert done.returncode == 0, done.stderr


OLDER = "rules", "files", "kinds", "trajectory", "offline", "report", "testing", "weights", "convert"


def test_older_names_of_modules():
    """In each of the three ways to import one, and it is the same module."""
    lines = [
        f"import parity.{name}\nfrom parity import {name}\n"
        f"assert parity.{name} is {name} is sys.modules['parity.{name}']"
        for name in OLDER
    ]
    lines += ["from parity.rules import register\nassert register is parity.register is parity.weights.register"]
    done = python("\n".join(["import sys", *lines]))
    assert done.returncode == 0, done.stderr


def test_no_other_name():
    done = python("import parity\nparity.no_such_name")
    assert "module 'parity' has no attribute 'no_such_name'" in done.stderr
