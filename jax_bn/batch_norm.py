"""Batch normalisation as a pure function, channels last (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`torch_bn/batch_norm.py` is the same page in PyTorch's words. Statistics, normalisation and the moving average are
separate functions; only the layers keep state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from bn_common.checks import FLOAT_DTYPES, channel_axes, check_batch_norm
from jax_bn import sums
from jax_bn.channels import Channels
from jax_bn.sums import LONG_SUM


class BatchStats(NamedTuple):
    """Moving statistics of a batch norm, one value per channel: `mean` [C] and `var` [C], at least float32."""

    mean: Array
    var: Array


def batch_norm(
    x: Array,
    scale: Array,
    bias: Array,
    batch_stats: BatchStats,
    *,
    train: bool,
    momentum: float | None = 0.9,
    epsilon: float = 1e-5,
    unbiased_moving_var: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    axis: int | Sequence[int] = -1,
    mask: Array | None = None,
    num_batches_tracked: Array | int | None = None,
) -> tuple[Array, BatchStats]:
    """Batch normalisation of x over every axis but the channels'.

    In training, with m values per channel, and gradients flowing through mu and var:

        mu  = sum(x) / m                     var = sum((x - mu)^2) / m
        y   = scale * (x - mu) / sqrt(var + epsilon) + bias
        new = momentum * batch_stats + (1 - momentum) * (mu, var)

    In prediction: y = scale * (x - batch_stats.mean) / sqrt(batch_stats.var + epsilon) + bias.

    Pure: nothing is changed in place. The difference x - mu is taken before anything is multiplied, and mu is carried
    in two parts, so that a large mean costs no accuracy; a constant channel becomes exactly bias. The derivative is
    the closed form (paper, section 3), in either mode and of any order; what is kept for it is x.

    Args:
      x: [..., C], rank 2 or more, float16, bfloat16, float32 or float64. Arithmetic is done in the widest dtype
        among x, scale, bias and batch_stats, at least float32: float16 x with float32 scale is float32 inside.
      scale: gamma, [C].
      bias: beta, [C].
      batch_stats: the moving statistics, each [C].
      train: take the statistics from x (and move batch_stats), or take batch_stats (also to train with frozen ones).
      momentum: weight of the OLD value, in [0, 1]. PyTorch's momentum is the weight of the new one. None: every batch
        weighs the same, new = (n * batch_stats + (mu, var)) / (n + 1) after n batches.
      epsilon: added to the variance, > 0 (not below the smallest normal number of that dtype).
      unbiased_moving_var: move batch_stats.var with var * m / (m - 1), as PyTorch does. y always uses the biased var.
      axis_name: a mapped axis (`jax.pmap`, `jax.shard_map`, `jax.vmap`) over whose devices the batch is spread: their
        statistics are merged from (m, mu, var), never from sums of squares, in one collective, and one in the
        derivative. Where devices hold different numbers of examples, they are padded, and mask says how far.
      axis_index_groups: which devices of axis_name are merged with which, see `jax.lax.psum`.
      axis: the channel axis, or several: then a value per channel has the shape of these axes, in ascending order.
      mask: bool or integer, broadcastable to x: which positions count in the statistics, so that m is their number;
        y is given everywhere. A channel in which fewer than two count leaves its batch_stats as they were. A NaN or
        an infinity that does not count is read as 0.
      num_batches_tracked: n, an integer, for momentum None only.

    Returns:
      (y, new batch_stats). y has x's shape and dtype. The new batch_stats have the dtype of the old, but at least
      float32; in prediction they are the batch_stats given.

    Raises:
      TypeError: x, scale, bias, batch_stats or mask is, or holds, something that is no array.
      ValueError: see `bn_common.checks.check_batch_norm`.
    """
    y, batch_stats = batch_norm_wide(
        x,
        scale,
        bias,
        batch_stats,
        train=train,
        momentum=momentum,
        epsilon=epsilon,
        unbiased_moving_var=unbiased_moving_var,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        axis=axis,
        mask=mask,
        num_batches_tracked=num_batches_tracked,
        dtypes=FLOAT_DTYPES,
    )
    return y.astype(x.dtype), batch_stats


def batch_norm_wide(
    x, scale, bias, batch_stats, *, train, momentum, epsilon, unbiased_moving_var, axis_name, axis_index_groups, axis,
    mask, num_batches_tracked, dtypes, long_sum=None
) -> tuple[Array, BatchStats]:  # fmt: skip
    """`batch_norm` with y in the dtype that it was computed in, and x of any of `dtypes`: what the layers round last.

    Complex x, as Flax's layers take it: var is the mean of |x - mu|^2. long_sum: in place of LONG_SUM.
    """
    x, gamma, beta = as_array("x", x), as_array("scale", scale), as_array("bias", bias)
    if not isinstance(batch_stats, tuple | list) or len(batch_stats) != 2:
        raise TypeError(f"batch_stats is {type(batch_stats).__name__}; allowed: a BatchStats, that is (mean, var)")
    batch_stats = batch_stats if isinstance(batch_stats, BatchStats) else BatchStats(*batch_stats)
    mean, var = as_array("batch_stats.mean", batch_stats[0]), as_array("batch_stats.var", batch_stats[1])
    mask = None if mask is None else as_array("mask", mask)
    named = {"scale": gamma, "bias": beta, "batch_stats.mean": mean, "batch_stats.var": var}
    axes = check_batch_norm(
        shape=x.shape,
        dtype=x.dtype.name,
        axis=axis,
        per_channel={name: (value.shape, value.dtype.name) for name, value in named.items()},
        mask=None if mask is None else (mask.shape, mask.dtype.name),
        train=train,
        momentum=momentum,
        num_batches_tracked=kind_of(num_batches_tracked),
        epsilon_name="epsilon",
        epsilon=epsilon,
        shards=_shards(axis_name, axis_index_groups),
        dtypes=dtypes,
    )
    epsilon = float(epsilon)  # a numpy float64 would widen what it meets
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    wide_x, gamma, beta, mean, var = (widen(value, dtype) for value in (x, gamma, beta, mean, var))
    groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))
    long = (long_sum or LONG_SUM).get(jax.default_backend(), math.inf)
    channels = Channels(axes, axis_name=axis_name, axis_index_groups=groups, long_sum=long)
    if not train:
        return _normalize(wide_x, mean, var, gamma, beta, epsilon, channels), batch_stats
    if mask is None:
        wide_x, channels = channels.fold(wide_x)
    else:
        mask = _full_rank(mask, x)
        wide_x = jnp.where(mask | jnp.isfinite(wide_x), wide_x, jnp.zeros_like(wide_x))
    y, batch = _normalize_batch(wide_x, gamma, beta, mask, epsilon, channels)
    new_var = (
        batch.var * (batch.num_values / jnp.maximum(batch.num_values - 1, 1)) if unbiased_moving_var else batch.var
    )
    moved = [
        _moving_average(old, new, momentum, num_batches_tracked, None if mask is None else batch.num_values >= 2)
        for old, new in zip(batch_stats, (batch.shift + batch.rest, new_var), strict=True)
    ]
    return y.reshape(x.shape), BatchStats(*moved)


def as_array(name: str, value: Array) -> Array:
    """`value` as a JAX array; raise TypeError unless it is an array already."""
    # Only what already is an array: a list would be a silent copy to the device in every call.
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array")
    return jnp.asarray(value)


def kind_of(value: Array | float | None) -> tuple[tuple[int, ...], str] | float | None:
    """(shape, dtype name) of an array; what is no array, as it is."""
    return (value.shape, value.dtype.name) if isinstance(value, Array | np.ndarray) else value


def wide_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype to compute in: float64 if one of them is (or complex128), else float32."""
    return np.dtype(np.float64 if any(jnp.finfo(dtype).dtype == np.float64 for dtype in dtypes) else np.float32)


def widen(value: Array, dtype: np.dtype) -> Array:
    """`value` in `dtype`, or in the complex dtype of that precision."""
    if jnp.iscomplexobj(value):
        return value.astype(np.complex128 if dtype == np.float64 else np.complex64)
    return value.astype(dtype)


def _shards(axis_name: str | tuple[str, ...] | None, groups: Sequence[Sequence[int]] | None) -> int:
    return 1 if axis_name is None else len(groups[0]) if groups else lax.axis_size(axis_name)


def _moving_average(
    old: Array, new: Array, momentum: float | None, num_batches_tracked: Array | int | None, known: Array | None
) -> Array:
    """momentum * old + (1 - momentum) * new, in old's dtype but at least float32; old where the new is not known.

    With momentum None, the weights are n / (n + 1) and 1 / (n + 1).
    """
    dtype = wide_dtype(old.dtype)
    old, new = widen(old, dtype), widen(new, dtype)
    weights: tuple[float | Array, float | Array]
    if momentum is None:
        n = jnp.asarray(num_batches_tracked).astype(old.dtype)
        weights = n / (n + 1), 1 / (n + 1)
    else:
        weights = float(momentum), 1 - float(momentum)
    moved = weights[0] * old + weights[1] * new
    return moved if known is None else jnp.where(known, moved, old)


def _normalize(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, epsilon: float, channels: Channels
) -> Array:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    factor = gamma * lax.rsqrt(var + epsilon)
    return (x - channels.spread(mean, x)) * channels.spread(factor, x) + channels.spread(beta, x)


class Statistics(NamedTuple):
    """Statistics of a batch, a value per channel, over all devices. The mean is shift + rest: twice the digits.

    Attributes:
      num_values: m, a float.
      shift: the mean, rounded.
      rest: what rounding left of the mean.
      var: the biased variance.
      minus_shift: -shift, see `_statistics`.
    """

    num_values: Array
    shift: Array
    rest: Array
    var: Array
    minus_shift: Array


def _product(a: Array, b: Array) -> Array:
    """a * b, or the real part of conj(a) * b: the scalar product of complex numbers as vectors of two."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b


def _statistics(x: Array, mask: Array | None, channels: Channels) -> Statistics:
    """Two passes over x: the mean, from the differences to one value of x or to 0, and the variance around it.

    These differences are exact where x is nearly constant, and 0 where it is constant; where x is around 0 they are x
    itself. Of the mean, one + offset, the rounding is known: rest. It comes off the variance again, which is taken
    around shift.

    x - shift is wanted in two sums and twice beside them. Were it written the same way everywhere, XLA would compute it
    once, and on a CPU write it out to memory, for the sums to read it from there; so each sum has it in words of its
    own, x + (-shift) here and x + minus_shift in the gradient, and is one pass over x.
    """
    num_values = channels.num_values(x, mask)
    total = jnp.maximum(num_values, 1) if mask is not None else num_values
    one = channels.one_of(x, mask)
    offset = sums.sum_values(x - channels.spread(one, x), mask, channels) / total
    shift = one + offset
    rest = (one - shift) + offset
    d = x + channels.spread(-shift, x)
    if channels.axis_name is not None:
        # With offset's own rounding, for the gradient's sake: see `_tangent`.
        rest = sums.sum_values(d, mask, channels) / total
    var = jnp.maximum(sums.sum_values(_product(d, d), mask, channels) / total - _product(rest, rest), 0)
    if channels.axis_name is None:
        return Statistics(num_values, shift, rest, var, -one - offset)
    return merge(jnp.broadcast_to(num_values, var.shape), shift, rest, var, channels)


def merge(num_values: Array, shift: Array, rest: Array, var: Array, channels: Channels) -> Statistics:
    """Statistics of the whole batch from those of its pieces (Chan, Golub and LeVeque 1979), in one collective.

    A sum of rows that only their owner fills is an all-gather whose result every device is known to share; the rows
    of other groups stay empty, and weigh nothing.
    """
    size, mine = (
        lax.axis_size(channels.axis_name),
        (num_values.astype(shift.dtype), shift, rest, var.astype(shift.dtype)),
    )
    row = (lax.broadcasted_iota(np.int32, (size,), 0) == lax.axis_index(channels.axis_name)).astype(shift.dtype)
    rows = [jnp.tensordot(row, value, 0) for value in mine]
    counts, shifts, rests, variances = channels.psum(*rows)
    counts, variances = counts.real, variances.real
    total = counts.sum(0)
    weights = counts / jnp.maximum(total, 1)[None]
    # Around the shift of the largest piece: an empty one has nothing to say, and its 0 may be far away.
    shift = jnp.take_along_axis(shifts, counts.argmax(0)[None], 0)[0]
    offsets = (shifts - shift[None]) + rests
    rest = (weights.astype(shift.dtype) * offsets).sum(0)
    apart = offsets - rest[None]
    return Statistics(total, shift, rest, (weights * (variances + _product(apart, apart))).sum(0), -shift)


def batch_statistics(
    x: Array,
    *,
    axis: int | Sequence[int] = -1,
    mask: Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Statistics:
    """The statistics that `batch_norm` normalises x with; the arguments are its own."""
    x = widen(x, wide_dtype(x.dtype))
    groups = None if axis_index_groups is None else tuple(map(tuple, axis_index_groups))
    channels = Channels(channel_axes(axis, x.ndim), axis_name=axis_name, axis_index_groups=groups)
    return _statistics(x, None if mask is None else _full_rank(mask, x), channels)


def _full_rank(mask: Array, x: Array) -> Array:
    """The mask as bool, with x's rank (rank promotion is never relied on)."""
    return mask.astype(np.bool_).reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _normalize_batch(
    x: Array, gamma: Array, beta: Array, mask: Array | None, epsilon: float, channels: Channels
) -> tuple[Array, Statistics]:
    """x normalised with its own statistics, and these. beta - rest * factor: rest is too small to cancel anything."""
    batch = _statistics(x, mask, channels)
    factor = gamma * lax.rsqrt(batch.var + epsilon)
    spread = functools.partial(channels.spread, x=x)
    return (x - spread(batch.shift)) * spread(factor) + spread(beta - batch.rest * factor), batch


def _tangent(x, gamma, mask, batch: Statistics, x_dot, gamma_dot, beta_dot, epsilon, channels: Channels):
    """The tangents of y, mean and var, in a form whose transpose is the closed form of the gradient.

        y_dot = factor * x_dot + a + (x - mu) * b        factor = gamma * r,  r = 1 / sqrt(var + epsilon)
            b = r * gamma_dot - factor * r^2 * mean((x - mu) * x_dot)
            a = beta_dot - factor * mean(x_dot)

    so that, transposed, the two sums of Algorithm 1's gradient are each taken once:

        dbeta = sum(dy)       dgamma = r * sum((dy - dbeta / m) * (x - mu))
        dx    = factor * (dy - dbeta / m - (x - mu) * r * dgamma / m)

    The mean comes off (x - mu) * b once more in the tangent, and so off dy in the gradient: with a common offset in dy,
    mu's own rounding would be added up m times. Over several devices, where this would take a second collective, mu
    itself is known more exactly instead.
    """
    num_values, shift, rest, var, minus_shift = batch
    total = jnp.maximum(num_values, 1) if mask is not None else num_values
    r = lax.rsqrt(var + epsilon)
    factor = gamma * r
    spread = functools.partial(channels.spread, x=x)
    sum_x_dot = channels.sum(x_dot, mask)
    sum_along = channels.sum(_product(x - spread(shift), x_dot), mask)
    sum_x_dot, sum_along = channels.psum(sum_x_dot, sum_along.astype(sum_x_dot.dtype))
    mean_dot = sum_x_dot / total
    half_var_dot = sum_along.real / total - _product(rest, mean_dot)
    b = r * (gamma_dot - factor * (r * half_var_dot))  # in this order: r^3 underflows where x is 1e13
    a = beta_dot - factor * mean_dot
    if channels.axis_name is not None:
        # Sent to the devices of `jax.shard_map` together: so the transpose of this is one sum over them.
        both = jnp.stack([a - rest * b, b.astype(a.dtype)])
        a, b = lax.pcast(both, tuple(_varying(x) - _varying(both)), to="varying")
    if x.dtype == np.float64:
        along = sums.in_parts(x, a, b, mask, minus_shift, total, channels)
    elif x.dtype == np.float32 and x.size // r.size >= channels.long_sum:
        along = sums.in_float64(x, a, b, mask, minus_shift, total, channels)
    else:
        along_b = (x + channels.spread(minus_shift, x)) * spread(b)
        if channels.axis_name is None:
            along_b = along_b - spread(channels.sum(along_b, mask) / total)
        along = spread(a) + along_b
    return x_dot * spread(factor) + along, mean_dot, 2 * half_var_dot


def _varying(x: Array) -> frozenset[str]:
    """The mapped axes along which x differs from device to device, as `jax.shard_map` keeps track of them."""
    return jax.typeof(x).manual_axis_type.varying


@_normalize_batch.defjvp
def _normalize_batch_jvp(epsilon, channels, primals, tangents):
    x, gamma, beta, mask = primals
    y, batch = _normalize_batch(x, gamma, beta, mask, epsilon, channels)
    # Checkpointed: what is kept for the backward pass is x, not x - shift beside it.
    tangent = jax.checkpoint(functools.partial(_tangent, epsilon=epsilon, channels=channels), prevent_cse=False)
    y_dot, mean_dot, var_dot = tangent(x, gamma, mask, batch, *tangents[:3])
    # The mean's derivative is shift's; rest is only what rounding left of it.
    zero = jnp.zeros_like
    return (y, batch), (y_dot, Statistics(zero(batch.num_values), mean_dot, zero(batch.rest), var_dot, -mean_dot))
