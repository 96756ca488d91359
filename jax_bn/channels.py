"""Sums and broadcasts by channel, of x with its channels anywhere. `torch_bn/channels.py` is its twin."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# Values of a channel that show whether it has both signs.
SAMPLE = 16
# JAX only: XLA's CPU reductions run over the last axis in vector registers; with 6 channels most of a register is idle.
# (256, 28, 28, 6) as (256, 56, 84) takes half the time; beyond 128 nothing is gained.
CPU_LANES = 128
# Values that are added one by one at most, in x's dtype: rounding is 0.7 sqrt(n / 24) eps of their Euclidean norm, and
# may be three times as much, 3.4. In blocks, whose sums are added nearly exactly, it is less, as they are independent.
BLOCK = 64
# Of the 53 that float64 has. JAX only.
FIRST_BITS = 16


class Channels(NamedTuple):
    """Which axes of x hold channels. Values per channel have the shape of these axes, [C] when there is one.

    JAX only: in PyTorch x has its channels on axis 1 by then, and is on one device.

    Attributes:
      axes: the channel axes of x, ascending.
      folds: the last axis of x holds so many pixels beside each other, each with all its channels.
      axis_name: a mapped axis over whose devices the batch is spread.
      groups: which devices of it belong together (None: all).
      platform: whose form it is: "cpu" (see `fold` and `sum_by_channel`), "tpu" (see `statistics_of`), or any
        other, as on a GPU.
    """

    axes: tuple[int, ...]
    folds: int = 1
    axis_name: str | tuple[str, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    platform: str = "gpu"

    def others(self, x: Array) -> tuple[int, ...]:
        """The axes of x that hold no channels."""
        return tuple(a for a in range(x.ndim) if a not in self.axes)

    def fold(self, x: Array) -> tuple[Array, Channels]:
        """x as it is summed fastest, and its channels: on a CPU, images as [N, blocks, pixels, channels].

        A block's pixels are BLOCK at most, which XLA adds in a loop over a whole axis; of few channels, some pixels are
        in a row. The batch axis stays as it is: it may be spread over devices.
        """
        if self.platform != "cpu" or self.axes != (x.ndim - 1,) or x.ndim < 3 or _is_split(x):
            return x, self
        if not all(isinstance(size, int) for size in x.shape[1:]):  # symbolic ones, in an export
            return x, self
        pixels, channels = math.prod(x.shape[1:-1]), x.shape[-1]
        folds = _divisor(pixels, CPU_LANES // channels)
        block = _divisor(pixels // folds, BLOCK)
        shape = x.shape[0], pixels // folds // block, block, folds * channels
        return x.reshape(shape), self._replace(axes=(3,), folds=folds)


def spread(v: Array, x: Array, channels: Channels) -> Array:
    """v, a value per channel, in the shape and dtype of x (rank promotion is never relied on)."""
    tiled = jnp.tile(v, channels.folds) if channels.folds > 1 else v
    return lax.broadcast_in_dim(tiled.astype(x.dtype), x.shape, channels.axes)


def sum_by_channel(x: Array, mask: Array | None, channels: Channels) -> Array:
    """Sum per channel of this device's x, of the positions in mask only.

    On a CPU in two stages: blocks of BLOCK values at most, in x's dtype, and their sums nearly exactly. XLA's own order
    depends on what else is in the loop, and may be one by one.
    """
    x = x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))
    if not _adds_in_blocks(x, channels):
        return _unfold(x.sum(channels.others(x)), channels)
    shape, blocks, others = _in_blocks(x, channels)
    sums = x.reshape(shape).sum(blocks)
    if sums.dtype == np.float32:
        with jax.enable_x64(True):
            return _unfold(sums.astype(np.float64).sum(others), channels).astype(np.float32)
    first = _first_bits(sums)
    return _unfold(first.sum(others), channels) + _unfold((sums - first).sum(others), channels)


def spread_to_add(v: Array, x: Array, channels: Channels) -> Array:
    """`spread` in words whose transpose is `sum_by_channel`. JAX only: PyTorch's gradient is no transpose."""
    if not _adds_in_blocks(x, channels):
        return spread(v, x, channels)
    shape, blocks, others = _in_blocks(x, channels)
    kept = [a for a in range(len(shape)) if a not in blocks]
    sums = jax.ShapeDtypeStruct([shape[a] for a in kept], x.dtype)
    axes = tuple(a for a in range(len(kept)) if a not in others)

    def spread_over_sums(v: Array) -> Array:
        tiled = jnp.tile(v, channels.folds) if channels.folds > 1 else v
        return lax.broadcast_in_dim(tiled, sums.shape, axes)

    v = v.astype(x.dtype)
    if x.dtype == np.float32:
        with jax.enable_x64(True):
            v = spread_over_sums(v.astype(np.float64)).astype(np.float32)
    else:
        first, rest = spread_over_sums(v), spread_over_sums(v)
        v = _first_bits(first) + (rest - _first_bits(rest))
    return lax.broadcast_in_dim(v, shape, kept).reshape(x.shape)


def num_values(x: Array, mask: Array | None, channels: Channels) -> Array:
    """Number of values per channel on this device, as a float; a scalar where it is the same for all channels."""
    dtype = x.real.dtype
    if mask is None:
        return jnp.full((), x.size // math.prod(x.shape[a] for a in channels.axes) * channels.folds, dtype)
    return jnp.broadcast_to(mask, x.shape).sum(channels.others(x)).astype(dtype)


def total_of(m: Array, mask: Array | None) -> Array:
    """What sums over a channel of m values are divided by: m, and 1 where no value counts."""
    return jnp.maximum(m, 1) if mask is not None else m


def one_of(x: Array, mask: Array | None, channels: Channels) -> Array:
    """A value among those of each channel, or 0 between them: the nearest to 0, so that most differences are exact.

    Without a mask of a sample, SAMPLE values of the channel; with one of all that count, and 0 where none does.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(one_of(x.real, mask, channels), one_of(x.imag, mask, channels))
    if mask is None and _is_split(x):
        mask = jnp.ones_like(x, bool)  # a sample may be on another device
    others = channels.others(x)
    if mask is None:
        axis = next(a for a in range(x.ndim) if a not in channels.axes)
        per_index = x.size // x.shape[axis] // math.prod(x.shape[a] for a in channels.axes) * channels.folds
        x = lax.slice_in_dim(x, 0, min(-(-SAMPLE // max(per_index, 1)), x.shape[axis]), axis=axis)
        # All folds at once: a second stage XLA would do anew for every element that it is spread over.
        x, axes = (x.reshape(-1, x.shape[-1] // channels.folds), (0,)) if channels.folds > 1 else (x, others)
        low, high = x.min(axes), x.max(axes)
    else:
        low = jnp.where(mask, x, jnp.full_like(x, jnp.inf)).min(others)
        high = jnp.where(mask, x, jnp.full_like(x, -jnp.inf)).max(others)
        low, high = (jnp.where(low > high, jnp.zeros_like(low), v) for v in (low, high))
    return jnp.clip(jnp.zeros_like(low), low, high)


def _adds_in_blocks(x: Array, channels: Channels) -> bool:
    """Whether x is added in blocks: not where its axes, cut in two, would be spread over devices. JAX only."""
    return channels.platform == "cpu" and not _is_split(x) and not jnp.iscomplexobj(x)


def _in_blocks(x: Array, channels: Channels) -> tuple[list[int], tuple[int, ...], tuple[int, ...]]:
    """x's shape with its axes cut into blocks; the axes that are within a block; and, without these, the rest.

    Pixels before examples, which may be spread over devices; neighbours along the last axis, one vector register, last.
    An axis whose size is no multiple of anything small is not cut. JAX only: PyTorch adds images plane by plane.
    """
    sizes, left = dict.fromkeys(range(x.ndim), 1), BLOCK
    for a in (*range(x.ndim - 2, -1, -1), x.ndim - 1):
        if a not in channels.axes and isinstance(x.shape[a], int):
            sizes[a] = _divisor(x.shape[a], left)
            left //= sizes[a]
    shape: list[int] = []
    blocks: list[int] = []
    others: list[int] = []
    for a, size in sizes.items():
        if a not in channels.axes and (size == 1 or size != x.shape[a]):
            others.append(len(shape) - len(blocks))
        if size == 1 or size != x.shape[a]:
            shape.append(x.shape[a] // size)
        if size > 1:
            blocks.append(len(shape))
            shape.append(size)
    return shape, tuple(blocks), tuple(others)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not larger than `most`; 1, if need be. JAX only."""
    return next((k for k in range(min(most, number), 1, -1) if number % k == 0), 1)


def _unfold(v: Array, channels: Channels) -> Array:
    """v, a sum per channel of each fold, added up. JAX only: PyTorch folds nothing."""
    return v if channels.folds == 1 else v.reshape(channels.folds, -1).sum(0)


def _first_bits(v: Array) -> Array:
    """v rounded to its first bits, of which sums hardly ever round: linear but for what that rounds off.

    JAX only: PyTorch adds float64 as it is.
    """
    return lax.reduce_precision(v, exponent_bits=11, mantissa_bits=FIRST_BITS - 1)


def _is_split(x: Array) -> bool:
    """Whether x is spread over devices, and says so in its type. JAX only: explicit sharding."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
