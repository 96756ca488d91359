"""A training step at other sizes: is there a cliff, in time or in memory? And what the input costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.harness import Calibration
from benchmarks.step.network import SAMPLE_SIZE
from benchmarks.step.peers import INPUT_PEER, PEERS, REFERENCE, TRAIN, WITH_INPUT
from benchmarks.step.rounds import Plan, Row, measure, paired_ratio, started
from benchmarks.step.worker import Setting

NAMES = "jax_bn", REFERENCE, "torch_bn"


class Sizes(NamedTuple):
    """Batches of images of 28 x 28, and images in batches of 32; the input is measured at one of the former."""

    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    fig_sizes: tuple[int, ...] = (56, 112, 224)
    input_batch: int = 256


QUICK_SIZES = Sizes(batch_sizes=(32, 256, 1024), fig_sizes=(56,))


def measure_scaling(
    sizes: Sizes, all_threads: tuple[int, ...], plan: Plan, calibration: Calibration, console: Console
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of each size and number of threads; and the input's share of a step, for each number of threads."""
    rows: list[Row] = []
    shares = []
    for threads in all_threads:
        for batch_size, fig_size in _cells(sizes):
            peers = {name: PEERS[name] for name in NAMES}
            with_input = (batch_size, fig_size) == (sizes.input_batch, SAMPLE_SIZE)
            if with_input:
                peers[WITH_INPUT] = INPUT_PEER
            # Processes of their own: one's peak of memory would be the next one's too.
            with started(peers, threads) as workers:
                measured = measure(workers, Setting(TRAIN, batch_size, fig_size, threads), plan, calibration, console)
            rows += [row for row in measured.rows if row["name"] in NAMES]
            if with_input:
                share = paired_ratio(measured.times[WITH_INPUT], measured.times["jax_bn"]) - 1
                shares.append({"share": share, "batch_size": batch_size, "threads": threads})
    return rows, shares


def _cells(sizes: Sizes) -> Iterator[tuple[int, int]]:
    yield from ((batch_size, SAMPLE_SIZE) for batch_size in sizes.batch_sizes)
    yield from ((32, fig_size) for fig_size in sizes.fig_sizes)
