"""How query, key and value are read from one projection or three, and which channels are a head's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.search import PARTS, part_of

Array = NDArray[Any]

MOST_PROJECTIONS = 4
"""So many of the layers run before, the most recent, may be query, key and value."""
# How a fused projection's channels may be read, and a head's.
SPLITS = tuple(", ".join(order) for order in itertools.permutations(("qkv", "head", "channel")))
ORDERS = tuple("".join(order) for order in itertools.permutations("qkv"))
MERGED = ("head, channel", "channel, head")


class Heads(NamedTuple):
    """How query, key and value are read from what was projected, and how the heads are joined again.

    Attributes:
      source: what was projected.
      number: of heads.
      split: in which order a projection's channels are: heads before the channels of a head, or behind them; of one
        projection for all three, where these stand.
      order: of query, key and value: of a fused projection "qkv"; of three, which is which.
      shared: how fewer heads of key and value are repeated: "each" (a, a, b, b), "all" (a, b, a, b) or "".
      merged: how the heads are joined.
    """

    source: str
    number: int
    split: str = MERGED[0]
    order: str = "qkv"
    shared: str = ""
    merged: str = MERGED[0]

    @property
    def usual(self) -> bool:
        """Nothing stands in an unusual order."""
        return (
            self.split in (*SPLITS[:1], "head, qkv, channel", MERGED[0])
            and self.merged == MERGED[0]
            and self.order in (ORDERS[0], self.source)
        )


class Arrays(NamedTuple):
    """Query, key and value [N, L, H, d], and the result [N, L, H, d]."""

    q: Array
    k: Array
    v: Array
    o: Array


def projections(sources: Sequence[Source], o: Array) -> Iterator[tuple[Heads, Arrays]]:
    """Every way to read query, key, value and result as heads; there are as many queries as results."""
    width = o.shape[-1]
    counts = [n for n in range(1, width + 1) if width % n == 0]
    outputs = [s for s in sources if s.name.startswith("the output")][:MOST_PROJECTIONS]
    for merged, count in itertools.product(MERGED, counts):
        if merged != MERGED[0] and count in (1, width):
            continue  # the same
        result = _heads(o, count, merged)
        for source in outputs:
            if source.value.shape[1:] == (o.shape[1], 3 * width):
                sizes = {"qkv": 3, "head": count, "channel": width // count}
                for split in SPLITS:
                    axes = split.split(", ")
                    parts = source.value.reshape(*source.value.shape[:2], *(sizes[axis] for axis in axes))
                    parts = parts.transpose(
                        2 + axes.index("qkv"), 0, 1, 2 + axes.index("head"), 2 + axes.index("channel")
                    )
                    for order in ORDERS:
                        q, k, v = (parts[order.index(letter)] for letter in "qkv")
                        yield Heads(source.name, count, split, order, merged=merged), Arrays(q, k, v, result)
        threes = [*itertools.permutations(outputs, 3), *_with_halves(outputs, width)]
        for split, three in itertools.product(MERGED, threes):
            if three[0].value.shape[1] != o.shape[1]:
                continue  # of another text: in cross-attention only keys and values are
            name = ", ".join(s.name for s in sorted(three, key=lambda s: _place(s, outputs)))
            for shared, (q, k, v) in _three([s.value for s in three], count, width, split):
                heads = Heads(name, count, split, ", ".join(s.name for s in three), shared, merged)
                yield heads, Arrays(q, k, v, result)


def _with_halves(outputs: Sequence[Source], width: int) -> Iterator[tuple[Source, Source, Source]]:
    """Of two projections one is the query, and the halves of the other are key and value, either way round."""
    for query, both in itertools.permutations(outputs, 2):
        if both.value.shape[-1] == 2 * width:
            halves = zip(PARTS[:2], np.split(both.value, 2, axis=-1), strict=True)
            one, other = (Source(f"{part}{both.name}", value) for part, value in halves)
            yield query, one, other
            yield query, other, one


def _place(source: Source, outputs: Sequence[Source]) -> tuple[int, str]:
    """Where it stands in the usual order: that of the calls; halves behind the query, whatever was called first."""
    return (1, source.name) if part_of(source.name) else (-[s.name for s in outputs].index(source.name), "")


def _three(values: Sequence[Array], count: int, width: int, split: str) -> Iterator[tuple[str, list[Array]]]:
    """Query, key and value of three projections, those of key and value repeated where they have fewer heads."""
    size = width // count
    few = values[1].shape[-1] // size
    fits = values[0].shape[-1] == width and values[1].shape == values[2].shape
    if not fits or not few or count % few or few * size != values[1].shape[-1]:
        return
    q, k, v = (_heads(value, n, split) for value, n in zip(values, (count, few, few), strict=True))
    if few == count:
        yield "", [q, k, v]
    else:
        yield "each", [q, *(np.repeat(a, count // few, axis=2) for a in (k, v))]
        if few > 1:
            yield "all", [q, *(np.tile(a, (1, 1, count // few, 1)) for a in (k, v))]


def _heads(a: Array, count: int, order: str) -> Array:
    """[N, L, D] as [N, L, H, d]."""
    if order == MERGED[0]:
        return a.reshape(*a.shape[:2], count, -1)
    return a.reshape(*a.shape[:2], -1, count).swapaxes(2, 3)
