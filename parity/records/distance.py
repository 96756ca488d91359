"""How far apart two arrays are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

MASK, BESIDE = 1e9, 1e6
"""A mask's constant is at least so large, and so many times as large as what stands beside it."""


def _size(a: NDArray, b: NDArray) -> float:
    """max|b|, but for a mask's constant that is the same on both sides: it is no measure of what stands beside it."""
    largest = float(np.abs(b).max(initial=0.0))
    if largest >= MASK:
        beside = (a != b) | (np.abs(b) < largest)
        rest = float(max(np.abs(a[beside]).max(initial=0.0), np.abs(b[beside]).max(initial=0.0)))
        return rest if largest > BESIDE * rest else largest
    return largest


def error_of(given: NDArray, truth: NDArray, floor: float = 0.0) -> float:
    """max|given - truth| / max(max|truth|, floor); infinity where shapes, NaNs or infinities differ.

    NaN where there was nothing to compare: both are empty, hold NaN in the same places, or nothing finite. Whole
    numbers on both sides are the same or not: 1 at least, where they are not.
    """
    if {given.dtype.kind, truth.dtype.kind} <= {*"iub"} and given.shape == truth.shape and np.any(given != truth):
        return max(1.0, error_of(given.astype(np.float64), truth.astype(np.float64), floor))
    exact = np.complex128 if "c" in (given.dtype.kind, truth.dtype.kind) else np.float64
    a, b = np.asarray(given, exact), np.asarray(truth, exact)
    if a.shape != b.shape:
        return float("inf")
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        if not same:
            return float("inf")
        if np.isnan(b).any():
            return float("nan")
        a, b = a[finite], b[finite]
    if not a.size:
        return float("nan")
    worst = float(np.abs(a - b).max(initial=0.0))
    if worst == 0:
        return 0.0
    scale = max(_size(a, b), floor)
    return worst / scale if scale > 0 else float("inf")


def relative_error(given: ArrayLike, truth: ArrayLike, scale: float | None = None) -> float:
    """max|given - truth| / max|truth|: one number a tensor, so that a small element beside large ones may round.

    Args:
      given: any shape.
      truth: the same shape, in float64 or exact.
      scale: in place of max|truth|, where the truth is 0 by cancellation: the size of what cancelled.

    Returns:
      The error; 0 if both are all 0; infinity if either holds a NaN or an infinity, or the shapes differ.
    """
    a, b = np.asarray(given, np.float64), np.asarray(truth, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    worst = float(np.abs(a - b).max(initial=0.0))
    scale = float(np.abs(b).max(initial=0.0)) if scale is None else scale
    return 0.0 if worst == 0 else worst / scale if scale > 0 else float("inf")


def relative_norm_error(given: ArrayLike, truth: ArrayLike) -> float:
    """||given - truth|| / ||truth|| (Euclidean): for a gradient, whose direction counts.

    Args:
      given: any shape.
      truth: the same shape, in float64 or exact.

    Returns:
      The error; 0 if both are all 0; infinity if either holds a NaN or an infinity, or the shapes differ.
    """
    a, b = np.asarray(given, np.float64), np.asarray(truth, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    difference, size = float(np.linalg.norm((a - b).ravel())), float(np.linalg.norm(b.ravel()))
    return 0.0 if difference == 0 else difference / size if size > 0 else float("inf")
