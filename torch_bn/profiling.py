"""A trace of some training steps, for TensorBoard and Perfetto. `jax_bn/profiling.py` is its twin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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
        self.step_num = -1
        self.profiler: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[list[Any]]:
        """Around a step; what is put in the list is waited for in JAX, here all that the device has to do."""
        self.step_num += 1
        if self.folder is None or not self.first <= self.step_num <= self.last:
            yield []
            return
        if self.profiler is None:
            save = torch.profiler.tensorboard_trace_handler(str(self.folder))
            self.profiler = torch.profiler.profile(on_trace_ready=save)
            self.profiler.start()
        with torch.profiler.record_function(f"train {self.step_num}"):
            yield []
        if self.step_num == self.last:
            self.stop()

    def stop(self) -> None:
        """Write the trace, if a run has ended before all steps were traced."""
        if self.profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
            self.profiler = None
