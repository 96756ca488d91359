"""The ways in which one kernel is taken for another: exchanged, flipped and reshaped axes, in order of plausibility."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SPATIAL = ("", "W", "HW", "DHW")


class Transform(NamedTuple):
    """A rearrangement of a kernel in Flax's layout `[*k, in, out]`.

    First the axes `flips` are reversed, then the axes are put in the order `order`, then, if `shape` is given, the
    array is reshaped to it and its axes put in the order `then`.

    Attributes:
      codes: the mistakes that it stands for; none for the kernel as it is held.
      words: what it does, for the evidence.
    """

    codes: tuple[str, ...]
    words: str
    flips: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    then: tuple[int, ...] | None = None

    def apply(self, kernel: Array) -> Array:
        """The rearranged kernel (a view where it can be one)."""
        kernel = np.flip(kernel, self.flips).transpose(self.order)
        return kernel if self.shape is None else kernel.reshape(self.shape).transpose(self.then)

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the rearranged kernel."""
        if self.shape is None or self.then is None:
            return tuple(shape[axis] for axis in self.order)
        return tuple(self.shape[axis] for axis in self.then)

    def pull_back(self, cotangent: Array, shape: tuple[int, ...]) -> Array:
        """The gradient at the kernel as held (of `shape`), from the gradient at the rearranged one."""
        held = np.empty(cotangent.size)
        held[self.apply(np.arange(cotangent.size).reshape(shape)).ravel()] = cotangent.ravel()
        return held.reshape(shape)


@functools.cache
def transforms(shape: tuple[int, ...]) -> tuple[Transform, ...]:
    """Every rearrangement of a kernel of this shape, the kernel as held first, likelier ones earlier.

    The result may have another shape than the kernel; who asks knows which shapes are possible.

    Args:
      shape: `[*k, in, out]`, up to three spatial axes.
    """
    rank = len(shape) - 2
    if not 0 <= rank <= 3:
        raise ValueError(f"shape is {shape}; allowed: a kernel [*k, in, out] with at most three spatial axes")
    named = sorted(_named(rank), key=lambda t: len(t.codes))
    layouts = _permutations(rank) + _reshapes(shape)
    flipped = [_flipped(layout, rank) for layout in layouts] if rank else []
    return tuple(named + layouts + flipped)


def _named(rank: int) -> list[Transform]:
    """In and out exchanged, spatial axes exchanged, spatial axes reversed, and all combinations."""
    axes = tuple(range(rank))
    # Reversing every axis is what a true convolution does; a single one is rarer.
    flips = sorted(
        (f for n in range(rank + 1) for f in itertools.combinations(axes, n)), key=lambda f: f not in ((), axes)
    )
    found = []
    for exchanged, spatial, flip in itertools.product((False, True), itertools.permutations(axes), flips):
        channels = (rank + 1, rank) if exchanged else (rank, rank + 1)
        codes, words = [], []
        if exchanged:
            codes.append("kernel-transposed")
            words.append("transposed (in and out exchanged)")
        if spatial != axes:
            codes.append("kernel-hw-swapped")
            words.append(f"with {_SPATIAL[rank]} in the order {''.join(_SPATIAL[rank][a] for a in spatial)}")
        if flip:
            codes.append("kernel-flipped")
            words.append(f"flipped along {' and '.join(_SPATIAL[rank][a] for a in flip)}")
        found.append(Transform(tuple(codes), " and ".join(words) or "as held", flip, spatial + channels))
    return found


def _permutations(rank: int) -> list[Transform]:
    """The axes in any order that mixes spatial axes with channels; first PyTorch's own order."""
    mixed = [order for order in itertools.permutations(range(rank + 2)) if any(axis >= rank for axis in order[:rank])]
    mixed.sort(key=lambda order: order not in _pytorch_orders(rank))
    words = f"order, read as {_letters(rank)}"
    return [Transform(("kernel-layout",), f"in {_spell(order, rank)} {words}", (), order) for order in mixed]


def _reshapes(shape: tuple[int, ...]) -> list[Transform]:
    """An array in one order reshaped, where its axes should have been exchanged."""
    rank = len(shape) - 2
    held = tuple(range(rank + 2))
    exchanged = (*held[:rank], rank + 1, rank)
    found = []
    for source, target in itertools.product((*_pytorch_orders(rank), held), (held, exchanged, *_pytorch_orders(rank))):
        if source == target:
            continue
        words = f"in {_spell(source, rank)} order, reshaped to {_spell(target, rank)}"
        then = tuple(np.argsort(target).tolist())
        code = "kernel-layout" if rank else "kernel-transposed"
        found.append(Transform((code,), words, (), source, tuple(shape[a] for a in target), then))
    return found


def _flipped(layout: Transform, rank: int) -> Transform:
    words = f"{layout.words}, and flipped along {' and '.join(_SPATIAL[rank])}"
    return layout._replace(codes=(*layout.codes, "kernel-flipped"), words=words, flips=tuple(range(rank)))


def _pytorch_orders(rank: int) -> tuple[tuple[int, ...], ...]:
    """Of a convolution (out, in, *k) and a transposed one (in, out, *k)."""
    spatial = tuple(range(rank))
    orders = ((rank + 1, rank, *spatial), (rank, rank + 1, *spatial))
    return orders if rank else orders[:1]


def _letters(rank: int) -> str:
    return _SPATIAL[rank] + "IO"


def _spell(order: tuple[int, ...], rank: int) -> str:
    return "".join(_letters(rank)[axis] for axis in order)
