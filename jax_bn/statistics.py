"""The statistics of a batch, by channel. `torch_bn/statistics.py` is its twin."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jax_bn.arrays import product, to_dtype
from jax_bn.channels import Channels, num_values, one_of, spread, sum_by_channel, total_of
from jax_bn.devices import is_shared, merge, num_shards, psum


class Statistics(NamedTuple):
    """Statistics of a batch, a value per channel, over all devices. The mean is shift + rest: twice the digits.

    Attributes:
      num_values: m, a float.
      shift: the mean, rounded.
      rest: what rounding left of the mean.
      var: the biased variance.
      minus_shift: -shift, see `statistics_of`. (JAX only: minus_shift.)
    """

    num_values: Array
    shift: Array
    rest: Array
    var: Array
    minus_shift: Array


def statistics_of(x: Array, near: Array, mask: Array | None, epsilon: float, channels: Channels) -> Statistics:
    """Mean and variance: from sums around a value that is near the mean, where in all channels it is.

    Of the variance, mean(d^2) - e^2 with d = x - near and e = mean(d), as much is lost as by one more rounding while e
    is half a standard deviation at most, and by 3 more at sqrt(3). Else x is read again, as it always is on a GPU,
    which would do both always. On a TPU the sums fuse into what has made x. On a CPU near is 0, so that d is x itself;
    over several of its devices the second form's sum over them would stand beside the first's.

    JAX only: in PyTorch they are taken in `mean_and_var`.
    """
    furthest = {"tpu": 0.5, "cpu": 3**0.5 if channels.axis_name is None else None}.get(channels.platform)
    if furthest is None or jnp.iscomplexobj(x) or not is_shared(near, x, channels):
        return _in_two_passes(x, near, mask, channels)
    near = jnp.zeros_like(near) if channels.platform == "cpu" else near
    here, e = _in_one_pass(x, near, mask, channels)
    is_near = (jnp.abs(e) <= jnp.sqrt(here.var) * furthest) & (here.var < jnp.inf)
    # A NaN of x is one in any form, and decides nothing for the other channels.
    is_near = (is_near | (jnp.isnan(e) & ~jnp.isnan(near))).all()
    # x as it is: of a conversion, XLA would write out the result for the branch.
    return lax.cond(is_near, lambda *_: here, functools.partial(_in_two_passes, channels=channels), x, near, mask)


def _in_one_pass(x: Array, near: Array, mask: Array | None, channels: Channels) -> tuple[Statistics, Array]:
    """The statistics from sums around near, and how far the mean is from it.

    Over several devices from one sum of [2, C], with a mask of [3, C]. JAX only: see `statistics_of`.
    """
    x = to_dtype(x, near.dtype)
    m = num_values(x, mask, channels)
    d = x - spread(near, x, channels)
    sums = [sum_by_channel(d, mask, channels), sum_by_channel(d * d, mask, channels)]
    if mask is None:
        if channels.axis_name is not None:
            m = jnp.full_like(near, m * num_shards(channels.axis_name, channels.groups))
        e, square = (v / m for v in psum(sums, channels))
    else:
        *sums, m = psum((*sums, m), channels)
        near = jnp.where(m > 0, near, jnp.zeros_like(near))  # as it is elsewhere where nothing counts
        e, square = (v / total_of(m, mask) for v in sums)
    var, shift = jnp.maximum(square - e * e, 0), near + e
    return Statistics(m, shift, (near - shift) + e, var, -shift), e


def _in_two_passes(x: Array, near: Array, mask: Array | None, channels: Channels) -> Statistics:
    """Two passes over x: the mean, from the differences to one value of x or to 0, and the variance around it.

    These differences are exact where x is nearly constant, and 0 where it is constant; where x is around 0 they are x
    itself. Of the mean, one + offset, the rounding is known: rest. It comes off the variance again, which is taken
    around shift.

    x - shift is wanted in two sums and twice beside them. Were it written the same way everywhere, XLA would compute it
    once, and on a CPU write it out to memory, for the sums to read it from there; so each sum has it in words of its
    own, x + (-shift) here and x + minus_shift in the gradient, and is one pass over x.

    JAX only: see `statistics_of`.
    """
    one = to_dtype(one_of(x, mask, channels), near.real.dtype)
    x = to_dtype(x, near.real.dtype)
    m = num_values(x, mask, channels)
    total = total_of(m, mask)
    offset = sum_by_channel(x - spread(one, x, channels), mask, channels) / total
    shift = one + offset
    rest = (one - shift) + offset
    d = x + spread(-shift, x, channels)
    if channels.axis_name is not None:
        # With offset's own rounding, for the gradient's sake: see `tangent`.
        rest = sum_by_channel(d, mask, channels) / total
    var = jnp.maximum(sum_by_channel(product(d, d), mask, channels) / total - product(rest, rest), 0)
    if channels.axis_name is None:
        return Statistics(m, shift, rest, var, -one - offset)
    m, shift, rest, var = merge(jnp.broadcast_to(m, var.shape), shift, rest, var, channels)
    return Statistics(m, shift, rest, var, -shift)
