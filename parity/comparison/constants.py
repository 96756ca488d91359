"""Constants that one side keeps in float32 and the other side's code makes in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MARGIN = 4
"""So many times what float32 makes of the constant on the one side it may be off on the other: both round, in an order
of their own."""


class Constant(NamedTuple):
    """A table or a factor of PyTorch's, and the same as Flax's code has it.

    Attributes:
      name: PyTorch's.
      exact: as PyTorch's, with Flax's numbers in it.
      torch: PyTorch's number, where the two are farthest apart.
      flax: Flax's.
    """

    name: str
    exact: NDArray
    torch: float
    flax: float

    @property
    def text(self) -> str:
        """In a sentence."""
        return (
            f"{self.name} is a constant rounded to float32 in PyTorch, and float64 in Flax's code: "
            f"{self.torch:.17g} and {self.flax:.17g}, where they are farthest apart"
        )


def rounded(tables: Mapping[str, NDArray], exact: Sequence[NDArray], rough: Sequence[NDArray]) -> Iterator[Constant]:
    """PyTorch's tables that are constants of Flax's but for float32's rounding, which is measured on Flax's own.

    Args:
      tables: PyTorch's, by name.
      exact: Flax's constants in float64.
      rough: the same in float32.
    """
    pairs = [(c, np.asarray(r, np.float64)) for c, r in zip(exact, rough, strict=True) if c.shape == np.shape(r)]
    for name, table in tables.items():
        found = (made for c, r in pairs if (made := _matched(name, np.asarray(table, np.float64), c, r)) is not None)
        if (constant := next(found, None)) is not None:
            yield constant


def _matched(name: str, table: NDArray, exact: NDArray, rough: NDArray) -> Constant | None:
    for way in _ways(exact):
        c, r = way(exact), way(rough)
        part = tuple(slice(n) for n in c.shape)
        here = table.squeeze()
        if here.ndim != c.ndim or here[part].shape != c.shape or not np.isfinite(c).all():
            continue
        least = np.finfo(np.float32).eps * np.abs(c)
        apart = np.abs(here[part] - c)
        if np.all(apart <= MARGIN * np.maximum(np.abs(r - c).max(initial=0.0), least)) and np.any(apart):
            at = np.unravel_index(int(np.argmax(apart)), c.shape)
            whole = here.copy()
            whole[part] = c
            return Constant(name, whole.reshape(table.shape), float(here[part][at]), float(c[at]))
    return None


def _ways(constant: NDArray) -> list[Callable[[NDArray], NDArray]]:
    """As it is; channels first; and of a factor, by which one may also divide, its inverse."""
    if constant.size == 1:
        ways: list[Callable[[NDArray], NDArray]] = [np.squeeze]
        return [*ways, lambda a: 1 / np.squeeze(a)] if np.all(constant) else ways
    return [np.squeeze, lambda a: np.moveaxis(np.squeeze(a), -1, 0)]
