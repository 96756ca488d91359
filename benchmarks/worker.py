"""A process with one framework in it, which is asked for blocks of timed calls.

One framework a process: the threads of PyTorch and XLA disturb each other when the two take turns within one.
"""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import ModuleType

import numpy as np

from benchmarks.harness import installed
from benchmarks.peers import Start, Truth, check, definition
from bn_common.memory import keep_memory

SECONDS, CALLS = 0.02, 3


def serve(connection: Connection, framework: str) -> None:
    """Answer until the other end closes: what is installed, the peers at a shape, the time of a call.

    That a peer computes something else is an answer too: an ArithmeticError. Any other error ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; this process ends with it.
    # As in a training loop, which asks for the same memory each time: see there. For all peers alike.
    keep_memory()
    if framework == "jax":
        importlib.import_module("jax_bn.settings").compute_in_the_caller()
    module = importlib.import_module(f"benchmarks.{framework}_peers")
    peers, missing = installed(module.PEERS)
    connection.send((module.about(), missing))
    calls: dict[str, Mapping[str, Callable[[], object]]] = {}
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if what == "prepare":
                calls.clear()
                start, x, dy = draw(*arguments)
                truth = definition(start, x, dy)
                calls.update({name: _prepare(module, name, start, x, dy, truth) for name in peers})
                connection.send(list(calls))
            else:
                name, mode = arguments
                connection.send(_seconds_a_call(calls[name][mode]))
        except ArithmeticError as error:
            connection.send(error)


def draw(shape: tuple[int, ...]) -> tuple[Start, np.ndarray, np.ndarray]:
    """The same start, x and dy, N(0, 1), in every process; shape is [N, C, ...]."""
    rng, c = np.random.default_rng(0), shape[1]
    x, dy = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    numbers = rng.uniform(0.5, 2, c), rng.normal(size=c), rng.normal(size=c), rng.uniform(0.5, 2, c)
    gamma, beta, mean, var = (v.astype(np.float32) for v in numbers)
    return Start(shape, gamma, beta, mean, var, momentum=0.9), x, dy


def _prepare(
    module: ModuleType, name: str, start: Start, x: np.ndarray, dy: np.ndarray, truth: Truth
) -> Mapping[str, Callable[[], object]]:
    """A peer's calls at a shape; checked, compiled and warm."""
    layer = module.PEERS[name].make(start)
    calls = module.calls(layer, x, dy)
    prediction = module.read_eval(layer, calls["eval"]())  # first: a step may move the layer's statistics in place
    check(name, start, truth, layer, module.read_step(layer, calls["forward+backward"]()), prediction)
    for call in calls.values():
        for _ in range(3):
            call()
    return calls


def _seconds_a_call(call: Callable[[], object]) -> float:
    """Mean over a block of CALLS calls or SECONDS seconds, whichever is longer, after one call that doesn't count."""
    call()
    begin, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        seconds = time.perf_counter() - begin
        if count >= CALLS and seconds >= SECONDS:
            return seconds / count
