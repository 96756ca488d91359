"""How the axes of an activation are arranged in Flax, and the places whose arrangement is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.records import kinds
from parity.records.recording import NETWORK


class Arrangement(NamedTuple):
    """What becomes of PyTorch's axes in Flax.

    Attributes:
      name: "same"; "last": axis 1 goes to the end; "swap": the first two axes (sequence and batch) are exchanged;
        "flatten": the last axis is reordered from C, *spatial to *spatial, C; "heads": the last axis is two.
      sizes: of "flatten": (C, *spatial); of "heads": (heads, features of each).
      rows: what is the same for all examples, as positions are, stands there so many times along axis 0, and here once;
        or there once (1), and here for each example; 0: as often.
      rank: 1: that axis is not here; -1: it is not there.
    """

    name: str
    sizes: tuple[int, ...] = ()
    rows: int = 0
    rank: int = 0

    def of(self, a: NDArray) -> NDArray:
        """PyTorch's array as Flax has it."""
        a = self._moved(a)
        if not self.rows:
            return a
        one = a if self.rank > 0 else a[0]
        return one if self.rank < 0 else np.broadcast_to(one, (self.rows, *one.shape))

    def of_gradient(self, g: NDArray) -> NDArray:
        """The gradient by such an array, by what Flax has; of many rows, each has an equal share of the one's."""
        g = self._moved(g)
        if not self.rows:
            return g
        one = g if self.rank > 0 else g.sum(0)
        return one if self.rank < 0 else np.broadcast_to(one / self.rows, (self.rows, *one.shape))

    def summed(self, g: NDArray) -> NDArray:
        """The gradient, of Flax's layout, of what both sides have: of all rows together."""
        return g.sum(0) if self.rows and self.rank >= 0 else g

    def _moved(self, a: NDArray) -> NDArray:
        if self.name == "last":
            return np.moveaxis(a, 1, -1)
        if self.name == "swap":
            return np.swapaxes(a, 0, 1)
        if self.name == "flatten":
            return np.moveaxis(a.reshape(*a.shape[:-1], *self.sizes), a.ndim - 1, -1).reshape(a.shape)
        if self.name == "heads":
            return a.reshape(*a.shape[:-1], *self.sizes)
        return a


SAME, LAST, SWAP = Arrangement("same"), Arrangement("last"), Arrangement("swap")


def flatten(sizes: tuple[int, ...]) -> Arrangement:
    """What stands behind a flatten of (C, *spatial)."""
    return Arrangement("flatten", sizes)


class Slot(NamedTuple):
    """A place in PyTorch's run that holds an activation.

    Attributes:
      key: the call; `NETWORK` for the network itself.
      part: "input" | "output".
      number: which of them.
    """

    key: tuple[str, int]
    part: str
    number: int = 0

    @property
    def is_result(self) -> bool:
        """Whether it is an output of the network."""
        return self.key == NETWORK


def result(number: int) -> Slot:
    """The network's output of that number."""
    return Slot(NETWORK, "output", number)


def usual(kind: str, a: NDArray) -> Arrangement:
    """The arrangement of what goes into and out of a layer of this kind."""
    return LAST if kind in kinds.CHANNELS_SECOND and a.ndim > 2 else SAME


def fitting(
    kind: str,
    a: NDArray,
    shape: Sequence[int],
    flattened: Sequence[tuple[int, ...]] = (),
    *,
    inside: bool = False,
) -> list[Arrangement]:
    """The arrangements that give PyTorch's array this shape, the usual one of this kind of layer first.

    Args:
      kind: of the layer, see `records.kinds`.
      a: PyTorch's array.
      shape: Flax's.
      flattened: (C, *spatial) of what may have been flattened to it.
      inside: of the network, where what is the same for all examples may stand once or for each.

    Returns:
      At least the usual one, whether it fits or not.
    """
    first = usual(kind, a)
    every = [first]
    every += [flatten(sizes) for sizes in flattened if a.ndim == 2 and np.prod(sizes) == a.shape[-1]]
    if a.ndim and tuple(shape[:-2]) == a.shape[:-1] and np.prod(shape[-2:]) == a.shape[-1]:
        every.append(Arrangement("heads", tuple(shape[-2:])))
    if kind in kinds.CHANNELS_SECOND:
        every.append(SAME)
    else:
        every += [LAST] * (a.ndim > 2) + [SWAP] * (a.ndim == 3)
    if inside and _is_repeated(a, shape):
        rank = len(shape) - a.ndim
        rows = 1 if rank < 0 else shape[0]
        every += [way._replace(rows=rows, rank=rank) for way in every if way != SWAP]
    return [arrangement for arrangement in every if arrangement.of(a).shape == tuple(shape)] or [first]


def _is_repeated(a: NDArray, shape: Sequence[int]) -> bool:
    """Whether it may be once, and for each example on the other side."""
    rank = len(shape) - a.ndim
    if not a.size or not a.ndim or a.shape == tuple(shape):
        return False
    if rank == 1 or (rank == 0 and len(a) == 1):
        return True
    return (rank == -1 or (rank == 0 and shape[0] == 1)) and bool((a == a[:1]).all())
