"""How a mistake is found: each side is fitted alone, the nearest pair of fits is taken, what they differ in is named.

A family of behaviours is a description (a NamedTuple, called a fit here), a search for every description that gives one
side's numbers, the likelier first, and the table of properties below. Numbers often allow several descriptions; of all
pairs the nearest is believed, so that a mistake is named only where no reading of the numbers is without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from parity.diagnosis.finding import Finding

SIDES = ("PyTorch", "Flax")

Fit = TypeVar("Fit")


class Property(NamedTuple, Generic[Fit]):
    """Something that two fits may differ in.

    Attributes:
      name: what it is called in `Family.differences`.
      distance: what it costs to suppose that PyTorch's fit and Flax's differ in it; 0: they do not.
      tell: what is said of two fits that do.
    """

    name: str
    distance: Callable[[Fit, Fit], float]
    tell: Callable[[Fit, Fit], Iterable[Finding]]


def unlike(attribute: str, cost: float = 1) -> Callable[[Any, Any], float]:
    """The distance of two fits of which this attribute is not the same: the cost, or 0."""
    return lambda torch, flax: cost * (getattr(torch, attribute) != getattr(flax, attribute))


def of_each(tell: Callable[[str, Fit, Fit], Iterable[Finding]]) -> Callable[[Fit, Fit], list[Finding]]:
    """What is said of PyTorch's fit, then of Flax's: `tell` gets a side's name, its fit and the other's."""
    return lambda torch, flax: [*tell(SIDES[0], torch, flax), *tell(SIDES[1], flax, torch)]


class Family(Generic[Fit]):
    """A table of properties, in the order in which they are told.

    Args:
      properties: what two fits may differ in.
      oddity: how unusual two fits are beside each other, in units of the distances; by default not at all.
      preference: which of the pairs that are equally near is taken: the one of the least; then the first.
    """

    def __init__(
        self,
        *properties: Property[Fit],
        oddity: Callable[[Fit, Fit], float] = lambda torch, flax: 0,
        preference: Callable[[Fit, Fit], Any] = lambda torch, flax: 0,
    ) -> None:
        self.properties, self.oddity, self.preference = properties, oddity, preference

    def differences(self, torch: Fit, flax: Fit) -> list[str]:
        """The names of the properties that the two differ in."""
        return [p.name for p in self.properties if p.distance(torch, flax)]

    def nearest(self, torch: Sequence[Fit], flax: Sequence[Fit]) -> tuple[Fit, Fit] | None:
        """The pair that differs in least; None where a side has no fit.

        Args:
          torch: all fits of PyTorch's side, the likelier first.
          flax: the same of Flax's.
        """

        def cost(pair: tuple[Fit, Fit]) -> tuple[float, Any]:
            distance = sum(p.distance(*pair) for p in self.properties)
            return distance + self.oddity(*pair), self.preference(*pair)

        return min(itertools.product(torch, flax), key=cost, default=None)

    def findings(self, torch: Fit, flax: Fit) -> list[Finding]:
        """What is said of everything that the two differ in."""
        return [f for p in self.properties if p.distance(torch, flax) for f in p.tell(torch, flax)]
