"""A softmax of a whole tensor, and the axes over which it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import error_of, limit_of
from parity.diagnosis.between.chains import LETTERS, Source
from parity.diagnosis.family import Family, Property, unlike
from parity.diagnosis.finding import Finding

Array = NDArray[Any]


class Softmax(NamedTuple):
    """A softmax of a source, or its logarithm; the axes by name."""

    source: str
    kind: str
    axes: str


def findings(sources: Sequence[Source], torch: Array, flax: Array, tolerance: float) -> list[Finding]:
    """Whether both sides are softmaxes of one source over different axes: the examples may be one of them.

    Args:
      sources: what both sides have alike, all examples.
      torch: PyTorch's result, all examples.
      flax: Flax's.
      tolerance: relative to the largest value.
    """
    first, second = (list(_search(sources, side, limit_of(side, tolerance))) for side in (torch, flax))
    pair = FAMILY.nearest(first, second)
    return [] if pair is None or pair[0].source != pair[1].source else FAMILY.findings(*pair)


def _search(sources: Sequence[Source], v: Array, limit: float) -> Iterator[Softmax]:
    # Of each softmax the numbers lie between 0 and 1, of its logarithm below: most tensors are none.
    if not v.size or not 1 < v.ndim < 5:
        return
    kind = "softmax" if v.min() >= 0 and v.max() <= 1 else "log-softmax" if v.max() <= 0 else ""
    names = ("the examples", *(f"axis {letter}" for letter in LETTERS[v.ndim - 1]))
    for source in sources:
        u = np.asarray(source.value, np.float64)
        if not kind or u.shape != v.shape or not np.isfinite(u).all():
            continue
        for count in range(1, v.ndim + 1):
            for axes in itertools.combinations(range(v.ndim), count):
                off = u - u.max(axis=axes, keepdims=True)
                total = np.exp(off).sum(axis=axes, keepdims=True)
                made = np.exp(off) / total if kind == "softmax" else off - np.log(total)
                if error_of(v, made) <= limit:
                    yield Softmax(source.name, kind, " and ".join(names[axis] for axis in axes))


FAMILY: Family[Softmax] = Family(
    Property("source", unlike("source", 8), lambda a, b: []),
    Property(
        "kind", unlike("kind", 4), lambda a, b: [Finding("activation", f"PyTorch applies {a.kind}, Flax {b.kind}")]
    ),
    Property(
        "axes",
        unlike("axes", 3),
        lambda a, b: [Finding("softmax-axis", f"the softmax is taken over {a.axes} in PyTorch, over {b.axes} in Flax")],
    ),
)
