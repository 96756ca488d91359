"""A training step at other sizes: is there a cliff, in time or in memory?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console

from benchmarks.harness import Calibration
from benchmarks.step.network import SAMPLE_SIZE
from benchmarks.step.peers import PEERS, REFERENCE, TRAIN
from benchmarks.step.rounds import Plan, Row, measure, started
from benchmarks.step.worker import Setting

NAMES = "jax_bn", REFERENCE, "torch_bn"


class Sizes(NamedTuple):
    """Batches of images of 28 x 28, and images in batches of 32."""

    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    fig_sizes: tuple[int, ...] = (56, 112, 224)


QUICK_SIZES = Sizes(batch_sizes=(32, 256, 1024), fig_sizes=(56,))


def measure_scaling(
    sizes: Sizes, all_threads: tuple[int, ...], plan: Plan, calibration: Calibration, console: Console
) -> list[Row]:
    """Rows of each size and number of threads."""
    rows: list[Row] = []
    for threads in all_threads:
        for batch_size, fig_size in _cells(sizes):
            # Processes of their own: one's peak of memory would be the next one's too.
            with started({name: PEERS[name] for name in NAMES}, threads) as workers:
                setting = Setting(TRAIN, batch_size, fig_size, threads)
                rows += measure(workers, setting, plan, calibration, console).rows
    return rows


def _cells(sizes: Sizes) -> Iterator[tuple[int, int]]:
    yield from ((batch_size, SAMPLE_SIZE) for batch_size in sizes.batch_sizes)
    yield from ((32, fig_size) for fig_size in sizes.fig_sizes)
