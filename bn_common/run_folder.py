"""The run folder: config, metrics, weights and curves of one training run, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bn_common.config import Config

CONFIG, METRICS, WEIGHTS, CURVES = "config.json", "metrics.jsonl", "weights.safetensors", "curves.png"


class Totals(NamedTuple):
    """Sums over examples: `loss` of the cross-entropy, `correct` of the right predictions, `examples` their number."""

    loss: float
    correct: float
    examples: float


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no crash, ever sees a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """Records a run on the screen and in its folder.

    Args:
      config: the run's; `out` names the folder (None: a new one below runs/, named by framework and time).
      framework: "jax" or "torch", whose names the weights have.
      about: added to every line of the metrics: {"data": ..., "notice": ...}.
      console: where to print.
      writes: whether this process does; of several that train together the first one alone.

    Raises:
      ValueError: the folder holds a run already (nothing is overwritten), is a file, or can't be written.
    """

    def __init__(
        self, config: Config, framework: str, about: Mapping[str, str], console: Console, *, writes: bool = True
    ) -> None:
        self.config, self.about, self.console, self.writes = config, dict(about), console, writes
        self.metrics: list[dict[str, Any]] = []
        self.path = config.out or Path("runs")
        if not writes:
            console.quiet = True
            return
        self.path = _new_folder(config.out, framework)
        fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
        write_whole(
            self.path / CONFIG,
            (json.dumps({"framework": framework, **fields, "out": str(self.path)}, indent=2) + "\n").encode(),
        )

    @contextlib.contextmanager
    def progress(self, epoch: int, steps: int) -> Iterator[Callable[[], None]]:
        """A progress bar over the steps of an epoch (on a terminal only); gives the function to call after a step."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(f"epoch {epoch}/{self.config.epochs}", total=steps)
            yield lambda: bar.advance(task)

    def end_epoch(
        self,
        *,
        epoch: int,
        step: int,
        train: Totals,
        test: Totals,
        start_time: float,
        seconds: float,
        learning_rate: float,
        weights: Mapping[str, np.ndarray],
    ) -> None:
        """Write weights.safetensors, add a line to metrics.jsonl and print it.

        Args:
          epoch: from 0; printed and written from 1.
          step: steps done since the start.
          train: sums over the epoch's training steps, each taken before its update.
          test: sums over the test set after the epoch.
          start_time: when the first training step began, in seconds since 1970.
          seconds: wall time of the training steps.
          learning_rate: of the last step.
          weights: name -> array, after the epoch.

        Raises:
          FloatingPointError: a loss, a weight or a statistic is not finite; nothing has been written.
        """
        broken = [name for name, v in weights.items() if not np.isfinite(v).all()]
        if broken or not (math.isfinite(train.loss) and math.isfinite(test.loss)):
            what = f"{broken[0]} is no longer finite" if broken else "the loss is no longer finite"
            raise FloatingPointError(f"{what} in epoch {epoch + 1}; a smaller --lr may help")
        if self.writes:
            content = safetensors.numpy.save({name: np.ascontiguousarray(v) for name, v in weights.items()})
            write_whole(self.path / WEIGHTS, content)
        line = {
            "epoch": epoch + 1,
            "step": step,
            "loss": train.loss / train.examples,
            "train_accuracy": train.correct / train.examples,
            "test_loss": test.loss / test.examples,
            "test_accuracy": test.correct / test.examples,
            "images_per_second": train.examples / seconds,
            "start_time": start_time,
            "seconds": seconds,
            "learning_rate": learning_rate,
        }
        self.metrics.append({**line, **self.about})
        if self.writes:
            lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.metrics)
            write_whole(self.path / METRICS, lines.encode())
        epochs = str(self.config.epochs)
        self.say(
            f"epoch {line['epoch']:{len(epochs)}d}/{epochs}  loss {line['loss']:.4f}"
            f"  train accuracy {line['train_accuracy']:.4f}  test accuracy {line['test_accuracy']:.4f}"
            f"  {line['images_per_second']:,.0f} images/s"
        )

    @property
    def reached(self) -> bool:
        """Whether the last epoch's test accuracy is what config.until_accuracy asks for."""
        wanted = self.config.until_accuracy
        return wanted is not None and bool(self.metrics) and self.metrics[-1]["test_accuracy"] >= wanted

    def finish(self) -> None:
        """Draw the curves and say where everything is."""
        if not self.writes:
            return
        write_whole(self.path / CURVES, draw_curves(self.metrics, self.about["data"]))
        if self.config.until_accuracy is not None:
            found = f"test accuracy {self.config.until_accuracy:g} {'' if self.reached else 'not '}reached"
            self.say(f"{found} after {len(self.metrics)} epochs")
        self.say(f"run folder: {self.path}")

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, never wrapped: it may be read by a program."""
        self.console.print(_as_text(text), style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _new_folder(out: Path | None, framework: str) -> Path:
    path = out
    if path is None:
        base = Path("runs") / f"{framework}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = next(p for p in (base, *(Path(f"{base}-{i}") for i in range(2, 1000))) if not p.exists())
    refuse_used(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / METRICS, b"")
    except OSError as error:
        raise ValueError(f"--out is {path}: {error.strerror}; allowed: a folder that can be written") from None
    return path


def _as_text(name: str) -> str:
    """The name with "?" for what is no text: a folder's name is any bytes."""
    return name.encode(errors="replace").decode()


def refuse_used(path: Path) -> None:
    """Raise ValueError if the folder holds a run: nothing is overwritten."""
    held = [name for name in (CONFIG, METRICS, WEIGHTS, CURVES) if os.path.exists(path / name)]
    if held:
        raise ValueError(f"--out is {path}, which holds {held[0]} of another run; allowed: a folder without a run")


def draw_curves(metrics: list[dict[str, Any]], data: str) -> bytes:
    """Loss and accuracy over the epochs, as a PNG."""
    # Only now: what is refused or interrupted before has not waited half a second for it.
    from matplotlib.figure import Figure

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
    best = f", test accuracy {metrics[-1]['test_accuracy']:.4f}" if metrics else ""
    figure.suptitle(f"BLeNet on {_as_text(data)}{best}", fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
