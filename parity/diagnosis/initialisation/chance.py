"""How improbable it is that two samples of one distribution differ so much: bounds that need no distribution's name.

Two samples of N independent numbers each of one distribution, whatever it is. Three questions are asked, of the
numbers' order alone:

- the largest distance D between the two empirical distribution functions (Kolmogorov and Smirnov), of the numbers and
  of their magnitudes: P(D >= d) <= C exp(-N d^2) with C = 2.16863 for every N >= 4 (Wei and Dudley, "Two-sample
  Dvoretzky-Kiefer-Wolfowitz inequalities", 2012);
- how many of one sample are larger in magnitude than all of the other: each of the k largest of all 2N is of the one or
  of the other with even chances, and those before it were all of the same: P <= 2 * 2^-k. This is where a normal that
  is cut at two standard deviations differs from one that is not.

Where the numbers of a tensor are of several distributions (gates of a cell, say), the same on both sides, the distances
are smaller than of one, so that the bounds hold.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FALSE_ALARM = 1e-6
"""How probable it is at most that any tensor of two networks that draw alike is said to differ."""
QUESTIONS = 3
WEI_DUDLEY = 2.16863
LEAST = 4
"""Numbers of which Wei and Dudley's bound is true."""
CUT = 0.0230
"""The share of a normal that a truncated one of the same deviation has not: beyond 2 / 0.8796 = 2.274 deviations."""
SLOPE = 2 / math.sqrt(2 * math.pi * math.e)
"""The distance between the magnitudes of two normals is this times the logarithm of the deviations' ratio, 0.484."""


def improbability(first: Array, second: Array) -> float:
    """-log10 of what the probability is at most that chance makes two such samples, over all questions; 0 or more."""
    count = min(len(first), len(second))
    if count < LEAST:
        return 0.0
    first, second = first[:count], second[:count]
    sizes = np.sort(np.abs(first)), np.sort(np.abs(second))
    farthest = max(distance(np.sort(first), np.sort(second)), distance(*sizes))
    larger = max(count - int(np.searchsorted(a, b[-1], "right")) for a, b in (sizes, sizes[::-1]))
    # Both in powers of ten: 2 exp(-N d^2) is 0 as a number.
    by_distance = (count * farthest**2 - math.log(WEI_DUDLEY)) / math.log(10)
    by_extremes = (larger - 1) * math.log10(2)
    return max(0.0, max(by_distance, by_extremes) - math.log10(QUESTIONS))


def distance(first: Array, second: Array) -> float:
    """The largest between the two empirical distribution functions, of sorted numbers."""
    every = np.concatenate([first, second])
    below = [np.searchsorted(a, every, "right") / len(a) for a in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def bound(tensors: int) -> float:
    """What an improbability may be: each of so many tensors has its share of `FALSE_ALARM`."""
    return -math.log10(FALSE_ALARM / max(tensors, 1))


def unseen_ratio(count: int, tensors: int) -> float:
    """Up to which factor two normals' standard deviations may differ, and N numbers not show it."""
    allowed = (bound(tensors) + math.log10(QUESTIONS)) * math.log(10) + math.log(WEI_DUDLEY)
    return math.exp(math.sqrt(allowed / max(count, 1)) / SLOPE)


def least_cut(tensors: int) -> int:
    """From how many numbers on a cut at two deviations shows, in all but one of a thousand pairs."""
    wanted = (bound(tensors) + math.log10(QUESTIONS)) / math.log10(2) + 1
    # Of N numbers N * CUT are beyond, give or take three times its root.
    root = (3 + math.sqrt(9 + 4 * wanted)) / 2
    return math.ceil(root**2 / CUT)
