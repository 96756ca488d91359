"""What the two modules of peers share: the words in which a peer is told what to compute, and says what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-5
MODES = ("forward", "forward+backward", "eval")


class Start(NamedTuple):
    """What a peer begins with, float32: gamma, beta and the moving statistics [C]; momentum is the old value's weight.

    `shape` is x's, [N, C, ...].
    """

    shape: tuple[int, ...]
    gamma: NDArray
    beta: NDArray
    mean: NDArray
    var: NDArray
    momentum: float


class Layer(NamedTuple):
    """A peer's batch norm as functions of its own trees of parameters and statistics.

    Attributes:
      train: (params, stats, x) -> (y, new stats).
      predict: (params, stats, x) -> y.
      params: in the peer's own form.
      stats: in the peer's own form.
      read_params: a tree like params -> (gamma, beta).
      read_stats: a tree like stats -> (mean, var).
      channel_axis: of x and y.
      unbiased: the peer moves its variance with var * m / (m - 1).
    """

    train: Callable[[Any, Any, Any], tuple[Any, Any]]
    predict: Callable[[Any, Any, Any], Any]
    params: Any
    stats: Any
    read_params: Callable[[Any], tuple[Any, Any]]
    read_stats: Callable[[Any], tuple[Any, Any]]
    channel_axis: int
    unbiased: bool = False


class Result(NamedTuple):
    """y, the new statistics and the gradients of sum(y * dy), from one training step; y and dx are [N, C, ...]."""

    y: NDArray
    mean: NDArray
    var: NDArray
    dx: NDArray
    dgamma: NDArray
    dbeta: NDArray


class Peer(NamedTuple):
    """`make` builds the layer; `module` is what must be installed for it, by pip's extra `extra` of this project."""

    make: Callable[[Start], Layer]
    module: str
    extra: str = "bench"


class Truth(NamedTuple):
    """What every peer has to compute: `result` of a training step, and y in `prediction`."""

    result: Result
    prediction: NDArray


def definition(start: Start, x: NDArray, dy: NDArray) -> Truth:
    """The formula in float64: truth enough at N(0, 1). The moving variance is from the biased one."""
    axes, wide = tuple(a for a in range(x.ndim) if a != 1), (-1, *[1] * (x.ndim - 2))
    gamma, beta, mean, var = (v.astype(np.float64).reshape(wide) for v in start[1:5])
    mu, sigma2 = x.mean(axes, np.float64, keepdims=True), x.var(axes, np.float64, keepdims=True)
    r = 1 / np.sqrt(sigma2 + EPSILON)
    x_hat = (x - mu) * r
    mean_dy, along = dy.mean(axes, np.float64, keepdims=True), (dy * x_hat).mean(axes, keepdims=True)
    m = x.size // x.shape[1]
    result = Result(
        y=gamma * x_hat + beta,
        mean=start.momentum * start.mean + (1 - start.momentum) * mu.reshape(-1),
        var=start.momentum * start.var + (1 - start.momentum) * sigma2.reshape(-1),
        dx=gamma * r * (dy - mean_dy - x_hat * along),
        dgamma=m * along.reshape(-1),
        dbeta=m * mean_dy.reshape(-1),
    )
    return Truth(result, gamma * (x - mean) / np.sqrt(var + EPSILON) + beta)


def check(name: str, start: Start, truth: Truth, layer: Layer, given: Result, prediction: NDArray) -> None:
    """Raise ArithmeticError unless a peer has computed the definition, to what float32 makes of N(0, 1)."""
    m = math.prod(start.shape) // start.shape[1]
    if layer.unbiased:
        old = start.momentum * start.var
        given = given._replace(var=old + (given.var - old) * (m - 1) / m)
    # Sums of m terms of either sign are sqrt(m) in size and in rounding.
    sizes = {"dgamma": math.sqrt(m), "dbeta": math.sqrt(m)}
    pairs = zip(
        (*Result._fields, "y in prediction"), (*given, prediction), (*truth.result, truth.prediction), strict=True
    )
    for what, a, b in pairs:
        worst = np.abs(a - b).max()
        if not worst <= 1e-4 * (sizes.get(what, 1.0) + np.abs(b).max()):
            raise ArithmeticError(f"{name} does not compute batch norm at {start.shape}: {what} is off by {worst:.1e}")
