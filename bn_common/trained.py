"""What a training run has left, read back: the network, its weights, and how its images are standardised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from bn_common.checks import require
from bn_common.files import check_can_write
from bn_common.record import WEIGHTS, read_record
from image_data import FASHION_MNIST_CLASSES

# What the function in an exported file is called: all that such a file says of its classes.
FASHION_MNIST, ANY = "fashion_mnist_logits", "logits"
PROGRAMS = {"jax": "train_jax.py", "torch": "python -m torch_bn.training"}


class Trained(NamedTuple):
    """A run's network, ready to predict.

    Attributes:
      framework: "jax" or "torch", whose names and layouts the weights have.
      weights: name -> array, as in weights.safetensors.
      mean, std: of the training set's pixels.
      fig_size: height and width of an image.
      epsilon: of every batch norm.
      precision: "float32" or "bfloat16", what the layers are computed in.
      is_fashion_mnist: whether the data were; else nobody knows what the classes are called.
    """

    framework: str
    weights: Mapping[str, NDArray]
    mean: np.float32
    std: np.float32
    fig_size: int
    epsilon: float
    precision: str
    is_fashion_mnist: bool

    @property
    def levels(self) -> NDArray[np.float32]:
        """[256], each grey level standardised, as training does it.

        A table is the same on every device: a compiler that is told to divide may multiply by 1 / std.
        """
        return (np.arange(256, dtype=np.float32) - self.mean) / self.std


def class_names(is_fashion_mnist: bool, num_class: int) -> tuple[str, ...]:
    """Fashion-MNIST's, or the labels' numbers."""
    return FASHION_MNIST_CLASSES if is_fashion_mnist else tuple(map(str, range(num_class)))


def function_name(is_fashion_mnist: bool) -> str:
    """What the function in an exported file is called."""
    return FASHION_MNIST if is_fashion_mnist else ANY


def read_trained(path: Path, framework: str | None = None) -> Trained:
    """The network of a run folder, as of its last finished epoch.

    Args:
      path: the folder.
      framework: "jax" or "torch", which it must be of; None: either.

    Raises:
      ValueError: no run, one of the other framework, none of its epochs finished, damaged weights.
    """
    record = read_record(path)
    if record is None:
        raise ValueError(f"the run is {path}, which holds none; allowed: the folder that a training program has left")
    theirs = record["framework"]
    if framework not in (None, theirs):
        raise ValueError(f"the run in {path} is of {PROGRAMS[theirs]}; allowed: one of {PROGRAMS[framework or theirs]}")
    for name in ("pixel_mean", "pixel_std", "fig_size"):
        require(name in record, f"{name} in {path}/config.json", "missing", "a run of this version")
    try:
        weights = safetensors.numpy.load_file(path / WEIGHTS)
    except FileNotFoundError:
        raise ValueError(f"the run in {path} has no {WEIGHTS} yet; allowed: one with a finished epoch") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path / WEIGHTS} is damaged ({error}); allowed: as the training program wrote it") from None
    return Trained(
        framework=theirs,
        weights=weights,
        mean=np.float32(record["pixel_mean"]),
        std=np.float32(record["pixel_std"]),
        fig_size=record["fig_size"],
        epsilon=record["bn_eps"],
        precision=record["precision"],
        is_fashion_mnist=record["data_dir"] is None,
    )


def check_weights(found: Mapping[str, NDArray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where weights are not those of a network with these names and shapes."""
    for name in sorted({*found, *shapes}):
        given = found[name].shape if name in found else "missing"
        require(given == shapes.get(name), f"{name} in {WEIGHTS}", given, str(shapes.get(name, "no such name")))


def check_new_file(name: str, path: Path) -> None:
    """A file that is not there yet, in a folder that is. It is tried, and nothing is left.

    Raises:
      ValueError: "`name` is `path`: why not; allowed: ...".
    """
    allowed = "a new file in a folder that is there"
    require(not os.path.lexists(path), name, f"{path}, which is there already", allowed)
    require(os.path.isdir(path.absolute().parent), name, f"{path}, whose folder is not there", allowed)
    check_can_write(name, path)
