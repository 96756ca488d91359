"""Write a run's network into one file that predicts without this project: by `jax.export`, for CPU, CUDA and TPU.

    python -m jax_bn.export runs/mine --out fashion.jaxexport
    python -m jax_bn.export runs/mine --out fashion.onnx --format onnx [--fold]

Weights, moving statistics and the standardisation of the images are inside. A program with nothing but JAX (and
flatbuffers, which JAX reads such files with) has the logits of raw images, from one image on:

    predict = jax.jit(jax.export.deserialize(bytearray(open("fashion.jaxexport", "rb").read())).call)
    logits = predict(images)    # uint8 [b, 28, 28] -> float32 [b, 10]; jax.nn.softmax(logits) are the probabilities

With `--format onnx` it is the file that `torch_bn/export.py` writes, for ONNX Runtime and its like: the bridge carries
the weights to PyTorch, which has to be installed then. The other form is JAX only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from bn_common import onnx_files
from bn_common.checks import require
from bn_common.command_line import parse, refuse
from bn_common.files import write_whole
from bn_common.trained import Trained, check_new_file, read_trained
from jax_bn.predict import predictor

PROG = "python -m jax_bn.export"
# JAX only: an ONNX file is for none in particular.
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported, and where to."""

    run: tyro.conf.Positional[Path]
    """The run folder, of train_jax.py."""
    out: Path
    """The new file."""
    format: Literal["jax", "onnx"] = "jax"
    """For JAX, or ONNX."""
    fold: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """In ONNX, each batch norm goes into the layer before it: a smaller program, whose last digits differ."""


def check_installed() -> None:
    """Raise ValueError where flatbuffers is missing, which is to say how to install it.

    JAX only: what ONNX needs, both wings need.
    """
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise ValueError("flatbuffers is not installed; allowed: pip install 'blenet-parity[export]'") from None


def exported_onnx(run: Trained, *, fold: bool = False) -> bytes:
    """The same as ONNX, see `torch_bn.export.exported`. JAX only: it comes by way of PyTorch.

    Raises:
      ValueError: what it needs is not installed, the run is in bfloat16, or the weights are another network's.
    """
    onnx_files.check_installed()
    # By name, and only now: this wing needs no PyTorch.
    carried = importlib.import_module("parity.wings.carried").to_torch(run)
    content: bytes = importlib.import_module("torch_bn.export").exported(carried, fold=fold)
    return content


def exported(run: Trained) -> bytes:
    """The file's content. Each platform has the form of BLeNet that it runs fastest, whatever this machine is.

    Raises:
      ValueError: flatbuffers is not installed, or the weights are another network's.
    """
    check_installed()
    (size,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((size, run.fig_size, run.fig_size), np.uint8)
    with _no_source_paths():
        return bytes(jax.export.export(jax.jit(predictor(run)), platforms=PLATFORMS)(images).serialize())


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Have JAX keep no names of source files, which it does for its error messages: they tell whose machine this is.

    JAX only: from an ONNX file they are taken out afterwards.
    """
    told = {"jax_include_full_tracebacks_in_locations": False, "jax_hlo_source_file_canonicalization_regex": ".*"}
    before = {name: jax.config.values[name] for name in told}
    try:
        for name, value in told.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def main(args: Sequence[str] | None = None) -> None:
    """The program: exit status 2 and one line for what it refuses."""
    options = parse(Options, args, prog=PROG, description=__doc__ or "")
    try:
        check_new_file("--out", options.out)
        require(options.format == "onnx" or not options.fold, "--fold", True, "with --format onnx")
        (onnx_files.check_installed if options.format == "onnx" else check_installed)()
        run = read_trained(options.run, "jax")
        content = exported_onnx(run, fold=options.fold) if options.format == "onnx" else exported(run)
        write_whole(options.out, content)
    except ValueError as error:
        refuse(PROG, str(error))
    except OSError as error:
        refuse(PROG, f"--out is {options.out}: {error.strerror}; allowed: a new file")
    kind = f"ONNX of opset {onnx_files.OPSET}" if options.format == "onnx" else f"for {', '.join(PLATFORMS)}"
    print(f"{options.out}: {len(content):,} bytes, {kind}")


if __name__ == "__main__":
    main()
