"""What is written twice for those who contribute says the same: hooks and `make lint`, CI and .ci/run, the version."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_hooks_are_make_lint():
    """Line by line; with the versions of constraints.txt, from which `make lint` installs them."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    commands = [line.strip().replace("$(VENV)", ".venv") for line in recipe.splitlines()]
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == commands
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
    pinned = (ROOT / "constraints.txt").read_text()
    for command in commands:
        tool = command.split(" -m ")[1].split()[0]
        assert re.search(rf"^{tool}==", pinned, re.MULTILINE), tool


def test_the_workflow_is_ci_run():
    workflow = read_yaml(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    job, *others = workflow["jobs"].values()
    assert [step["run"] for other in others for step in other["steps"] if "run" in step] == [
        "make docs",
        "make package",
        "make versions",
    ]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert PROJECT["requires-python"] == f">={python['python-version']}"
    assert python["cache-dependency-path"] == "constraints.txt"


def test_one_version_and_one_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    (holder,) = citation["authors"]
    assert f"{PROJECT['license']} License" in (ROOT / "LICENSE").read_text()
    assert holder["name"] in (ROOT / "LICENSE").read_text()
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
