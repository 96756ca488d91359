"""Where a normalising layer may take its mean and variance from: every source a layer is fitted to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

AXIS_NAMES = {2: "NC", 3: "NLC", 4: "NHWC", 5: "NDHWC"}
# Rank and kept axes -> what one group of statistics belongs to.
GROUP_NAMES = {
    "N": "per example",
    "NC": "per example and channel (instance norm)",
    "NHC": "per image row and channel",
    "NWC": "per image column and channel",
    "NH": "per image row",
    "NW": "per image column",
    "HWC": "per pixel and channel",
    "NHW": "per pixel, over the channels",
    "LC": "per position and channel",
    "NL": "per position, over the channels",
    "HC": "per row and channel",
    "WC": "per column and channel",
    "": "over everything, the channels too",
}
MOST_CHUNKS = 64


class NormSide(NamedTuple):
    """What one side's layer did in one call: float64, channels last.

    Attributes:
      x: input, [..., C]; the two sides' are the same.
      y: output, as x.
      gamma: this side's own scale, [C] (layer norm: the trailing axes that it normalises); None: it has none.
      beta: this side's own bias, as gamma.
      mean: moving mean before the call, [C]; None: it keeps none.
      var: moving variance before the call.
      new_mean: moving mean after the call.
      new_var: moving variance after the call.
      dy: gradient at the output, as x; None: not recorded.
      dx: gradient at the input, through this layer only.
    """

    x: Array
    y: Array
    gamma: Array | None = None
    beta: Array | None = None
    mean: Array | None = None
    var: Array | None = None
    new_mean: Array | None = None
    new_var: Array | None = None
    dy: Array | None = None
    dx: Array | None = None


class Source(NamedTuple):
    """A mean and a variance for every element of x.

    Attributes:
      kind: "batch", "moving", "updated" (moving, after the update), "axes", "groups" (of channels), "chunks" (of the
        batch, each with its own) or "part" (one chunk's for the whole batch).
      name: the same in words; two sources are the same where their names are.
      view: shape in which x is looked at, so that the groups are axes.
      axes: axes of the view along which mean and variance are constant.
      mean: broadcasts to the view.
      var: biased; for uncentred sources the mean square.
      values: how many values stand behind a variance; None: moving statistics.
      chunk: (axis of the view, index) of the chunk that the statistics are of, for "part".
      centred: False: the mean is not subtracted (RMS norm).
    """

    kind: str
    name: str
    view: tuple[int, ...]
    axes: tuple[int, ...]
    mean: Array
    var: Array
    values: int | None
    chunk: tuple[int, int] | None = None
    centred: bool = True


def moving(side: NormSide) -> Iterator[Source]:
    """The moving statistics: before the update, and after it."""
    axes = tuple(range(side.x.ndim - 1))
    if side.mean is not None and side.var is not None:
        yield Source("moving", "the moving statistics", side.x.shape, axes, side.mean, side.var, None)
    if side.new_mean is not None and side.new_var is not None:
        name = "the moving statistics after their update"
        yield Source("updated", name, side.x.shape, axes, side.new_mean, side.new_var, None)


def batch(x: Array) -> Source:
    """Mean and variance over all axes but the channels'."""
    return _reduced(x, x.shape, tuple(range(x.ndim - 1)), "batch", "the statistics of the whole batch")


def other_axes(x: Array, *, centred: bool = True) -> Iterator[Source]:
    """Every subset of axes with more than one value, but for the batch norm's own; no two of them the same."""
    long = [axis for axis in range(x.ndim) if x.shape[axis] > 1]
    own = tuple(axis for axis in long if axis < x.ndim - 1)
    for number in range(len(long), 0, -1):
        for axes in itertools.combinations(long, number):
            if axes != own or not centred:
                yield reduced_over(x, axes, centred=centred)


def reduced_over(x: Array, axes: tuple[int, ...], *, centred: bool = True) -> Source:
    """Mean and variance over `axes` of x, or the mean square."""
    names = AXIS_NAMES.get(x.ndim, "")
    kept = "".join(letter for axis, letter in enumerate(names) if axis not in axes and x.shape[axis] > 1)
    words = f", {GROUP_NAMES[kept]}" if names and kept in GROUP_NAMES else ""
    letters = f" of [{', '.join(names)}]" if names else ""
    what = "statistics" if centred else "root mean squares (no mean subtracted)"
    return _reduced(x, x.shape, axes, "axes", f"{what} over axes {axes}{letters}{words}", centred=centred)


def channel_groups(x: Array) -> Iterator[Source]:
    """Group norm: per example and group of neighbouring channels, for every number of groups; then interleaved ones."""
    channels = x.shape[-1]
    inner = tuple(range(1, x.ndim - 1))
    for groups in [1, *divisors(channels), channels] if channels > 1 else [1]:
        if groups == 1 or groups == channels:
            what = "all channels as one group" if groups == 1 else f"{groups} groups of one channel (instance norm)"
        else:
            what = f"{groups} groups of {channels // groups} channels"
        view = (*x.shape[:-1], groups, channels // groups)
        name = f"statistics per example and group, {what}"
        yield _reduced(x, view, (*inner, x.ndim), "groups", name)
    for groups in divisors(channels):
        view = (*x.shape[:-1], channels // groups, groups)
        name = f"statistics per example and group, {groups} groups of interleaved channels"
        yield _reduced(x, view, (*inner, x.ndim - 1), "groups", name)


def chunks(x: Array) -> Iterator[Source]:
    """Statistics per device: the batch in equal pieces, contiguous or strided, each with its own."""
    rows = x.shape[0]
    for number in [n for n in divisors(rows) if n <= MOST_CHUNKS]:
        piece = rows // number
        inner = tuple(range(2, x.ndim))
        name = f"the statistics of {number} pieces of {piece} examples each"
        yield _reduced(x, (number, piece, *x.shape[1:]), (1, *inner), "chunks", name)
        yield _reduced(x, (piece, number, *x.shape[1:]), (0, *inner), "chunks", f"{name}, interleaved")
    for number in [n for n in (2, 4, 8) if rows % n == 0 and rows > n]:
        for index in (0, number - 1):
            yield _part(x, number, index)


def divisors(number: int) -> list[int]:
    """All divisors between 1 and the number itself, both left out, ascending."""
    return [n for n in range(2, number // 2 + 1) if number % n == 0]


def _part(x: Array, number: int, index: int) -> Source:
    piece = x.shape[0] // number
    one = batch(x[index * piece : (index + 1) * piece])
    view = (number, piece, *x.shape[1:])
    which = "first" if index == 0 else "last"
    name = f"the statistics of the {which} {piece} of {x.shape[0]} examples"
    axes = tuple(range(x.ndim))
    return Source("part", name, view, axes, one.mean, one.var, one.values, chunk=(0, index))


def _reduced(
    x: Array, view: tuple[int, ...], axes: tuple[int, ...], kind: str, name: str, *, centred: bool = True
) -> Source:
    seen = x.reshape(view)
    count = int(np.prod([view[axis] for axis in axes]))
    mean = seen.mean(axis=axes, keepdims=True) if centred else np.zeros(())
    if centred:
        # The second pass takes away what the first one rounded.
        mean = mean + (seen - mean).mean(axis=axes, keepdims=True)
    var = np.square(seen - mean).mean(axis=axes, keepdims=True)
    return Source(kind, name, view, axes, mean, var, count, centred=centred)
