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
    """

    name: str
    sizes: tuple[int, ...] = ()

    def of(self, a: NDArray) -> NDArray:
        """PyTorch's array as Flax has it."""
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
    kind: str, a: NDArray, shape: Sequence[int], flattened: Sequence[tuple[int, ...]] = ()
) -> list[Arrangement]:
    """The arrangements that give PyTorch's array this shape, the usual one of this kind of layer first.

    Args:
      kind: of the layer, see `records.kinds`.
      a: PyTorch's array.
      shape: Flax's.
      flattened: (C, *spatial) of what may have been flattened to it.

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
    return [arrangement for arrangement in every if arrangement.of(a).shape == tuple(shape)] or [first]
