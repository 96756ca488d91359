"""What the weights of new networks were: of each tensor which numbers never change, and a sample of those that do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MOST_NUMBERS = 2**17
"""Of a tensor, over all networks, that are kept: as many show 3 % between two standard deviations."""
LEAST_DISTINCT = 0.5
"""Of the numbers of one network. Where fewer are, several are one draw, as in a row that is repeated."""


MOST_OFTEN = 0.01
"""The share of one number among those drawn, in bfloat16 too. Eight networks have one of such by chance 1e-16 times."""


LEAST_SIDE, MOST_SIDE = 4, 512
"""Rows of a matrix that is looked at as an orthogonal one: of fewer any may be, of more it costs seconds."""
ORTHOGONAL = 1e-4
"""How far from it float32 leaves one."""


class Drawn(NamedTuple):
    """One tensor over several networks.

    Attributes:
      first: as the first network has it.
      fixed: which of its numbers all networks have; of its shape.
      numbers: of the others, those that are kept, one draw each.
    """

    first: Array
    fixed: Array
    numbers: Array

    @property
    def is_random(self) -> bool:
        """Whether any of it is drawn."""
        return not bool(self.fixed.all())

    @property
    def is_continuous(self) -> bool:
        """Whether no number is drawn again and again (0, or 1 and -1): else all networks may have it by chance."""
        _, counts = np.unique(self.numbers[:4096], return_counts=True)
        return bool(counts.max(initial=0) <= max(1, MOST_OFTEN * counts.sum()))

    @property
    def is_orthogonal(self) -> bool:
        """Whether the rows of the matrix [*, out], or its columns, are at right angles, and of one length.

        Numbers that are drawn independently never are; of a cell all gates together are, if each is.
        """
        if self.first.ndim < 2 or self.fixed.any():
            return False
        a = self.first.reshape(-1, self.first.shape[-1]).astype(np.float64)
        a = a if len(a) <= a.shape[1] else a.T
        if not LEAST_SIDE <= len(a) <= MOST_SIDE:
            return False
        gram = a @ a.T
        length = gram.trace() / len(a)
        return bool(np.abs(gram - length * np.eye(len(a))).max() <= ORTHOGONAL * length)

    @property
    def mean(self) -> float:
        """Of all its numbers that are drawn; of what is fixed, where none is."""
        return float(self._all.mean())

    @property
    def std(self) -> float:
        """Likewise."""
        return float(self._all.std())

    @property
    def reach(self) -> float:
        """How many standard deviations the farthest number is from the mean."""
        return float(np.abs(self._all - self.mean).max() / self.std) if self.std else 0.0

    @property
    def _all(self) -> Array:
        return self.numbers if self.is_random else self.first.ravel().astype(np.float64)


class Draws:
    """The tensors of one side, network after network; no more is kept than `MOST_NUMBERS` of each.

    Args:
      networks: how many there will be.
    """

    def __init__(self, networks: int) -> None:
        self.networks = networks
        self.first: dict[str, Array] = {}
        self._fixed: dict[str, Array] = {}
        self._places: dict[str, Array] = {}
        self._kept: dict[str, list[Array]] = {}

    def add(self, tensors: Mapping[str, Array]) -> None:
        """One more network."""
        for name, tensor in tensors.items():
            a = np.asarray(tensor, np.float32)
            if name not in self.first:
                # Places that have nothing to do with what stands in them; the same for both sides.
                every = np.random.default_rng(0).permutation(a.size)
                self._places[name] = every[: max(1, MOST_NUMBERS // self.networks)]
                self.first[name], self._fixed[name], self._kept[name] = a.copy(), np.ones(a.shape, bool), []
            self._fixed[name] &= a == self.first[name]
            self._kept[name].append(a.reshape(-1)[self._places[name]])

    def drawn(self, name: str) -> Drawn:
        """That tensor."""
        fixed = self._fixed[name]
        sample = np.array(self._kept[name], np.float64)[:, ~fixed.reshape(-1)[self._places[name]]]
        if sample.size and len(np.unique(sample[0])) < LEAST_DISTINCT * sample.shape[1]:
            sample = np.unique(sample, axis=1)
        return Drawn(self.first[name], fixed, sample.ravel())
