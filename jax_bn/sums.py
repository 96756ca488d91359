"""The sums of a batch norm's gradient, dbeta = sum(dy) and dgamma = r * sum((dy - mean(dy)) * (x - mu)), nearly exact.

A tree of additions of m terms of random sign and size s rounds m / 2^l partial sums of size sqrt(2^l) s at each of its
log2(m) levels, each by eps / sqrt(12): by sqrt(m log2(m) / 12) eps s in all, where the sum is some sqrt(m) s, but may
be anything down to 0. So float32 is added in float64, and float64 in two parts: the first half of each value's bits,
whose sum hardly ever rounds, and all that is left.

`batch_norm.tangent` says in forward words what is transposed to the gradient; so do the functions here.
`torch_bn/sums.py` has the same sums in PyTorch's words.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from jax import Array, lax

from jax_bn.channels import Channels, spread, spread_to_add, sum_by_channel

# From this many values per channel on float32's sums are float64, by platform; elsewhere (TPU) never. On a CPU the step
# takes up to a third longer for it, of batches below 512 half as long again; on a GPU, which waits for memory, a tenth
# where it is made for data centres. Others, 32 to 64 times as slow in float64 as in float32, have eight such operations
# a value to do beside 24 bytes to move.
LONG_SUM = {"cpu": 1, "gpu": 1}
# Of the 53 that float64 has: sums of millions of values of so many bits hardly ever round, though XLA adds rows one by
# one on a CPU; and the product of two never does.
FIRST_BITS = 16


def sum_values(x: Array, mask: Array | None, channels: Channels) -> Array:
    """Sum per channel of what is not differentiated, of float64 in two parts: a GPU adds some hundred one by one.

    JAX only: PyTorch's `sum_by_channel` adds in stages.
    """
    if x.dtype != np.float64:
        return sum_by_channel(x, mask, channels)
    return sum_by_channel(first_bits(x), mask, channels) + sum_by_channel(x - first_bits(x), mask, channels)


def gradient_sums(
    x: Array, a: Array, b: Array, mask: Array | None, minus_shift: Array, total: Array, channels: Channels
) -> Array:
    """a + (x - mu) * b, the latter centred, in words whose transpose is both sums, as exact as x's dtype asks for.

    Over several devices nothing is centred: see `batch_norm.tangent`.
    """
    if x.dtype == np.float64:
        return sums_in_parts(x, a, b, mask, minus_shift, total, channels)
    if x.dtype == np.float32 and x.size // b.size >= channels.long_sum:
        return sums_in_float64(x, a, b, mask, minus_shift, total, channels)
    along_b = (x + spread(minus_shift, x, channels)) * spread(b, x, channels)
    if channels.axis_name is None:
        along_b = along_b - spread(sum_by_channel(along_b, mask, channels) / total, x, channels)
    return spread(a, x, channels) + along_b


def sums_in_float64(
    x: Array, a: Array, b: Array, mask: Array | None, minus_shift: Array, total: Array, channels: Channels
) -> Array:
    """The same in float64, also where JAX has none (x64 off): so its transpose adds in it.

    All conversions are linear, and transposed too: float32 comes in and goes out in either direction.
    """
    with jax.enable_x64(True):
        wide, a, b, total, minus_shift = (v.astype(np.float64) for v in (x, a, b, total, minus_shift))
        along_b = (wide + spread(minus_shift, wide, channels)) * spread_to_add(b, wide, channels)
        if channels.axis_name is None:
            # At once: of the product that ends the stages JAX makes no float64 transpose.
            a = a - sum_by_channel(along_b, mask, channels, in_stages=False) / total
        # Converted apart, and in different words: of a conversion that the gradient's two sums share, XLA would write
        # out all of dy in float64 for them.
        return along_b.astype(np.float32) - spread_to_add(-a, wide, channels).astype(np.float32)


def sums_in_parts(
    x: Array, a: Array, b: Array, mask: Array | None, minus_shift: Array, total: Array, channels: Channels
) -> Array:
    """The same of float64, in words whose transpose adds in two parts.

    With d = x - mu, p = dy1 * d1, and dy1, d1, p1 the first bits of dy, d, p:

        sum(dy)     = sum(dy1) + sum(dy - dy1)
        sum(dy * d) = sum(p1) + sum((p - p1) + (dy - dy1) * d1 + dy * (d - d1))

    p is exact, and d - d1 has what d rounds off. The last sum of each line is 2^-16 as large as the one before, and so
    is its rounding.
    """
    over_x = functools.partial(spread, x=x, channels=channels)
    d, rounded_off = difference(x, over_x(minus_shift))
    high = lax.stop_gradient(first_bits(d))  # the derivative, which it would round, is low's
    low = (d - high) + rounded_off
    if channels.axis_name is None:
        a = a - b * ((sum_by_channel(high, mask, channels) + sum_by_channel(low, mask, channels)) / total)
    # What comes off again has a spread of its own, and is multiplied once: of one that is shared JAX would transpose a
    # sum by element, and round what comes off by all else before.
    a1, a2, b1, b2, b3 = (over_x(v) for v in (a, a, b, b, b))
    high_b = high * b3
    along_b = first_bits(high * (first_bits(b1) + (b2 - first_bits(b2)))) + ((high_b - first_bits(high_b)) + low * b3)
    return first_bits(a1) + ((a2 - first_bits(a2)) + along_b)


def difference(a: Array, minus_b: Array) -> tuple[Array, Array]:
    """a - b, rounded, and what that rounds off, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    d = a + minus_b
    moved = d - a
    return d, (a - (d - moved)) + (minus_b - moved)


def first_bits(v: Array) -> Array:
    """v rounded to its first bits: linear but for what that rounds off."""
    return lax.reduce_precision(v, exponent_bits=11, mantissa_bits=FIRST_BITS - 1)
