"""Where modules that draw their weights at random begin to draw."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def sown(seed: int) -> Iterator[None]:
    """The same for a while: then Python's, numpy's and PyTorch's generators go on where they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = importlib.import_module("torch")
    with torch.random.fork_rng(devices=[]):
        try:
            sow(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def sow(seed: int) -> None:
    """Seed Python's, numpy's and PyTorch's generators; Flax's modules are given their keys.

    PyTorch is imported if it is installed: it begins with another seed in each process, and a module of weights may be
    made as soon as a stranger's file is imported.

    Args:
      seed: >= 0; its lowest 32 bits count, which is what numpy takes.
    """
    seed %= 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the generator of those who name none
    # One that can't be imported can't draw either; who needs it says so.
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("torch").manual_seed(seed)
