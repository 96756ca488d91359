"""The peers of a setting, measured in turns; their rows, and what the rows say about the bounds."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks.harness import Calibration, answer, worker
from benchmarks.step.peers import OURS, REFERENCE, TRAIN, Peer, check_logits, check_losses
from benchmarks.step.worker import Setting, serve

Row = dict[str, Any]


class Plan(NamedTuple):
    """How long to measure: rounds of a block of each peer, of some seconds."""

    rounds: int
    seconds: float


class Measured(NamedTuple):
    """Seconds a step of each peer, a figure a round, and the rows for them."""

    times: dict[str, list[float]]
    rows: list[Row]


@contextlib.contextmanager
def started(peers: Mapping[str, Peer], threads: int) -> Iterator[dict[str, Connection]]:
    """A process for each peer, all of which have imported their library."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="train-step-", ignore_cleanup_errors=True))
        )
        workers = {
            name: stack.enter_context(worker(serve, peer, threads, str(folder / str(number))))
            for number, (name, peer) in enumerate(peers.items())
        }
        for name, connection in workers.items():
            _answer(name, connection)
        yield workers


def _ask(name: str, connection: Connection, what: str, argument: Any = None) -> Any:
    connection.send((what, argument))
    return _answer(name, connection)


def _answer(name: str, connection: Connection) -> Any:
    try:
        return answer(connection)
    except EOFError:
        raise EOFError(f"the process of {name} has ended") from None


def measure(
    workers: Mapping[str, Connection], setting: Setting, plan: Plan, calibration: Calibration, console: Console
) -> Measured:
    """Check that all are the same network; then a block of each in turn, round after round.

    Raises:
      ArithmeticError: a peer is another network; named.
      EOFError: a peer's process has ended; named.
    """
    hidden = not console.is_terminal
    label = f"{setting.mode} {setting.batch_size}"
    first = {  # one after the other: the time that it takes is a figure too
        name: _ask(name, connection, "prepare", setting)
        for name, connection in track(
            workers.items(), f"{label}: compile", console=console, transient=True, disable=hidden
        )
    }
    check: Callable[[str, Any, Any], None] = check_losses if setting.mode == TRAIN else check_logits
    for name, (_, found) in first.items():
        check(name, found, first[REFERENCE].found)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in track(range(plan.rounds), label, console=console, transient=True, disable=hidden):
        calibration.take()
        # Every round begins with another peer: none is always the first after the calibration, or after a slow one.
        names = list(workers)[turn % len(workers) :] + list(workers)[: turn % len(workers)]
        for name in names:
            times[name].append(_ask(name, workers[name], "block", plan.seconds))
    rows = [
        {
            "name": name,
            **setting._asdict(),
            "median_ms": statistics.median(times[name]) * 1e3,
            "min_ms": min(times[name]) * 1e3,
            "max_ms": max(times[name]) * 1e3,
            "ratio": paired_ratio(times[name], times[REFERENCE]),
            "rounds": plan.rounds,
            "compile_s": first[name].seconds,
            "peak_memory_mib": _ask(name, workers[name], "memory"),
        }
        for name in workers
    ]
    return Measured(times, rows)


def paired_ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios of each round: a machine that is slower for a while is slower for both."""
    return statistics.median(_ratios(a, b))


def _ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """A confidence interval of 95 % for the median, whatever the distribution; of fewer than six values, their range.

    Between the (k+1)-th smallest and the (k+1)-th largest of n values, with the largest k for which at most k of n
    tosses of a coin fall on one side with a probability of 2.5 % or less (H. A. David, Order Statistics, section 7.1).
    """
    n, below, k = len(values), 0, -1
    while (below := below + math.comb(n, k + 1)) <= 0.025 * 2**n:
        k += 1
    ordered = sorted(values)
    return ordered[max(k, 0)], ordered[-1 - max(k, 0)]


def compared(setting: Setting, measured: Measured, a: str, b: str, bound: float) -> Row:
    """A bound on the time of a step of peer a, in that of peer b."""
    times = measured.times
    low, high = interval_of_median(_ratios(times[a], times[b]))
    value = paired_ratio(times[a], times[b])
    return _comparison(setting, {"what": f"time, {a} / {b}", "value": value, "low": low, "high": high, "bound": bound})


def _comparison(setting: Setting, row: Row) -> Row:
    about = {name: value for name, value in setting._asdict().items() if name != "fig_size"}
    return about | row | {"met": row["value"] <= row["bound"]}


def compare(setting: Setting, measured: Measured, peers: Mapping[str, Peer]) -> list[Row]:
    """The bounds that this project sets itself, and what was found; of what has been measured."""
    times = measured.times

    def fastest(names: list[str]) -> str | None:
        return min(names, key=lambda name: statistics.median(times[name]), default=None)

    others = {
        framework: [n for n in times if n not in OURS and peers[n].framework == framework]
        for framework in ("jax", "torch")
    }
    if setting.mode == TRAIN:
        pairs = [
            ("jax_bn", REFERENCE, 0.67),
            ("jax_bn", fastest(others["torch"]), 0.67),
            ("jax_bn", fastest(others["jax"]), 0.40),
            ("torch_bn", REFERENCE, 1.2),
            ("torch_bn compiled", "torch_native compiled", 1.2),
        ]
    else:
        pairs = [("jax_bn", fastest(others["jax"] + others["torch"]), 1.0)]
    found = [
        compared(setting, measured, a, b, bound)
        for a, b, bound in dict.fromkeys(pairs)
        if a in times and b is not None and b in times
    ]
    first = "seconds of the first step, jax_bn"
    found += [
        _comparison(setting, {"what": first, "value": row["compile_s"], "bound": 6.0})
        for row in measured.rows
        if setting.mode == TRAIN and row["name"] == "jax_bn"
    ]
    return found
