"""A convolution of any rank, geometry and kernel in float64, its derivative, and a look at a few of its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.product.geometry import Call, Geometry, taps

Array = NDArray[Any]

_CHUNK = 1 << 22  # numbers that are unfolded at once
_FAR = 0.05  # relative error beyond every kind of rounding
_CHANNELS = 4  # output channels that a probe looks at


class Product(NamedTuple):
    """`y[o] = bias + sum over taps t of x[o * stride - low + dilation * t] @ kernel[t]`, groups of channels apart.

    Attributes:
      x: `[N, *spatial, C]`.
      kernel: as it is applied, `[*k, C / groups, out]`.
      bias: `[out]`.
    """

    x: Array
    kernel: Array
    call: Call
    geometry: Geometry
    bias: Array

    def forward(self) -> Array:
        """y, `[N, *outputs, out]`."""
        y = np.empty((len(self.x), *self.call.outputs, self.kernel.shape[-1]))
        for rows, positions in self._chunks():
            unfolded = _unfold(self.x[rows], self.call, self.geometry, positions)
            left, right = _by_group(unfolded, self.kernel)
            part = np.moveaxis(left @ right, 0, 1).reshape(*unfolded.shape[:2], -1)
            sizes = tuple(map(len, positions))
            y[(rows, *(slice(p[0], p[-1] + 1) for p in positions))] = part.reshape(-1, *sizes, part.shape[-1])
        return y + self.bias

    def backward(self, dy: Array) -> tuple[Array, Array]:
        """The gradients at x and at the kernel."""
        dx, dkernel = np.zeros(self.x.shape), np.zeros(self.kernel.shape)
        for rows, positions in self._chunks():
            unfolded = _unfold(self.x[rows], self.call, self.geometry, positions)
            left, right = _by_group(unfolded, self.kernel)
            part = dy[(rows, *(slice(p[0], p[-1] + 1) for p in positions))]
            part = np.moveaxis(part.reshape(left.shape[1], len(right), -1), 1, 0)
            of_right, of_left = left.transpose(0, 2, 1) @ part, part @ right.transpose(0, 2, 1)
            (examples, outputs, count, _), inputs = unfolded.shape, self.kernel.shape[-2]
            dkernel += of_right.reshape(-1, count, inputs, part.shape[-1]).transpose(1, 2, 0, 3).reshape(dkernel.shape)
            columns = of_left.reshape(-1, examples, outputs, count, inputs).transpose(1, 2, 3, 0, 4)
            dx[rows] += _fold(columns.reshape(unfolded.shape), self.call, self.geometry, positions)
        return dx, dkernel

    def error(self, y: Array, enough: float) -> float:
        """How far y is from this product, relative to its largest value or to what its sums could reach.

        The latter, which takes a second product, is looked at only if the former is above `enough`: where terms cancel,
        rounding is measured by the terms.
        """
        error, size = float(np.abs(self.forward() - y).max()), float(np.abs(y).max())
        if error <= enough * size or error > _FAR * size > 0:
            return error / size if size else 0.0
        return error / max(self.scale(), size, 1e-300)

    def squared(self) -> Product:
        """The product of the squares: the root of what comes out is the usual size of the sums."""
        return self._replace(x=self.x**2, kernel=self.kernel**2, bias=self.bias**2)

    def scale(self) -> float:
        """The largest root of a sum of squares of the terms that are summed."""
        return float(np.sqrt(self.squared().forward().max()))

    def _chunks(self) -> Iterator[tuple[slice, list[Array]]]:
        outputs, channels = self.call.outputs, self.x.shape[-1]
        line = channels * math.prod(self.call.kernel) * math.prod(outputs[1:])
        lines = max(_CHUNK // max(line, 1), 1)
        along = min(lines, outputs[0]) if outputs else 1
        each = max(lines // (outputs[0] if outputs else 1), 1)
        rest = [np.arange(size) for size in outputs[1:]]
        for row in range(0, len(self.x), each):
            if not outputs:
                yield slice(row, row + each), []
                continue
            for start in range(0, outputs[0], along):
                first = np.arange(start, min(start + along, outputs[0]))
                yield slice(row, row + each), [first, *rest]


class Probe:
    """A few outputs of one geometry, for many kernels of one shape at once.

    Args:
      x: `[N, *spatial, C]`.
      y: `[N, *outputs, out]`.
      call: the sizes.
      geometry: where it looks.
      few: look at outputs in the middle only.
    """

    def __init__(self, x: Array, y: Array, call: Call, geometry: Geometry, *, few: bool = False) -> None:
        # The corners see the padding, the middle does not; neighbours of a transposed convolution see other taps.
        near = (0, 1, 2, 3) if call.transposed else (0,)
        ends = ((size // 2, size // 2) if few else (0, size - 1) for size in call.outputs)
        near = near[:2] if few else near  # type: ignore[assignment]  # of any length
        positions = [
            np.unique([first, *(min(size // 2 + i, size - 1) for i in near), last])
            for size, (first, last) in zip(call.outputs, ends, strict=True)
        ]
        self.channels = looked_at(y.shape[-1])
        unfolded = _unfold(x, call, geometry, positions)
        self.columns = unfolded.reshape(-1, *unfolded.shape[2:])
        self.y = y[np.ix_(np.arange(len(y)), *positions, self.channels)].reshape(-1, len(self.channels))
        self.outputs = y.shape[-1]
        self.largest = float(np.abs(self.y).max())

    def errors(self, kernels: Array, inputs: int, biases: Sequence[Array]) -> list[tuple[float, float]]:
        """(largest error, size of what is summed) for each kernel with each bias, kernels slowest.

        Args:
          kernels: from `stacked`.
          inputs: channels that one output sees.
          biases: each `[out]`.
        """
        groups = self.columns.shape[-1] // inputs
        found = np.zeros((kernels.shape[-1], len(biases), 2))
        for place, channel in enumerate(self.channels):
            group = channel // (self.outputs // groups)
            columns = self.columns[..., group * inputs : (group + 1) * inputs].reshape(len(self.columns), -1)
            sums = columns @ kernels[place]
            sizes = np.sqrt(((columns**2) @ (kernels[place] ** 2)).max(0))
            for index, bias in enumerate(biases):
                error = np.abs(sums + bias[channel] - self.y[:, place, None]).max(0)
                here = np.stack([error, np.maximum(sizes, abs(bias[channel]))], axis=1)
                found[:, index] = np.maximum(found[:, index], here)
            # Most hypotheses are far off already in the first channel.
            if found[..., 0].min() > max(_FAR * self.largest, _FAR * found[..., 1].max()):
                break
        found[..., 1] = np.maximum(found[..., 1], self.largest)
        return [(float(error), float(size)) for error, size in found.reshape(-1, 2)]


def inner(x: Array, y: Array, call: Call, geometry: Geometry) -> tuple[Array, Array] | None:
    """What one output sees, and that output, if there is one that sees no padding, whatever that is filled with.

    Args:
      x: one example, `[*spatial, C]`.
      y: its output, `[*outputs, out]`.
      call: the sizes.
      geometry: where it looks.

    Returns:
      `[*k, C]` and `[out]`; None if every output sees some padding.
    """
    outputs, windows = [], []
    for axis, (n, out) in enumerate(zip(call.inputs, call.outputs, strict=True)):
        stride, dilation, low = (sizes[axis] for sizes in geometry[:3])
        span = dilation * (call.kernel[axis] - 1)
        first, last = max(-(-low // stride), 0), min((n - 1 - span + low) // stride, out - 1)
        if call.transposed or first > last:
            return None
        middle = (first + last) // 2
        start = middle * stride - low
        outputs.append(middle)
        windows.append(slice(start, start + span + 1, dilation))
    return x[tuple(windows)], y[tuple(outputs)]


def stacked(kernels: Sequence[Array]) -> Array:
    """Those output channels of kernels of one shape that a probe looks at, `[channels, taps * in, kernels]`."""
    channels = looked_at(kernels[0].shape[-1])
    return np.stack([kernel[..., channels].reshape(-1, len(channels)).T for kernel in kernels], axis=-1)


def looked_at(outputs: int) -> Array:
    """Channels, evenly spread."""
    return np.unique(np.linspace(0, outputs - 1, _CHANNELS).astype(int))


def _unfold(x: Array, call: Call, geometry: Geometry, positions: Sequence[Array]) -> Array:
    """What each output sees: `[N, outputs, taps, C]`."""
    sizes: list[int] = []
    for axis, (index, weight) in enumerate(taps(call, geometry, positions)):
        x = x.take(index.ravel(), axis=1 + axis)
        if not weight.all():
            x *= _along(weight, axis, x.ndim)
        sizes += index.shape
    rank = len(positions)
    x = x.reshape(x.shape[0], *sizes, x.shape[-1])
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(x.shape[0], math.prod(sizes[::2]), math.prod(sizes[1::2]), x.shape[-1])


def _fold(columns: Array, call: Call, geometry: Geometry, positions: Sequence[Array]) -> Array:
    """The transpose of `_unfold`: what arrives at each input."""
    rank = len(positions)
    x = columns.reshape(len(columns), *map(len, positions), *call.kernel, columns.shape[-1])
    x = x.transpose(0, *(axis for i in range(1, rank + 1) for axis in (i, i + rank)), 2 * rank + 1)
    x = x.reshape(len(x), *(len(p) * k for p, k in zip(positions, call.kernel, strict=True)), x.shape[-1])
    for axis, (index, weight) in enumerate(taps(call, geometry, positions)):
        order = np.argsort(index, axis=None, kind="stable")
        seen, starts = np.unique(index.ravel()[order], return_index=True)
        sums = np.add.reduceat((x * _along(weight, axis, x.ndim)).take(order, axis=1 + axis), starts, axis=1 + axis)
        x = np.zeros((*x.shape[: 1 + axis], call.inputs[axis], *x.shape[2 + axis :]))
        x[(slice(None),) * (1 + axis) + (seen,)] = sums
    return x


def _along(weight: Array, axis: int, ndim: int) -> Array:
    """The weights of one spatial axis, so that they broadcast."""
    return weight.reshape(-1, *(1,) * (ndim - 2 - axis))


def _by_group(columns: Array, kernel: Array) -> tuple[Array, Array]:
    """What each output sees and the kernel as matrices, of which y is the product, groups of channels apart.

    `[N, P, taps, C]` and `[*k, C / groups, out]` become `[groups, N P, terms]` and `[groups, terms, out / groups]`.
    """
    count, channels = columns.shape[2:]
    inputs = kernel.shape[-2]
    groups = channels // inputs
    left = columns.reshape(-1, count, groups, inputs).transpose(2, 0, 1, 3).reshape(groups, -1, count * inputs)
    right = kernel.reshape(count, inputs, groups, -1).transpose(2, 0, 1, 3).reshape(groups, count * inputs, -1)
    return left, right
