"""What people are shown of a run: its lines and its curves."""

from __future__ import annotations

import datetime
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 80
"""What a line for people has, as a terminal is wide."""


def as_text(name: str) -> str:
    """The name with "?" for what is no text: a folder's name is any bytes."""
    return name.encode(errors="replace").decode()


def printable(text: str) -> str:
    r"""The text with all that is not printable escaped, as \x1b: names are the user's, and might steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    """What is printed of a line of the metrics: in 80 columns, for which the speed is shortened or left out."""
    loss = f"{line['loss']:.4f}" if line["loss"] < 100 else f"{line['loss']:.1e}"
    said = (
        f"epoch {line['epoch']:{len(str(epochs))}d}/{epochs}  loss {loss}"
        f"  train {line['train_accuracy']:.4f}  test accuracy {line['test_accuracy']:.4f}"
    )
    rate = f"{line['images_per_second']:,.0f}"
    return next(
        said + end for end in (f"  {rate} images/s", f"  {rate}/s", "") if not end or len(said + end) <= COLUMNS
    )


def summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What has come of a run, in one line: its accuracy, and how long its steps took."""
    last, best = metrics[-1], max(metrics, key=lambda line: line["test_accuracy"])
    took = datetime.timedelta(seconds=round(sum(line["seconds"] for line in metrics)))
    peak = "" if best is last else f" (best {best['test_accuracy']:.4f}, epoch {best['epoch']})"
    count = f"{last['epoch']} epoch{'s' if last['epoch'] > 1 else ''}"
    return f"test accuracy {last['test_accuracy']:.4f} after {count}{peak}, {took} of training"


def data_title(data: str) -> str:
    """A data set's name for people, of its name in the metrics: "Fashion-MNIST", or the last name of its folder."""
    if data == "sample":
        return "Fashion-MNIST (sample)"
    last = os.path.basename(os.path.abspath(data)) or data
    return {name.lower(): name for name in ("Fashion-MNIST", "KMNIST", "MNIST", "EMNIST", "QMNIST")}.get(
        last.lower(), last
    )


def draw_curves(metrics: list[dict[str, Any]], data: str) -> bytes:
    """Loss and accuracy over the epochs, as a PNG."""
    return as_png(plot_curves(metrics, data))


def as_png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plot_curves(metrics: list[dict[str, Any]], data: str) -> Figure:
    """The same, as matplotlib's figure; accuracies in percent."""
    # Only now: what is refused or interrupted before has not waited half a second for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in metrics]
    marker = "o" if len(epochs) < 30 else None
    for axes, title, curves in (
        (loss, "cross-entropy", {"training": "loss", "test": "test_loss"}),
        (accuracy, "accuracy", {"training": "train_accuracy", "test": "test_accuracy"}),
    ):
        for label, key in curves.items():
            axes.plot(epochs, [line[key] for line in metrics], marker=marker, markersize=3, label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    reached = f", test accuracy {metrics[-1]['test_accuracy']:.2%}" if metrics else ""
    figure.suptitle(f"BLeNet on {as_text(data_title(data))}{reached}", fontsize=10, parse_math=False)
    return figure
