"""Two arrays of one place that have other shapes: what is said of these, for no number says how far apart they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """The shapes of an array on both sides, where they are not the same but for the layout.

    Attributes:
      torch: PyTorch's, as it has it.
      flax: Flax's, as it has it.
      flax_in_torch: Flax's with its axes in PyTorch's order; None where that is the same, or not known.
    """

    torch: Shape
    flax: Shape
    flax_in_torch: Shape | None = None

    @property
    def text(self) -> str:
        """In words."""
        there = f" (in PyTorch's order {[*self.flax_in_torch]})" if self.flax_in_torch else ""
        return f"another shape: {[*self.torch]} in PyTorch, {[*self.flax]} in Flax{there}"


def shapes_of(source: NDArray, flax: NDArray, way: Callable[[NDArray], NDArray] | None) -> Shapes:
    """Both shapes.

    Args:
      source: PyTorch's array, in its own layout.
      flax: Flax's.
      way: from PyTorch's layout to Flax's.
    """
    rank, order = source.ndim, None
    if way is not None and rank == flax.ndim:
        try:
            # Sizes that are all different show where each axis goes.
            order = [n - 2 for n in way(np.zeros(range(2, 2 + rank))).shape]
        except ValueError:
            order = None  # it is cut or joined on its way, and no axis goes anywhere
    if order is None or sorted(order) != [*range(rank)] or order == [*range(rank)]:
        return Shapes(source.shape, flax.shape)
    return Shapes(source.shape, flax.shape, tuple(flax.shape[order.index(i)] for i in range(rank)))
