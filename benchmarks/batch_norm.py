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

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.peers import MODES, is_installed
from benchmarks.worker import serve
from bn_common.command_line import parse, refuse
from bn_common.run_folder import write_whole

PROG = "python -m benchmarks.batch_norm"
SHAPES, LARGE_SHAPES = ("256,28,28,6", "256,10,10,16", "256,120", "64,14,14,256"), ("32,56,56,64",)
ROUNDS, QUICK_ROUNDS = 25, 5
OURS, NATIVE = "jax_bn", "torch native"
BUSY_LOAD, BUSY_SPREAD = 0.5, 1.25


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
            if path is not None:
                _check_can_be_written(name, path)
    except ValueError as error:
        refuse(PROG, str(error))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    try:
        machine, rows = measure(shapes, QUICK_ROUNDS if options.quick else ROUNDS, console)
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted; nothing written\n")
        raise SystemExit(130) from None
    except (ArithmeticError, EOFError) as error:
        sys.stderr.write(f"{PROG}: stopped: {error or 'a worker has ended'}; nothing written\n")
        raise SystemExit(1) from None
    if options.json is not None:
        content = json.dumps({"machine": machine, "rows": rows}, indent=1, allow_nan=False) + "\n"
        write_whole(options.json, content.encode())
    if options.write is not None:
        write_whole(options.write, _text(machine, rows).encode())


def _check_can_be_written(option: str, path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} is {path}; allowed: a file in a folder that exists and can be written")


def measure(
    shapes: Sequence[tuple[int, ...]], rounds: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Print a table per shape; return what the machine is and all the rows."""
    machine: dict[str, Any] = _machine()
    spread, rows = [], []
    with contextlib.ExitStack() as stack:
        workers = {
            framework: stack.enter_context(_worker(framework))
            for framework in ("jax", "torch")
            if framework == "jax" or is_installed("torch")
        }
        if "torch" not in workers:
            console.print("PyTorch's batch norms are left out: torch is not installed (pip install '.[torch]')")
        for connection in workers.values():
            about, missing = _answer(connection)
            machine |= about
            for line in missing:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(
            ", ".join(f"{name} {value}" for name, value in machine.items()),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        for shape in shapes:
            rounds_of, seconds = _measure_shape(workers, shape, rounds, console)
            spread += seconds
            of_shape = _rows(shape, rounds_of)
            console.print(_table(shape, of_shape))
            rows += of_shape
    machine["calibration spread"] = round(_spread(spread), 3)
    _say_if_busy(machine, console)
    return machine, rows


Times = dict[tuple[str, str, str], list[float]]


def _measure_shape(
    workers: dict[str, Connection], shape: tuple[int, ...], rounds: int, console: Console
) -> tuple[Times, list[float]]:
    """(framework, name, mode) -> seconds a call, a figure a round; and the calibration's, likewise."""
    channels_second = (shape[0], shape[-1], *shape[1:-1])
    for connection in workers.values():
        connection.send(("prepare", channels_second))
    names = {framework: _answer(connection) for framework, connection in workers.items()}
    times: Times = {(f, name, mode): [] for mode in MODES for f in names for name in names[f]}
    calibration = []
    label = "x".join(map(str, shape))
    # A framework after the other: PyTorch's threads keep a core busy for some time after they have been used. And the
    # turns begin with another peer each round: none is always the first after the calibration, or after a slow one.
    turns = [(framework, turn) for framework in names for turn in range(rounds)]
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        for framework, turn in track(turns, label, console=console, transient=True, disable=not console.is_terminal):
            calibration.append(_calibrate(pool))
            mine = [key for key in times if key[0] == framework]
            first = turn % len(mine)
            for _, name, mode in mine[first:] + mine[:first]:
                workers[framework].send(("block", name, mode))
                times[framework, name, mode].append(_answer(workers[framework]))
    return times, calibration


@contextlib.contextmanager
def _worker(framework: str) -> Iterator[Connection]:
    """A process that serves one framework's peers."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, framework), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(2)
        process.kill()


def _answer(connection: Connection) -> Any:
    """What the worker says; ArithmeticError if it is that, EOFError if the worker has ended."""
    answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


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
            cells.append(f"{_ms(row['median_ms'])} ({_ms(row['min_ms'])} to {_ms(row['max_ms'])})")
            cells.append(f"{row['ratio']:.2f}" + ("*" if row["ratio_to"] == name else " "))
        table.add_row(name, *cells)
    return table


def _ms(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _machine() -> dict[str, Any]:
    """Processor, cores, load before anything has begun."""
    load = {"load before": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {}
    return {"CPU": _cpu(), "cores": _cores(), "Python": platform.python_version()} | load


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_KERNEL = np.linspace(0, 1, 100_000)


def _calibrate(pool: concurrent.futures.ThreadPoolExecutor) -> float:
    """Seconds of a fixed piece of work on every core at once: the same each time, if nobody else is at work."""
    begin = time.perf_counter()
    list(pool.map(lambda _: np.sin(_KERNEL), range(_cores())))
    return time.perf_counter() - begin


def _spread(seconds: list[float]) -> float:
    """Median over the lower decile: 1 where the same work always takes the same time."""
    return statistics.median(seconds) / sorted(seconds)[len(seconds) // 10]


def _say_if_busy(machine: dict[str, Any], console: Console) -> None:
    signs = []
    if machine.get("load before", 0) > BUSY_LOAD:
        signs.append(f"the load was {machine['load before']} before the start")
    if machine["calibration spread"] > BUSY_SPREAD:
        signs.append(
            f"the same piece of work took {machine['calibration spread']:.2f} times its time in half the rounds"
        )
    machine["busy"] = bool(signs)
    if signs:
        # Threads that meet at a barrier wait for the one whose core is taken, a time slice for each parallel region:
        # PyTorch's ratios then count regions instead of work.
        advice = "Neither times nor ratios (PyTorch's least of all) are worth much: measure again when it is quiet."
        console.print(f"The machine was busy with other things: {'; '.join(signs)}. {advice}", soft_wrap=True)


OVER_NATIVE = """Why PyTorch's wing is not as fast as the native batch norm, which is less exact: what a CPU
moves to and from memory, in lengths of x.

|                                 | native | torch_bn |
|---------------------------------|-------:|---------:|
| mean of x                       |        |        1 |
| x to near its mean: read, write |        |        2 |
| the kernel: x three times, y    |      4 |        4 |
| sum of dy                       |        |        1 |
| dy centred: read, write         |        |        2 |
| the kernel: dy and x twice, dx  |      5 |        5 |
| in all                          |      9 |       15 |

15/9 = 1.67 is what to expect of an image that does not fit into a cache. Without the shift, a large mean would be lost;
without centring dy, a common offset in it would be, from gamma's gradient. Where a batch is as small as 256 x 120, the
time is that of 46 small operations, as PyTorch's profiler counts, against two of the native one's. From 2^18 values per
channel on, the sums of the gradient are taken in float64, and the step takes longer (see `LONG_SUM` in either
`batch_norm.py`)."""


def _text(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """docs/batch_norm_speed.md."""
    made = (
        f"Made by `{PROG} --write docs/batch_norm_speed.md` with "
        + ", ".join(f"{name} {value}" for name, value in machine.items() if name not in BUSY)
        + "."
    )
    busy = (
        f" **The machine was busy with other things** (load {machine.get('load before', '?')} before the start, the "
        f"same piece of work took {machine['calibration spread']} times its time): times and ratios are rough."
        if machine["busy"]
        else ""
    )
    head = f"""# How fast batch norm is

{textwrap.fill(made + busy, 120, break_on_hyphens=False)}

float32, x and dy N(0, 1). A cell is the median time of a call in milliseconds and, in brackets, the median of the
ratios to the reference, taken round by round: in JAX the fastest library other than ours (\\*), in PyTorch the native
batch norm. Shapes are written channels last, as JAX takes them; PyTorch has the channels on axis 1,
contiguous. How it is measured stands in `benchmarks/batch_norm.py`.
"""
    shapes = dict.fromkeys(tuple(row["shape"]) for row in rows)
    tables = [_markdown(shape, [row for row in rows if tuple(row["shape"]) == shape]) for shape in shapes]
    return "\n".join([head, *tables, OVER_NATIVE, ""])


BUSY = ("load before", "calibration spread", "busy")


def _markdown(shape: tuple[int, ...], rows: Sequence[dict[str, Any]]) -> str:
    """A shape's table: peers down, modes across."""
    lines = [["", *MODES]]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = {row["mode"]: row for row in rows if row["name"] == name}
        cells = []
        for mode in MODES:
            row = of_name[mode]
            mark = "\\*" if row["ratio_to"] == name else ""
            cells.append(f"{_ms(row['median_ms'])} ({row['ratio']:.2f}{mark})")
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    text = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    ]
    return "\n".join([f"## {' x '.join(map(str, shape))}", "", text[0], rule, *text[1:], ""])


if __name__ == "__main__":
    main()
