"""Sums and broadcasts by channel, of x with its channels anywhere. `torch_bn/channels.py` is its twin."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# Values of a channel that show whether it has both signs.
SAMPLE = 16
# JAX only: XLA's CPU reductions run over the last axis in vector registers; with 6 channels most of a register is idle.
# (256, 28, 28, 6) as (256, 56, 84) takes half the time; beyond 128 nothing is gained.
CPU_LANES = 128
# JAX only, see `spread_to_add`: of so few values per channel the sum takes less time in float64 as a product.
FEW_ROWS = 2**9


class Channels(NamedTuple):
    """Which axes of x hold channels. Values per channel have the shape of these axes, [C] when there is one.

    JAX only: in PyTorch x has its channels on axis 1 by then, and is on one device.

    Attributes:
      axes: the channel axes of x, ascending.
      folds: the last axis of x holds so many pixels beside each other, each with all its channels.
      axis_name: a mapped axis over whose devices the batch is spread.
      groups: which devices of it belong together (None: all).
      long_sum: from so many values on float32's sums in a gradient are float64.
    """

    axes: tuple[int, ...]
    folds: int = 1
    axis_name: str | tuple[str, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    long_sum: float = math.inf

    def others(self, x: Array) -> tuple[int, ...]:
        """The axes of x that hold no channels."""
        return tuple(a for a in range(x.ndim) if a not in self.axes)

    def fold(self, x: Array) -> tuple[Array, Channels]:
        """x as it is summed fastest, and its channels: on a CPU, images of few channels with some pixels in a row.

        The batch axis stays as it is: it may be spread over devices.
        """
        pixels, channels = math.prod(x.shape[1:-1]), x.shape[-1]
        if jax.default_backend() != "cpu" or self.axes != (x.ndim - 1,) or x.ndim < 3 or _is_split(x):
            return x, self
        folds = next((k for k in range(CPU_LANES // channels, 1, -1) if pixels % k == 0), 1)
        if folds == 1:
            return x, self
        return x.reshape(x.shape[0], pixels // folds, folds * channels), self._replace(axes=(2,), folds=folds)


def spread(v: Array, x: Array, channels: Channels) -> Array:
    """v, a value per channel, in the shape and dtype of x (rank promotion is never relied on)."""
    tiled = jnp.tile(v, channels.folds) if channels.folds > 1 else v
    return lax.broadcast_in_dim(tiled.astype(x.dtype), x.shape, channels.axes)


def spread_to_add(v: Array, x: Array, channels: Channels) -> Array:
    """The same in words whose transpose, a sum by channel, takes the least time where x is float64.

    JAX only: PyTorch's gradient is no transpose.
    """
    if x.ndim != 2 or channels.axes != (1,) or channels.folds > 1 or len(x) >= FEW_ROWS or _is_split(x):
        return spread(v, x, channels)
    # Not by jnp.matmul, whose transpose is of the type that JAX has by then.
    return lax.dot_general(jnp.ones((len(x), 1), x.dtype), v.astype(x.dtype)[None], (((1,), (0,)), ((), ())))


def sum_by_channel(x: Array, mask: Array | None, channels: Channels, *, in_stages: bool = True) -> Array:
    """Sum per channel of this device's x, of the positions in mask only; in_stages where its rounding matters."""
    x = x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))
    total = x.sum(channels.others(x))
    if channels.folds == 1:
        return total
    rows = total.reshape(channels.folds, -1)
    return _add_up(rows) if in_stages else rows.sum(0)


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


def _add_up(x: Array) -> Array:
    """Sum over the first axis, of some dozens, in two stages: one by one, equal values would all round the same way.

    The second is a product, as XLA would make one sum of two; and with either it ends a fusion: plain additions it
    would do anew for every element that their sum is spread over. JAX only: PyTorch folds nothing.
    """
    n = x.shape[0]
    if n <= 8:
        return x.sum(0)
    columns = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
    rows = x.reshape(n // columns, columns, -1).sum(1)
    return jnp.matmul(jnp.ones(n // columns, x.dtype), rows, precision=lax.Precision.HIGHEST)


def _is_split(x: Array) -> bool:
    """Whether x is spread over devices, and says so in its type. JAX only: explicit sharding."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)
