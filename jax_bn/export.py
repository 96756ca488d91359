"""Write a run's network into one file that predicts without this project: by `jax.export`, for CPU, CUDA and TPU.

    python -m jax_bn.export runs/mine --out fashion.jaxexport

Weights, moving statistics and the standardisation of the images are inside. A program with nothing but JAX (and
flatbuffers, which JAX reads such files with) has the logits of raw images, from one image on:

    predict = jax.jit(jax.export.deserialize(bytearray(open("fashion.jaxexport", "rb").read())).call)
    logits = predict(images)    # uint8 [b, 28, 28] -> float32 [b, 10]; jax.nn.softmax(logits) are the probabilities

JAX only: PyTorch has no such files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from bn_common.command_line import parse, refuse
from bn_common.files import write_whole
from bn_common.trained import Trained, check_new_file, read_trained
from jax_bn.predict import predictor

PROG = "python -m jax_bn.export"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported, and where to."""

    run: tyro.conf.Positional[Path]
    """The run folder, of train_jax.py."""
    out: Path
    """The new file."""


def check_installed() -> None:
    """Raise ValueError where flatbuffers is missing, which is to say how to install it."""
    try:
        importlib.import_module("flatbuffers")
    except ImportError:
        raise ValueError("flatbuffers is not installed; allowed: pip install 'blenet-parity[export]'") from None


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
    """Have JAX keep no names of source files, which it does for its error messages: they tell whose machine this is."""
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
        content = exported(read_trained(options.run, "jax"))
        write_whole(options.out, content)
    except ValueError as error:
        refuse(PROG, str(error))
    except OSError as error:
        refuse(PROG, f"--out is {options.out}: {error.strerror}; allowed: a new file")
    print(f"{options.out}: {len(content):,} bytes, for {', '.join(PLATFORMS)}")


if __name__ == "__main__":
    main()
