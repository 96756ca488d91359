"""Does a run's memory stay flat? Both training loops on the sample, each in a process of its own.

    python -m benchmarks.memory                                     5,000 steps, a checkpoint after each epoch
    python -m benchmarks.memory --steps 1000 --checkpoint-every 5

What a process holds at ten moments of its run: its resident memory, which is the allocator's doing too, and what it
keeps: arrays (tensors), Python's objects and blocks of memory.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.harness import answer, is_installed, make_console, or_stop, print_line, rows_table, worker
from bn_common.command_line import parse, refuse
from bn_common.config import Config
from bn_common.memory import keep_memory
from bn_common.run_folder import RunFolder
from image_data import ImageDataset, load_sample, steps_per_epoch

PROG = "python -m benchmarks.memory"
MOMENTS = 10
LOOPS = ("jax", "torch")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    steps: int = 5000
    """Steps of each loop, rounded up to whole epochs, 100 to 1,000,000."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, >= 1. None: after every epoch only."""


class Held(NamedTuple):
    """What a process holds after an epoch, when its checkpoint is on the disk and all garbage is collected.

    Attributes:
      step: the epoch's last one.
      resident: bytes of memory that the process has; None where the system does not say it as Linux does.
      arrays: of JAX's, or tensors, that are alive.
      objects: that Python's collector knows, beside the lines of the metrics: a run keeps these on purpose.
      blocks: of memory that Python has given out.
    """

    step: int
    resident: int | None
    arrays: int
    objects: int
    blocks: int


class MeasuredRun(RunFolder):
    """A run folder that looks after each epoch at what its process holds, and tells it."""

    tell: Callable[[Held], None]

    def before_close(self, wait: Callable[[], None]) -> None:
        """As always; what it belongs to are the wing's `Checkpoints`."""
        super().before_close(wait)
        self.checkpoints: Any = wait.__self__  # type: ignore[attr-defined]

    def end_epoch(self, *, step: int, **found: Any) -> None:
        """As always, and measured."""
        super().end_epoch(step=step, **found)
        self.checkpoints.wait()  # else it would count what is just being written
        self.tell(held(self, step))


def held(run: RunFolder, step: int) -> Held:
    """See `Held`."""
    gc.collect()
    blocks = sys.getallocatedblocks()
    told = set(map(id, run.metrics))
    objects = [one for one in gc.get_objects() if id(one) not in told]
    framework = sys.modules[str(run.record["framework"])]
    if framework.__name__ == "jax":
        arrays = len(framework.live_arrays())
    else:
        arrays = sum(issubclass(type(one), framework.Tensor) for one in objects)
    return Held(step, _resident(), arrays, len(objects), blocks)


def _resident() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def train(loop: str, config: Config, dataset: ImageDataset, tell: Callable[[Held], None]) -> None:
    """Train with the loop of that name, and tell after each epoch what this process holds."""
    run = MeasuredRun(config, loop, {"data": dataset.name}, Console(file=io.StringIO()))
    run.tell = tell
    importlib.import_module(f"{loop}_bn.training").train(config, dataset, run)


def serve(connection: Connection, loop: str, config: Config) -> None:
    """A process that trains, with the settings of the training program; sends each `Held`, and None at the end."""
    if loop == "jax":
        settings = importlib.import_module("jax_bn.settings")
        keep_memory()
        settings.compute_in_the_caller()
        settings.keep_compiled()
        settings.say_errors_once()
    train(loop, config, load_sample(), connection.send)
    connection.send(None)


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="What both training loops hold, as they go on.")
    try:
        if not 100 <= options.steps <= 1_000_000:
            raise ValueError(f"--steps is {options.steps}; allowed: 100 to 1,000,000")
        config = Config(data="sample", checkpoint_every=options.checkpoint_every).resolved()
        steps = steps_per_epoch(len(load_sample().train_images), config.batch_size)
        config = dataclasses.replace(config, epochs=-(-options.steps // steps))
    except ValueError as error:
        refuse(PROG, str(error))
    console = make_console()
    with or_stop(PROG):
        for loop in LOOPS:
            if not is_installed(loop):
                print_line(f"{loop} is left out: it is not installed", console)
                continue
            with tempfile.TemporaryDirectory(prefix="memory-") as folder:
                found = _measured(loop, dataclasses.replace(config, out=Path(folder) / "run"))
            print_line(f"{loop}, {config.epochs} epochs of {steps} steps", console)
            console.print(rows_table(COLUMNS, found))


def _measured(loop: str, config: Config) -> list[Held]:
    """What a process holds at MOMENTS moments of the run, as evenly as its epochs allow, the last one among them."""
    found = []
    with worker(serve, loop, config) as connection:
        while (one := answer(connection)) is not None:
            found.append(one)
    every = max(1, len(found) // MOMENTS)
    return found[::-1][::every][::-1]


COLUMNS: dict[str, Callable[[Held], str]] = {
    "step": lambda held: f"{held.step:,}",
    "resident, MiB": lambda held: "-" if held.resident is None else f"{held.resident / 2**20:.1f}",
    "arrays": lambda held: f"{held.arrays:,}",
    "objects": lambda held: f"{held.objects:,}",
    "blocks": lambda held: f"{held.blocks:,}",
}


if __name__ == "__main__":
    main()
