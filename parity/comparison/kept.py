"""The statistics that training keeps, step by step, freed of what the network does not see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def kept_difference(
    torch: Sequence[NDArray], flax: Sequence[NDArray], biases: Sequence[tuple[Sequence[NDArray], Sequence[NDArray]]]
) -> NDArray:
    """Flax's statistic less PyTorch's behind the last step, but for what a bias before the norm explains.

    Such a bias has no gradient but rounding, of which an optimiser may make whole steps, and the moving mean follows
    it: mean[n] = (1 - r) mean[n-1] + r (mu + bias[n-1]), with the norm's own r. So the sides' difference D of the means
    grows by D[n] - D[n-1] = r (B[n-1] - D[n-1]), B the difference of the biases; what is left is the norms' own. The r
    of each step is the one of [0, 1] that explains most, over all channels.

    Args:
      torch: [C] before the first step and after each, in Flax's layout.
      flax: Flax's, likewise.
      biases: PyTorch's and Flax's of each such bias, [C] likewise; the one is taken that explains most.
    """
    apart = [(f - t).ravel() for t, f in zip(torch, flax, strict=True)]
    lefts = [apart[-1] - apart[0]]
    for ours, theirs in biases:
        if np.shape(ours[0]) and np.size(ours[0]) == apart[0].size:
            shifts = [(f - t).ravel() for t, f in zip(ours, theirs, strict=True)]
            lefts.append(_unexplained(apart, shifts))
    return min(lefts, key=lambda left: float(np.abs(left).max(initial=0.0))).reshape(np.shape(torch[0]))


def _unexplained(apart: Sequence[NDArray], shifts: Sequence[NDArray]) -> NDArray:
    total = np.zeros_like(apart[0])
    for before, after, shift in zip(apart, apart[1:], shifts, strict=False):
        grown, reach = after - before, shift - before
        size = float(reach @ reach)
        rate = min(max(float(grown @ reach) / size, 0.0), 1.0) if size else 0.0
        total = total + grown - rate * reach
    return total
