"""From image files to a table of classes and probabilities."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bn_common.images import read_image
from bn_common.shown import as_text, printable

# Images that are predicted at once.
BATCH_SIZE = 1000
# Classes in a row of the table; JSON has all.
MOST_LIKELY = 3


class Network(NamedTuple):
    """A trained network, ready to predict.

    Attributes:
      logits: of images uint8 [n, fig_size, fig_size], n >= 1: float32 [n, number of classes].
      fig_size: height and width of the images.
      classes: what they are called.
    """

    logits: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    fig_size: int
    classes: Sequence[str]


class Prediction(NamedTuple):
    """Of one image.

    Attributes:
      image: its file.
      probabilities: float64 [number of classes], the softmax of the logits.
    """

    image: Path
    probabilities: NDArray[np.float64]


def predict(
    network: Network, images: Iterable[Path], *, resize: bool, invert: bool
) -> tuple[list[Prediction], list[str]]:
    """The predictions of all files that can be read, in their order; and a line for each of the others."""
    read, wrong = [], []
    for path in images:
        try:
            read.append((path, read_image(path, network.fig_size, resize=resize, invert=invert)))
        except ValueError as error:
            wrong.append(str(error))
    found: list[Prediction] = []
    for first in range(0, len(read), BATCH_SIZE):
        part = read[first : first + BATCH_SIZE]
        logits = network.logits(np.stack([image for _, image in part]))
        found += [Prediction(path, p) for (path, _), p in zip(part, softmax(logits), strict=True)]
    return found, wrong


def softmax(logits: NDArray) -> NDArray[np.float64]:
    """exp(logits) / sum(exp(logits)), in float64, over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def as_json(found: Sequence[Prediction], classes: Sequence[str]) -> str:
    """A list with the file, the most likely class, its number, and every class's probability."""
    told: list[dict[str, Any]] = []
    for image, probabilities in found:
        label = int(probabilities.argmax())
        every = dict(zip(classes, probabilities.tolist(), strict=True))
        told.append({"image": str(image), "class": classes[label], "label": label, "probabilities": every})
    return json.dumps(told, indent=2, allow_nan=False)


def as_table(found: Sequence[Prediction], classes: Sequence[str]) -> Table:
    """A row an image: its most likely classes."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    for name in ("class", *("or",) * (min(MOST_LIKELY, len(classes)) - 1)):
        table.add_column(name, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for image, probabilities in found:
        likely = np.argsort(-probabilities, kind="stable")[:MOST_LIKELY]
        cells = [cell for label in likely for cell in (classes[label], f"{probabilities[label]:.1%}")]
        table.add_row(_as_cell(str(image)), *cells)
    return table


def _as_cell(name: str) -> str:
    """A file's name, with what would move the cursor or look like rich's markup shown as it is."""
    return printable(as_text(name)).replace("[", r"\[")


def tell(found: Sequence[Prediction], wrong: Sequence[str], network: Network, prog: str, *, as_list: bool) -> int:
    """Print both; gives the exit status, 2 if a file was wrong."""
    if as_list:
        print(as_json(found, network.classes))
    elif found:
        Console().print(as_table(found, network.classes))
    sys.stdout.flush()
    for line in wrong:
        sys.stderr.write(f"{prog}: error: {' '.join(as_text(line).split())}\n")
    return 2 if wrong else 0
