"""A process with one peer in it, which is asked for blocks of timed steps.

A process each: one framework's threads would disturb another's, and a process has one peak of memory. PyTorch's threads
wait for 6 ms in a busy loop when they have nothing more to do; that is its default, and stays as it is, because it is
part of how fast it is. Every block begins with WARM_SECONDS of steps that don't count, which is longer.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from benchmarks.step.network import Data, Network, draw_weights, load_data
from benchmarks.step.peers import CHECKED_STEPS, TRAIN, Peer

WARM_SECONDS = 0.03


class Setting(NamedTuple):
    """What a peer is measured at."""

    mode: str
    batch_size: int
    fig_size: int = 28
    threads: int = 1


class First(NamedTuple):
    """What the first steps gave: seconds of the very first, compilation included; losses, or a batch's logits."""

    seconds: float
    found: Any


def serve(connection: Connection, peer: Peer, threads: int, folder: str) -> None:
    """Answer until the other end closes: that the library is imported, first steps, the time of a step, memory.

    Compiled code goes into the folder, which is new: what an earlier run has left would hide how long it takes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it.
    _set_up(peer, threads, folder)
    module, _, function = peer.make.partition(":")
    make = getattr(importlib.import_module(module), function)
    connection.send(True)
    cell: _Cell | None = None
    while True:
        try:
            what, argument = connection.recv()
        except EOFError:
            return
        if what == "prepare":
            cell = None  # before the next one takes memory of its own
            cell = _Cell(make(draw_weights(argument.fig_size), argument.fig_size), argument)
            connection.send(cell.first())
        elif what == "block":
            assert cell is not None, "prepare comes first"
            connection.send(cell.block(argument))
        else:
            connection.send(peak_memory())


def _set_up(peer: Peer, threads: int, folder: str) -> None:
    """Threads as asked for, the same cores for both frameworks, the CPU; before either is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # JAX has a thread a core
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # otherwise it keeps a pool of further processes
    } | dict(peer.environment)


def peak_memory() -> float:
    """Of this process until now, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class _Cell:
    """A peer at a setting."""

    def __init__(self, network: Network, setting: Setting) -> None:
        self.network, self.setting = network, setting
        data: Data = load_data(setting.batch_size, setting.fig_size)
        self.placed = network.place(data)
        self.steps_a_call = len(data.indices) // len(self.placed)
        self.calls, self.seconds_a_call = 0, 0.0

    def first(self) -> First:
        begin = time.perf_counter()
        result = self._call()
        self.network.wait(result)
        seconds = time.perf_counter() - begin
        if self.setting.mode == TRAIN:
            losses = self.network.losses(result)
            while len(losses) < CHECKED_STEPS:
                losses += self.network.losses(self._call())
            found: Any = losses
        else:
            found = np.array(result)
        self.seconds_a_call = self._time(3)
        return First(seconds, found)

    def block(self, seconds: float) -> float:
        """Seconds a step, over a block of some `seconds`, after a short one that doesn't count."""
        self._time(max(1, round(WARM_SECONDS / self.seconds_a_call)))
        self.seconds_a_call = self._time(max(2, round(seconds / self.seconds_a_call)))
        return self.seconds_a_call / self.steps_a_call

    def _time(self, count: int) -> float:
        """Training runs ahead of what is finished, as a loop does, until the block ends; a prediction is waited for."""
        each: Callable[[Any], object] = (lambda _: None) if self.setting.mode == TRAIN else self.network.wait
        begin, result = time.perf_counter(), None
        for _ in range(count):
            result = self._call()
            each(result)
        self.network.wait(result)
        return (time.perf_counter() - begin) / count

    def _call(self) -> Any:
        batch = self.placed[self.calls % len(self.placed)]
        self.calls += 1
        if self.setting.mode == TRAIN:
            return self.network.train_step(batch)
        assert self.network.predict is not None, "the peer's modes say so"
        return self.network.predict(batch)
