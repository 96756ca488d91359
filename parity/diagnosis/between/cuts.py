"""Positions that one side leaves out, at another end than the other: a chomp behind padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

from numpy.typing import NDArray

from parity.diagnosis.between.chains import Chain, Source, Target
from parity.diagnosis.finding import Finding
from parity.diagnosis.fixes import Fix

Array = NDArray[Any]
Describe = Callable[[Sequence[Source], Array, float], Chain | None]

MOST_SOURCES = 4
"""Of the most recent, those of which positions may be left out."""


class Cut(NamedTuple):
    """What is left of a source.

    Attributes:
      source: its name.
      first, last: how many positions are left out there, along each axis.
    """

    source: str
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """How many are left out before and behind, axis by axis."""
        return tuple(zip(self.first, self.last, strict=True))

    @property
    def lines(self) -> tuple[str, str]:
        """The code that leaves these out of y, in PyTorch and in Flax."""
        slices = ", ".join(f"{first or ''}:{-last if last else ''}" for first, last in self.ends)
        return f"y[:, :, {slices}]", f"y[:, {slices}]"

    def __str__(self) -> str:
        ends = [f"the {end} {_short(some)}" for end, some in (("first", self.first), ("last", self.last)) if any(some)]
        return " and ".join(ends) or "none"


def findings(sources: Sequence[Source], torch: Target, flax: Target, describe: Describe) -> list[Finding]:
    """A `padding` where both sides go on from one source, and leave out other positions of it; else nothing."""
    # Nothing is left out of what is as long on both sides: it is not looked at.
    sizes = [math.prod(target.value.shape[:-1]) for target in (torch, flax)]
    longer = {s.name for s in sources if s.value.ndim > 2 and math.prod(s.value.shape[:-1]) > min(sizes)}
    for mine in _cuts(sources, longer, torch, describe):
        for theirs in _cuts(sources, {mine.source}, flax, describe):
            if mine != theirs and mine.source == theirs.source:
                of = f"of the positions of {mine.source}"
                (a, b), (c, d) = mine.lines, theirs.lines
                evidence = f"{of} PyTorch leaves out {mine}, Flax {theirs}"
                return [Finding("padding", evidence, cut=(mine, theirs), fix=Fix((a, c), (d, b)))]
    return []


def _cuts(sources: Sequence[Source], names: Set[str], target: Target, describe: Describe) -> Iterator[Cut]:
    """What is left out of one of the sources of these names, that this may be made of the rest."""
    for source in [s for s in sources if s.name in names][:MOST_SOURCES]:
        x, y = source.value, target.value
        if x.ndim < 3 or x.ndim != y.ndim or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
            continue
        more = [n - m for n, m in zip(x.shape[1:-1], y.shape[1:-1], strict=True)]
        if min(more) < 0:
            continue
        starts = {tuple(0 for _ in more), tuple(more), tuple(n // 2 for n in more)}
        for start in sorted(starts):
            part = x[:, *(slice(a, a + m) for a, m in zip(start, y.shape[1:-1], strict=True))]
            # A residual branch may be added to what is made of the rest.
            others = [s.value for s in sources if s.name != source.name and s.value.shape == y.shape]
            chains = (describe([Source(source.name, part)], y - other, target.tolerance) for other in (0.0, *others))
            if any(chain is not None and not (chain.pool or chain.layout) for chain in chains):
                yield Cut(source.name, start, tuple(n - a for n, a in zip(more, start, strict=True)))


def _short(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else " x ".join(map(str, sizes))
