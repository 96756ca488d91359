"""Do the lowest versions that pyproject.toml allows work, and the newest? `make versions`, or

    python -m parity_tests.versions                          both, with PyTorch
    python -m parity_tests.versions --sets lowest            one of them
    python -m parity_tests.versions --python python3.13 --only-jax --sets newest
    python -m parity_tests.versions --torch 2.13.0           instead of the lowest PyTorch that is allowed

Each set is installed in a new environment from here, and used (`smoke.py`); then the tests that touch the frameworks
most are run, without taking the libraries' own deprecations for errors. The lowest set is the lower bound of every
dependency, that of Python too where it is not said otherwise; the newest is what pip finds.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from parity_tests.package import PROJECT, ROOT, environment, run, use

SETS = "lowest", "newest"
OF_TESTS = "flatbuffers", "hypothesis", "mpmath", "pytest", "pytest-xdist", "pyyaml"
TESTS = (
    "parity_tests/jax_bn/test_layers.py", "parity_tests/jax_bn/test_nnx.py", "parity_tests/parity/test_weights.py",
    "parity_tests/test_options.py", "parity_tests/test_predict.py", "parity_tests/parity/test_check.py",
    "parity_tests/torch_bn/test_layers.py",
)  # fmt: skip


def lowest(requirements: list[str], torch: str = "") -> list[str]:
    """Each lower bound as a pin: "jax>=0.10" is "jax==0.10".

    Args:
      requirements: as pyproject.toml has them; what is no lower bound is passed over.
      torch: the version of PyTorch instead of its lower bound.
    """
    bounds = [found for line in requirements if (found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", line))]
    return [
        f"{name}=={torch or low}" if name == "torch" else f"{name}=={low}" for name, low in (b.groups() for b in bounds)
    ]


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--python", help="the Python to make the environments with; default: this one")
    parser.add_argument("--torch", default="", help="of the lowest set, where that PyTorch has no build for CPUs alone")
    parser.add_argument("--only-jax", action="store_true", help="without PyTorch, and without the tests, which need it")
    args = parser.parse_args()
    extras = PROJECT["optional-dependencies"]
    bounds = lowest([*PROJECT["dependencies"], *extras["torch"], *extras["export"]], args.torch)
    python = {"python": args.python} if args.python else {}
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder, "lowest.txt")
            pins.write_text("".join(f"{line}\n" for line in bounds) if name == "lowest" else "")
            what = f"{ROOT}[export{'' if args.only_jax else ',torch'}]"
            inside = environment(Path(folder, name), "--constraint", str(pins), what, *OF_TESTS, **python)
            use(inside, *(["--only-jax"] if args.only_jax else []))
            if not args.only_jax:
                options = "-n0", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"
                run(inside, "-m", "pytest", *options, *TESTS)
    print(f"of use: the {' and the '.join(args.sets)} versions")


if __name__ == "__main__":
    main()
