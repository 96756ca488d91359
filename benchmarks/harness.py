"""What the timing programs share: what the machine is and whether it is busy, processes to measure in, how to print."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

from bn_common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUSY_LOAD, BUSY_SPREAD = 0.5, 1.25
BUSY = ("load before", "calibration spread", "busy")
_KERNEL = np.linspace(0, 1, 100_000)


class Installable(Protocol):
    """A peer: `module` is what must be installed for it, by pip's extra `extra` of this project."""

    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def extra(self) -> str: ...  # noqa: D102


AnyPeer = TypeVar("AnyPeer", bound=Installable)


def is_installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def installed(peers: Mapping[str, AnyPeer]) -> tuple[dict[str, AnyPeer], list[str]]:
    """The peers that can be measured here, and a line about each that can't."""
    here = {name: peer for name, peer in peers.items() if is_installed(peer.module)}
    missing = [
        f"{name} is left out: {peer.module} is not installed (pip install '.[{peer.extra}]')"
        for name, peer in peers.items()
        if name not in here
    ]
    return here, missing


def describe_machine() -> dict[str, Any]:
    """Processor, cores, and how many of these were at work before anything has begun."""
    load = _load()
    about = {"CPU": _cpu(), "cores": count_cores(), "Python": platform.python_version()}
    return about if load is None else about | {"load before": round(load, 2)}


def _load() -> float | None:
    """How many cores are at work, over a second in which this process is not.

    The system's own figure is a mean over a minute, in which another benchmark of this project may just have ended.
    """
    before = _work_and_all()
    if before is None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    time.sleep(1)
    after = _work_and_all()
    assert after is not None, "it was there before"
    return (after[0] - before[0]) / max(1, after[1] - before[1]) * (os.cpu_count() or 1)


def _work_and_all() -> tuple[int, int] | None:
    """Ticks of all cores since the machine began, those at work and all."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = list(map(int, file.readline().split()[1:9]))
    except OSError:
        return None
    idle = sum(ticks[3:5])  # idle, or waiting for a disk
    return sum(ticks) - idle, sum(ticks)


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Calibration:
    """A fixed piece of work, done again and again: it takes the same time, if nobody else is at work."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(count_cores())

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def take(self) -> None:
        """Do it once, on every core at once."""
        begin = time.perf_counter()
        list(self._pool.map(lambda _: np.sin(_KERNEL), range(count_cores())))
        self.seconds.append(time.perf_counter() - begin)

    def spread(self) -> float:
        """Median over the lower decile: 1 where the same work has always taken the same time."""
        return statistics.median(self.seconds) / sorted(self.seconds)[len(self.seconds) // 10]


def note_busy(machine: dict[str, Any], calibration: Calibration, console: Console) -> None:
    """Add to the machine's description whether it was busy with other things, and say so if it was."""
    machine["calibration spread"] = round(calibration.spread(), 3)
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


def made_by(command: str, machine: Mapping[str, Any]) -> str:
    """The paragraph of a docs page that says how its figures were made, on what, and whether that was busy."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in BUSY)
    busy = (
        f" **The machine was busy with other things** (load {machine.get('load before', '?')} before the start, the "
        f"same piece of work took {machine['calibration spread']} times its time): times and ratios are rough."
        if machine["busy"]
        else ""
    )
    return textwrap.fill(f"Made by `{command}` with {facts}.{busy}", 120, break_on_hyphens=False)


def command(prog: str, options: Any, page: str, *, without: Sequence[str] = ()) -> str:
    """The command that makes a page of docs/: the program with the options that are no default, but for the files.

    Args:
      prog: its name.
      options: a dataclass, with `json` and `write`.
      page: the page's name.
      without: fields that change nothing of what is found.
    """
    words = [prog]
    for field in dataclasses.fields(options):
        if field.name not in ("json", "write", *without) and getattr(options, field.name) != field.default:
            words.append(f"--{field.name} {getattr(options, field.name)}")
    return " ".join([*words, f"--write {page}"])


@contextlib.contextmanager
def worker(serve: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process that runs serve(connection, *args); gives the connection's other end, whose closing ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(2)
        process.kill()


def answer(connection: Connection) -> Any:
    """What the worker says; ArithmeticError if it is that, EOFError if the worker has ended."""
    said = connection.recv()
    if isinstance(said, Exception):
        raise said
    return said


@contextlib.contextmanager
def or_stop(prog: str) -> Iterator[None]:
    """End the program with one line where it is interrupted, or a worker has ended or computed something else."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted; nothing written\n")
        raise SystemExit(130) from None
    except (ArithmeticError, EOFError) as error:
        sys.stderr.write(f"{prog}: stopped: {error or 'a worker has ended'}; nothing written\n")
        raise SystemExit(1) from None


def measured(
    options: Any,
    prog: str,
    check: Callable[[Any], None],
    measure: Callable[[Any, Console], dict[str, Any]],
    markdown: Callable[[dict[str, Any], Any], str],
    draw: Callable[[dict[str, Any]], Figure] | None = None,
) -> None:
    """A program: check the options, measure, and write the files that `--json` and `--write` name.

    Args:
      options: of its own kind, with `json` and `write`.
      prog: its name.
      check: raises ValueError where the options are wrong.
      measure: (options, console) -> what was found.
      markdown: (what was found, options) -> the page.
      draw: what was found -> a figure, which is written beside the page, as a PNG of the same name.
    """
    from bn_common.command_line import refuse  # not in the workers, whose start may be timed

    try:
        for name in ("json", "write"):
            check_can_be_written(f"--{name}", getattr(options, name))
        check(options)
    except ValueError as error:
        refuse(prog, str(error))
    with or_stop(prog):
        found = measure(options, make_console())
    if options.json is not None:
        write_whole(options.json, to_json(found))
    if options.write is not None:
        write_whole(options.write, markdown(found, options).encode())
    if options.write is not None and draw is not None:
        buffer = io.BytesIO()
        draw(found).savefig(buffer, format="png", dpi=120)
        write_whole(options.write.with_suffix(".png"), buffer.getvalue())


def rows_table(columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any]) -> Table:
    """For the terminal: a column for each entry, whose function makes a row's cell."""
    table = Table(box=rich.box.SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def rows_markdown(columns: Mapping[str, Callable[[Any], str]], rows: Sequence[Any]) -> str:
    """The same in Markdown."""
    return markdown_table([[*columns], *([cell(row) for cell in columns.values()] for row in rows)])


def check_can_be_written(option: str, path: Path | None) -> None:
    """Raise ValueError, which says what is allowed, unless the file that an option names can be written."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{option} is {path}; allowed: a file in a folder that exists and can be written")


def make_console() -> Console:
    """Wide enough for a table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def print_line(line: str, console: Console) -> None:
    """As it is: neither wrapped nor coloured."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_machine(machine: Mapping[str, Any], console: Console) -> None:
    """In one line."""
    print_line(", ".join(f"{name} {value}" for name, value in machine.items()), console)


def ms(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def to_json(report: Mapping[str, Any]) -> bytes:
    """The content of a file."""
    return (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the head; columns other than the first are figures, flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    text = [
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    ]
    return "\n".join([text[0], rule, *text[1:]])
