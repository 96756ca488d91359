"""How a tensor's axes move from PyTorch to Flax, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Move = Callable[[NDArray[Any]], NDArray[Any]]


class Layout(NamedTuple):
    """How a tensor's axes move from PyTorch to Flax, and back: permutations, so that gradients move alike."""

    to_flax: Move
    to_torch: Move


def _permuted(axes: Callable[[int], Sequence[int]]) -> Layout:
    return Layout(lambda a: a.transpose(axes(a.ndim)), lambda a: a.transpose(np.argsort(axes(a.ndim))))


def _flip(a: NDArray, axes: Sequence[int]) -> NDArray:
    return np.flip(a, tuple(axes))


def _each_output(a: NDArray) -> NDArray:
    if any(n != 1 for n in a.shape[1:]):
        raise ValueError(f"shape is {a.shape}; allowed: a number for each index of axis 0")
    return a


SAME = Layout(lambda a: a, lambda a: a)
OUT_IN = _permuted(lambda rank: _of_rank(rank, 2, (1, 0)))  # [out, in] <-> [in, out]
OIHW = _permuted(lambda rank: (*range(2, rank), 1, 0))  # [O, I, *k] <-> [*k, I, O], any number of spatial axes
CHANNELS_LAST = _permuted(lambda rank: (0, *range(2, rank), 1))  # [N, C, *k] <-> [N, *k, C]
FIRST_LAST = _permuted(lambda rank: (*range(1, rank), 0))  # [C, *k] <-> [*k, C]
EACH_OUTPUT = Layout(_each_output, lambda a: a)  # [O, 1, ...] <-> [O]: the lengths of a weight norm
# PyTorch's transposed convolution is the derivative of a convolution, Flax's a convolution of the dilated input: what
# one multiplies with the first kernel element the other multiplies with the last.
TRANSPOSED = Layout(
    lambda a: _flip(a, range(2, a.ndim)).transpose(*range(2, a.ndim), 0, 1),  # [I, O, *k] <-> [*k, I, O], flipped
    lambda a: _flip(a.transpose(-2, -1, *range(a.ndim - 2)), range(2, a.ndim)),
)
TRANSPOSE_KERNEL = OIHW  # [I, O, *k] <-> [*k, O, I]: with transpose_kernel=True Flax computes the derivative, too


def _of_rank(rank: int, wanted: int, axes: Sequence[int]) -> Sequence[int]:
    if rank != wanted:
        raise ValueError(f"rank is {rank}; allowed: {wanted}")
    return axes


def behind_flatten(channels: int, *spatial: int) -> Layout:
    """The matrix of a linear layer behind a flatten: PyTorch's inputs come as C, *spatial, Flax's as *spatial, C."""
    count = len(spatial)

    def to_flax(a: NDArray) -> NDArray:
        return a.reshape(-1, channels, *spatial).transpose(*range(2, 2 + count), 1, 0).reshape(-1, len(a))

    def to_torch(a: NDArray) -> NDArray:
        return a.reshape(*spatial, channels, -1).transpose(-1, -2, *range(count)).reshape(a.shape[1], -1)

    return Layout(to_flax, to_torch)


MASKED = -1e3
"""What an additive mask has in the places that it takes out is not larger: -1e4 in half precision, else -1e9 or so."""


def goes_last(a: NDArray) -> bool:
    """Whether axis 1 of this input of PyTorch's is the last in Flax: of floating arrays of rank 3 and more, but masks.

    An additive mask of attention, such as [B, 1, T, T], is 0 and one large negative number, and the same on both sides.
    """
    if a.dtype.kind != "f" or a.ndim < 3:
        return False
    others = np.unique(a[a != 0])
    return not (len(others) == 1 and others[0] <= MASKED)
