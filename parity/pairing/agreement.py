"""How far apart two runs with the same weights are: wrongly carried ones do not agree by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from parity.pairing.arrangements import fitting
from parity.pairing.outputs import partners
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.recording import Recording

AGREES = 1e-6
"""Of the largest value: a side may compute in float32 inside."""
CLEARLY = 0.01
"""Where the networks differ in something else, too (an epsilon), the right choice is so much closer than the next."""

T = TypeVar("T")


def distance(torch: Recording, flax: Recording) -> float:
    """The largest error of an output, whatever the arrangement of its axes; infinity where there is none."""
    if not torch.has_ended or flax.failure is not None:
        return float("inf")
    both = [(torch.outputs[i], flax.outputs[j]) for i, j in partners(torch.named_outputs, flax.named_outputs)]
    errors = [min(error_of(b, way.of(a)) for way in fitting(kinds.OTHER, a, b.shape)) for a, b in both]
    return max(errors) if errors and all(error == error for error in errors) else float("inf")


def closest(possible: Sequence[T], distance_of: Callable[[T], float]) -> T | None:
    """The first that agrees, or the one that is clearly closer than all others; None: the numbers do not say."""
    distances: list[float] = []
    for one in possible:
        distances.append(distance_of(one))
        if distances[-1] <= AGREES:
            return one
    best = min(range(len(distances)), key=distances.__getitem__)
    others = [d for i, d in enumerate(distances) if i != best]
    return possible[best] if others and distances[best] <= CLEARLY * min(*others, 1.0) else None
