"""What both sides have in common: how a run is forced, its loss, what a training step leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LARGE = 16.0
"""What the default loss takes the sine of is not larger."""


class LossError(ValueError):
    """A loss that is no number."""


def check_loss(total: Any, side: str) -> None:
    """LossError for a loss that is not one number."""
    shape = getattr(total, "shape", ()) if not isinstance(total, tuple | list) else (len(total),)
    if math.prod(shape) != 1:
        raise LossError(f"loss is of shape {tuple(shape)} in {side}; allowed: one number, such as the mean")


def loss_weights(count: int) -> NDArray:
    """The w of the default loss, sum over n of w[n] * (sum over all y in entry n of the first axis of sin(y / s + 1)).

    It does not ask for the order of y within an entry, so each side computes it alone, whatever its layout; and its
    gradient, w[n] cos(y / s + 1) / s, differs from number to number. s = max(1, max|y| / LARGE), a constant in the
    derivative: the sine of a large number would blow its rounding up, and with it the bound of every gradient.

    Args:
      count: length of the first axis, or of the one that holds the other side's first.

    Returns:
      [count], fixed.
    """
    return np.random.default_rng(20150211).normal(size=count)


class Force(Protocol):
    """What single-layer mode puts in the place of this side's own arrays; in this side's layout.

    Each answer is (array, its gradient), a gradient of None is 0; or None, to leave the array as it is.
    """

    def input(self, key: tuple[str, int], i: int, arrived: Any) -> tuple[NDArray, NDArray | None] | None:
        """In place of what arrived as the i-th input of that call."""

    def output(self, key: tuple[str, int], output: Any) -> tuple[NDArray, NDArray | None] | None:
        """In place of the output of that call."""

    def result(self, i: int, outputs: Sequence[tuple[str, Any]]) -> tuple[NDArray, NDArray | None] | None:
        """In place of the i-th output of the network, of all these (name, output)."""


Snapshot = dict[str, dict[str, NDArray]]
"""{"parameters" | "statistics" | "optimizer <buffer>": {PyTorch's name: array}}."""


def nudged(a: NDArray, rng: np.random.Generator) -> NDArray:
    """Every element of a floating array one unit in the last place up or down, or where it is; 0 stays."""
    if a.dtype.kind != "f":
        return a
    towards = a * rng.choice(np.array([0, 1, 2], a.dtype), a.shape)
    return np.nextafter(a, towards)
