"""The statistics of a batch, by channel. `jax_bn/statistics.py` is its twin."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_bn.channels import largest_of, one_of, spread, sum_by_channel, sum_of_squares, total_of


class Statistics(NamedTuple):
    """Statistics of a batch, a value per channel. The mean is shift + rest: twice the digits.

    Attributes:
      num_values: m, a number, or by channel.
      shift: a value near the mean.
      rest: what the mean is beside it.
      var: the biased variance.
    """

    num_values: int | Tensor
    shift: Tensor
    rest: Tensor
    var: Tensor


def near_the_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """A value near the mean of each channel, which of a constant channel is its value exactly.

    It is the mean of a quarter of the examples, from the differences to one of the channel's values: whatever the
    others hold, the mean of all is at most sqrt(3) standard deviations away. PyTorch only: JAX takes the mean itself.
    """
    one = one_of(x, mask)
    some = x if mask is not None else x[: (len(x) + 3) // 4]
    near = one + sum_by_channel(some - spread(one, x), mask) / total_of(some, mask)
    # Rounded to the grid of the largest values: these, and most that are smaller, less near are then exact. Else all
    # of a size would round the same way, and their mean be off by as much: more than it is, in a long batch around 0.
    largest = largest_of(x, mask).copysign(near)
    return (near - largest) + largest


def mean_and_var(d: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of d, whose mean is at most a few standard deviations.

    PyTorch only: in JAX they are taken in `statistics_of`.
    """
    total = total_of(d, mask)
    mean = sum_by_channel(d, mask) / total
    return mean, (sum_of_squares(d, mask) / total - mean * mean).clamp(min=0)
