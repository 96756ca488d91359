"""Layers that one side keeps in one: their tensors stacked along an axis, as scan and vmap do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from parity.pairing.alignment import Alignment
from parity.pairing.recut.cut import Piece, Recut, structure
from parity.records.kinds import Shape
from parity.records.recording import Layer
from parity.records.structure import Structure

Framework = Literal["torch", "flax"]
MOST_AXES = 3


def alternatives(mine: Structure, other: Structure, framework: Framework) -> Iterator[list[Recut]]:
    """How the layers of one side that fit none of the other's may be stacks of them, the usual axis first.

    Args:
      mine: the side with the stacks.
      other: the other.
      framework: whose `mine` is.
    """
    alone = [x for x in mine.layers if not _fits(x, mine, other, framework)]
    for axis in range(MOST_AXES):
        counts = {layer.path: count for layer in alone if (count := count_of(layer, mine, axis)) is not None}
        found = [x for x in alone if x.path in counts]
        every = [unstacked([x], mine, framework, axis, counts[x.path]) for x in found]
        cut = structure(mine, every)
        fitting = {x.path for x in cut.layers if _fits(x, cut, other, framework)}
        found = [x for x, recut in zip(found, every, strict=True) if recut.layers[0].path in fitting]
        if not found:
            continue
        ways = [_runs(found, counts, depth) for depth in (0, 1)]
        for groups in ways if ways[0] != ways[1] else ways[:1]:
            yield [unstacked(group, mine, framework, axis, counts[group[0].path]) for group in groups]


def _fits(layer: Layer, mine: Structure, other: Structure, framework: Framework) -> bool:
    one = replace(mine, layers=[layer])
    fits = Alignment(one, other, {}) if framework == "torch" else Alignment(other, one, {})
    return any(fits.fit(*((layer, y) if framework == "torch" else (y, layer))) is not None for y in other.layers)


def count_of(layer: Layer, mine: Structure, axis: int) -> int | None:
    """How many layers may lie along this axis of all tensors; None if they do not agree."""
    shapes = [mine.shapes[full] for full in layer.tensors.values()]
    sizes = {shape[axis] if len(shape) > axis else 0 for shape in shapes}
    count = next(iter(sizes)) if len(sizes) == 1 else 0
    return count if count > 1 else None


def _runs(layers: Sequence[Layer], counts: dict[str, int], depth: int) -> list[list[Layer]]:
    """What is stacked together: all that is as often, one behind the other, within as many names of its path."""

    def key(layer: Layer) -> tuple:
        return counts[layer.path], layer.path.replace("/", ".").split(".")[:depth]

    return [list(group) for _, group in itertools.groupby(layers, key)]


def unstacked(layers: Sequence[Layer], mine: Structure, framework: Framework, axis: int, count: int) -> Recut:
    """Stacked layers one by one: all of the first turn, then all of the second."""
    between = "." if framework == "torch" else "/"

    def path_of(layer: Layer, i: int) -> str:
        return f"{layer.path}[{i}]"

    def full_of(layer: Layer, i: int, local: str) -> str:
        head = "" if framework == "torch" else layer.tensors[local].partition("/")[0] + "/"
        return f"{head}{path_of(layer, i)}{between}{local}"

    pieces = [
        piece(full, mine.shapes[full], tuple(full_of(layer, i, local) for i in range(count)), axis)
        for layer in layers
        for local, full in layer.tensors.items()
    ]
    made = tuple(
        replace(layer, path=path_of(layer, i), tensors={local: full_of(layer, i, local) for local in layer.tensors})
        for i in range(count)
        for layer in layers
    )

    def key(called: tuple[str, int]) -> tuple[str, int]:
        return f"{called[0]}[{called[1] % count}]", called[1] // count

    holds = "holds" if len(layers) == 1 else "hold"
    paths = ", ".join(layer.path for layer in layers)
    return Recut(
        framework,
        tuple(layer.path for layer in layers),
        made,
        tuple(pieces),
        text=f"{paths} {holds} {count} layers along axis {axis}",
        key=key,
        turns=count,
    )


def piece(full: str, shape: Shape, parts: tuple[str, ...], axis: int) -> Piece:
    """A tensor taken apart along an axis, which is gone then."""

    def apart(arrays: Sequence[NDArray]) -> list[NDArray]:
        return list(np.moveaxis(arrays[0], axis, 0))

    def together(arrays: Sequence[NDArray]) -> list[NDArray]:
        return [np.stack(arrays, axis)]

    return Piece({full: shape}, parts, apart, together)
