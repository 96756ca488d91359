"""Inputs at which a batch norm in float32 goes wrong, each a function of a seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHANNELS = 4
SHAPE = (64, CHANNELS, 14, 14)


class HardInput(NamedTuple):
    """x and dy [N, C, ...], gamma and beta [C]."""

    x: NDArray
    gamma: NDArray
    beta: NDArray
    dy: NDArray


def normal(
    seed: int, *, shape: tuple[int, ...] = SHAPE, mean: ArrayLike = 0.0, std: ArrayLike = 1.0, with_beta: bool = True
) -> HardInput:
    """Normal x with the given mean and std (one number, or one per channel); gamma, beta and dy are ordinary."""
    rng = np.random.default_rng(seed)
    wide = (-1, *[1] * (len(shape) - 2))
    x = rng.normal(size=shape) * np.reshape(std, wide) + np.reshape(mean, wide)
    gamma, beta, dy = rng.uniform(0.5, 2, shape[1]), rng.normal(size=shape[1]), rng.normal(size=shape)
    return HardInput(*(v.astype(np.float32) for v in (x, gamma, beta if with_beta else 0 * beta, dy)))


def constant(seed: int, *, values: ArrayLike = (0.1, 1234.567, -1e6, 3e-5)) -> HardInput:
    """Every channel one value, none of which its mean, added up in float32, need give back."""
    return normal(seed, mean=values, std=0.0)


def outlier(seed: int) -> HardInput:
    """N(0, 1) but for one value of 1e6 in each channel."""
    given = normal(seed)
    for channel, example in enumerate(np.random.default_rng(seed + 1).integers(0, SHAPE[0], CHANNELS)):
        given.x[example, channel, 3, 3] = 1e6
    return given


def one_ulp(seed: int, *, values: ArrayLike = (1.0, 1234.567, -1e6, 3e-5)) -> HardInput:
    """Two examples, which differ in the last bit."""
    given = normal(seed, shape=(2, CHANNELS), mean=values, std=0.0)
    given.x[1] = np.nextafter(given.x[0], np.float32(np.inf))
    return given


def nan_in_one(seed: int) -> HardInput:
    """N(0, 1) but for one NaN in channel 1: the other channels must not notice."""
    given = normal(seed)
    given.x[5, 1, 3, 3] = np.nan
    return given


HARD_INPUTS: dict[str, Callable[[int], HardInput]] = {
    "N(0, 1)": normal,
    "mean 1e2, std 1e-3": partial(normal, mean=1e2, std=1e-3),
    "mean 1e4, std 1": partial(normal, mean=1e4),
    "mean 1e6, std 0.1": partial(normal, mean=1e6, std=0.1),
    "mean -1e5, std 1e-2 to 1e4": partial(normal, mean=-1e5, std=(1e-2, 1.0, 1e2, 1e4)),
    "constant": constant,
    "zero": partial(constant, values=0.0),
    "one outlier of 1e6": outlier,
    "m = 2, one ulp apart": one_ulp,
    "scale 1e-20, beta 0": partial(normal, std=1e-20, with_beta=False),
    "a million rows, mean 1000": partial(normal, shape=(1_000_000, CHANNELS), mean=1e3),
    "the same in rank 4": partial(normal, shape=(1000, CHANNELS, 25, 40), mean=1e3),
    "NaN in one channel": nan_in_one,
}
# Where y is beta, whatever its size.
CONSTANT = ("constant", "zero")
