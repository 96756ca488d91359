"""Which output of the network is which on the other side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Outputs = Sequence[tuple[str, Any]]
"""(name, array) of each: the keys and fields that it stands under, see `records.recording.Recording`."""


def partners(torch: Outputs, flax: Outputs) -> list[tuple[int, int]]:
    """(PyTorch's place, Flax's) of the outputs that belong together, in PyTorch's order.

    Those of one name; of the others each with the next. Where there is another number of these, as many as have the
    same sizes in whatever order, and the rest is without a partner.
    """
    place = {name: j for j, (name, _) in enumerate(flax) if name}
    found = [(i, place[name]) for i, (name, _) in enumerate(torch) if name in place]
    left = [i for i in range(len(torch)) if i not in {i for i, _ in found}]
    right = [j for j in range(len(flax)) if j not in {j for _, j in found}]
    if len(left) == len(right):
        others = [*zip(left, right, strict=True)]
    else:
        others = _longest([(i, _sizes(torch[i][1])) for i in left], [(j, _sizes(flax[j][1])) for j in right])
    return sorted(found + others)


def _sizes(array: Any) -> list[int]:
    return sorted(array.shape)


def _longest(a: Sequence[tuple[int, Any]], b: Sequence[tuple[int, Any]]) -> list[tuple[int, int]]:
    """The longest sequence of pairs that are equal in their second parts."""
    # best[n]: of the first of a seen so far and the first n of b.
    best: list[list[tuple[int, int]]] = [[] for _ in range(len(b) + 1)]
    for i, sizes in a:
        before = best
        best = [[]]
        for n, (j, others) in enumerate(b):
            with_both = [*before[n], (i, j)] if sizes == others else []
            best.append(max(before[n + 1], best[n], with_both, key=len))
    return best[-1]


def told(outputs: Outputs, place: int) -> str:
    """In words: by its name, else by its place."""
    name, _ = outputs[place]
    return f"output {name}" if name else f"output {place + 1} of {len(outputs)}"
