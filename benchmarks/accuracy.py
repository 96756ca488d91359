"""What BLeNet reaches on Fashion-MNIST, in both wings, with batch norm and without, over several seeds.

    python -m benchmarks.accuracy --runs runs/accuracy --write docs/accuracy.md

With batch norm, the learning rates are the training programs' own. Without, they are those of `RATES` with which the
network did best on 10,000 training images that were held out. Each run has one core; in the folder `--runs` what is
finished is kept, and not done again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.console import Console

from benchmarks.harness import (
    command,
    describe_machine,
    is_installed,
    made_by,
    measured,
    print_line,
    print_machine,
    rows_markdown,
    rows_table,
)
from benchmarks.learning.pool import in_parallel
from benchmarks.learning.runs import PRECISE_BATCHES, PRECISE_SIZE, Run, train
from bn_common.command_line import load, parse
from bn_common.config import DEFAULTS, Config
from bn_common.shown import data_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROG = "python -m benchmarks.accuracy"
WINGS: tuple[Literal["jax", "torch"], ...] = ("jax", "torch")
Optimizer = Literal["adamw", "sgd"]
RATES: dict[Optimizer, tuple[float, ...]] = {"adamw": (0.003, 0.01, 0.03, 0.1), "sgd": (0.3, 1.0, 3.0, 10.0)}
HELD_OUT_EPOCHS, HELD_OUT_SEED = 5, 1000
LEAST = 0.918
"""Bound for the mean test accuracy of the default run in 10 epochs, in either wing."""

TUTORIAL: dict[str, Any] = {"optimizer": "sgd", "lr": 1.0, "schedule": "constant", "batch_size": 256}
"""As tutorials train this network: a high rate that never falls."""

STATISTICS = ("moving", "precise")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    seeds: int = 5
    """Runs of each kind, seeds 0, 1, ...; 2 to 100."""
    epochs: int = 10
    """Of each run, 1 to 1000."""
    data: Literal["fashion-mnist", "sample"] = "fashion-mnist"
    """fashion-mnist or sample, as the programs have it."""
    runs: Path | None = None
    """Folder in which finished runs are kept."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write a page to this file, in Markdown, and a figure beside it."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="Test accuracy over seeds, both wings.")
    measured(options, PROG, _check, measure, _markdown, draw)


def _check(options: Options) -> None:
    if not 2 <= options.seeds <= 100:
        raise ValueError(f"--seeds is {options.seeds}; allowed: 2 to 100")
    if not 1 <= options.epochs <= 1000:
        raise ValueError(f"--epochs is {options.epochs}; allowed: 1 to 1000")
    if options.runs is not None and options.runs.exists() and not options.runs.is_dir():
        raise ValueError(f"--runs is {options.runs}; allowed: a folder")
    if not is_installed("torch"):
        raise ValueError("torch is not installed; allowed: an environment with it (pip install '.[torch]')")


def measure(options: Options, console: Console) -> dict[str, Any]:
    """Choose the learning rates without batch norm, train all runs, print a row for each kind."""
    dataset = load(Config(data=options.data), console)
    machine = describe_machine() | {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch")}
    print_machine(machine, console)
    tried = [
        Run("jax", False, optimizer, lr, min(HELD_OUT_EPOCHS, options.epochs), HELD_OUT_SEED, _held_out(dataset))
        for optimizer, rates in RATES.items()
        for lr in rates
    ]
    held_out: dict[str, dict[float, float]] = {optimizer: {} for optimizer in RATES}
    for run, found in in_parallel(train, tried, dataset, options.runs):
        held_out[run.optimizer][run.lr] = found["moving"][-1]
        print_line(f"held out: {run.optimizer} {run.lr:g}: {found['moving'][-1]:.4f}", console)

    def rate(batch_norm: bool, optimizer: Optimizer) -> float:
        return DEFAULTS[optimizer][0] if batch_norm else max(held_out[optimizer], key=held_out[optimizer].__getitem__)

    wanted = [
        Run(wing, batch_norm, optimizer, rate(batch_norm, optimizer), options.epochs, seed)
        for batch_norm in (True, False)
        for optimizer in get_args(Optimizer)
        for seed in range(options.seeds)
        for wing in WINGS
    ] + [
        Run(wing, True, epochs=options.epochs, seed=seed, **TUTORIAL) for seed in range(options.seeds) for wing in WINGS
    ]
    kinds: dict[tuple[Any, ...], list[dict[str, list[float]]]] = {}
    for run, found in in_parallel(train, wanted, dataset, options.runs):
        kinds.setdefault((not run.batch_norm, title(run), run.lr, run.wing), []).append(found)
        print_line(f"{run.wing} {title(run)} seed {run.seed}: {_last(found)}", console)
    rows = [
        {"title": name, "lr": lr, "wing": wing, "statistics": kind, **_summary(runs, kind)}
        for (_, name, lr, wing), runs in sorted(kinds.items())
        for kind in runs[0]
    ]
    console.print(rows_table(COLUMNS, rows))
    found = {"machine": machine, "data": data_title(dataset.name), "held_out": held_out, "rows": rows}
    for line in bounds(rows, options.epochs):
        print_line(line, console)
    return found


def _held_out(dataset: Any) -> int:
    """10,000 of 60,000, and as large a part of another."""
    return len(dataset.train_labels) // 6


def _summary(runs: Sequence[dict[str, list[float]]], kind: str) -> Row:
    """Mean and standard deviation (n - 1) of the last accuracy; the mean of each epoch, and all runs' last ones."""
    last = [run[kind][-1] for run in runs]
    return {
        "mean": statistics.mean(last),
        "std": statistics.stdev(last),
        "seeds": len(last),
        "all": sorted(last),
        "on_the_way": min(min(run[kind][1:] or run[kind]) for run in runs),
        "highest_on_the_way": max(max(run[kind][1:] or run[kind]) for run in runs),
        "curve": [statistics.mean(values) for values in zip(*(run[kind] for run in runs), strict=True)],
        "curve_std": [statistics.stdev(values) for values in zip(*(run[kind] for run in runs), strict=True)],
    }


def bounds(rows: Sequence[Row], epochs: int) -> list[str]:
    """A line for each bound: the default run's mean in both wings, and how far apart the wings are."""
    by_kind = {(row["title"], row["statistics"], row["wing"]): row for row in rows}
    default = title(Run("jax", True, "adamw", DEFAULTS["adamw"][0], epochs, 0))
    lines = []
    if epochs == 10:
        for wing in WINGS:
            mean = by_kind[default, "moving", wing]["mean"]
            lines.append(f"{wing}, {default}: {mean:.4f}, bound {LEAST}: {'met' if mean >= LEAST else 'missed'}")
    for name, kind, wing in by_kind:
        if wing == WINGS[0]:
            one, other = (by_kind[name, kind, either] for either in WINGS)
            # Of the difference of two independent means.
            error = math.sqrt(sum(row["std"] ** 2 / row["seeds"] for row in (one, other)))
            apart = abs(one["mean"] - other["mean"])
            lines.append(
                f"the wings' means, {name}, {kind} statistics: {apart:.4f} apart, "
                f"{apart / error if error else math.nan:.1f} standard errors of the difference ({error:.4f})"
            )
    return lines


def title(run: Run) -> str:
    """What kind of run it is, but for wing, learning rate and seed."""
    schedule = "" if run.schedule == "cosine" else f", rate {run.schedule}, batches of {run.batch_size}"
    return f"{'with' if run.batch_norm else 'without'} batch norm, {run.optimizer}{schedule}"


def _last(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{kind} {values[-1]:.4f}" for kind, values in found.items())


COLUMNS = {
    "": lambda row: row["title"],
    "learning rate": lambda row: f"{row['lr']:g}",
    "wing": lambda row: row["wing"],
    "statistics": lambda row: row["statistics"],
    "mean": lambda row: f"{row['mean']:.4f}",
    "std": lambda row: f"{row['std']:.4f}",
    "lowest": lambda row: f"{row['all'][0]:.4f}",
    "highest": lambda row: f"{row['all'][-1]:.4f}",
    "lowest on the way": lambda row: f"{row['on_the_way']:.4f}",
    "seeds": lambda row: str(row["seeds"]),
}


def _markdown(found: dict[str, Any], options: Options) -> str:
    """docs/accuracy.md."""
    # No time is claimed here: whether the machine was busy is of no interest.
    machine = {name: value for name, value in found["machine"].items() if name != "load before"} | {"busy": False}
    tried = [
        {"optimizer": optimizer, "lr": lr, "accuracy": accuracy}
        for optimizer, rates in found["held_out"].items()
        for lr, accuracy in sorted(rates.items())
    ]
    columns = {
        "without batch norm": lambda row: row["optimizer"],
        "learning rate": lambda row: f"{row['lr']:g}",
        "accuracy, held out": lambda row: f"{row['accuracy']:.4f}",
    }
    picture = options.write.with_suffix(".png").name if options.write else ""
    held_out_epochs = min(HELD_OUT_EPOCHS, options.epochs)
    said = "\n".join(f"- {line}" for line in bounds(found["rows"], options.epochs))
    return f"""# What BLeNet reaches

{made_by(command(PROG, options, "docs/accuracy.md", without=["runs"]), machine)}

Test accuracy on {found["data"]} after {options.epochs} epochs, over {options.seeds} seeds for each row: mean, standard
deviation (n - 1), lowest and highest. Each seed has its own weights and its own order of batches, in each wing.
Batches of 64, the programs' schedule (warm-up of one epoch, half a cosine), weight decay and label smoothing. With
batch norm the learning rate is the programs' default; without, the best of the second table, be it the highest
that was tried.

![Test accuracy after each epoch, mean and standard deviation]({picture})

{rows_markdown(COLUMNS, found["rows"])}

{said}

A difference of two means of so few runs is within one standard error in about two cases of three, if nothing is
behind it, and within two in nineteen of twenty.

**moving** statistics are what training leaves: an average in which the last ten batches or so count. **precise** ones
are taken over {PRECISE_BATCHES} batches of {PRECISE_SIZE} training images, with the weights as they are (paper,
Algorithm 2; `precise_statistics` in either wing). "lowest on the way" is the lowest accuracy of any run after
any epoch but the first. While the rate is high, the weights run away from the average; where it falls to 0, the two
meet.

{others(found["rows"])}

## Learning rates without batch norm

{held_out_epochs} epochs on five sixths of the training images, one run each (JAX, seed {HELD_OUT_SEED}), tested on the
rest. No test image was seen.

{rows_markdown(columns, tried)}
"""


def others(rows: Sequence[Row]) -> str:
    """What explains the figures that others report, by those that were found here."""
    constant = title(Run("jax", True, epochs=1, seed=0, **TUTORIAL))
    found = {
        kind: [row for row in rows if (row["title"], row["statistics"]) == (constant, kind)] for kind in STATISTICS
    }
    low, high = (
        {kind: pick(row[name] for row in of) for kind, of in found.items()}
        for pick, name in ((min, "on_the_way"), (max, "highest_on_the_way"))
    )
    tutorial = f"{TUTORIAL['optimizer']} at a constant {TUTORIAL['lr']:g} and batches of {TUTORIAL['batch_size']}"
    ranges = {kind: f"{low[kind]:.3f} to {high[kind]:.3f}" for kind in STATISTICS}
    text = (
        f"Lower accuracies than these are often told of this network. A rate that is high to the end is enough to have "
        f"them: with {tutorial}, the accuracy after an epoch was anything from {ranges['moving']} with moving "
        f"statistics, and {ranges['precise']} with precise ones of the very same weights. It is the average that is "
        f"noisy, more than the network; and a rate that falls to 0 needs no other statistics."
    )
    return f"## What others report\n\n{textwrap.fill(text, 120)}"


def draw(found: dict[str, Any]) -> Figure:
    """Curves over the epochs: a panel for each optimiser and network, mean as a line, standard deviation as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    kinds = list(dict.fromkeys(row["title"] for row in found["rows"]))
    figure = Figure(figsize=(9, 9), layout="constrained")
    panels = figure.subplots(math.ceil(len(kinds) / 2), 2, squeeze=False).flat
    colors, styles = {"jax": "tab:blue", "torch": "tab:orange"}, {"moving": "-", "precise": "--"}
    for axes, kind in zip(panels, kinds, strict=False):
        for row in found["rows"]:
            if row["title"] == kind:
                epochs = range(1, len(row["curve"]) + 1)
                low, high = ([m + s * d for m, d in zip(row["curve"], row["curve_std"], strict=True)] for s in (-1, 1))
                label = f"{row['wing']}, {row['statistics']}"
                color = colors[row["wing"]]
                axes.plot(epochs, row["curve"], styles[row["statistics"]], color=color, label=label)
                axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(title=kind, xlabel="epoch")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"Test accuracy on {found['data']}, mean and standard deviation", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
