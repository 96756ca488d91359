"""The options of `python -m parity train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bn_common.checks import require
from bn_common.files import check_can_be_made
from bn_common.shown import printable
from parity.wings.blenet import batches, blenets

# Where a recipe for BLeNet has it.
LEARNING_RATES = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.01}
ADAM_LEARNING_RATE = 1e-3
DTYPES = "float32", "float64"


@dataclass(frozen=True)
class Train:
    """Train both sides in lockstep, each with a float64 referee; exit status 1 if they part."""

    steps: int = 50
    """How many steps, >= 1."""
    optimizer: str = "adam"
    """sgd, momentum, nesterov, adam, adam-l2, adamw, rmsprop or adagrad."""
    lr: float | None = None
    """Learning rate, > 0. None: 0.1 for sgd, 0.05 with momentum, 0.01 for adagrad, 0.001 for the others."""
    batch_size: int = 64
    """Images a step, 2 to 6000."""
    dtype: str = "float32"
    """Of the two sides: float32 or float64."""
    seed: int = 0
    """Of the initial weights and of the order of the images, >= 0."""
    torch: str | None = None
    """package.module:name or file.py:name of a PyTorch module in place of BLeNet; it takes images [N, 1, 28, 28]."""
    flax: str | None = None
    """The Flax module in place of BLeNet, in the same way."""
    out: Path | None = None
    """A folder for trajectory.json and trajectory.png; made if need be."""

    def __post_init__(self) -> None:
        from parity.sides.optimizers import OPTIMIZERS

        require(self.steps >= 1, "--steps", self.steps, "an integer >= 1")
        require(self.optimizer in OPTIMIZERS, "--optimizer", self.optimizer, ", ".join(OPTIMIZERS))
        require(self.lr is None or 0 < self.lr < float("inf"), "--lr", self.lr, "> 0")
        require(
            2 <= self.batch_size <= 6000, "--batch-size", self.batch_size, "2 to 6000, the sample's training images"
        )
        require(self.dtype in DTYPES, "--dtype", self.dtype, " or ".join(DTYPES))
        require(self.seed >= 0, "--seed", self.seed, "an integer >= 0")
        both = (self.torch is None) == (self.flax is None)
        require(both, "--torch and --flax", f"{self.torch} and {self.flax}", "both or neither")
        require(self.out is None or not self.out.is_file(), "--out", self.out, "a folder")
        if self.out is not None:
            check_can_be_made("--out", self.out)

    def run(self) -> int:
        """Train, show, write; gives the exit status."""
        from rich.console import Console
        from rich.progress import track

        from parity.trajectory import lockstep

        lr = self.lr if self.lr is not None else LEARNING_RATES.get(self.optimizer, ADAM_LEARNING_RATE)
        console = Console()
        bar = iter(
            track(range(self.steps), "training", console=console, transient=True, disable=not sys.stdout.isatty())
        )
        trajectory = lockstep(
            *self._modules(),
            batches(self.batch_size, self.steps, self.seed),
            optimizer=self.optimizer,
            lr=lr,
            steps=self.steps,
            dtype=self.dtype,
            progress=lambda _: next(bar, None),
        )
        console.print(trajectory.table())
        if trajectory.gauges:
            gauges = printable(", ".join(trajectory.gauges))
            console.print(f"no gradient but rounding, compared without: {gauges}", markup=False)
        for note in trajectory.notes:
            console.print(printable(note), markup=False)
        console.print(trajectory.verdict, style="green" if trajectory.ok else "red")
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            trajectory.to_json(self.out / "trajectory.json")
            trajectory.plot(self.out / "trajectory.png")
        return 0 if trajectory.ok else 1

    def _modules(self) -> tuple[Any, Any]:
        if self.torch is not None and self.flax is not None:
            from parity.cli.named_objects import module_of

            return module_of("torch", self.torch, self.seed), module_of("flax", self.flax, self.seed)
        return blenets(self.seed)


def main(args: Sequence[str] | None = None) -> int:
    """`python -m parity train`; gives the exit status."""
    from bn_common.command_line import parse, program_name
    from parity.cli.named_objects import exits_told

    prog = f"{program_name('parity', 'python -m parity')} train"
    options = parse(Train, args, prog=prog, description=Train.__doc__ or "")
    with exits_told():
        return options.run()
