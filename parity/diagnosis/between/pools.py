"""Pooling as a family of behaviours: which windows, strides, paddings and divisors lead from one shape to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Axis(NamedTuple):
    """How a pool goes along one axis. Output i looks at elements i*stride - before ... + window - 1 of the input.

    Attributes:
      window, stride: as usual; stride is the window where there is only one output (no number shows it).
      before: how many elements of padding stand before the first.
      outputs: how many outputs there are.
      adaptive: PyTorch's adaptive pool with windows of unequal sizes; window, stride and before mean nothing then.
    """

    window: int
    stride: int
    before: int
    outputs: int
    adaptive: bool = False


class Pool(NamedTuple):
    """A pool over all spatial axes.

    Attributes:
      kind: "max", "average", or "first" and "last" (one position taken out of a sequence).
      axes: one for each spatial axis.
      sizes: the input's spatial shape.
      counted: "yes": padding counts in the average (its zeros compete in the maximum); "no": it does not;
        "explicit": only the padding before and as much after, not what rounding the shape up adds (PyTorch's
        ceil_mode); "" where no padding is touched.
    """

    kind: str
    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    counted: str = ""

    @property
    def window(self) -> tuple[int, ...]:
        """The window along each axis."""
        return tuple(axis.window for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride along each axis."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """The padding that the windows touch, before and after, along each axis."""
        return tuple((a.before, max(0, _after(size, a))) for a, size in zip(self.axes, self.sizes, strict=True))

    def __str__(self) -> str:
        if self.kind in ("first", "last"):
            return f"the {self.kind} position"
        if any(axis.adaptive for axis in self.axes):
            return f"adaptive {self.kind} pool to {times(tuple(axis.outputs for axis in self.axes))}"
        if self.window == self.sizes and not any(map(any, self.padding)):
            return f"global {self.kind} pool"
        return f"{self.kind} pool {times(self.window)}, stride {times(self.stride)}, padding {pads(self.padding)}"


def times(sizes: Sequence[int]) -> str:
    """(2, 2) as "2x2"."""
    return "x".join(map(str, sizes))


def pads(padding: Sequence[tuple[int, int]]) -> str:
    """((0, 1), (0, 1)) as "(0, 1)"; axis by axis where they differ."""
    texts = [str(before) if before == after else f"({before}, {after})" for before, after in padding]
    return texts[0] if len(set(texts)) == 1 else " x ".join(texts)


def _after(size: int, axis: Axis) -> int:
    """Padding touched after the last element; negative: elements left over."""
    return (axis.outputs - 1) * axis.stride + axis.window - axis.before - size


def geometries(sizes: tuple[int, ...], outputs: tuple[int, ...]) -> list[tuple[Axis, ...]]:
    """Pools with equal window, stride and kind of padding along all axes, global and adaptive ones.

    Args:
      sizes: the input's spatial shape.
      outputs: the output's.

    Returns:
      Every way that leads from one to the other: window 1..5, stride 1..4 (or the window), padding 0..2 on both sides
      or SAME; the simplest first.
    """
    found: dict[tuple[Axis, ...], None] = {}
    if all(n == 1 for n in outputs):
        found[tuple(Axis(size, size, 0, 1) for size in sizes)] = None
    for window, stride in itertools.product((2, 3, 4, 5, 1), (1, 2, 3, 4, 5)):
        for padding in (0, 1, 2, "SAME"):
            axes = [_axis(s, n, window, stride, padding) for s, n in zip(sizes, outputs, strict=True)]
            usual = window > 1 or stride > 1
            if usual and all(axes):
                found[tuple(a for a in axes if a)] = None
    if any(n > size or size % n for size, n in zip(sizes, outputs, strict=True)):
        found[tuple(Axis(0, 0, 0, n, adaptive=True) for n in outputs)] = None
    return list(found)


def uneven_geometries(sizes: tuple[int, ...], outputs: tuple[int, ...]) -> list[tuple[Axis, ...]]:
    """Pools whose window, stride or padding differ from axis to axis (2x1, ...); two axes at most, windows up to 3."""
    if len(sizes) > 2:
        return []
    usual = set(geometries(sizes, outputs))
    options = [_axes(size, n) for size, n in zip(sizes, outputs, strict=True)]
    return [axes for axes in itertools.product(*options) if axes not in usual]


def _axes(size: int, n: int) -> list[Axis]:
    """Every small window that leads from size to n along one axis."""
    found: dict[Axis, None] = {Axis(1, 1, 0, size): None} if n == size else {}
    if n == 1:
        found[Axis(size, size, 0, 1)] = None
    for window, stride, padding in itertools.product((2, 3, 1), (2, 1, 3), (0, 1)):
        if axis := _axis(size, n, window, stride, padding):
            found[axis] = None
    return list(found)


def _axis(size: int, n: int, window: int, stride: int, padding: int | str) -> Axis | None:
    """The pool along one axis, or None if it does not give n outputs."""
    if padding == "SAME":
        if n != -(-size // stride):
            return None
        before = max(0, (n - 1) * stride + window - size) // 2
    else:
        before = int(padding)
    axis = Axis(window, stride, before, n)
    # More left over than a stride: another output would fit. A window wholly in the padding: never.
    if before >= window or not -stride < _after(size, axis) < window:
        return None
    return axis._replace(stride=window) if n == 1 else axis


def variants(axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> list[Pool]:
    """Maximum and average with that geometry, and each way of counting padding that makes a difference."""
    pool = Pool("max", axes, sizes)
    if axes[0].adaptive:
        return [pool, pool._replace(kind="average")]
    if not any(map(any, pool.padding)):
        if all(axis.window == 1 for axis in axes):
            return [pool]
        return [pool, pool._replace(kind="average")]
    ways = ["yes", "no"]
    # With ceil_mode PyTorch counts its own padding, but not the rows that rounding up has added.
    if any(before and after > before for before, after in pool.padding):
        ways.append("explicit")
    found = [pool._replace(counted="no"), *(pool._replace(kind="average", counted=way) for way in ways)]
    return [*found, pool._replace(counted="yes")]


def positions(sizes: tuple[int, ...]) -> list[Pool]:
    """The first and the last position of a sequence, as a class token is read."""
    axes = tuple(Axis(size, size, 0, 1) for size in sizes)
    return [Pool(kind, axes, sizes) for kind in ("first", "last")] if len(sizes) == 1 else []


def apply(x: Array, pool: Pool) -> Array:
    """Pools x.

    Args:
      x: [..., *sizes, C], any leading axes.
      pool: over the axes before the last; `sizes` must be x's.

    Returns:
      [..., *outputs, C].
    """
    first = x.ndim - 1 - len(pool.axes)
    if pool.kind in ("first", "last"):
        return x[..., :1, :] if pool.kind == "first" else x[..., -1:, :]
    fill = -math.inf if pool.kind == "max" and pool.counted != "yes" else 0.0
    reduce = np.maximum if pool.kind == "max" else np.add
    for offset, axis in enumerate(pool.axes):
        x = _along(x, first + offset, axis, fill, reduce)
    if pool.kind == "max":
        return x
    for offset, (axis, size) in enumerate(zip(pool.axes, pool.sizes, strict=True)):
        shape = [1] * x.ndim
        shape[first + offset] = axis.outputs
        x = x / _divisor(axis, size, pool.counted).reshape(shape)
    return x


def _along(x: Array, number: int, axis: Axis, fill: float, reduce: np.ufunc) -> Array:
    # By swapaxes and by hand: this is called some 100,000 times, for which moveaxis and pad are ten times as slow.
    x = x.swapaxes(0, number)
    size = len(x)
    if axis.adaptive:
        parts = [reduce.reduce(x[start:stop], axis=0) for start, stop in _segments(size, axis.outputs)]
        return np.stack(parts).swapaxes(0, number)
    after = max(0, _after(size, axis))
    if axis.before or after:
        padded = np.full((axis.before + size + after, *x.shape[1:]), fill, x.dtype)
        padded[axis.before : axis.before + size] = x
        x = padded
    if axis.outputs == 1:
        return reduce.reduce(x[: axis.window], axis=0)[None].swapaxes(0, number)
    last = (axis.outputs - 1) * axis.stride + 1
    total = x[: last : axis.stride]
    for shift in range(1, axis.window):
        total = reduce(total, x[shift : shift + last : axis.stride])
    return total.swapaxes(0, number)


def _divisor(axis: Axis, size: int, counted: str) -> Array:
    """What each output's sum is divided by, along one axis."""
    if axis.adaptive:
        return np.array([stop - start for start, stop in _segments(size, axis.outputs)], np.float64)
    if counted in ("", "yes"):
        return np.full(axis.outputs, float(axis.window))
    margin = axis.before if counted == "explicit" else 0
    start = np.arange(axis.outputs) * axis.stride - axis.before
    inside = np.minimum(start + axis.window, size + margin) - np.maximum(start, -margin)
    return inside.astype(np.float64)


def _segments(size: int, outputs: int) -> Iterator[tuple[int, int]]:
    for i in range(outputs):
        yield i * size // outputs, -(-(i + 1) * size // outputs)
