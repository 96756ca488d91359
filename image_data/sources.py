"""Where the training data come from: a named folder, or the first place that has Fashion-MNIST."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from image_data.dataset import ImageDataset, is_complete, load_folder
from image_data.download import Progress, download

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""What the labels 0 to 9 of Fashion-MNIST are called."""
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SAMPLE_FOLDER = Path(__file__).parent / "sample"
SAMPLE_NOTICE = (
    "this is the sample of 6,000 + 1,000 images that ships with the project, "
    "not the full Fashion-MNIST (60,000 + 10,000)"
)


def cache_folder() -> Path:
    """Where a download of Fashion-MNIST is kept: a folder of the user's cache (XDG_CACHE_HOME is honoured)."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path.home() / ".cache"
    return base / "fashion-mnist"


def load_sample() -> ImageDataset:
    """The embedded sample: 600 training and 100 test images of each of Fashion-MNIST's 10 classes."""
    return load_folder(SAMPLE_FOLDER)._replace(name="sample", notice=f"{SAMPLE_NOTICE}.")


def load_fashion_mnist(*, progress: Progress | None = None) -> ImageDataset:
    """Fashion-MNIST from the first place that has it whole, else the sample.

    The places: the cache folder; the folder of Debian's and Ubuntu's package `dataset-fashion-mnist`; the official
    download, into the cache folder; the embedded sample.

    Args:
      progress: see `image_data.download.Progress`.

    Returns:
      The data set. If it is the sample, or a place had it damaged, `notice` says so, and why.
    """
    damaged: list[str] = []

    def told(dataset: ImageDataset, notice: str = "") -> ImageDataset:
        said = [f"{reason}; the data are from {dataset.name} instead." for reason in damaged]
        return dataset._replace(notice=" ".join([*said, notice]).strip())

    for folder in (cache_folder(), DEBIAN_FOLDER):
        if is_complete(folder):
            try:
                return told(load_folder(folder))
            except ValueError as error:
                damaged.append(str(error))
    try:
        download(cache_folder(), progress=progress, anew=is_complete(cache_folder()))
        return told(load_folder(cache_folder()))
    except (OSError, ValueError) as error:
        return told(load_sample(), f"{SAMPLE_NOTICE}: the download failed ({error}).")
