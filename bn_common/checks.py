"""Entrance checks of both wings: framework-free, so that both refuse the same input with the same words.

Every function returns None or raises ValueError with what was given and what is allowed. They look at shapes, dtype
names and Python numbers only, never at values in arrays, so they cost nothing under `jax.jit` and `torch.compile`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
EPSILONS = {dtype: f"a finite number >= {v:.8g}, the smallest normal {dtype}" for dtype, v in SMALLEST_NORMAL.items()}
LARGEST = math.nextafter(math.inf, 0)
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")

# 5x5 convolution with padding keeps 12, pool 6, 5x5 without padding 2, pool 1: one pixel is left for the linear layer.
SMALLEST_FIG_SIZE = 12


def require(condition: bool, what: str, given: object, allowed: str) -> None:
    """Raise ValueError "`what` is `given`; allowed: `allowed`" unless `condition` holds."""
    if not condition:
        raise ValueError(f"{what} is {given}; allowed: {allowed}")


def check_real(name: str, value: object, low: float, high: float, allowed: str) -> None:
    """`value` is a Python or numpy real number (no bool, no NaN) from low to high."""
    # The message is put together where it is needed only: `torch.compile` knows no repr of a number that may vary.
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= float(value) <= high:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def check_int(name: str, value: object, low: int) -> None:
    """`value` is an integer (no bool) of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < low:
        raise ValueError(f"{name} is {value!r}; allowed: an integer >= {low}")


def check_momentum(momentum: object, name: str = "momentum") -> None:
    """The weight of the old value: a number in [0, 1], or None (all batches weigh the same)."""
    if momentum is not None:
        check_real(name, momentum, 0.0, 1.0, "a number from 0 to 1 (the weight of the old value), or None")


def check_epsilon(name: str, epsilon: object, dtype: str = "float64") -> None:
    """The number added to the variance: finite, and not below the smallest normal number of the dtype computed in.

    (Below that it may count as 0, and a constant channel becomes 0 / 0.) `name` is what this wing calls it.
    """
    check_real(name, epsilon, SMALLEST_NORMAL[dtype], LARGEST, EPSILONS[dtype])


def check_initial_moving_var(value: object) -> None:
    """What a moving variance starts with: a finite number >= 0."""
    check_real("initial_moving_var", value, 0.0, LARGEST, "a finite number >= 0")


def check_platform(platform: object) -> None:
    """The name of a platform, whatever it is, as JAX's are plugins; or None."""
    require(isinstance(platform, str | None), "platform", repr(platform), "None, or a name such as 'cpu'")


def check_batch_norm(
    *,
    shape: Sequence[int],
    dtype: str,
    axis: object,
    per_channel: Mapping[str, tuple[Sequence[int], str]],
    mask: tuple[Sequence[int], str] | None,
    train: bool,
    momentum: object,
    num_batches_tracked: object,
    epsilon_name: str,
    epsilon: object,
    shards: int = 1,
    dtypes: Sequence[str] = FLOAT_DTYPES,
) -> tuple[int, ...]:
    """Everything `batch_norm` asks of its arguments.

    Args:
      shape: shape of x.
      dtype: name of x's dtype.
      axis: the channel axis of x, or several.
      per_channel: name -> (shape, dtype name) of the arguments with one value per channel.
      mask: (shape, dtype name), or None.
      train: whether statistics are taken from x.
      momentum: weight of the old value in the moving statistics, or None.
      num_batches_tracked: how many batches the moving statistics hold, or (shape, dtype name) of an array that says
        so; needed where momentum is None.
      epsilon_name: this wing's name of epsilon.
      epsilon: added to the variance.
      shards: over how many devices the batch is spread: every one holds a piece of this shape.
      dtypes: what x may be.

    Returns:
      The channel axes, from 0 on, ascending.

    Raises:
      ValueError: rank below 2; a dtype that is no float; a channel axis that x does not have; a wrong channel count;
        a mask of another dtype than bool or an integer, or not broadcastable to x; momentum outside [0, 1], or None
        without num_batches_tracked; epsilon not finite or below the smallest normal number of the dtype computed in;
        in training, fewer than two values per channel (the variance of one value says nothing).
    """
    if type(train).__name__ not in ("bool", "bool_"):
        raise ValueError(f"train is {train!r}; allowed: True or False")
    check_momentum(momentum)
    if momentum is None:
        check_number_of_batches(num_batches_tracked)
    widest = (
        "float64" if {"float64", "complex128"} & {dtype, *(given for _, given in per_channel.values())} else "float32"
    )
    check_epsilon(epsilon_name, epsilon, widest)
    check_rank(shape)
    if dtype not in dtypes:
        raise ValueError(f"the dtype of x is {dtype}; allowed: {', '.join(dtypes)}")
    axes = channel_axes(axis, len(shape))
    channel_shape = tuple(shape[a] for a in axes)
    channels = math.prod(channel_shape)
    # Messages are put together where they are needed: PyTorch calls this eagerly, for every batch.
    if channels < 1:
        raise ValueError(f"the number of channels of x is {channels} (shape {tuple(shape)}); allowed: 1 or more")
    for name, (given_shape, given_dtype) in per_channel.items():
        if tuple(given_shape) != channel_shape:
            allowed = f"{channel_shape}, one value for each channel of x, whose shape is {tuple(shape)}"
            raise ValueError(f"the shape of {name} is {tuple(given_shape)}; allowed: {allowed}")
        if given_dtype not in dtypes:
            raise ValueError(f"the dtype of {name} is {given_dtype}; allowed: {', '.join(dtypes)}")
    if mask is not None:
        check_mask(*mask, shape)
    if train and (values := math.prod(shape) // channels * shards) < 2:
        allowed = "2 or more in training: the variance of fewer says nothing"
        raise ValueError(f"the number of values per channel is {values} (shape {tuple(shape)}); allowed: {allowed}")
    return axes


def check_rank(shape: Sequence[int]) -> None:
    """The rank of x: a batch and channels at least."""
    if len(shape) < 2:
        given, allowed = f"{len(shape)} (shape {tuple(shape)})", "2 or more: a batch and channels"
        raise ValueError(f"the rank of x is {given}; allowed: {allowed}")


def channel_axes(axis: object, rank: int) -> tuple[int, ...]:
    """The channel axes from 0 on, ascending; `axis` is one or several, counted from the end where negative.

    Raises:
      ValueError: no integer, not an axis of an array of that rank, twice the same, none at all, or all of them.
    """
    if type(axis) is int and -rank <= axis < rank and rank > 1:
        return (axis % rank,)
    given: list[Any] = list(axis) if isinstance(axis, Sequence) else [axis]
    allowed = f"an axis of x, from {-rank} to {rank - 1}, or several"
    ints = [int(one) for one in given if type(one) is not bool and isinstance(one, numbers.Integral)]
    axes = tuple(sorted({one % rank for one in ints if -rank <= one < rank}))
    if not 0 < len(axes) == len(given):
        raise ValueError(f"axis is {axis!r}; allowed: {allowed}, each once")
    if len(axes) == rank:
        raise ValueError(f"axis is {axis!r}; allowed: {allowed}; one at least is left for the batch")
    return axes


def check_number_of_batches(given: object) -> None:
    """An integer >= 0, or an array of no dimension and an integer dtype."""
    if not isinstance(given, tuple):
        check_int("num_batches_tracked", given, 0)
    elif tuple(given[0]) != () or "int" not in given[1]:
        raise ValueError(f"num_batches_tracked is {given[1]} of shape {tuple(given[0])}; allowed: one integer")


def check_mask(mask_shape: Sequence[int], mask_dtype: str, shape: Sequence[int]) -> None:
    """The positions of x that count: bool or integers, in a shape that broadcasts to x's."""
    if mask_dtype != "bool" and "int" not in mask_dtype:
        raise ValueError(f"the dtype of mask is {mask_dtype}; allowed: bool or an integer")
    behind = shape[len(shape) - len(mask_shape) :]
    fits = len(mask_shape) <= len(shape) and all(m in (1, s) for m, s in zip(mask_shape, behind, strict=True))
    if not fits:
        allowed = f"broadcastable to {tuple(shape)}, the shape of x"
        raise ValueError(f"the shape of mask is {tuple(mask_shape)}; allowed: {allowed}")


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
