"""The rows as tables in a terminal, as Markdown and as a plot."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from benchmarks.harness import made_by, ms, rows_markdown
from benchmarks.step.peers import OURS, REFERENCE, TRAIN

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

COLUMNS: Columns = {
    "": lambda row: row["name"],
    "ms": lambda row: ms(row["median_ms"]),
    "min": lambda row: ms(row["min_ms"]),
    "max": lambda row: ms(row["max_ms"]),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "first step, s": lambda row: f"{row['compile_s']:.1f}",
    "peak MiB": lambda row: f"{row['peak_memory_mib']:.0f}",
}
COMPARISONS: Columns = {
    "": lambda row: row["what"],
    "mode": lambda row: f"{row['mode']} {row['batch_size']}",
    "threads": lambda row: str(row["threads"]),
    "found": lambda row: f"{row['value']:.2f}",
    "95 %": lambda row: f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else "",
    "bound": lambda row: f"{row['bound']:.2f}",
    "met": lambda row: "yes" if row["met"] else "no",
}
SCALING: Columns = {
    "": lambda row: row["name"],
    "threads": lambda row: str(row["threads"]),
    "image": lambda row: str(row["fig_size"]),
    "batch": lambda row: str(row["batch_size"]),
    "ms": lambda row: ms(row["median_ms"]),
    "us an image": lambda row: ms(row["median_ms"] * 1e3 / row["batch_size"]),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "peak MiB": lambda row: f"{row['peak_memory_mib']:.0f}",
}
EXPLANATION = f"""\
BLeNet on images of 28 x 28 in float32, Adam, from the same weights on the same batches, which are on the device: every
peer has been checked to be the same network. Milliseconds a step, or a prediction: median, fastest and slowest of the
rounds. A round is a block of steps of each peer in turn; the ratio to {REFERENCE} (PyTorch, eager, with nn.BatchNorm)
is taken round by round, and is the median of these. The first step includes compilation; the peak of memory is the
process's until then. How it is measured stands in `benchmarks/train_step.py`, and each peer as it was run in
`benchmarks/step/`."""
BOUNDS = """\
Medians of the ratios of each round, with a confidence interval of 95 % for the median. jax_bn scan, a step as one of
ten in a `lax.scan`, and jax_bn with its input, which gathers the batch from 60,000 uint8 images on the device and
standardises it, are measured beside jax_bn alone, in more rounds, with several processes of each."""
Report = Mapping[str, Any]
"""{"machine": ..., "rows": ..., "comparisons": ..., "scaling": ...}, the last if measured."""


def table(columns: Columns, rows: Sequence[Row]) -> Table:
    """For the terminal."""
    made = Table(box=rich.box.SIMPLE)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(cell(row) for cell in columns.values()))
    return made


def title_of(row: Row) -> str:
    """Of the table that a row stands in."""
    what = "Training step" if row["mode"] == TRAIN else "Prediction"
    return f"{what}, batch {row['batch_size']}, {_threads(row['threads'])}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def by_title(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each table."""
    titles = dict.fromkeys(map(title_of, rows))
    return {title: [row for row in rows if title_of(row) == title] for title in titles}


def markdown(report: Report, command: str, picture: str | None) -> str:
    """docs/train_step_speed.md."""
    parts = [
        "# How fast a training step is",
        made_by(command, report["machine"]),
        EXPLANATION,
    ]
    if picture is not None:
        parts.append(f"![Milliseconds a step, median and range]({picture})")
    for title, rows in by_title(report["rows"]).items():
        parts += [f"## {title}", rows_markdown(COLUMNS, rows)]
    if report["comparisons"]:
        parts += ["## Bounds", BOUNDS, rows_markdown(COMPARISONS, report["comparisons"])]
    if "scaling" in report:
        parts += [
            "## Scaling",
            f"A training step at other sizes. The ratio is to {REFERENCE} of the same size and threads.",
            rows_markdown(SCALING, report["scaling"]),
        ]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], path: Path) -> bytes:
    """Bars of the median, whiskers from the fastest to the slowest round; PNG or SVG by the path's suffix."""
    # Only now: what is refused or interrupted before has not waited half a second for it.
    from matplotlib.figure import Figure

    tables = by_title(rows)
    heights = [len(of_table) for of_table in tables.values()]
    figure = Figure(figsize=(8, sum(heights) * 0.28 + len(heights) * 0.8), layout="constrained")
    all_axes = figure.subplots(len(tables), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, of_table) in zip(all_axes, tables.items(), strict=True):
        medians = [row["median_ms"] for row in of_table]
        whiskers = [
            [row["median_ms"] - row["min_ms"] for row in of_table],
            [row["max_ms"] - row["median_ms"] for row in of_table],
        ]
        colors = ["tab:blue" if row["name"] in OURS else "tab:gray" for row in of_table]
        axes.barh([row["name"] for row in of_table], medians, xerr=whiskers, color=colors, capsize=2)
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="ms, median and range of the rounds")
        axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=120)
    return buffer.getvalue()
