"""What a trained network takes for what: a confusion matrix, and a sheet of the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bn_common.predictions import BATCH_SIZE, Network, softmax
from bn_common.shown import as_png
from image_data import ImageDataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 25
"""Mistakes on the sheet, at most."""


def pictures(network: Network, dataset: ImageDataset) -> tuple[bytes, bytes, str]:
    """Of the test set: the confusion matrix and the sheet as PNG, and the commonest mistake in words."""
    images, labels = dataset.test_images, dataset.test_labels.astype(np.int64)
    starts = range(0, len(images), BATCH_SIZE)
    logits = np.concatenate([network.logits(images[first : first + BATCH_SIZE]) for first in starts])
    counts = confusion(labels, logits.argmax(-1), len(network.classes))
    sheet = plot_mistakes(images, labels, softmax(logits), network.classes)
    return as_png(plot_confusion(counts, network.classes)), as_png(sheet), commonest(counts, network.classes)


def confusion(labels: NDArray, predicted: NDArray, num_class: int) -> NDArray[np.int64]:
    """[num_class, num_class]: how many images of the class of a row were taken for that of a column."""
    counts = np.zeros((num_class, num_class), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def commonest(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """The commonest mistake in words."""
    wrong = counts - np.diag(np.diag(counts))
    label, predicted = divmod(int(wrong.argmax()), len(classes))
    if not wrong[label, predicted]:
        return "no mistake"
    times, of = wrong[label, predicted], counts[label].sum()
    return f"most often {classes[predicted]} for {classes[label]}, {times} of {of}"


def worst(labels: NDArray, probabilities: NDArray) -> NDArray[np.int64]:
    """Which images are taken for another class: first those whose own class has the least probability."""
    wrong = np.flatnonzero(probabilities.argmax(-1) != labels)
    return wrong[np.argsort(probabilities[wrong, labels[wrong]], kind="stable")][:SHOWN]


def plot_confusion(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """The matrix with its numbers, each row coloured by its parts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.2), layout="constrained")
    axes = figure.subplots()
    parts = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if parts[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=45, ha="right")
    axes.set_yticks(places, classes)
    right, all_of_them = int(np.trace(counts)), int(counts.sum())
    axes.set(xlabel="taken for", ylabel="is", title=f"{right} of {all_of_them} right, {right / all_of_them:.2%}")
    return figure


def plot_mistakes(images: NDArray[np.uint8], labels: NDArray, probabilities: NDArray, classes: Sequence[str]) -> Figure:
    """The worst first, each with what it is, what it was taken for, and how probable either was."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10.5), layout="constrained")
    for axes in figure.subplots(5, SHOWN // 5).flat:
        axes.set_axis_off()
    for axes, at in zip(figure.axes, worst(labels, probabilities), strict=False):
        taken = int(probabilities[at].argmax())
        axes.imshow(images[at], cmap="gray", vmin=0, vmax=255)
        told = ((classes[label], probabilities[at, label]) for label in (int(labels[at]), taken))
        (label, little), (other, much) = told
        axes.set_title(f"{label} {little:.1%}\ntaken for {other} {much:.1%}", fontsize=7)
    return figure
