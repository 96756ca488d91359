"""What is published is whole, and of use where nothing else of this project is: `make package`, or

    python -m parity_tests.package --dist dist

Builds the sdist, and the wheel from it; looks at both as registries do, and at what is in the wheel; installs that in
two new environments, with PyTorch and without, and uses it there (`smoke.py`). Needs build, twine and
check-wheel-contents, which `make package` installs apart from everything else.
"""

from __future__ import annotations

import argparse
import email.parser
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """SystemExit where it fails; what it says is seen."""
    print("$", *command, flush=True)
    if status := subprocess.run([str(word) for word in command], cwd=cwd, check=False).returncode:
        raise SystemExit(f"{command[0]} ends with {status}")


def environment(folder: Path, *what: str, python: str = sys.executable) -> Path:
    """The Python of a new environment in which this is installed.

    Args:
      folder: that it is made in, anew.
      *what: pip's arguments.
      python: with which it is made.
    """
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin/python"
    run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what)
    return inside


def use(python: Path, *options: str) -> None:
    """`smoke.py`, from outside the project's folder: only what is installed is found."""
    run(python, "-I", ROOT / "parity_tests/smoke.py", *options, cwd=python.parents[1])


def missing(wheel: Path) -> list[str]:
    """What the wheel ought to have and has not, and what it has and ought not to."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        about = email.parser.BytesParser().parsebytes(file.read(f"{info}/METADATA"))
    packages = sorted({name.partition("/")[0] for name in names if name.endswith("/__init__.py")})
    wanted = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"{package}/py.typed" for package in packages}
    wanted |= {f"{info}/licenses/{name}" for name in PROJECT["license-files"]} | {
        f"{info}/entry_points.txt",
        "train_jax.py",
    }
    wrong = [f"{name} is not in the wheel" for name in sorted(wanted - names)]
    wrong += [f"{name} is in the wheel" for name in sorted(names - wanted) if not name.startswith(info)]
    text = about.get_payload() or about["Description"]
    wrong += [f"the description's link {link} leads nowhere" for link in re.findall(r"\]\(((?!\w+:)[^)]*)\)", text)]
    return wrong if len(text) > 1000 else [*wrong, "the description is not there"]


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for both, made anew")
    parser.add_argument("--no-use", action="store_true", help="built and looked at, not installed")
    args = parser.parse_args()
    shutil.rmtree(args.dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", args.dist, ROOT)
    (wheel,), (sdist,) = args.dist.glob("*.whl"), args.dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    run(sys.executable, "-m", "check_wheel_contents", wheel)
    if wrong := missing(wheel):
        raise SystemExit("\n".join(wrong))
    if args.no_use:
        return
    with tempfile.TemporaryDirectory() as folder:
        use(environment(Path(folder, "jax"), str(wheel)), "--only-jax")
        use(environment(Path(folder, "both"), f"{wheel}[torch]"))
    print(f"{wheel.name} and {sdist.name} are whole and of use")


if __name__ == "__main__":
    main()
