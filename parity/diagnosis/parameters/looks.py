"""Whether two parameters agree, and what one looks like that no known mistake explains."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding, told_apart
from parity.diagnosis.product.formats import FORMATS

Array = NDArray[Any]


def close(a: Array, b: Array, tolerance: float) -> bool:
    """Whether two arrays of one shape agree, relative to the largest value."""
    largest = max(float(np.abs(a).max(initial=0.0)), 1e-300)
    return bool(np.all(np.abs(a - b) <= tolerance * largest))


def same(a: Array, b: Array, tolerance: float, largest: float | None = None) -> bool:
    """Whether two arrays have one shape and agree, relative to `largest`, by default the largest value."""
    if a.shape != b.shape or not a.size:
        return a.shape == b.shape
    if largest is None:
        largest = float(np.abs(a).max())
    line = (0,) * (a.ndim - 1)  # tells most apart, without a pass over all
    allowed = tolerance * max(largest, 1e-300)
    return bool(np.abs(a[line] - b[line]).max() <= allowed and np.abs(a - b).max() <= allowed)


def unexplained(role: str, truth: Array, held: Array, tolerance: float) -> Finding:
    """Says where and how much a parameter differs that no known mistake explains, and what it looks like."""
    if truth.shape != held.shape:
        if truth.size == held.size and close(np.sort(truth, None), np.sort(held, None), tolerance):
            return Finding(
                "unexplained", f"Flax's {role} has PyTorch's numbers in another order and shape {held.shape}"
            )
        evidence = f"Flax's {role} has the shape {held.shape}, where {truth.shape} is expected"
        return Finding("unexplained", evidence)
    off = np.abs(held - truth)
    largest = max(float(np.abs(truth).max(initial=0.0)), 1e-300)
    wrong = off > tolerance * largest
    return Finding("unexplained", f"Flax's {role} {_looks(role, truth, held, wrong, tolerance)}")


def _looks(role: str, truth: Array, held: Array, wrong: Array, tolerance: float) -> str:
    for name in ("bfloat16", "float16", "TF32", "bfloat16, truncated"):
        if close(FORMATS[name](truth), held, min(tolerance, 1e-7)):
            return f"is PyTorch's, rounded to {name}"
    if not np.isfinite(held).all():
        return f"has {np.count_nonzero(~np.isfinite(held))} values that are not finite"
    if not held.any():
        return "is all zeros: not loaded"
    factor = float(np.vdot(truth, held)) / max(float(np.vdot(truth, truth)), 1e-300)
    if truth.size > 1 and close(factor * truth, held, tolerance):
        return f"is PyTorch's times {factor:.6g}"
    if truth.size > 1 and close(np.sort(truth, None), np.sort(held, None), tolerance):
        return "has PyTorch's numbers in another order"
    if truth.size >= 16:
        together = np.vdot(truth - truth.mean(), held - held.mean())
        correlation = together / max(truth.std() * held.std() * truth.size, 1e-300)
        if wrong.mean() > 0.9 and abs(correlation) < 5 / np.sqrt(truth.size):
            deviation = f"mean {held.mean():.2g}, deviation {held.std():.2g}"
            return f"has nothing in common with PyTorch's ({deviation}) - not loaded: looks freshly initialised"
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.abs(held - truth))), truth.shape))
    worst = "the most at {}: {} for {}".format(place, *told_apart(held[place], truth[place]))
    return f"differs in {np.count_nonzero(wrong)} of {truth.size} numbers, {worst}"
