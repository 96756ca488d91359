"""A trace of some training steps, for XProf (TensorBoard) and Perfetto. `torch_bn/profiling.py` is its twin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"
# The first steps wait for memory, caches and the input; of many steps the trace would be too large to look at.
FIRST, STEPS = 10, 20


class Profile:
    """Traces steps FIRST to FIRST + STEPS of a run, or the last of a shorter one.

    Args:
      run_folder: where the trace goes, in its folder FOLDER; None: nothing is traced.
      total: steps of the run from here on.
    """

    def __init__(self, run_folder: Path | None, total: int) -> None:
        self.folder = None if run_folder is None else run_folder / FOLDER
        self.first = max(0, min(FIRST, total - STEPS))
        self.last = min(self.first + STEPS, total) - 1
        self.step_num, self.running = -1, False

    @contextlib.contextmanager
    def step(self) -> Iterator[list[Any]]:
        """Around a step; what is put in the list is waited for before the trace ends."""
        self.step_num += 1
        results: list[Any] = []
        if self.folder is None or not self.first <= self.step_num <= self.last:
            yield results
            return
        if self.step_num == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step_num):
            yield results
        if self.step_num == self.last:
            jax.block_until_ready(results)
            self.stop()

    def stop(self) -> None:
        """Write the trace, if a run has ended before all steps were traced."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
