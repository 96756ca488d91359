"""Batch norm without rounding error worth naming: the truth that both wings and their peers are held against.

Written from the definition, and sharing nothing with either wing. `batch_norm` does all of it in mpmath, 60 digits, one
element at a time; `long_batch_norm` is for millions of elements: the sums in integers, without any rounding, and only
the elementwise y and dx in numpy's longdouble.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import NamedTuple

import mpmath
import numpy as np
from numpy.typing import NDArray

mpmath.mp.dps = 60
_to_mp = np.frompyfunc(lambda v: mpmath.mpf(float(v)), 1, 1)
_sqrt = np.frompyfunc(mpmath.sqrt, 1, 1)
_fraction_to_mp = np.frompyfunc(lambda v: mpmath.mpf(v.numerator) / v.denominator, 1, 1)


class Exact(NamedTuple):
    """Arrays of mpf; x, y, dy and dx are [N, C, ...]. From `long_batch_norm` y and dx are longdouble."""

    y: NDArray
    moving_mean: NDArray
    moving_var: NDArray
    dx: NDArray
    dgamma: NDArray
    dbeta: NDArray
    mean: NDArray
    var: NDArray


def batch_norm(
    x, gamma, beta, moving_mean, moving_var, dy, *, train, momentum=0.9, eps=1e-5, unbiased_moving_var=False, mask=None
) -> Exact:
    """y, the moving statistics after the step, and the gradients of sum(y * dy).

    With a `mask` (bool, broadcastable to x) mean and var are those of the positions where it is true, m of them in a
    channel; y is given, and counts in sum(y * dy), at every position.
    """
    axes, counts, m = _axes(x), *_counted(x, mask)
    x, gamma, beta, moving_mean, moving_var, dy = map(_to_mp, (x, gamma, beta, moving_mean, moving_var, dy))
    momentum, eps = mpmath.mpf(momentum), mpmath.mpf(eps)

    if train:
        mean = (x * counts).sum(axes) / m
        var = ((x - _wide(mean, x)) ** 2 * counts).sum(axes) / m
    else:
        mean, var = moving_mean, moving_var
    x_hat = (x - _wide(mean, x)) / _wide(_sqrt(var + eps), x)
    y = _wide(gamma, x) * x_hat + _wide(beta, x)
    g = dy * _wide(gamma / _sqrt(var + eps), x)
    dx = g
    if train:
        dx = g - (_wide(g.sum(axes) / m, x) + x_hat * _wide((g * x_hat).sum(axes) / m, x)) * counts
        kept = var * m / (m - 1) if unbiased_moving_var else var
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * kept
    return Exact(y, moving_mean, moving_var, dx, (dy * x_hat).sum(axes), dy.sum(axes), mean, var)


def long_batch_norm(
    x, gamma, beta, moving_mean, moving_var, dy, *, train, momentum=0.9, eps=1e-5, unbiased_moving_var=False, mask=None
) -> Exact:
    """The same for long inputs (x and dy float32 or float64 and finite, at most 2^26 values in a channel).

    Everything per channel comes from sums without rounding, combined in fractions where they cancel, and is mpf. y and
    dx are taken in longdouble, whose rounding u is 2^-64 (2^-53 where longdouble is double, which is enough for float32
    only). With eps32 = 2^-23, and float32 values:

    - The mean is carried in two doubles, a + b. Either x - a is exact in longdouble, or it is so much larger than b
      that nothing cancels: the difference d has a relative error of 2 u, and an absolute one of 2^-106 |mean| for what
      a + b leaves out. In a batch two float32 values that differ are 2^-24 of the larger apart, and a channel of one
      value has a = x and b = 0, so the latter is below 2^-80 of the largest |d|.
    - y = (gamma r) d + beta rounds three times more. The d of the positions that count sum to 0 in training, hence
      max |y| >= |beta| and max |gamma r d| <= 2 max |y|: the error is below 16 u max |y|, which is at most
      1.5e-8 eps32. In prediction it is relative to max |gamma r d| + |beta| instead.
    - dx = gamma r ((dy - mean(dy)) - d k) with k = mean(dy x_hat) r. Here |d k| <= sqrt(m) max |dy|, from
      |x_hat| <= sqrt(m) and mean(x_hat^2) <= 1, so the error is below 8 u (2 + sqrt(m)) |gamma r| max |dy|:
      6e-5 eps32 of |gamma r| max |dy| at m = 2^26, were longdouble only double. (With a mask: as much more as
      x_hat and dy are larger at the positions that don't count.)

    Of float64 values with eps = 2^-52, where the largest |d| is 2^-40 |mean| or more: below 2^-7 eps for y, and for dx
    2^-9 (2 + sqrt(m)) eps, which is 2 eps at m = 2^20.
    """
    assert x.dtype == dy.dtype, (x.dtype, dy.dtype)
    counts, m = _counted(x, mask)
    rows = [(_row(x, c), _row(dy, c), _row(counts, c)) for c in range(x.shape[1])]
    sum_dy = _fractions(_exact_sum(dys) for _, dys, _ in rows)
    sum_dy_x = _fractions(_exact_dot(dys, xs) for xs, dys, _ in rows)
    if train:
        sum_x = _fractions(_exact_sum(xs[some]) for xs, _, some in rows)
        sum_x2 = _fractions(_exact_dot(xs[some], xs[some]) for xs, _, some in rows)
        exact_mean, var = sum_x / m, _fraction_to_mp((m * sum_x2 - sum_x**2) / m**2)
    else:
        exact_mean, var = _fractions(Fraction(float(v)) for v in moving_mean), _to_mp(moving_var)
    mean, momentum = _fraction_to_mp(exact_mean), mpmath.mpf(momentum)
    r = 1 / _sqrt(var + mpmath.mpf(eps))
    scale, dgamma = _to_mp(gamma) * r, _fraction_to_mp(sum_dy_x - exact_mean * sum_dy) * r

    d = _minus(x.astype(np.longdouble), mean)
    y = d * _longdouble(scale, x) + _longdouble(_to_mp(beta), x)
    dx = dy.astype(np.longdouble)
    moving_mean, moving_var = _to_mp(moving_mean), _to_mp(moving_var)
    if train:
        through = _minus(dx, _fraction_to_mp(sum_dy / m)) - d * _longdouble(dgamma * r / m, x)
        dx = through if mask is None else np.where(counts, through, dx)
        kept = var * m / (m - 1) if unbiased_moving_var else var
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * kept
    dx = dx * _longdouble(scale, x)
    return Exact(y, moving_mean, moving_var, dx, dgamma, _fraction_to_mp(sum_dy), mean, var)


def error_in_eps(given: NDArray, truth: NDArray, dtype: str, scale: NDArray | None = None) -> float:
    """The largest error, in eps of the channel's largest true value (or of `scale`, [C]).

    Args:
      given: [N, C, ...] or [C].
      truth: the same shape, mpf or longdouble.
      dtype: whose eps.
      scale: [C], in place of the largest true value, where the truth is 0 by cancellation.
    """
    assert given.shape == truth.shape, (given.shape, truth.shape)
    if not np.isfinite(given).all():
        return float("inf")
    axis, exactly = (1 if given.ndim > 1 else 0), (truth.dtype == object)
    difference = (_to_mp(given) if exactly else given.astype(np.longdouble)) - truth
    error, size = (np.moveaxis(np.abs(a), axis, 0).reshape(given.shape[axis], -1).max(1) for a in (difference, truth))
    if not exactly:
        error, size = _to_mp(error), _to_mp(size)
    size = size if scale is None else scale
    eps = float(np.finfo(dtype).eps)
    return max(float(e / (s * eps)) if e else 0.0 for e, s in zip(error, size, strict=True))


def sizes_of_sums(x: NDArray, dy: NDArray, mean: NDArray, var_eps: NDArray) -> tuple[NDArray, NDArray]:
    """||dy||_2 and ||dy x_hat||_2 per channel, float64: how large is what dbeta and dgamma are the sums of.

    mean is that of the truth, mpf; var_eps is var + eps.
    """
    wide, x_hat = dy.astype(np.float64), _minus(x.astype(np.longdouble), mean).astype(np.float64)
    x_hat = x_hat / _wide(np.sqrt(var_eps.astype(np.float64)), x)
    of_dbeta, of_dgamma = (np.sqrt(np.square(v).sum(_axes(x))) for v in (wide, wide * x_hat))
    return of_dbeta, of_dgamma


def _axes(x) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a != 1)


def _wide(v, x) -> NDArray:
    """v [C] as [1, C, 1, ...]."""
    return v.reshape(1, -1, *[1] * (x.ndim - 2))


def _counted(x, mask) -> tuple[NDArray, NDArray]:
    """Which positions count, in x's shape, and how many do in each channel: Python ints, [C]."""
    counts = np.broadcast_to(True if mask is None else np.asarray(mask, dtype=bool), x.shape)
    m = counts.sum(_axes(x))
    assert m.all(), "a channel without a position that counts has no mean"
    return counts, np.array([int(v) for v in m], dtype=object)


def _row(x, c: int) -> NDArray:
    """Channel c as a vector; float64 unless bool."""
    row = x[:, c].reshape(-1)
    return row if row.dtype == bool else row.astype(np.float64)


def _fractions(values) -> NDArray:
    return np.array(list(values), dtype=object)


def _exact_sum(values: NDArray) -> Fraction:
    """The sum of finite float64 values without rounding.

    Each is an integer below 2^53 times a power of two. Per power the integers are added in two halves below 2^27: up to
    2^26 of these stay below 2^53, so bincount's float64 sums are integers, exactly; Python's integers do the rest.
    """
    assert np.isfinite(values).all()
    assert len(values) <= 2**26
    mantissa, exponent = np.frexp(values)
    integer = np.ldexp(mantissa, 53).astype(np.int64)
    lowest = exponent.min()
    high, low = (np.bincount(exponent - lowest, weights=half) for half in (integer >> 27, integer & (2**27 - 1)))
    total = sum(((int(h) << 27) + int(n)) << power for power, (h, n) in enumerate(zip(high, low, strict=True)))
    return total * Fraction(2) ** (int(lowest) - 53)


def _exact_dot(a: NDArray, b: NDArray) -> Fraction:
    """The sum of a * b without rounding: of the products of their thirds, of 24 bits at most."""
    pairs = itertools.product(_thirds(a), _thirds(b))
    return sum((_exact_sum(p * q) for p, q in pairs if p.any() and q.any()), start=Fraction(0))


def _thirds(v: NDArray) -> list[NDArray]:
    thirds = []
    for _ in range(3):
        thirds.append(v.astype(np.float32).astype(np.float64))
        v = v - thirds[-1]
    assert not v.any(), "beyond the exponents of float32"
    return thirds


def _longdouble(v, x) -> NDArray:
    """v [C] of mpf, to stand beside x: rounded to two doubles, and their sum to longdouble."""
    first = v.astype(np.float64)
    return _wide(first.astype(np.longdouble) + (v - _to_mp(first)).astype(np.float64), x)


def _minus(x, v) -> NDArray:
    """x - v, v [C] of mpf taken off in two doubles."""
    first = v.astype(np.float64)
    rest = (v - _to_mp(first)).astype(np.float64)
    return (x - _wide(first, x)) - _wide(rest, x)
