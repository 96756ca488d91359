"""The run folder: config, metrics, weights and curves of one training run, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bn_common import checkpoints
from bn_common.checkpoints import Checkpoint, Fetched, Place, UnfitError
from bn_common.config import Config
from bn_common.config_file import as_toml
from bn_common.files import check_can_be_made, leftovers, lock, read_json, write_together, write_whole
from bn_common.record import (
    CONFIG,
    CONFUSION,
    CURVES,
    FILES,
    METRICS,
    MISTAKES,
    OPTIONS,
    WEIGHTS,
    check_epoch,
    difference,
    reached,
    read_metrics,
    record_of,
    refuse_other,
    under_way,
)
from bn_common.shown import as_text, draw_curves, epoch_line, summary
from bn_common.stopping import Stopped
from bn_common.tensorboard import Scalars


class Totals(NamedTuple):
    """Sums over examples: `loss` of the cross-entropy, `correct` of the right predictions, `examples` their number."""

    loss: float
    correct: float
    examples: float


class RunFolder:
    """Records a run on the screen and in its folder, and finds there what an earlier process has left of it.

    Args:
      config: the run's; `out` names the folder (None: a new one below runs/, named by framework and time).
      framework: "jax" or "torch", whose names the weights have.
      about: added to every line of the metrics: {"data": ..., "notice": ...}.
      console: where to print.
      identity: what else a run must share with one that it continues, see `identity_of`.
      writes: whether this process does; of several that train together the first one alone.

    Attributes:
      path: the folder.
      record: what config.json says: framework, configuration, identity.
      metrics: the lines of metrics.jsonl, those of an earlier process first.
      saved_step: of the newest checkpoint on the disk, or None.
      told_to_stop: whether a signal has said, by the end of this step, that the run is to end; and which.

    Raises:
      ValueError: the folder holds another run (nothing is overwritten), or one under way; it is a file, or can't be
        written.
    """

    def __init__(
        self,
        config: Config,
        framework: str,
        about: Mapping[str, str],
        console: Console,
        identity: Mapping[str, Any] | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self.config, self.about, self.console, self.writes = config, dict(about), console, writes
        self.saved_step: int | None = None
        self.told_to_stop: Callable[[int], int | None] = lambda step: None
        self.pictures: Callable[[], tuple[bytes, bytes, str]] | None = None
        self._open = contextlib.ExitStack()
        self._scalars: Scalars | None = None
        self.metrics: list[dict[str, Any]] = []
        self.path = config.out or Path("runs")
        if not writes:
            console.quiet = True
            return
        self.path = config.out or _new_path(framework)
        self.record = {**record_of(config, framework), "out": str(self.path), **(identity or {})}
        check_can_be_made("--out", self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            unlock = lock(self.path)
            if unlock is None:
                raise ValueError(under_way(self.path))
            self._open.callback(weakref.finalize(self, unlock))
            # Now that nobody else writes.
            refuse_other(self.path, self.record)
            _tidy(self.path)
            begun = {CONFIG: json.dumps(self.record, indent=2) + "\n", METRICS: "", OPTIONS: as_toml(config)}
            for name, content in begun.items():  # in this order: what another process's end has left out comes now
                if not (self.path / name).exists():
                    write_whole(self.path / name, content.encode())
            self.metrics = read_metrics(self.path)
            if config.tensorboard:
                self._scalars = Scalars(self.path)
                self._open.callback(self._scalars.close)
        except OSError as error:
            self.close()
            raise ValueError(f"--out is {self.path}: {error.strerror}; allowed: a folder that can be written") from None
        except ValueError:
            self.close()
            raise

    def before_close(self, wait: Callable[[], None]) -> None:
        """Have this called before the folder is let go of: what ends all writing to it."""
        self._open.callback(wait)

    def close(self) -> None:
        """Wait for what is being written, and let go of the folder."""
        self._open.close()

    def say_what_runs_where(self, kind: str, count: int, *, processes: int = 1, framework: str) -> None:
        """Before the first step: so many devices of that kind, in how many processes, and what each has of a batch."""
        batch = self.config.batch_size
        least, most = batch // count, -(-batch // count)
        within = "" if processes == 1 else f" in {processes} processes"
        each = f"{least} each" if least == most else f"{least} or {most} each"
        self.say(f"{count} x {kind}{within}, global batch {batch}, {each}, {self.config.precision}")
        self.say(f"{framework}, data: {self.about['data']}")

    def waiting(self, what: str) -> contextlib.AbstractContextManager[object]:
        """Around what takes seconds and prints nothing: a spinner, where standard error is a terminal."""
        shows = self.writes and sys.stderr.isatty()
        return Console(stderr=True).status(what) if shows else contextlib.nullcontext()

    def newest_checkpoint(self) -> Checkpoint | None:
        """Where the run is to be continued, if an earlier process has left a checkpoint; and that is said.

        Raises:
          UnfitError: it is another run's.
        """
        if not self.writes:
            return None
        found = checkpoints.newest(self.path / checkpoints.FOLDER, lambda text: self.say(f"Notice: {text}", "yellow"))
        if found is not None:
            differs = difference(self.record, found.about["run"])
            if differs is not None:
                called, mine, theirs = differs
                text = f"{found.path} is a checkpoint of another run: {called} is {theirs} there"
                raise UnfitError(f"{text}; allowed: {mine}, as config.json beside it says")
            # Of epochs that are behind the checkpoint, the lines stay: they will be the same again.
            done = found.about["metrics"]
            self.metrics = done + [line for line in self.metrics if line["epoch"] > len(done)]
            self.saved_step = found.step
            self.say(f"continued from step {found.step}, {found.path}")
        elif self.metrics:
            self.say("Notice: no checkpoint is left of this run; it begins anew", "yellow")
        return found

    def about_checkpoint(self, place: Place, arrays: Mapping[str, str], made_with: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint's seal says.

        Args:
          place: where the run stands.
          arrays: of the tensors in the checkpoint, see `checkpoints.describe`.
          made_with: of the framework and its devices.

        Raises:
          OSError: the folder is gone.
        """
        self._check_there()
        accuracy = None if place.found or not place.epoch else self.metrics[place.epoch - 1]["test_accuracy"]
        return {
            "place": place._asdict(),
            "run": self.record,
            "metrics": self.metrics[: place.epoch],
            "test_accuracy": accuracy,
            "arrays": dict(arrays),
            "made_with": dict(made_with),
        }

    def say_what_differs(self, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """That the run goes on with another framework or on other devices than the checkpoint was made with."""
        differs = [
            f"{name} is {mine.get(name)}, not {value}" for name, value in theirs.items() if mine.get(name) != value
        ]
        if differs:
            self.say(
                f"Notice: {', '.join(differs)}: the numbers may differ in their last digits from here on", "yellow"
            )

    def save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step (counted from 1), in the midst of an epoch."""
        every = self.config.checkpoint_every
        return (every is not None and step % every == 0) or self.told_to_stop(step) is not None

    def check_finite(
        self,
        *,
        epoch: int,
        step: int,
        found: Fetched,
        weights: Mapping[str, np.ndarray],
        first_broken: Callable[[int, int], str],
    ) -> None:
        """Before anything is written of them: the losses of an epoch's steps and the weights after.

        Args:
          epoch: from 0.
          step: the last one, from 1.
          found: what the epoch's steps so far have found.
          weights: after it.
          first_broken: given the epoch and one of its steps, both from 0: the first layer that is not finite in it.

        Raises:
          FloatingPointError: one of them is not finite; the message names the step and the layer or the array.
        """
        broken = next((i for i, (loss, *_) in enumerate(found) if not math.isfinite(loss)), None)
        if broken is not None:
            at = f"epoch {epoch + 1}, step {step - len(found) + broken + 1}"
            layer = first_broken(epoch, broken)
            raise FloatingPointError(f"the loss is no longer finite in {at}, first in {layer}; a smaller --lr may help")
        for name, value in weights.items():
            if not np.isfinite(value).all():
                at = f"epoch {epoch + 1}, after step {step}"
                raise FloatingPointError(f"{name} is no longer finite in {at}; a smaller --lr may help")

    def stop_if_told(self, step: int, wait: Callable[[], None]) -> None:
        """After the checkpoint of this step: end the run if a signal has said so.

        Args:
          step: the checkpoint's.
          wait: until it is on the disk.

        Raises:
          Stopped: so it is.
        """
        number = self.told_to_stop(step)
        if number is not None:
            wait()
            raise Stopped(number)

    def is_there(self) -> bool:
        """Whether nobody has taken the folder away."""
        return not self.writes or (self.path / CONFIG).exists()

    def _check_there(self) -> None:
        # Else a new folder would be made, with half of the run.
        if not self.is_there():
            raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(self.path))

    @contextlib.contextmanager
    def progress(self, epoch: int, steps: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """A progress bar over the steps of an epoch (on a terminal only); gives the function to call after a step."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(f"epoch {epoch}/{self.config.epochs}", total=steps, completed=done)
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
        """Write weights.safetensors, which tells its epoch and step, add a line to metrics.jsonl, and print it.

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
          OSError: the folder is gone, or can't be written.
        """
        broken = [name for name, v in weights.items() if not np.isfinite(v).all()]
        if broken or not (math.isfinite(train.loss) and math.isfinite(test.loss)):
            what = f"{broken[0]} is no longer finite" if broken else "the loss is no longer finite"
            raise FloatingPointError(f"{what} in epoch {epoch + 1}; a smaller --lr may help")
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
        self.metrics[epoch : epoch + 1] = [{**line, **self.about}]
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.metrics)
        self._check_there()
        content = with_metadata(
            safetensors.numpy.save({name: np.ascontiguousarray(v) for name, v in weights.items()}),
            {"epoch": str(epoch + 1), "step": str(step)},
        )
        if self.writes:
            write_together({self.path / WEIGHTS: content, self.path / METRICS: lines.encode()})
        if self._scalars is not None:
            self._scalars.write(line)
        self.say(epoch_line(line, self.config.epochs))

    def reached(self, epoch: int) -> bool:
        """Whether the test accuracy after that many epochs is what config.until_accuracy asks for."""
        return reached(self.config, self.metrics[:epoch])

    def finish(self) -> None:
        """Draw the pictures, let go of the folder, and say what has come of the run and where everything is."""
        if not self.writes:
            return
        mistakes = self._drawn(f"{CONFUSION} and {MISTAKES} are", self._draw_mistakes) if self.metrics else None
        curves = self._drawn(f"{CURVES} is", lambda: draw_curves(self.metrics, self.about["data"]))
        if curves is not None:
            # The last file: with it the run is finished. Without, the same command again only draws it.
            write_whole(self.path / CURVES, curves)
        if self.metrics:
            self.say(summary(self.metrics))
        if mistakes is not None:
            self.say(f"{CONFUSION}, {MISTAKES}: {mistakes}")
        if self.config.until_accuracy is not None:
            found = "reached" if reached(self.config, self.metrics) else "not reached"
            self.say(f"test accuracy {self.config.until_accuracy:g} {found} after {len(self.metrics)} epochs")
        self.close()
        self.say(f"run folder: {self.path}")

    def _drawn(self, what: str, draw: Callable[[], Any]) -> Any:
        """What `draw` gives, or None. What fails is told, and the run ends as it would: no picture matters so much."""
        try:
            return draw()
        except Exception as error:
            self.say(f"Notice: {what} not drawn: {error}", "yellow")
            return None

    def _draw_mistakes(self) -> str | None:
        """Draw what `self.pictures` gives, and give its words."""
        if self.pictures is None:
            return None
        confusion, sheet, mistakes = self.pictures()
        write_together({self.path / CONFUSION: confusion, self.path / MISTAKES: sheet})
        return mistakes

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, never wrapped: it may be read by a program."""
        self.console.print(as_text(text), style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _new_path(framework: str) -> Path:
    base = Path("runs") / f"{framework}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(p for p in (base, *(Path(f"{base}-{i}") for i in range(2, 1000))) if not p.exists())


def _tidy(path: Path) -> None:
    """Remove what a killed process has left half written, or end what it had begun."""
    for left in leftovers(path / METRICS):
        # All of it is written before the weights get their name: are they of its last epoch, it is to have its own.
        try:
            lines = [read_json(line) for line in left.read_bytes().splitlines()]
            for line in lines:
                check_epoch(line)
        except ValueError:
            continue
        if lines and str(lines[-1]["epoch"]) == weights_metadata(path / WEIGHTS).get("epoch"):
            os.replace(left, path / METRICS)
    for name in FILES:
        for left in leftovers(path / name):
            left.unlink()


def with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """A .safetensors file with that metadata, always in the same bytes (the library writes it in any order)."""
    size = struct.unpack("<Q", content[:8])[0]
    header = {"__metadata__": dict(metadata)} | json.loads(content[8 : 8 + size])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def weights_metadata(path: Path) -> dict[str, str]:
    """Of a .safetensors file; {} where it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            return read_json(file.read(size))["__metadata__"] if size < 2**24 else {}
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return {}
