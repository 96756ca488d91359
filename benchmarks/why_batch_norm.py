"""What batch norm does for BLeNet: at which learning rates it learns, how fast, and where intermediate values stay.

    python -m benchmarks.why_batch_norm --runs runs/why --write docs/why_batch_norm.md

The two claims of the paper (Ioffe and Szegedy 2015), on this network and with plain SGD at a constant rate: a network
with batch norm learns at rates at which the same network without it does not, and in fewer steps (section 4.2.1); and
the distribution of what comes in at a nonlinearity moves less while it is trained (section 4.1, figure 1).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console

from benchmarks.harness import (
    command,
    describe_machine,
    made_by,
    markdown_table,
    measured,
    print_line,
    print_machine,
    rows_markdown,
    rows_table,
)
from benchmarks.learning.pool import in_parallel
from benchmarks.learning.runs import Run, begin_jax, index_batches
from bn_common.command_line import load, parse
from bn_common.config import Config
from bn_common.shown import data_title
from image_data import ImageDataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROG = "python -m benchmarks.why_batch_norm"
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
WATCHED_RATE = 1.0
"""The rate of the run whose intermediate values are looked at."""
EVERY = 100
"""Steps between two looks at the test accuracy."""
LAYERS = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
"""What comes in at the four sigmoids: these layers' outputs, or the batch norm's behind them."""
QUANTILES = (0.15, 0.5, 0.85)
"""As in the paper's figure 1."""
WATCHED_IMAGES = 1000

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    accuracy: float = 0.85
    """Test accuracy at which a run ends, above 0 and below 1."""
    epochs: int = 5
    """At most, of each run, 1 to 1000."""
    seed: int = 0
    """Of weights and batches, 0 to 2^32 - 1."""
    data: Literal["fashion-mnist", "sample"] = "fashion-mnist"
    """fashion-mnist or sample, as the programs have it."""
    runs: Path | None = None
    """Folder in which finished runs are kept."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write a page to this file, in Markdown, and a figure beside it."""


@dataclasses.dataclass(frozen=True)
class Search:
    """A run until a test accuracy is reached, or its epochs are over."""

    run: Run
    accuracy: float


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="BLeNet with and without batch norm.")
    measured(options, PROG, _check, measure, _markdown, draw)


def _check(options: Options) -> None:
    if not 0 < options.accuracy < 1:
        raise ValueError(f"--accuracy is {options.accuracy}; allowed: above 0, below 1")
    if not 1 <= options.epochs <= 1000:
        raise ValueError(f"--epochs is {options.epochs}; allowed: 1 to 1000")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; allowed: 0 to 2^32 - 1")
    if options.runs is not None and options.runs.exists() and not options.runs.is_dir():
        raise ValueError(f"--runs is {options.runs}; allowed: a folder")


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Train at each rate, with batch norm and without; then look into a run of each."""
    dataset = load(Config(data=options.data), console)
    machine = describe_machine() | {name: importlib.metadata.version(name) for name in ("jax", "flax")}
    print_machine(machine, console)

    def runs(rates: Sequence[float]) -> list[Run]:
        return [
            Run("jax", batch_norm, "sgd", lr, options.epochs, options.seed, schedule="constant")
            for lr in rates
            for batch_norm in (True, False)
        ]

    rows = []
    searches = [Search(run, options.accuracy) for run in runs(RATES)]
    for search, found in in_parallel(steps_to_accuracy, searches, dataset, options.runs):
        run = search.run
        rows.append({"batch_norm": run.batch_norm, "lr": run.lr, **found})
        print_line(f"{_title(run.batch_norm)}, rate {run.lr:g}: {_steps(rows[-1])}", console)
    rows.sort(key=lambda row: (row["lr"], row["batch_norm"]))
    seen = {}
    for run, found in in_parallel(quantiles_by_epoch, runs([WATCHED_RATE]), dataset, options.runs):
        seen[_title(run.batch_norm)] = found
    table = by_rate(rows)
    console.print(rows_table(COLUMNS, table))
    data = data_title(dataset.name)
    return {"machine": machine, "data": data, "rows": rows, "quantiles": seen, "accuracy": options.accuracy}


def steps_to_accuracy(search: Search, dataset: ImageDataset) -> Row:
    """{"steps": the first multiple of EVERY after which the accuracy was reached (None: never), "best": the best}."""
    learner, best = begin_jax(search.run, dataset), 0.0
    for number, indices in enumerate(index_batches(search.run, len(dataset.train_labels)), 1):
        learner.step(indices)
        if number % EVERY == 0:
            best = max(best, learner.accuracy(False))
            if best >= search.accuracy:
                return {"steps": number, "best": best}
    return {"steps": None, "best": best}


def quantiles_by_epoch(run: Run, dataset: ImageDataset) -> dict[str, list[list[float]]]:
    """Layer -> after each epoch, from before the first on, the quantiles of its output, over images, places and units.

    With batch norm both sides of it: "Conv_0" and "BatchNorm_0" and so on. In training mode, on test images.
    """
    learner = begin_jax(run, dataset)
    found: dict[str, list[list[float]]] = {}
    steps = len(dataset.train_labels) // run.batch_size
    images = np.arange(min(WATCHED_IMAGES, len(dataset.test_labels)), dtype=np.int32)

    def look() -> None:
        assert learner.intermediates is not None, "in JAX"
        for name, value in learner.intermediates(images).items():
            found.setdefault(name, []).append(np.quantile(value, QUANTILES).tolist())

    for number, indices in enumerate(index_batches(run, len(dataset.train_labels))):
        if number % steps == 0:
            look()
        learner.step(indices)
    look()
    return found


def by_rate(rows: Sequence[Row]) -> list[Row]:
    """A row for each learning rate."""
    at = {(row["lr"], row["batch_norm"]): row for row in rows}
    return [{"lr": lr, "with": at[lr, True], "without": at[lr, False]} for lr in sorted({row["lr"] for row in rows})]


def _title(batch_norm: bool) -> str:
    return f"{'with' if batch_norm else 'without'} batch norm"


def _steps(row: Row) -> str:
    return f"{row['steps']:,}" if row["steps"] else f"not reached; best {row['best']:.4f}"


def _ratio(row: Row) -> str:
    fast, slow = row["with"]["steps"], row["without"]["steps"]
    return f"{slow / fast:.1f}" if fast and slow else "-"


COLUMNS = {
    "learning rate": lambda row: f"{row['lr']:g}",
    "steps with batch norm": lambda row: _steps(row["with"]),
    "steps without": lambda row: _steps(row["without"]),
    "times as many without": _ratio,
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/why_batch_norm.md."""
    # No time is claimed here: whether the machine was busy is of no interest.
    machine = {name: value for name, value in found["machine"].items() if name != "load before"} | {"busy": False}
    moves = [_moves(found["quantiles"], number) for number in range(len(LAYERS))]
    quantiles = ", ".join(map(str, QUANTILES))
    picture = options.write.with_suffix(".png").name if options.write else ""
    return f"""# What batch norm does

{made_by(command(PROG, options, "docs/why_batch_norm.md", without=["runs"]), machine)}

BLeNet and the same network without its batch norms, from the same seed, on {found["data"]}: plain SGD at a constant
rate, batches of 64, JAX. It is what the article on batch norm claims (Ioffe and Szegedy 2015, sections 4.1 and 4.2.1),
on this network.

![Steps to an accuracy by learning rate; quantiles of intermediate values by epoch]({picture})

## Learning rates

Steps until the test accuracy is {options.accuracy:g}, looked at every {EVERY} steps, in {options.epochs} epochs at
most.

{rows_markdown(COLUMNS, by_rate(found["rows"]))}

{conclusion(found["rows"])}

## Intermediate values

What comes in at the four sigmoids over the epochs, at a rate of {WATCHED_RATE:g}: the quantiles {quantiles}
over {WATCHED_IMAGES:,} test images and all units, in training mode. A sigmoid does most of its work between -2 and 2.
"Median moves": how far the median went over the epochs, highest minus lowest; "spread": from the lowest quantile to the
highest, after the last epoch.

{markdown_table([[*moves[0]], *([*row.values()] for row in moves)])}
"""


def conclusion(rows: Sequence[Row]) -> str:
    """One sentence: the best rate of each network, and at how many rates each learnt."""
    said = []
    for batch_norm in (True, False):
        of_it = [row for row in rows if row["batch_norm"] == batch_norm]
        learnt = [row for row in of_it if row["steps"]]
        name = _title(batch_norm).capitalize()
        if learnt:
            best = min(learnt, key=lambda row: row["steps"])
            fastest = f", fastest in {best['steps']:,} steps, at a rate of {best['lr']:g}"
        else:
            fastest = ""
        said.append(f"{name} it got there at {len(learnt)} of {len(of_it)} rates{fastest}.")
    return " ".join(said)


def _moves(quantiles: dict[str, dict[str, list[list[float]]]], number: int) -> dict[str, str]:
    """A row of the table: for each place how far its median went, and its spread at the end."""
    bands = _bands(quantiles, number)
    row = {"what comes in at the sigmoid of": LAYERS[number]}
    for name, band in bands.items():
        row[f"{name}: median moves"] = f"{np.ptp([point[1] for point in band]):.2f}"
        row[f"{name}: spread"] = f"{band[-1][2] - band[-1][0]:.2f}"
    return row


def _bands(quantiles: dict[str, dict[str, list[list[float]]]], number: int) -> dict[str, list[list[float]]]:
    """Name -> the quantiles of the layer with that number, epoch by epoch."""
    with_norm, without = quantiles[_title(True)], quantiles[_title(False)]
    return {
        "without batch norm": without[LAYERS[number]],
        "before batch norm": with_norm[LAYERS[number]],
        "after batch norm": with_norm[f"BatchNorm_{number}"],
    }


def draw(found: dict[str, Any]) -> Figure:
    """Above, steps by learning rate; below, a panel for each layer, quantiles by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    above, below = parts
    axes = above.subplots()
    for batch_norm, color in ((True, "tab:blue"), (False, "tab:orange")):
        points = [(row["lr"], row["steps"]) for row in found["rows"] if row["batch_norm"] == batch_norm]
        rates, reached = zip(*[(lr, steps or math.nan) for lr, steps in points], strict=True)
        axes.plot(rates, reached, "o-", color=color, label=_title(batch_norm))
        for lr, steps in points:
            if steps is None:
                axes.plot(lr, 0.97 if batch_norm else 0.92, "x", color=color, transform=axes.get_xaxis_transform())
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="steps")
    axes.set_title(f"Steps to a test accuracy of {found['accuracy']:.0%} (x: not reached)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    colors = {"without batch norm": "tab:orange", "before batch norm": "tab:green", "after batch norm": "tab:blue"}
    panels: Any = below.subplots(1, len(LAYERS), squeeze=False)[0]
    for number, panel in enumerate(panels):
        for name, band in _bands(found["quantiles"], number).items():
            low, middle, high = zip(*band, strict=True)
            epochs = range(len(band))
            panel.plot(epochs, middle, color=colors[name], label=name)
            panel.fill_between(epochs, low, high, color=colors[name], alpha=0.2, linewidth=0)
        panel.set_title(f"behind {LAYERS[number]}", fontsize=9)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    below.suptitle(f"What comes in at a sigmoid, rate {WATCHED_RATE:g}: median, and from 15 % to 85 %", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
