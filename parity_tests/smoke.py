"""Is what is installed of use? Everything that a user comes for, once, from an empty folder.

    python -I parity_tests/smoke.py                with what is installed there, and with PyTorch if that is
    python -I parity_tests/smoke.py --only-jax     PyTorch must not be there, and what needs it says so

Nothing of this project's folder is imported: `make package` and `make versions` run it in environments of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from importlib import metadata, resources
from pathlib import Path

PACKAGES = "bn_common", "image_data", "jax_bn", "parity", "torch_bn"

PAIR = """
import flax.linen
import torch

torch_model = torch.nn.Sequential(
    torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 3)
)


class FlaxModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train):
        x = flax.linen.Dense(6)(x)
        x = flax.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return flax.linen.Dense(3)(flax.linen.relu(x))
"""


def program(name: str, *args: str, status: int = 0) -> str:
    """What a console script prints.

    Raises:
      RuntimeError: it ends with another status.
    """
    command = [str(Path(sys.executable).with_name(name)), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def require(fine: object, what: str) -> None:
    """RuntimeError where it is not so; an `assert` would be gone under -O."""
    if not fine:
        raise RuntimeError(f"not so: {what}")


def files() -> None:
    """The packages are whole, and are not those of a folder that happens to be there."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # imports nothing: torch_bn would want PyTorch
        require(spec and spec.origin and Path(spec.origin).with_name("py.typed").is_file(), f"{name} has py.typed")
    for name in ("page.css", "page.js"):
        require(resources.files("parity.report.html").joinpath(name).is_file(), f"the report's {name}")
    licences = {Path(str(f)).name for f in metadata.files("blenet-parity") or () if "licenses" in Path(str(f)).parts}
    require(licences == {"LICENSE"}, "the licences")


def one_side() -> None:
    """JAX alone: the function, the layers, training on the sample, a dump and what reads it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import jax_bn
    import jax_bn.nnx
    import parity

    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    stats = jax_bn.BatchStats(jnp.zeros(8), jnp.zeros(8))
    y, stats = jax.jit(lambda x: jax_bn.batch_norm(x, jnp.ones(8), jnp.zeros(8), stats, train=True))(x)
    require(np.allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-6), "jax_bn.batch_norm")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), jax_bn.nnx.BatchNorm(6, rngs=rngs), nnx.gelu)
    parity.dump(model, (x,), "one")
    require("both dumps are of flax" in program("parity", "compare", "one", "one", status=2), "parity compare")
    program("blenet-train", "--data", "sample", "--epochs", "2", "--out", "run")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    require(lines[1]["test_accuracy"] > 0.75, "blenet-train learns the sample")
    require(Path("run/curves.png").stat().st_size, "the curves")


def without_torch() -> None:
    """What needs PyTorch says so, in one line."""
    import parity

    require(importlib.util.find_spec("torch") is None, "PyTorch is not installed")
    try:
        parity.check(None, None, [])
    except ModuleNotFoundError as error:
        require("pip install torch" in str(error), str(error))
    else:
        raise RuntimeError("parity.check runs without PyTorch")


def both_sides() -> None:
    """A pair that is the same, one that is not, in Python and on the command line; the report as a page; torch_bn."""
    import numpy as np
    import optax
    import torch

    import parity
    import torch_bn

    file = Path("pair.py")
    file.write_text(PAIR)
    sys.path.insert(0, "")
    pair = importlib.import_module(file.stem)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    require(parity.check(pair.torch_model, pair.FlaxModel(), x, train=False).ok, "the pair is the same")
    report = parity.check(pair.torch_model, pair.FlaxModel(), x)
    require([d.code for d in report.diagnoses] == ["unbiased-variance"], "the known convention, and nothing else")
    report.to_html("report.html")
    page = Path("report.html").read_text()
    for name in ("page.css", "page.js"):
        require(resources.files("parity.report.html").joinpath(name).read_text()[:200] in page, f"{name} in the page")
    adam = (lambda p: torch.optim.Adam(p, 1e-3), optax.adam(1e-3))
    pair.torch_model[1] = torch_bn.BatchNorm(num_features=6, num_dims=2, initial_moving_var=1.0)
    report = parity.check(pair.torch_model, pair.FlaxModel(), x, steps=2, optimizers=adam)
    require(report.ok, f"torch_bn.BatchNorm trains as Flax's:\n{report}")
    arguments = "check", "pair.py:torch_model", "pair.py:FlaxModel", "--shape", "16,8"
    require("ok" in program("parity", *arguments, "--eval"), "parity check")
    require("unbiased-variance" in program("parity", *arguments, status=1), "parity check names what differs")


def main(only_jax: bool) -> None:
    """All of it, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        files()
        one_side()
        without_torch() if only_jax else both_sides()
    names = ["jax", "flax", "optax", "numpy", "tyro", *([] if only_jax else ["torch"])]
    print("of use with Python", sys.version.split()[0], *(f"{name} {metadata.version(name)}" for name in names))


if __name__ == "__main__":
    main(sys.argv[1:] == ["--only-jax"])
