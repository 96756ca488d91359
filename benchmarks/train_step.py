"""How fast is a training step of BLeNet, beside its peers in the same run?

    python -m benchmarks.train_step --quick --json step.json
    python -m benchmarks.train_step --peers jax_bn flax.linen --threads 1
    python -m benchmarks.train_step --scaling --write docs/train_step_speed.md

Every peer (`benchmarks/step/`, a module per library) is first checked to be the same network, by the losses of five
steps from the same weights and by its predictions. Then they take turns, A B C B C A ..., in blocks of 0.3 s; a ratio
to PyTorch's eager step with nn.BatchNorm is taken within each round, so that a machine that is slower for a while is
slower for both, and the median of these is printed. That does not help where other programs take a core away; the last
line says so.

A step is timed as a training loop does it: on a batch that is on the device, and waited for at the end of a block; a
prediction is waited for each time. Everything runs on the CPU, each peer in a process of its own, some 0.5 GB each.
A full run takes twenty minutes on two cores, --scaling a quarter of an hour more.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import (
    Calibration,
    check_can_be_written,
    count_cores,
    describe_machine,
    is_installed,
    make_console,
    note_busy,
    or_stop,
    print_line,
    print_machine,
    to_json,
)
from benchmarks.step import report
from benchmarks.step.close import measure_close
from benchmarks.step.peers import PEERS, PREDICT, REFERENCE, TRAIN, available
from benchmarks.step.rounds import Plan, Row, compare, measure, started
from benchmarks.step.scaling import QUICK_SIZES, Sizes, measure_scaling
from benchmarks.step.worker import Setting
from bn_common.command_line import parse, refuse
from bn_common.files import write_whole

PROG = "python -m benchmarks.train_step"
FULL, QUICK = Plan(rounds=25, seconds=0.3), Plan(rounds=5, seconds=0.15)
SCALING, CLOSE = Plan(rounds=9, seconds=0.3), Plan(rounds=21, seconds=0.3)
CLOSE_PROCESSES = 3
BATCH_SIZE = 256
CELLS = (TRAIN, BATCH_SIZE), (PREDICT, BATCH_SIZE), (PREDICT, 1)
QUICK_CELLS = CELLS[:1]
LIBRARIES = "jax", "jaxlib", "flax", "optax", "dm-haiku", "equinox", "keras", "torch"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    quick: bool = False
    """The training step only, nine peers, fewer and shorter rounds: a minute or two instead of a quarter of an hour."""
    json: Path | None = None
    """Also write the figures to this file, and a plot beside it."""
    plot: Path | None = None
    """Also draw the plot to this file, .png or .svg."""
    write: Path | None = None
    """Also write the tables to this file, in Markdown, and a plot beside it."""
    threads: int | None = None
    """Threads of every peer, the same cores for each; 1 to the number of cores, which is the default."""
    peers: tuple[str, ...] = ()
    """Measure only these, and torch_native, which the ratios are to. None given: all."""
    scaling: bool = False
    """Also measure the step at other batch sizes, image sizes and threads."""


def main(args: Sequence[str] | None = None) -> None:
    """The program."""
    options = parse(Options, args, prog=PROG, description="A training step's speed beside its peers, in ratios.")
    try:
        plots = _check(options)
    except ValueError as error:
        refuse(PROG, str(error))
    with or_stop(PROG):
        found = run(options, make_console())
    if options.json is not None:
        write_whole(options.json, to_json(found))
    for path in plots:
        write_whole(path, report.plot(found["rows"], path))
    if options.write is not None:
        picture = options.write.with_suffix(".png").name
        write_whole(options.write, report.markdown(found, _command(options), picture).encode())


def _check(options: Options) -> list[Path]:
    """The files to draw the plot to; ValueError says what is given and what is allowed."""
    written = [path for path in (options.json, options.write) if path is not None]
    for name in ("json", "plot", "write"):
        check_can_be_written(f"--{name}", getattr(options, name))
    plots = [path.with_suffix(".png") for path in written]
    if options.plot is not None:
        plots.append(options.plot)
    for path in plots:
        check_can_be_written("the plot", path)
    if clash := {*plots} & {*written}:
        raise ValueError(f"{clash.pop()} would be a plot; allowed: --json and --write with another ending than .png")
    if options.plot is not None and options.plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot is {options.plot}; allowed: a file that ends in .png or .svg")
    cores, pinned = count_cores(), hasattr(os, "sched_setaffinity")
    if options.threads is not None and not 1 <= options.threads <= cores:
        raise ValueError(f"--threads is {options.threads}; allowed: 1 to {cores}, the cores of this machine")
    if not pinned and (options.threads not in (None, cores) or options.scaling):
        raise ValueError("JAX's threads are its cores, which this system gives no choice of; allowed: all threads")
    for name in options.peers:
        if name not in PEERS:
            raise ValueError(f"--peers has {name!r}; allowed: {', '.join(PEERS)}")
    for module in ("torch", "jax"):
        if not is_installed(module):
            raise ValueError(f"{module} is not installed; allowed: an environment with it (pip install '.[bench]')")
    return plots


def _command(options: Options) -> str:
    """The command line that writes the docs page again."""
    words = [PROG, *(f"--{name}" for name in ("quick", "scaling") if getattr(options, name))]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    if options.peers:
        words += ["--peers", *map(shlex.quote, options.peers)]
    return " ".join([*words, f"--write docs/{options.write.name if options.write else ''}"])


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measure, print, and return all that is found: machine, rows, comparisons; with --scaling that too."""
    threads = options.threads or count_cores()
    machine = describe_machine() | {"threads": threads} | _versions()
    names = {REFERENCE, *(options.peers or PEERS)}
    wanted = {name: peer for name, peer in PEERS.items() if name in names}
    if options.quick and not options.peers:
        wanted = {name: peer for name, peer in wanted.items() if peer.is_quick}
    peers, missing = available(wanted)
    for line in missing:
        print_line(line, console)
    print_machine(machine, console)
    rows: list[Row] = []
    comparisons: list[Row] = []
    found: dict[str, Any] = {"machine": machine, "rows": rows, "comparisons": comparisons}
    plan = QUICK if options.quick else FULL
    with Calibration() as calibration:
        with started(peers, threads) as workers:
            for mode, batch_size in QUICK_CELLS if options.quick else CELLS:
                setting = Setting(mode, batch_size, threads=threads)
                of_mode = {name: connection for name, connection in workers.items() if mode in peers[name].modes}
                measured = measure(of_mode, setting, plan, calibration, console)
                rows += measured.rows
                comparisons += compare(setting, measured, peers)
                title = report.title_of(measured.rows[0])
                print_line(f"{title}: ms of {plan.rounds} rounds, ratio to {REFERENCE}", console)
                console.print(report.table(report.COLUMNS, measured.rows))
        all_threads = tuple(sorted({1, threads})) if options.scaling else (threads,)
        if options.scaling or not (options.quick or options.peers):
            plan, processes = (QUICK, 1) if options.quick else (CLOSE, CLOSE_PROCESSES)
            comparisons += measure_close(BATCH_SIZE, all_threads, plan, processes, calibration, console)
        if comparisons:
            print_line("Bounds: medians of the ratios of each round", console)
            console.print(report.table(report.COMPARISONS, comparisons))
        if options.scaling:
            sizes, plan = (QUICK_SIZES, QUICK) if options.quick else (Sizes(), SCALING)
            found["scaling"] = measure_scaling(sizes, all_threads, plan, calibration, console)
            print_line(f"Training step at other sizes: ms of {plan.rounds} rounds, ratio to {REFERENCE}", console)
            console.print(report.table(report.SCALING, found["scaling"]))
    note_busy(machine, calibration, console)
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    main()
