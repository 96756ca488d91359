"""A labelled image data set in a folder of four IDX files, named as Fashion-MNIST, MNIST and KMNIST name them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from image_data.idx import read_idx

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class ImageDataset(NamedTuple):
    """A training and a test set of grey images.

    Attributes:
      train_images, test_images: uint8 [N, H, W].
      train_labels, test_labels: uint8 [N], each below num_class.
      name: where it comes from, for the reader of a log: "sample", or the folder.
      notice: what the user must know about it, or "".
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    name: str
    notice: str = ""


def read_images(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W], N >= 1, from an IDX file; ValueError with the file's name for anything else."""
    images = read_idx(path)
    if images.ndim != 3 or images.dtype != np.uint8:
        hint = " (a label file in its place?)" if images.ndim == 1 else ""
        raise ValueError(f"{path}: found {images.dtype} of rank {images.ndim}{hint}; expected uint8 of rank 3 (images)")
    if images.size == 0:
        raise ValueError(f"{path}: found images of shape {images.shape}; expected one image or more, of 1x1 or more")
    return images


def read_labels(path: str | os.PathLike[str], num_class: int = 10) -> NDArray[np.uint8]:
    """Labels uint8 [N], each below num_class, from an IDX file; ValueError with the file's name for anything else."""
    labels = read_idx(path)
    if labels.ndim != 1 or labels.dtype != np.uint8:
        hint = " (an image file in its place?)" if labels.ndim == 3 else ""
        raise ValueError(f"{path}: found {labels.dtype} of rank {labels.ndim}{hint}; expected uint8 of rank 1 (labels)")
    if labels.size and labels.max() >= num_class:
        where = int(np.argmax(labels >= num_class))
        raise ValueError(
            f"{path}: found label {labels[where]} at index {where}; expected labels from 0 to {num_class - 1}"
        )
    return labels


def find_file(folder: str | os.PathLike[str], name: str) -> Path | None:
    """`name`.gz or `name` in the folder, the first that exists; None if neither does."""
    candidates = (Path(folder) / f"{name}.gz", Path(folder) / name)
    # os.path.exists: False, and no exception, for what may not be looked at
    return next((path for path in candidates if os.path.exists(path)), None)


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether all four files are there."""
    return all(find_file(folder, name) for name in FILES)


def load_folder(folder: str | os.PathLike[str], *, num_class: int = 10) -> ImageDataset:
    """The data set in a folder with the four files `FILES`, each with or without .gz.

    Raises:
      ValueError: the folder or a file is missing; a file is damaged or holds something else (see `read_idx`,
        `read_images`, `read_labels`); image and label counts differ; the images are not square, or not of one size.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        what = "a file" if os.path.exists(folder) else "no such folder"
        raise ValueError(f"{folder}: found {what}; expected a folder with {', '.join(FILES)} (.gz or plain)")
    paths = {name: find_file(folder, name) for name in FILES}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise ValueError(f"{folder}: found no {', no '.join(missing)}; expected each of them, with .gz or without")
    train_images, train_labels = _read_pair(paths[FILES[0]], paths[FILES[1]], num_class)
    test_images, test_labels = _read_pair(paths[FILES[2]], paths[FILES[3]], num_class)
    if train_images.shape[1:] != test_images.shape[1:]:
        size = "x".join(map(str, train_images.shape[1:]))
        raise ValueError(f"{paths[FILES[2]]}: found images of {test_images.shape[1:]}; expected {size}, as in training")
    if train_images.shape[1] != train_images.shape[2]:
        raise ValueError(f"{paths[FILES[0]]}: found images of {train_images.shape[1:]}; expected square ones")
    return ImageDataset(
        train_images, train_labels, test_images, test_labels, name=os.fsencode(folder).decode(errors="replace")
    )


def _read_pair(images_path, labels_path, num_class: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images, labels = read_images(images_path), read_labels(labels_path, num_class)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: found {len(labels)} labels; expected {len(images)}, one an image")
    return images, labels
