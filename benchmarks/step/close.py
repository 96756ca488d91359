"""Differences of a hundredth: what is nearly as fast as the plain step is measured beside it alone, in more rounds.

And in several processes of each: of the same program one process may be some hundredths slower than another for as long
as it lives, by where its memory lies.
"""

from __future__ import annotations

from rich.console import Console

from benchmarks.harness import Calibration
from benchmarks.step.peers import INPUT_PEER, PEERS, REFERENCE, TRAIN, WITH_INPUT
from benchmarks.step.rounds import Measured, Plan, Row, compared, measure, started
from benchmarks.step.worker import Setting

BOUNDS = {"jax_bn scan": 1.0, WITH_INPUT: 1.02}
"""An epoch as one `lax.scan` is no slower than a step a call; the input costs less than a fiftieth of a step."""


def measure_close(
    batch_size: int,
    all_threads: tuple[int, ...],
    plan: Plan,
    processes: int,
    calibration: Calibration,
    console: Console,
) -> list[Row]:
    """The bounds on a step as one of a scan, and with its input, for each number of threads.

    The rounds of the plan are taken with `processes` processes of each peer, one after the other.
    """
    peers = {name: PEERS[name] for name in ("jax_bn", "jax_bn scan", REFERENCE)} | {WITH_INPUT: INPUT_PEER}
    rows: list[Row] = []
    for threads in all_threads:
        setting = Setting(TRAIN, batch_size, threads=threads)
        times: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(processes):
            with started(peers, threads) as workers:
                measured = measure(workers, setting, plan, calibration, console)
            for name, of_process in measured.times.items():
                times[name] += of_process
        pooled = Measured(times, [])
        rows += [compared(setting, pooled, name, "jax_bn", bound) for name, bound in BOUNDS.items()]
    return rows
