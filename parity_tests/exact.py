"""Batch norm in exact arithmetic (mpmath, 60 digits): the truth that both wings are held against.

Written from the definition, one element at a time, and sharing nothing with either wing.
"""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import numpy as np
from numpy.typing import NDArray

mpmath.mp.dps = 60
_to_mp = np.frompyfunc(lambda v: mpmath.mpf(float(v)), 1, 1)
_sqrt = np.frompyfunc(mpmath.sqrt, 1, 1)


class Exact(NamedTuple):
    """Object arrays of mpf; x, y, dy and dx are [N, C, ...]."""

    y: NDArray
    moving_mean: NDArray
    moving_var: NDArray
    dx: NDArray
    dgamma: NDArray
    dbeta: NDArray
    mean: NDArray
    var: NDArray


def batch_norm(
    x, gamma, beta, moving_mean, moving_var, dy, *, train, momentum=0.9, eps=1e-5, unbiased_moving_var=False
) -> Exact:
    """y, the moving statistics after the step, and the gradients of sum(y * dy)."""
    axes = tuple(a for a in range(x.ndim) if a != 1)
    m = x.size // x.shape[1]
    x, gamma, beta, moving_mean, moving_var, dy = map(_to_mp, (x, gamma, beta, moving_mean, moving_var, dy))
    momentum, eps = mpmath.mpf(momentum), mpmath.mpf(eps)

    def wide(v):
        return v.reshape(1, -1, *[1] * (x.ndim - 2))

    if train:
        mean = x.sum(axes) / m
        var = ((x - wide(mean)) ** 2).sum(axes) / m
    else:
        mean, var = moving_mean, moving_var
    x_hat = (x - wide(mean)) / wide(_sqrt(var + eps))
    y = wide(gamma) * x_hat + wide(beta)
    g = dy * wide(gamma / _sqrt(var + eps))
    if train:
        dx = g - wide(g.sum(axes) / m) - x_hat * wide((g * x_hat).sum(axes) / m)
        kept = var * m / (m - 1) if unbiased_moving_var else var
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * kept
    else:
        dx = g
    return Exact(y, moving_mean, moving_var, dx, (dy * x_hat).sum(axes), dy.sum(axes), mean, var)


def error_in_eps(given: NDArray, truth: NDArray, dtype: str, scale: NDArray | None = None) -> float:
    """The largest error, in eps of the channel's largest true value (or of `scale`, [C]).

    Args:
      given: [N, C, ...] or [C].
      truth: the same shape, mpf.
      dtype: whose eps.
      scale: [C], in place of the largest true value, where the truth is 0 by cancellation.
    """
    assert given.shape == truth.shape, (given.shape, truth.shape)
    if not np.isfinite(given).all():
        return float("inf")
    axis = 1 if given.ndim > 1 else 0
    error, size = (
        np.moveaxis(np.abs(a), axis, 0).reshape(given.shape[axis], -1).max(1) for a in (_to_mp(given) - truth, truth)
    )
    size = size if scale is None else scale
    eps = float(np.finfo(dtype).eps)
    return max(float(e / (s * eps)) if e else 0.0 for e, s in zip(error, size, strict=True))
