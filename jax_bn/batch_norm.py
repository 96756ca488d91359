"""Batch normalisation as a pure function, channels last (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`torch_bn/batch_norm.py` is the same page in PyTorch's words. Statistics, normalisation and the moving average are
separate functions; only `jax_bn/layers.py` keeps state.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from bn_common.checks import check_batch_norm


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
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    unbiased_moving_var: bool = False,
    axis_name: str | None = None,
) -> tuple[Array, BatchStats]:
    """Batch normalisation of x over every axis but the last.

    In training, with m values per channel, and gradients flowing through mu and var:

        mu  = sum(x) / m                     var = sum((x - mu)^2) / m
        y   = scale * (x - mu) / sqrt(var + epsilon) + bias
        new = momentum * batch_stats + (1 - momentum) * (mu, var)

    In prediction: y = scale * (x - batch_stats.mean) / sqrt(batch_stats.var + epsilon) + bias.

    Pure: nothing is changed in place. The difference x - mu is taken before anything is multiplied, and mu is carried
    in two parts, so that a large mean costs no accuracy.

    Args:
      x: [..., C], rank 2 or more, float16, bfloat16, float32 or float64. Arithmetic is done in the widest dtype
        among x, scale, bias and batch_stats, at least float32.
      scale: gamma, [C].
      bias: beta, [C].
      batch_stats: the moving statistics, each [C].
      train: take the statistics from x (and move batch_stats), or take batch_stats.
      momentum: weight of the OLD value, in [0, 1]. PyTorch's momentum is the weight of the new one.
      epsilon: added to the variance, > 0 (not below the smallest normal number of that dtype).
      unbiased_moving_var: move batch_stats.var with var * m / (m - 1), as PyTorch does. y always uses the biased var.
      axis_name: a mapped axis (`jax.pmap`, `jax.shard_map`, `jax.vmap`) whose devices hold equal pieces of the batch;
        their statistics are merged from (mean, var), never from sums of squares, in one collective.

    Returns:
      (y, new batch_stats). y has x's shape and dtype; in prediction the second is the batch_stats given.

    Raises:
      TypeError: x, scale, bias or batch_stats hold something that is no array.
      ValueError: see `bn_common.checks.check_batch_norm`.
    """
    x, gamma, beta = as_array("x", x), as_array("scale", scale), as_array("bias", bias)
    mean, var = as_array("batch_stats.mean", batch_stats[0]), as_array("batch_stats.var", batch_stats[1])
    named = {"scale": gamma, "bias": beta, "batch_stats.mean": mean, "batch_stats.var": var}
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    check_batch_norm(
        shape=x.shape,
        dtype=x.dtype.name,
        channel_axis=-1,
        per_channel={name: (value.shape, value.dtype.name) for name, value in named.items()},
        train=train,
        momentum=momentum,
        epsilon_name="epsilon",
        epsilon=epsilon,
        shards=shards,
    )
    momentum, epsilon = float(momentum), float(epsilon)  # a numpy float64 would widen what it meets
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    wide_x, gamma, beta = x.astype(dtype), gamma.astype(dtype), beta.astype(dtype)
    if not train:
        y = _normalize(wide_x, mean.astype(dtype), var.astype(dtype), gamma, beta, epsilon)
        return y.astype(x.dtype), batch_stats
    y, shift, rest, batch_var = _normalize_batch(wide_x, gamma, beta, epsilon, axis_name)
    count = x.size // x.shape[-1] * shards
    moved_var = batch_var * (count / (count - 1)) if unbiased_moving_var else batch_var
    return y.astype(x.dtype), BatchStats(
        _moving_average(mean, shift + rest, momentum), _moving_average(var, moved_var, momentum)
    )


def as_array(name: str, value: Array) -> Array:
    """`value` as a JAX array; raise TypeError unless it is an array already."""
    # Only what already is an array: a list would be a silent copy to the device in every call.
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array")
    return jnp.asarray(value)


def wide_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype to compute in: float64 if one of them is, else float32."""
    return np.dtype(np.float64 if any(jnp.dtype(dtype) == np.float64 for dtype in dtypes) else np.float32)


def _moving_average(old: Array, new: Array, momentum: float) -> Array:
    """momentum * old + (1 - momentum) * new, in old's dtype but at least float32."""
    dtype = wide_dtype(old.dtype)
    return momentum * old.astype(dtype) + (1 - momentum) * new.astype(dtype)


def _last(v: Array, x: Array) -> Array:
    """v [C] with leading axes of size 1, to stand beside x (rank promotion is never relied on)."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def _normalize(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    return (x - _last(mean, x)) * _last(gamma * lax.rsqrt(var + epsilon), x) + _last(beta, x)


def _mean(x: Array, axis_name: str | None = None) -> Array:
    """Mean per channel, over the devices of axis_name too."""
    mu = x.mean(tuple(range(x.ndim - 1)))
    return mu if axis_name is None else lax.pmean(mu, axis_name)


def _statistics(x: Array, axis_name: str | None) -> tuple[Array, Array, Array]:
    """(shift, rest, var): the mean is shift + rest, a float with twice the digits, and var is the biased variance.

    Two passes over x: shift = mean(x); then, of d = x - shift, rest = mean(d) and var = mean(d^2) - rest^2. The
    rounding of the first mean is what the second pass finds as rest.
    """
    shift = _mean(x)
    d = x - _last(shift, x)
    rest = _mean(d)
    var = jnp.maximum(_mean(d * d) - rest * rest, 0)
    return (shift, rest, var) if axis_name is None else _merge(shift, rest, var, axis_name)


def _merge(shift: Array, rest: Array, var: Array, axis_name: str) -> tuple[Array, Array, Array]:
    """Statistics of the whole batch from those of its equal pieces (Chan, Golub and LeVeque 1979), one collective.

    A sum of rows that only their owner fills is an all-gather whose result every device is known to share.
    """
    size, mine = lax.axis_size(axis_name), jnp.stack([shift, rest, var])
    rows = jnp.zeros((size, *mine.shape), mine.dtype).at[lax.axis_index(axis_name)].set(mine)
    shifts, rests, variances = jnp.moveaxis(lax.psum(rows, axis_name), 1, 0)
    shift = shifts[0]
    offsets = (shifts - shift[None]) + rests
    rest = offsets.mean(0)
    return shift, rest, (variances + (offsets - rest[None]) ** 2).mean(0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _normalize_batch(
    x: Array, gamma: Array, beta: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array, Array]:
    """(y, shift, rest, var): x normalised with its own statistics, and these."""
    shift, rest, var = _statistics(x, axis_name)
    y = _x_hat(x, shift, rest, gamma * lax.rsqrt(var + epsilon)) + _last(beta, x)
    return y, shift, rest, var


def _x_hat(x: Array, shift: Array, rest: Array, factor: Array) -> Array:
    """(x - mu) * factor, with mu = shift + rest taken off in two steps."""
    return ((x - _last(shift, x)) - _last(rest, x)) * _last(factor, x)


@_normalize_batch.defjvp
def _normalize_batch_jvp(epsilon, axis_name, primals, tangents):
    """The tangent map, written so that its transpose is the closed form of the gradient (paper, section 3).

        g  = gamma / sqrt(var + epsilon) * (dy - mean(dy))
        dx = g - x_hat * mean(x_hat * g)       dgamma = sum(dy * x_hat)       dbeta = sum(dy)

    dy is centred before it meets x_hat: with a common offset in dy the other order cancels.
    """
    x, gamma, beta = primals
    x_dot, gamma_dot, beta_dot = tangents
    y, shift, rest, var = _normalize_batch(x, gamma, beta, epsilon, axis_name)
    r = lax.rsqrt(var + epsilon)
    x_hat = _x_hat(x, shift, rest, r)
    along = _mean(x_hat * x_dot, axis_name)
    z = x_dot - x_hat * _last(along, x)
    y_dot = (z - _last(_mean(z, axis_name), x)) * _last(gamma * r, x) + _last(gamma_dot, x) * x_hat + _last(beta_dot, x)
    # The mean's derivative is shift's; rest is only what rounding left of it.
    return (y, shift, rest, var), (y_dot, _mean(x_dot, axis_name), jnp.zeros_like(rest), 2 * along / r)
