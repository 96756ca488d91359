"""Makes the embedded sample from the full Fashion-MNIST: `python -m image_data.make_sample FOLDER OUT`.

The first 600 training and the first 100 test images of every class, in the data set's own order. The same input gives
the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_data.dataset import FILES, load_folder
from image_data.idx import write_idx


def first_of_each_class(labels: NDArray[np.uint8], count: int) -> NDArray[np.intp]:
    """Ascending indices of the first `count` examples of every class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def main(source: str, target: str) -> None:
    """Write the four sample files into `target`."""
    full = load_folder(source)
    train, test = first_of_each_class(full.train_labels, 600), first_of_each_class(full.test_labels, 100)
    arrays = full.train_images[train], full.train_labels[train], full.test_images[test], full.test_labels[test]
    Path(target).mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES, arrays, strict=True):
        write_idx(Path(target) / f"{name}.gz", array)


if __name__ == "__main__":
    main(*sys.argv[1:])
