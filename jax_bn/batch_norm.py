"""Batch normalisation as a pure function, channels last (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`torch_bn/batch_norm.py` is the same page in PyTorch's words. Statistics, normalisation and the moving average are
separate functions; only the layers keep state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_common.checks import COMPLEX_DTYPES, FLOAT_DTYPES, channel_axes, check_batch_norm
from jax_bn.arrays import check_array, full_rank, kind_of, product, to_dtype, wide_dtype
from jax_bn.channels import Channels, spread, spread_to_add, sum_by_channel, total_of
from jax_bn.devices import num_shards, psum, send
from jax_bn.statistics import Statistics, statistics_of


class BatchStats(NamedTuple):
    """Moving statistics of a batch norm, one value per channel: `mean` [C] and `var` [C], at least float32.

    JAX only: Flax keeps them in a collection of their own; in PyTorch they are two buffers of the layer.
    """

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
    options = Options(
        momentum, epsilon, unbiased_moving_var, axis, mask, axis_name, axis_index_groups, num_batches_tracked
    )
    y, batch_stats = batch_norm_with(x, scale, bias, batch_stats, options, train=train, dtypes=FLOAT_DTYPES)
    return y.astype(x.dtype), batch_stats


class Options(NamedTuple):
    """How a batch is normalised: the arguments of `batch_norm` that are no value per channel, carried whole.

    Attributes:
      momentum, epsilon, axis, mask, axis_name: see `batch_norm`.
      unbiased: its unbiased_moving_var.
      groups: its axis_index_groups. (JAX only: axis_name and groups; PyTorch has a group.)
      tracked: its num_batches_tracked.
      platform: what this will run on, where that is known: then only the form for it is traced. (JAX only: platform.)
    """

    momentum: float | None = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    axis: int | Sequence[int] = -1
    mask: Array | None = None
    axis_name: str | tuple[str, ...] | None = None
    groups: Sequence[Sequence[int]] | None = None
    tracked: Array | int | None = None
    platform: str | None = None


def batch_norm_with(
    x: Array,
    scale: Array,
    bias: Array,
    batch_stats: BatchStats,
    options: Options,
    *,
    train: bool,
    dtypes: Sequence[str] = FLOAT_DTYPES + COMPLEX_DTYPES,
) -> tuple[Array, BatchStats]:
    """`batch_norm` as the layers call it: y stays in the dtype that it was computed in, and is rounded by them.

    Complex x, as Flax's layers take it: var is the mean of |x - mu|^2.
    """
    x, gamma, beta = check_array("x", x), check_array("scale", scale), check_array("bias", bias)
    if not isinstance(batch_stats, tuple | list) or len(batch_stats) != 2:
        raise TypeError(f"batch_stats is {type(batch_stats).__name__}; allowed: a BatchStats, that is (mean, var)")
    batch_stats = batch_stats if isinstance(batch_stats, BatchStats) else BatchStats(*batch_stats)
    mean, var = check_array("batch_stats.mean", batch_stats[0]), check_array("batch_stats.var", batch_stats[1])
    named = {"scale": gamma, "bias": beta, "batch_stats.mean": mean, "batch_stats.var": var}
    options = checked(options, x, named, train=train, dtypes=dtypes)
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    gamma, beta, mean, var = (to_dtype(value, dtype) for value in (gamma, beta, mean, var))
    channels, mask = _channels(options, x), options.mask
    if options.axis_name is None:
        gamma, beta = send(gamma, x), send(beta, x)
    if not train:
        return normalize(to_dtype(x, dtype), mean, var, gamma, beta, options.epsilon, channels), batch_stats
    if mask is not None:
        mask = full_rank(mask, x)
        x = jnp.where(mask | jnp.isfinite(x), x, jnp.zeros_like(x))
    arrays = x, gamma, beta, mean, mask
    y, batch = _on_its_platform(_normalize_folded, arrays, options.epsilon, channels, options.platform)
    return y, moving_average(batch_stats, batch, options)


def checked(
    options: Options, x: Array, per_channel: Mapping[str, Array], *, train: bool, dtypes: Sequence[str]
) -> Options:
    """The options, which fit x and the named arguments with a value per channel, or an error."""
    mask = None if options.mask is None else check_array("mask", options.mask)
    check_batch_norm(
        shape=x.shape,
        dtype=x.dtype.name,
        axis=options.axis,
        per_channel={name: (value.shape, value.dtype.name) for name, value in per_channel.items()},
        mask=None if mask is None else (mask.shape, mask.dtype.name),
        train=train,
        momentum=options.momentum,
        num_batches_tracked=kind_of(options.tracked),
        epsilon_name="epsilon",
        epsilon=options.epsilon,
        shards=num_shards(options.axis_name, options.groups),
        dtypes=dtypes,
    )
    # A numpy float64 would widen what it meets.
    return options._replace(epsilon=float(options.epsilon), mask=mask)


def _channels(options: Options, x: Array) -> Channels:
    """Where the channels of x are, and which devices share the batch. JAX only: see `Channels`."""
    groups = None if options.groups is None else tuple(map(tuple, options.groups))
    return Channels(channel_axes(options.axis, x.ndim), 1, options.axis_name, groups)


# Compiled as one, so that a call outside of `jax.jit` compiles no form twice; not inline, nor does its derivative.
@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _on_its_platform(function, arrays, epsilon: float, channels: Channels, platform: str | None) -> Any:
    """function(*arrays, epsilon, channels) in the form for the platform that is compiled for, which is not the host's.

    JAX only: in PyTorch a tensor knows its device.
    """

    def form(*arrays, name: str) -> Any:
        return function(*arrays, epsilon, channels._replace(platform=name))

    forms = {name: functools.partial(form, name=name) for name in ("cpu", "tpu", "gpu")}
    if platform is not None:
        return forms.get(platform, forms["gpu"])(*arrays)
    return lax.platform_dependent(*arrays, cpu=forms["cpu"], tpu=forms["tpu"], default=forms["gpu"])


def _normalize_folded(x, gamma, beta, near, mask, epsilon: float, channels: Channels) -> tuple[Array, Statistics]:
    """`normalize_batch` of x as it is summed fastest: on a CPU folded, and widened once for all that reads it.

    JAX only: see `Channels.fold`.
    """
    folded, channels = (x, channels) if mask is not None else channels.fold(x)
    folded = to_dtype(folded, gamma.real.dtype) if channels.platform == "cpu" else folded
    y, batch = normalize_batch(folded, gamma, beta, near, mask, epsilon, channels)
    return y.reshape(x.shape), batch


def moving_average(batch_stats: BatchStats, batch: Statistics, options: Options) -> BatchStats:
    """momentum * old + (1 - momentum) * new, in old's dtype but at least float32; old where the new is not known.

    With momentum None, the weights are n / (n + 1) and 1 / (n + 1).
    """
    m = batch.num_values
    var = batch.var * (m / jnp.maximum(m - 1, 1)) if options.unbiased else batch.var
    moved = []
    for old, new in zip(batch_stats, (batch.shift + batch.rest, var), strict=True):
        known = None if options.mask is None else m >= 2
        dtype = wide_dtype(old.dtype)
        old, new = to_dtype(old, dtype), to_dtype(new, dtype)
        weights: tuple[float | Array, float | Array]
        if options.momentum is None:
            n = jnp.asarray(options.tracked).astype(old.dtype)
            weights = n / (n + 1), 1 / (n + 1)
        else:
            weights = float(options.momentum), 1 - float(options.momentum)
        value = weights[0] * old + weights[1] * new
        moved.append(value if known is None else jnp.where(known, value, old))
    return BatchStats(*moved)


def normalize(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, epsilon: float, channels: Channels
) -> Array:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    over_x = functools.partial(spread, x=x, channels=channels)
    factor = gamma * lax.rsqrt(var + epsilon)
    return (x - over_x(mean)) * over_x(factor) + over_x(beta)


def batch_statistics(x: Array, options: Options) -> Statistics:
    """The statistics that `batch_norm` normalises x with."""
    x = to_dtype(x, wide_dtype(x.dtype))
    mask = None if options.mask is None else full_rank(options.mask, x)
    channels = _channels(options, x)
    arrays = x, jnp.zeros([x.shape[a] for a in channels.axes], x.real.dtype), mask
    return _on_its_platform(statistics_of, arrays, options.epsilon, channels, options.platform)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def normalize_batch(
    x: Array, gamma: Array, beta: Array, near: Array, mask: Array | None, epsilon: float, channels: Channels
) -> tuple[Array, Statistics]:
    """x normalised with its own statistics, and these. beta - rest * factor: rest is too small to cancel anything.

    JAX only: near, any value per channel; nearest the mean it costs least.
    """
    batch = statistics_of(x, near, mask, epsilon, channels)
    x = to_dtype(x, near.real.dtype)
    factor = gamma * lax.rsqrt(batch.var + epsilon)
    over_x = functools.partial(spread, x=x, channels=channels)
    return (x - over_x(batch.shift)) * over_x(factor) + over_x(beta - batch.rest * factor), batch


def tangent(x, gamma, mask, batch: Statistics, x_dot, gamma_dot, beta_dot, epsilon, channels: Channels):
    """The tangents of y, mean and var, in a form whose transpose is the closed form of the gradient.

        y_dot = factor * x_dot + a + (x - mu) * b        factor = gamma * r,  r = 1 / sqrt(var + epsilon)
            b = r * gamma_dot - factor * r^2 * mean((x - mu) * x_dot)
            a = beta_dot - factor * mean(x_dot)

    so that, transposed, the two sums of Algorithm 1's gradient are each taken once:

        dbeta = sum(dy)       dgamma = r * sum((dy - dbeta / m) * (x - mu))
        dx    = factor * (dy - dbeta / m - (x - mu) * r * dgamma / m)

    The mean comes off (x - mu) * b once more in the tangent: with a common offset in dy, mu's own rounding would be
    added up m times. On a CPU off the product, and so off dy in the gradient, which is free there; elsewhere by a third
    sum, which no other has to wait for. Over several devices, where this would take a second collective, rest stands
    for it.
    """
    m, shift, rest, var, minus_shift = batch
    x, x_dot = (to_dtype(v, gamma.real.dtype) for v in (x, x_dot))
    total = total_of(m, mask)
    r = lax.rsqrt(var + epsilon)
    factor = gamma * r
    over_x = functools.partial(spread, x=x, channels=channels)
    sum_x_dot = sum_by_channel(x_dot, mask, channels)
    sum_along = sum_by_channel(product(x - over_x(shift), x_dot), mask, channels)
    sum_x_dot, sum_along = psum((sum_x_dot, sum_along.astype(sum_x_dot.dtype)), channels)
    mean_dot = sum_x_dot / total
    half_var_dot = sum_along.real / total - product(rest, mean_dot)
    b = r * (gamma_dot - factor * (r * half_var_dot))  # in this order: r^3 underflows where x is 1e13
    a = beta_dot - factor * mean_dot
    if channels.axis_name is not None:
        # Sent to the devices of `jax.shard_map` together: so the transpose of this is one sum over them.
        both = jnp.stack([a - rest * b, b.astype(a.dtype)])
        a, b = send(both, x)
    d = x + over_x(minus_shift)
    if channels.axis_name is None and channels.platform != "cpu":
        # Not rest, in which e's own rounding is missing. Nor does that come off d: low bits that all values share would
        # make all products round the same way.
        a = a - b * (sum_by_channel(d, mask, channels) / total)
    along = d * spread_to_add(b, x, channels)
    if channels.axis_name is None and channels.platform == "cpu":
        along = along - spread_to_add(sum_by_channel(along, mask, channels) / total, x, channels)
    return x_dot * over_x(factor) + (spread_to_add(a, x, channels) + along), mean_dot, 2 * half_var_dot


@normalize_batch.defjvp
def _normalize_batch_jvp(epsilon, channels, primals, tangents):
    """The rule that hands JAX the tangent. JAX only: in PyTorch it is `_NormalizeBatchForward`."""
    x, gamma, beta, near, mask = primals
    y, batch = normalize_batch(x, gamma, beta, near, mask, epsilon, channels)
    # Checkpointed: what is kept for the backward pass is x, not x - shift beside it.
    recomputed = jax.checkpoint(functools.partial(tangent, epsilon=epsilon, channels=channels), prevent_cse=False)
    y_dot, mean_dot, var_dot = recomputed(x, gamma, mask, batch, *tangents[:3])
    # The mean's derivative is shift's; rest is only what rounding left of it.
    zero = jnp.zeros_like
    return (y, batch), (y_dot, Statistics(zero(batch.num_values), mean_dot, zero(batch.rest), var_dot, -mean_dot))
