"""Differences of a hundredth: what is nearly as fast as the plain step is measured beside it alone, in more rounds."""

from __future__ import annotations

from rich.console import Console

from benchmarks.harness import Calibration
from benchmarks.step.peers import INPUT_PEER, PEERS, REFERENCE, TRAIN, WITH_INPUT
from benchmarks.step.rounds import Plan, Row, compared, measure, started
from benchmarks.step.worker import Setting

BOUNDS = {"jax_bn scan": 1.0, WITH_INPUT: 1.02}
"""An epoch as one `lax.scan` is no slower than a step a call; the input costs less than a fiftieth of a step."""


def measure_close(
    batch_size: int, all_threads: tuple[int, ...], plan: Plan, calibration: Calibration, console: Console
) -> list[Row]:
    """The bounds on a step as one of a scan, and with its input, for each number of threads."""
    peers = {name: PEERS[name] for name in ("jax_bn", "jax_bn scan", REFERENCE)} | {WITH_INPUT: INPUT_PEER}
    rows: list[Row] = []
    for threads in all_threads:
        with started(peers, threads) as workers:
            setting = Setting(TRAIN, batch_size, threads=threads)
            measured = measure(workers, setting, plan, calibration, console)
            rows += [compared(setting, measured, name, "jax_bn", bound) for name, bound in BOUNDS.items()]
    return rows
