"""Integers that arrive at an embedding: positions, and what is counted by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.masks import padding
from parity.diagnosis.family import Family, Property, unlike
from parity.diagnosis.finding import Finding

Array = NDArray[Any]

EVERY = "every place"


class Positions(NamedTuple):
    """Numbers that count along a sequence.

    Attributes:
      counted: which places are counted.
      start: the number of the first of them.
      others: what stands at the other places.
    """

    counted: str
    start: int
    others: str

    def __str__(self) -> str:
        return f"counts {self.counted} from {self.start}{self.others}"


def findings(name: str, torch: Array, flax: Array, inputs: Sequence[Source]) -> list[Finding]:
    """What two sides' integers differ in.

    Args:
      name: of the layer at which they arrive.
      torch: PyTorch's.
      flax: Flax's.
      inputs: of the network, that may say which places are padding.

    Returns:
      "position-ids" where both count, but otherwise; else "unexplained".
    """
    pair = FAMILY.nearest(list(_counts(torch, inputs)), list(_counts(flax, inputs)))
    found = [] if pair is None else FAMILY.findings(*pair)
    return found[:1] or [Finding("unexplained", f"the integers that arrive at {name} differ")]


def _counts(v: Array, inputs: Sequence[Source]) -> Iterator[Positions]:
    """Every way of counting that gives these numbers, [L] or [N, L]; the usual first."""
    if v.ndim not in (1, 2) or v.dtype.kind not in "iu" or v.shape[-1] < 2:
        return
    v = v.reshape(-1, v.shape[-1]).astype(np.int64)
    places = [(EVERY, np.ones(v.shape, bool))]
    places += [
        (mask.text.replace("positions ", "places "), mask.keep[:, 0])
        for source in inputs
        for mask in padding(source, len(v), 1, v.shape[1])
        if mask.keep[:, 0].shape == v.shape
    ]
    for text, keep in places:
        count = np.cumsum(keep, axis=1)
        if count.max() < 2:
            continue
        first = int((v - count)[keep][0])
        if not np.array_equal(v[keep], (count + first)[keep]):
            continue
        rest = np.unique(v[~keep])
        if len(rest) < 2:
            yield Positions(text, first + 1, f" and has {rest[0]} elsewhere" if len(rest) else "")
        elif np.array_equal(v, np.maximum(count, 1) + first):
            yield Positions(text, first + 1, " and repeats the last number elsewhere")


def _finding(torch: Positions, flax: Positions) -> list[Finding]:
    return [Finding("position-ids", f"PyTorch {torch}, Flax {flax}")]


FAMILY: Family[Positions] = Family(
    Property("counted", unlike("counted", 3), _finding),
    Property("start", unlike("start", 2), _finding),
    Property("others", unlike("others", 1), _finding),
)
