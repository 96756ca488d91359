"""What leads from one side's tensor to the other's where nobody knows what both were made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import FUNCTIONS, error_of, limit_of

Array = NDArray[Any]

# Activations whose argument can be had back from their value, at least in part.
INVERTED = (
    "ReLU",
    "exact GELU",
    "tanh approximation of GELU",
    "SiLU",
    "sigmoid",
    "tanh",
    "identity",
    "leaky ReLU with slope 0.01",
    "ReLU6",
    "ELU",
    "SELU",
    "softplus",
    "hard swish",
    "hard sigmoid",
    "mish",
    "quick GELU x*sigmoid(1.702 x)",
)
_GRID = np.linspace(-30.0, 30.0, 6001)
_VALUES = {name: FUNCTIONS[name](_GRID) for name in INVERTED}
# A function that moves less than this from one point of the grid to the next says nothing exact about its argument.
# (Leaky ReLU moves by 1e-4, as near as rounding: were that the limit, it would be a thousand pieces.)
_FLAT = 5e-5


class _Piece(NamedTuple):
    """A stretch of an activation that rises, falls, or is nearly flat."""

    low: float
    high: float
    direction: int  # 1, -1, or 0: flat


def _pieces(name: str) -> list[_Piece]:
    steps = np.diff(_VALUES[name])
    kind = np.where(np.abs(steps) < _FLAT, 0, np.sign(steps)).astype(int)
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1), len(kind)]
    return [_Piece(_GRID[a], _GRID[b], kind[a]) for a, b in itertools.pairwise(edges)]


def _inverse(name: str, piece: _Piece, values: Array) -> Array:
    """Where on the piece the function has these values; NaN where nowhere."""
    function = FUNCTIONS[name]
    low, high = np.full(values.shape, piece.low), np.full(values.shape, piece.high)
    ends = np.sort([function(low[:1])[0], function(high[:1])[0]])
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = function(middle) > values if piece.direction > 0 else function(middle) < values
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where((values >= ends[0]) & (values <= ends[1]), 0.5 * (low + high), np.nan)


def _slope(name: str, u: Array) -> Array:
    return np.abs(FUNCTIONS[name](u + 1e-5) - FUNCTIONS[name](u - 1e-5)) / 2e-5


def activations_between(torch: Array, flax: Array, tolerance: float) -> tuple[str, str] | None:
    """Two activations of the same unknown values.

    Args:
      torch: PyTorch's result, any shape.
      flax: Flax's, the same shape.
      tolerance: relative to the largest value.

    Returns:
      PyTorch's activation and Flax's, the most usual pair that explains every element; None if there is none.
    """
    if torch.shape != flax.shape or torch.size < 32:
        return None
    t, f = torch.ravel(), flax.ravel()
    pick = np.unique(np.r_[np.linspace(0, t.size - 1, 384).astype(int), np.argsort(-np.abs(t - f))[:32]])
    t, f = t[pick], f[pick]
    for one, other in _pairs(t, f, tolerance):
        return one, other
    return None


def _pairs(t: Array, f: Array, tolerance: float) -> Iterator[tuple[str, str]]:
    limit_t, limit_f = limit_of(t, tolerance), limit_of(f, tolerance)
    preimages = {
        name: [(piece, _inverse(name, piece, t)) for piece in _pieces(name) if piece.direction] for name in INVERTED
    }
    by_rank = sorted(itertools.product(range(len(INVERTED)), repeat=2), key=sum)
    for first, second in ((INVERTED[i], INVERTED[j]) for i, j in by_rank if i != j):
        explained, informed = np.zeros(t.shape, bool), np.zeros(t.shape, bool)
        for _, u in preimages[first]:
            known = np.isfinite(u)
            at = np.where(known, u, 0.0)
            slope = _slope(first, at)
            margin = 4 * (limit_f + limit_t * (1 + _slope(second, at)) / np.maximum(slope, 1e-12))
            fitting = known & (np.abs(FUNCTIONS[second](at) - f) <= margin)
            explained |= fitting
            informed |= fitting & (slope > 0.01)
        for piece in (piece for piece in _pieces(first) if not piece.direction):
            explained |= _on_flat(first, second, piece, t, f, limit_f)
        if explained.all() and informed.sum() >= 16:
            yield first, second


def _on_flat(first: str, second: str, piece: _Piece, t: Array, f: Array, limit: float) -> NDArray[np.bool_]:
    """Elements of a flat stretch (ReLU's zeros): the other side must be somewhere in its own range there."""
    there = (piece.low <= _GRID) & (piece.high >= _GRID)
    a, b = _VALUES[first][there], _VALUES[second][there]
    # Between two points of the grid the extremum may be a little beyond both.
    inside_t = (t >= a.min() - 2e-5) & (t <= a.max() + 2e-5)
    return inside_t & (f >= b.min() - limit - 1e-3 * np.ptp(b)) & (f <= b.max() + limit)


def reordered(torch: Array, flax: Array, tolerance: float) -> str | None:
    """Whether one side's tensor is the other's in another order, example by example.

    Args:
      torch: [N, ...].
      flax: [N, ...], as many elements.
      tolerance: relative to the largest value.

    Returns:
      A sentence that says which order; None if the values are not the same ones, or are in the same order.
    """
    if torch.ndim < 2 or not torch.size or len(torch) != len(flax) or torch.size != flax.size:
        return None
    t, f, limit = torch.reshape(len(torch), -1), flax.reshape(len(flax), -1), limit_of(torch, tolerance)
    if error_of(t, f) <= limit or error_of(np.sort(t, axis=1), np.sort(f, axis=1)) > limit or len(np.unique(t)) < 8:
        return None
    width = t.shape[1]
    for channels in (c for c in range(2, width // 2 + 1) if width % c == 0):
        if error_of(t.reshape(len(t), channels, -1).swapaxes(1, 2), f.reshape(len(f), -1, channels)) <= limit:
            return (
                f"PyTorch flattens C,H,W, Flax H,W,C, with C = {channels}, or H,W = {channels} and the other way round"
            )
    return "Flax's values are PyTorch's in another order"
