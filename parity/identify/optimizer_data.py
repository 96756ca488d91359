"""One side's response made ready for fitting, and what every fit needs of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.identify.optimizer_probe import Response, rounding
from parity.identify.optimizer_rules import Numbers, Shape, direction

# A side may compute in float32 inside (a schedule's rate; 1 - 0.999^t loses three digits there): tried in this order.
# Every known mistake changes some answer by more, since the questions are made to show it.
LOOSER = (1e-6, 1e-4)


class Rule(NamedTuple):
    """A rule that gives the response.

    Attributes:
      shape, numbers: see `optimizer_rules`.
      rate: what the direction is multiplied by at each step, [T]: the learning rate, and the corrections that are
        factors of a step.
      decay: what the parameter is multiplied by, beside, at each step, [T]: learning rate times decoupled decay.
      error: the largest deviation from the response, as in `optimizer_probe.disagreement`.
    """

    shape: Shape
    numbers: Numbers
    rate: NDArray
    decay: NDArray
    error: float


class Data(NamedTuple):
    """A response, its finite columns; all [T, K].

    Attributes:
      g, p, u: gradients, parameters and updates.
      weight: of a deviation, in a least squares fit.
      size: the largest update that an element has seen so far.
      slack: rounding of an update.
    """

    g: NDArray
    p: NDArray
    u: NDArray
    weight: NDArray
    size: NDArray
    slack: NDArray

    def columns(self, chosen: NDArray) -> Data:
        """Some elements only."""
        return Data(*(a[:, chosen] for a in self))

    def first(self, steps: int) -> Data:
        """The first steps only."""
        return Data(*(a[:steps] for a in self))


def data_of(response: Response) -> Data:
    """Weighs a response; elements that are not finite are left out."""
    g, p, u = response.gradients, response.parameters, response.updates
    finite = np.isfinite(u).all(0)
    g, p, u = g[:, finite], p[:, finite], u[:, finite]
    size = np.maximum.accumulate(np.abs(u), axis=0)
    slack = rounding(p, u)
    scale = size + slack * 1e9
    return Data(g, p, u, np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0), size, slack)


def deviation(data: Data, fitted: NDArray) -> float:
    """The largest difference from the response beyond rounding, relative to the element's size."""
    excess = np.maximum(np.abs(fitted - data.u) - data.slack, 0)
    relative = np.divide(excess, data.size, out=np.where(excess > 0, np.inf, 0.0), where=data.size > 0)
    return float(relative.max(initial=0.0))


def best_rate(data: Data, d: NDArray) -> NDArray:
    """The rate of every step that fits best, without decay."""
    dw, uw = d * data.weight, data.u * data.weight
    power = (dw * dw).sum(1)
    return -np.divide((dw * uw).sum(1), power, out=np.zeros_like(power), where=power > 0)


def rate_and_decay(data: Data, d: NDArray) -> tuple[NDArray, NDArray]:
    """Both, of every step: u = -rate d - decay p."""
    dw, pw, uw = d * data.weight, data.p * data.weight, data.u * data.weight
    dd = (dw * dw).sum(1)
    along = np.divide((dw * pw).sum(1), dd, out=np.zeros_like(dd), where=dd > 0)
    rest = pw - along[:, None] * dw
    power = (rest * rest).sum(1)
    decay = np.divide((rest * uw).sum(1), power, out=np.zeros_like(dd), where=power > 0)
    free = uw - decay[:, None] * pw
    rate = np.divide((dw * free).sum(1), dd, out=np.zeros_like(dd), where=dd > 0)
    return -rate, -decay


def fitted_rule(data: Data, shape: Shape, numbers: Numbers) -> Rule:
    """The rule with the rates and decoupled decays that fit best."""
    d = direction(shape, numbers, data.g, data.p)
    rate, decay = rate_and_decay(data, d)
    return Rule(shape, numbers, rate, decay, deviation(data, -rate[:, None] * d - decay[:, None] * data.p))
