"""What moving statistics mean where, and what carries them from one meaning to another (README, "Three conventions").

The tensors themselves never change their names here: `parity.weights` does that.
"""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_common.checks import check_int, check_momentum, require


class Convention(NamedTuple):
    """How a batch norm keeps its moving statistics.

    Attributes:
      momentum: weight of the OLD value; None: every batch weighs the same.
      unbiased_moving_var: kept from the unbiased variance, m / (m - 1) times the biased.
      initial_moving_var: what the moving variance starts with.
    """

    momentum: float | None
    unbiased_moving_var: bool
    initial_moving_var: float


PROJECT = Convention(0.9, False, 0.0)
PYTORCH = Convention(0.9, True, 1.0)
FLAX = Convention(0.99, False, 1.0)
KERAS = Convention(0.99, False, 1.0)
ONNX = Convention(0.9, False, 1.0)
"""ONNX's BatchNormalization, opset 14 and later; the initial value is whatever the file holds, 1 by custom."""


def complement(momentum: float | None) -> float | None:
    """1 - momentum, as it would be written: 0.1 for 0.9, where in binary 1 - 0.9 is 0.09999999999999998."""
    check_momentum(momentum)
    return None if momentum is None else float(1 - Decimal(repr(float(momentum))))


def convert_moving_var(
    moving_var: ArrayLike,
    source: Convention,
    target: Convention,
    *,
    values_per_channel: int | None = None,
    num_batches: int | None = None,
) -> NDArray:
    """What the moving variance would be, had the same batches been seen in another convention.

    After n batches of m values per channel each, with a the weight of the old value, it is the sum of what is left of
    the start and of the batches' part:

        moving_var = a^n * initial + batches        unbiased batches = m / (m - 1) * biased batches

    So exact, but for rounding, where m and n are known; n is needed only where either start is not 0 and something
    changes, m only where the bias does. The moving mean means the same everywhere. For prediction nothing is to be
    converted: there the statistics are numbers, and every convention uses them alike.

    Args:
      moving_var: [C], any float dtype.
      source: the convention it was kept in.
      target: the convention it is wanted in; the same momentum.
      values_per_channel: m, the same in every batch: N for a linear layer, N * H * W for a convolution.
      num_batches: n.

    Returns:
      [C], in moving_var's dtype.

    Raises:
      ValueError: the momenta differ (what an average has forgotten cannot be brought back); m or n is needed and not
        given, or too small.
    """
    require(
        source.momentum == target.momentum,
        "the target's momentum",
        target.momentum,
        f"{source.momentum}, the source's: an average with other weights cannot be made from this one",
    )
    given = np.asarray(moving_var)
    same_bias = source.unbiased_moving_var == target.unbiased_moving_var
    if same_bias and source.initial_moving_var == target.initial_moving_var:
        return given.copy()
    start, new_start = source.initial_moving_var, target.initial_moving_var
    left = 0.0
    if start or new_start:
        _needed("num_batches", num_batches, 0, "moving_var does not say how much of its start is left in it")
        # With every batch weighing the same, the start weighs nothing once there is one.
        left = float(num_batches == 0) if source.momentum is None else source.momentum ** float(num_batches or 0)
    factor = 1.0
    if not same_bias:
        _needed("values_per_channel", values_per_channel, 2, "the unbiased variance is m / (m - 1) times the biased")
        m = float(values_per_channel or 0)
        factor = m / (m - 1) if target.unbiased_moving_var else (m - 1) / m
    return ((given.astype(np.float64) - left * start) * factor + left * new_start).astype(given.dtype)


def _needed(name: str, value: int | None, low: int, why: str) -> None:
    require(value is not None, name, None, f"an integer >= {low} ({why})")
    check_int(name, value, low)
