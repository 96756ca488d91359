"""Numbers known up to rounding: the interval of all values that fit, and the likeliest in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

EPSILONS = (1e-5, 1e-3, 1e-6, 1e-12, 1e-8, 1e-4, 1e-2, 1e-7, 1e-1, 1e-10)
MOMENTA = (0.9, 0.99, 0.1, 0.01, 0.999, 0.001, 0.0, 1.0, 0.5)


class Interval(NamedTuple):
    """All numbers from `low` to `high`; `best` is the likeliest by the data."""

    low: float
    high: float
    best: float

    @property
    def empty(self) -> bool:
        """Whether no number fits."""
        return not self.low <= self.high

    def meet(self, other: Interval) -> Interval:
        """What fits both; the best of the narrower one, moved inside."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        best = self.best if self.high - self.low <= other.high - other.low else other.best
        return Interval(low, high, min(max(best, low), high))

    def holds(self, number: float) -> bool:
        """Whether the number fits."""
        return self.low <= number <= self.high

    def round(self, common: tuple[float, ...]) -> tuple[float, float]:
        """The roundest number that fits, and how odd it is: 0 common, 0.3 one digit, 0.6 two, 1.5 an odd number.

        People write 1e-3 and 0.99: where several numbers fit, or several explanations do, the round one is meant.
        """
        for number in common:
            if self.holds(number):
                return number, 0.0
        for digits, oddity in ((1, 0.3), (2, 0.6)):
            number = float(f"{self.best:.{digits}g}") if math.isfinite(self.best) else math.nan
            if self.holds(number):
                return number, oddity
        return (0.0, 0.6) if self.holds(0.0) else (self.best, 1.5)


EVERYTHING = Interval(-math.inf, math.inf, math.nan)


def intersection(low: ArrayLike, high: ArrayLike, best: ArrayLike) -> Interval:
    """What fits every group; the best weighs each group by how much it says."""
    lows, highs, bests = (np.ravel(np.asarray(v, np.float64)) for v in np.broadcast_arrays(low, high, best))
    if lows.size == 0:
        return EVERYTHING
    says = np.isfinite(lows) & np.isfinite(highs) & np.isfinite(bests)
    at_most, at_least = float(highs.min()), float(lows.max())
    if not says.any():
        return Interval(at_least, at_most, at_least if math.isfinite(at_least) else at_most)
    width = np.maximum(highs[says] - lows[says], np.finfo(np.float64).tiny ** 0.5)
    weight = np.square(width.min() / width)
    best_of_all = float((weight * bests[says]).sum() / weight.sum())
    return Interval(at_least, at_most, min(max(best_of_all, at_least), at_most))
