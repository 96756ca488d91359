"""ONNX files of a run's network: what both wings' programs write, and how they read it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_common.predictions import Network
from bn_common.trained import FASHION_MNIST, class_names

SUFFIX = ".onnx"
OPSET = 20
# The names of the function's argument and result.
IMAGES, LOGITS = "images", "logits"
WRITES = ("torch", "onnx", "onnxscript")
READS = ("onnxruntime",)


def check_installed(modules: Sequence[str] = WRITES) -> None:
    """Raise ValueError where one is missing, which is to say how to install it."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(f"{name} is not installed; allowed: pip install 'blenet-parity[onnx]'") from None


def of_onnx(path: Path) -> Network:
    """The network in an ONNX file, run by ONNX Runtime on the CPU.

    Raises:
      ValueError: it can't be read, or is not what `torch_bn.export` and `jax_bn.export` write; onnxruntime is not
        installed.
    """
    check_installed(READS)
    import onnxruntime

    allowed = "a file that python -m jax_bn.export or python -m torch_bn.export has written, or a run folder"
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4  # what is wrong is raised, too
    try:
        content = path.read_bytes()
        held = onnxruntime.InferenceSession(content, quiet, providers=["CPUExecutionProvider"])
        name = held.get_modelmeta().graph_name
        told = [(one.name, one.type, one.shape) for one in (*held.get_inputs(), *held.get_outputs())]
    except OSError as error:
        raise ValueError(f"the run is {path}: {error.strerror}; allowed: {allowed}") from None
    except Exception as error:  # whatever a reader raises of bytes that it was not made for
        raise ValueError(f"the run is {path}, which can't be read ({error}); allowed: {allowed}") from None
    if not _fits(told):
        raise ValueError(f"the run is {path}, another function ({told}); allowed: {allowed}")
    fig_size, num_class = told[0][2][1], told[1][2][1]

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: Any = held.run([LOGITS], {IMAGES: images})[0]
        return np.asarray(found, np.float32)

    return Network(logits, fig_size, class_names(name == FASHION_MNIST, num_class))


def _fits(told: Sequence[tuple[str, str, Sequence[Any]]]) -> bool:
    """Whether it is the function that predicts: uint8 [b, H, H] -> float32 [b, number of classes]."""
    if [one[:2] for one in told] != [(IMAGES, "tensor(uint8)"), (LOGITS, "tensor(float)")]:
        return False
    images, logits = told[0][2], told[1][2]
    sizes = [*images[1:], *logits[1:]]
    if len(images) != 3 or len(logits) != 2 or not all(isinstance(size, int) for size in sizes):
        return False
    return images[1] == images[2] and isinstance(images[0], str) and images[0] == logits[0]
