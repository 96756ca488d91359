"""How fast is batch norm, beside its peers in the same run?

    python -m benchmarks.batch_norm --quick
    python -m benchmarks.batch_norm --json times.json --shapes 256,28,28,6 256,120
    python -m benchmarks.batch_norm --write docs/batch_norm_speed.md

Every peer is first checked to compute the same function. Then those of a framework take turns, A B C B C A ..., in
blocks of some 20 ms;
a ratio is taken within each round, so that a machine that is slower for a while is slower for both of its sides, and
the median of these is printed. That does not help where other programs take a core away; the last line says so.
JAX and PyTorch run in a process each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import (
    Calibration,
    answer,
    check_can_be_written,
    describe_machine,
    is_installed,
    made_by,
    make_console,
    markdown_table,
    ms,
    note_busy,
    or_stop,
    print_line,
    print_machine,
    to_json,
    worker,
)
from benchmarks.peers import MODES
from benchmarks.worker import serve
from bn_common.command_line import parse, refuse
from bn_common.files import write_whole

PROG = "python -m benchmarks.batch_norm"
SHAPES, LARGE_SHAPES = ("256,28,28,6", "256,10,10,16", "256,120", "64,14,14,256"), ("32,56,56,64",)
ROUNDS, QUICK_ROUNDS = 25, 5
OURS, NATIVE = "jax_bn", "torch native"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    quick: bool = False
    """Fewer rounds, and without the largest shape: a minute instead of several."""
    json: Path | None = None
    """Also write the figures to this file."""
    write: Path | None = None
    """Also write the tables to this file, in Markdown, with what explains them."""
    shapes: tuple[str, ...] = ()
    """Shapes of x, channels last, sizes joined by commas: two or more, and two or more values per channel.
    None given: 256,28,28,6 256,10,10,16 256,120 64,14,14,256, and if not --quick 32,56,56,64."""


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape that --shapes names, channels last; ValueError says what is allowed."""
    try:
        shape = tuple(map(int, text.split(",")))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[:-1]) < 2 or math.prod(shape) > 2**28:
        raise ValueError(
            f"--shapes is {text!r}; allowed: like 256,28,28,6, channels last, two or more values per channel"
        )
    return shape


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="Batch norm's speed beside its peers, in ratios.")
    try:
        shapes = [parse_shape(text) for text in options.shapes or SHAPES + LARGE_SHAPES * (not options.quick)]
        for name, path in (("--json", options.json), ("--write", options.write)):
            check_can_be_written(name, path)
    except ValueError as error:
        refuse(PROG, str(error))
    with or_stop(PROG):
        machine, rows = measure(shapes, QUICK_ROUNDS if options.quick else ROUNDS, make_console())
    if options.json is not None:
        write_whole(options.json, to_json({"machine": machine, "rows": rows}))
    if options.write is not None:
        write_whole(options.write, _text(machine, rows).encode())


def measure(
    shapes: Sequence[tuple[int, ...]], rounds: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Print a table per shape; return what the machine is and all the rows."""
    machine, rows = describe_machine(), []
    with contextlib.ExitStack() as stack:
        calibration = stack.enter_context(Calibration())
        workers = {
            framework: stack.enter_context(worker(serve, framework))
            for framework in ("jax", "torch")
            if framework == "jax" or is_installed("torch")
        }
        if "torch" not in workers:
            console.print("PyTorch's batch norms are left out: torch is not installed (pip install '.[torch]')")
        for connection in workers.values():
            about, missing = answer(connection)
            machine |= about
            for line in missing:
                print_line(line, console)
        print_machine(machine, console)
        for shape in shapes:
            of_shape = _rows(shape, _measure_shape(workers, shape, rounds, calibration, console))
            console.print(_table(shape, of_shape))
            rows += of_shape
    note_busy(machine, calibration, console)
    return machine, rows


Times = dict[tuple[str, str, str], list[float]]


def _measure_shape(
    workers: dict[str, Connection], shape: tuple[int, ...], rounds: int, calibration: Calibration, console: Console
) -> Times:
    """(framework, name, mode) -> seconds a call, a figure a round."""
    channels_second = (shape[0], shape[-1], *shape[1:-1])
    for connection in workers.values():
        connection.send(("prepare", channels_second))
    names = {framework: answer(connection) for framework, connection in workers.items()}
    times: Times = {(f, name, mode): [] for mode in MODES for f in names for name in names[f]}
    label = "x".join(map(str, shape))
    # A framework after the other: PyTorch's threads keep a core busy for some time after they have been used. And the
    # turns begin with another peer each round: none is always the first after the calibration, or after a slow one.
    turns = [(framework, turn) for framework in names for turn in range(rounds)]
    for framework, turn in track(turns, label, console=console, transient=True, disable=not console.is_terminal):
        calibration.take()
        mine = [key for key in times if key[0] == framework]
        first = turn % len(mine)
        for _, name, mode in mine[first:] + mine[:first]:
            workers[framework].send(("block", name, mode))
            times[framework, name, mode].append(answer(workers[framework]))
    return times


def _rows(shape: tuple[int, ...], times: Times) -> list[dict[str, Any]]:
    """The figures of a shape, each with its ratio to the reference of its framework and mode."""
    rows = []
    for (framework, name, mode), seconds in times.items():
        reference = _reference(framework, mode, times)
        ratios = [a / b for a, b in zip(seconds, times[framework, reference, mode], strict=True)]
        rows.append(
            {
                "name": name,
                "framework": framework,
                "shape": list(shape),
                "mode": mode,
                "median_ms": statistics.median(seconds) * 1e3,
                "min_ms": min(seconds) * 1e3,
                "max_ms": max(seconds) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_to": reference,
            }
        )
    return rows


def _reference(framework: str, mode: str, times: Times) -> str:
    """PyTorch: its native batch norm. JAX: the fastest of those that are not ours."""
    if framework == "torch":
        return NATIVE
    others = [name for f, name, of_mode in times if (f, of_mode) == (framework, mode) and name != OURS]
    return min(others, key=lambda name: statistics.median(times[framework, name, mode]))


def _table(shape: tuple[int, ...], rows: list[dict[str, Any]]) -> Table:
    """Peers down, modes across: milliseconds (fastest to slowest round), and the ratio (* is the reference)."""
    table = Table(
        title=f"{' x '.join(map(str, shape))}: ms a call, median (min to max) of the rounds; ratio to the *",
        box=rich.box.SIMPLE,
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for mode in MODES:
        table.add_column(mode, justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    previous = None
    for framework, name in dict.fromkeys((row["framework"], row["name"]) for row in rows):
        if previous not in (None, framework):
            table.add_section()
        previous = framework
        cells = []
        for row in (row for row in rows if row["name"] == name):
            cells.append(f"{ms(row['median_ms'])} ({ms(row['min_ms'])} to {ms(row['max_ms'])})")
            cells.append(f"{row['ratio']:.2f}" + ("*" if row["ratio_to"] == name else " "))
        table.add_row(name, *cells)
    return table


WHERE_IT_GOES = """## Where the time goes

JAX. XLA hands a plain sum of float32 to a library, and of the others makes loops; so the mean, the variance and the two
sums of the gradient are a pass over memory each, and y and dx one more.

PyTorch. What a step on a CPU moves to and from memory, in lengths of x, where x does not fit into a cache; beside it
where a mean is further than 1.7 standard deviations from 0, and x is taken relative to a value near it:

|                                         | native | torch_bn | a large mean |
|-----------------------------------------|-------:|---------:|-------------:|
| the statistics: each reads twice        |      2 |        2 |            2 |
| mean of a quarter of x                  |        |          |          0.5 |
| x to near its mean: read, write         |        |          |            2 |
| statistics again                        |        |          |            2 |
| y: read, write                          |      2 |        2 |            2 |
| the sum of dy                           |        |        1 |            1 |
| the kernel: dy and x twice, dx          |      5 |        5 |            5 |
| in all                                  |      9 |       10 |         14.5 |
| dy centred, where it has a large offset |        |       +2 |           +2 |

The native kernel reads its statistics one value at a time, which takes as long as all else; so the sums that stand for
it more than pay for the sum of dy. Without the shift, a large mean would be lost; without centring dy, a common offset
in it would be, from gamma's gradient. Whether it has one is seen from some of the examples: `torch_bn/kernels.py`.
The larger the means of x, the sooner an offset shows: then the table's last line counts.
Planes above 32 x 32 are added up again for gamma's gradient, in 5 more. Where a batch is as small as 256 x 120, the
time is that of some 50 small operations, of 1 to 8 us each, against two of the native one's."""


def _text(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """docs/batch_norm_speed.md."""
    head = f"""# How fast batch norm is

{made_by(f"{PROG} --write docs/batch_norm_speed.md", machine)}

float32, x and dy N(0, 1). A cell is the median time of a call in milliseconds and, in brackets, the median of the
ratios to the reference, taken round by round: in JAX the fastest library other than ours (\\*), in PyTorch the native
batch norm. Shapes are written channels last, as JAX takes them; PyTorch has the channels on axis 1,
contiguous. The processes keep what memory they have freed (`bn_common.memory`, `compute_in_the_caller`), all peers
alike: called by itself, a layer would pay for page faults that it does not have in a network. How it is measured stands
in `benchmarks/batch_norm.py`.
"""
    shapes = dict.fromkeys(tuple(row["shape"]) for row in rows)
    tables = [_markdown(shape, [row for row in rows if tuple(row["shape"]) == shape]) for shape in shapes]
    return "\n".join([head, *tables, WHERE_IT_GOES, ""])


def _markdown(shape: tuple[int, ...], rows: Sequence[dict[str, Any]]) -> str:
    """A shape's table: peers down, modes across."""
    lines = [["", *MODES]]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = {row["mode"]: row for row in rows if row["name"] == name}
        cells = []
        for mode in MODES:
            row = of_name[mode]
            mark = "\\*" if row["ratio_to"] == name else ""
            cells.append(f"{ms(row['median_ms'])} ({row['ratio']:.2f}{mark})")
        lines.append([name, *cells])
    return "\n".join([f"## {' x '.join(map(str, shape))}", "", markdown_table(lines), ""])


if __name__ == "__main__":
    main()
