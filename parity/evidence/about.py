"""What is written down of a run beside its arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOST = (
    "compiled, the gradient of Flax's network is not finite here; operation by operation it is, and so all was "
    "compared: XLA may compute what a maximum is taken of once more for the gradient, rounded otherwise, and find "
    "no number that equals it"
)


def details(module: Any, train: bool, loss: Callable | None) -> dict[str, Any]:
    """What a dump says of its run, beside the arrays."""
    return {
        "mode": "train" if train else "eval",
        "class": type(module).__name__,
        "dtype": "float64",
        "parameters": "float32",
        "loss": "default" if loss is None else getattr(loss, "__qualname__", str(loss)),
        "numpy": np.__version__,
        "inputs": None,
    }


def about(a: NDArray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an input."""
    return {
        "shape": a.shape,
        "dtype": str(a.dtype),
        "sha256": hashlib.sha256(np.array(a, order="C").tobytes()).hexdigest(),
    }
