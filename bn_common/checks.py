"""Entrance checks of both wings: framework-free, so that both refuse the same input with the same words.

Every function returns None or raises ValueError with what was given and what is allowed. They look at shapes, dtype
names and Python numbers only, never at values in arrays, so they cost nothing under `jax.jit` and `torch.compile`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
LARGEST = math.nextafter(math.inf, 0)
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

# 5x5 convolution with padding keeps 12, pool 6, 5x5 without padding 2, pool 1: one pixel is left for the linear layer.
SMALLEST_FIG_SIZE = 12


def require(condition: bool, what: str, given: object, allowed: str) -> None:
    """Raise ValueError "`what` is `given`; allowed: `allowed`" unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what} is {given}; allowed: {allowed}")


def check_real(name: str, value: object, low: float, high: float, allowed: str) -> None:
    """`value` is a Python or numpy real number (no bool, no NaN) from low to high."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(is_real and low <= float(value) <= high, name, repr(value), allowed)  # type: ignore[arg-type]


def check_int(name: str, value: object, low: int) -> None:
    """`value` is an integer (no bool) of at least `low`."""
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(is_int and int(value) >= low, name, repr(value), f"an integer >= {low}")  # type: ignore[call-overload]


def check_momentum(momentum: object, name: str = "momentum") -> None:
    """The weight of the old value: a number in [0, 1]."""
    check_real(name, momentum, 0.0, 1.0, "a number from 0 to 1 (the weight of the old value)")


def check_epsilon(name: str, epsilon: object, dtype: str = "float64") -> None:
    """The number added to the variance: finite, and not below the smallest normal number of the dtype computed in.

    (Below that it may count as 0, and a constant channel becomes 0 / 0.) `name` is what this wing calls it.
    """
    allowed = f"a finite number >= {SMALLEST_NORMAL[dtype]:.8g}, the smallest normal {dtype}"
    check_real(name, epsilon, SMALLEST_NORMAL[dtype], LARGEST, allowed)


def check_initial_moving_var(value: object) -> None:
    """What a moving variance starts with: a finite number >= 0."""
    check_real("initial_moving_var", value, 0.0, LARGEST, "a finite number >= 0")


def check_batch_norm(
    *,
    shape: Sequence[int],
    dtype: str,
    channel_axis: int,
    per_channel: Mapping[str, tuple[Sequence[int], str]],
    train: bool,
    momentum: object,
    epsilon_name: str,
    epsilon: object,
    shards: int = 1,
) -> None:
    """Everything `batch_norm` asks of its arguments.

    Args:
      shape: shape of x.
      dtype: name of x's dtype.
      channel_axis: 1 in PyTorch, -1 in JAX.
      per_channel: name -> (shape, dtype name) of the arguments with one value per channel.
      train: whether statistics are taken from x.
      momentum: weight of the old value in the moving statistics.
      epsilon_name: this wing's name of epsilon.
      epsilon: added to the variance.
      shards: over how many devices the batch is spread: every one holds a piece of this shape.

    Raises:
      ValueError: rank below 2; a dtype that is no float; a wrong channel count; momentum outside [0, 1]; epsilon not
        finite or below the smallest normal number of the dtype computed in; in training, fewer than two values per
        channel (the variance of one value says nothing).
    """
    check_momentum(momentum)
    widest = "float64" if "float64" in {dtype, *(given for _, given in per_channel.values())} else "float32"
    check_epsilon(epsilon_name, epsilon, widest)
    require(len(shape) >= 2, "the rank of x", f"{len(shape)} (shape {tuple(shape)})", "2 or more: a batch and channels")
    require(dtype in FLOAT_DTYPES, "the dtype of x", dtype, ", ".join(FLOAT_DTYPES))
    channels = shape[channel_axis]
    require(channels >= 1, "the number of channels of x", f"{channels} (shape {tuple(shape)})", "1 or more")
    for name, (given_shape, given_dtype) in per_channel.items():
        require(
            tuple(given_shape) == (channels,),
            f"the shape of {name}",
            tuple(given_shape),
            f"({channels},), one value for each channel of x, whose shape is {tuple(shape)}",
        )
        require(given_dtype in FLOAT_DTYPES, f"the dtype of {name}", given_dtype, ", ".join(FLOAT_DTYPES))
    if train:
        values = math.prod(shape) // channels * shards
        require(
            values >= 2,
            "the number of values per channel",
            f"{values} (shape {tuple(shape)})",
            "2 or more in training: the variance of fewer says nothing",
        )


def check_blenet(*, channels: object, fig_size: object, num_class: object) -> None:
    """The sizes of BLeNet: fig_size >= 12, channels >= 1, num_class >= 1, all integers."""
    check_int("channels", channels, 1)
    check_int("fig_size", fig_size, SMALLEST_FIG_SIZE)
    check_int("num_class", num_class, 1)


def check_blenet_input(
    *, shape: Sequence[int], dtype: str, layout: str, image: Sequence[int], train: bool, shards: int = 1
) -> None:
    """A batch of images for BLeNet, checked as a whole before any layer has seen it.

    In training a batch of one image is refused here: the convolutions' batch norms would still find many values per
    channel and move their statistics, and only the linear layers' would refuse.

    Args:
      shape: shape of x.
      dtype: name of x's dtype.
      layout: "NCHW" or "NHWC".
      image: the expected shape of one image in that layout.
      train: whether statistics are taken from x.
      shards: over how many devices the batch is spread: every one holds a piece of this shape.
    """
    expected = f"({layout[0]}, {', '.join(map(str, image))}), that is {layout}"
    require(len(shape) == 4 and tuple(shape[1:]) == tuple(image), "the shape of x", tuple(shape), expected)
    require(dtype in FLOAT_DTYPES, "the dtype of x", dtype, ", ".join(FLOAT_DTYPES))
    if train:
        allowed = "2 or more images in training: behind the flatten a channel has one value an image"
        require(shape[0] * shards >= 2, "the batch size", shape[0] * shards, allowed)
