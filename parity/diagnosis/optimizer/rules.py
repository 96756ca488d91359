"""Which update rule gives these updates? SGD with momentum, Adam, RMSprop and Adagrad, each with all its choices.

    h = g + l2 p                                            (L2: decay added to the gradient)
    linear:    b <- beta b + (1 - dampening) h;  d = b, or h + beta b (Nesterov)
    adaptive:  m <- b1 m + (1 - b1) h;  v <- b2 v + (1 - b2) h^2, or v <- v + h^2 (Adagrad)
               d = m / (sqrt(v) + eps), each corrected for its bias or not; m Nesterov's, v centred, d with momentum
    update  = -lr (d + decay p)                             (decoupled decay)

lr is solved at every step by itself, so that any schedule fits; what else there is must hold for all steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.records.answers import Response, rounding


class Shape(NamedTuple):
    """A rule's choices that are no numbers.

    Attributes:
      second: "" (linear), "ema" or "sum".
      epsilon: "outside" of the root, "inside", or "both".
      corrected: v is corrected for its bias before epsilon is added.
      nesterov: "" none; "plain" looks ahead with the uncorrected average; "optax" and "torch" as their NAdam do.
      centred: v - (the gradient's average)^2 stands for v.
      trace: "" or "plain" or "nesterov": momentum over the finished direction.
      inside: the learning rate is multiplied in before the momentum.
      maximum: "" or v is the largest so far (AMSGrad), taken "before" or "after" its correction.
    """

    second: str = ""
    epsilon: str = "outside"
    corrected: bool = False
    nesterov: str = ""
    centred: bool = False
    trace: str = ""
    inside: bool = False
    maximum: str = ""


class Numbers(NamedTuple):
    """A rule's hyperparameters; those without a meaning for its shape stay as they are here."""

    b1: float = 0.0
    b2: float = 0.0
    epsilon: float = 0.0  # outside the root
    epsilon_root: float = 0.0  # inside
    l2: float = 0.0
    initial: float = 0.0  # v before the first step
    beta: float = 0.0
    dampening: float = 0.0
    first_damped: bool = False


def direction(shape: Shape, numbers: Numbers, gradients: NDArray, parameters: NDArray) -> NDArray:
    """d of all steps, before learning rate, correction of m and decoupled decay; gradients, parameters, d: [T, K].

    The correction of m, 1 / (1 - b1^t), is a factor of a step like the learning rate: it is left to that.
    """
    h = gradients + numbers.l2 * parameters
    return _linear(shape, numbers, h) if not shape.second else _traced(shape, numbers, _adaptive(shape, numbers, h))


def _linear(shape: Shape, n: Numbers, h: NDArray) -> NDArray:
    out, buffer = np.empty_like(h), np.zeros_like(h[0])
    for t, now in enumerate(h):
        damping = 1 - n.dampening if t or n.first_damped else 1.0
        buffer = n.beta * buffer + damping * now
        out[t] = now + n.beta * buffer if shape.nesterov else buffer
    return out


def _traced(shape: Shape, n: Numbers, d: NDArray) -> NDArray:
    if not shape.trace:
        return d
    out, buffer = np.empty_like(d), np.zeros_like(d[0])
    for t, now in enumerate(d):
        buffer = n.beta * buffer + now
        out[t] = now + n.beta * buffer if shape.trace == "nesterov" else buffer
    return out


TORCH_NADAM_DECAY = 0.004


def _adaptive(shape: Shape, n: Numbers, h: NDArray) -> NDArray:
    out, m, mean = np.empty_like(h), np.zeros_like(h[0]), np.zeros_like(h[0])
    v = np.full_like(h[0], n.initial)
    largest = np.zeros_like(v)
    product = 1.0
    for t, now in enumerate(h, 1):
        m = n.b1 * m + (1 - n.b1) * now
        v = v + now**2 if shape.second == "sum" else n.b2 * v + (1 - n.b2) * now**2
        seen = v
        if shape.centred:
            mean = n.b2 * mean + (1 - n.b2) * now
            # Rounding may make it negative where a gradient stays as it is.
            seen = np.maximum(v - mean**2, 0)
        if shape.maximum == "before":
            seen = largest = np.maximum(largest, seen)
        if shape.corrected:
            seen = seen / (1 - n.b2**t)
        if shape.maximum == "after":
            seen = largest = np.maximum(largest, seen)
        root = np.sqrt(seen + n.epsilon_root) + n.epsilon
        if shape.nesterov == "optax":
            ahead = n.b1 * m * (1 - n.b1**t) / (1 - n.b1 ** (t + 1)) + (1 - n.b1) * now
        elif shape.nesterov == "plain":
            ahead = n.b1 * m + (1 - n.b1) * now
        elif shape.nesterov == "torch":
            mu, after = (n.b1 * (1 - 0.5 * 0.96 ** (s * TORCH_NADAM_DECAY)) for s in (t, t + 1))
            product *= mu
            # PyTorch's factors of a step, times 1 - b1^t: as in the others, that correction is left to the rate.
            ahead = (1 - n.b1**t) * ((1 - mu) / (1 - product) * now + after / (1 - product * after) * m)
        else:
            ahead = m
        out[t - 1] = np.divide(ahead, root, out=np.zeros_like(ahead), where=root > 0)
    return out


# A side may compute in float32 inside (a schedule's rate; 1 - 0.999^t loses three digits there): tried in this order.
# Every known mistake changes some answer by more, since the questions are made to show it.
LOOSER = (1e-6, 1e-4)


class Rule(NamedTuple):
    """A rule that gives the response.

    Attributes:
      shape, numbers: see `rules`.
      rate: what the direction is multiplied by at each step, [T]: the learning rate, and the corrections that are
        factors of a step.
      decay: what the parameter is multiplied by, beside, at each step, [T]: learning rate times decoupled decay.
      error: the largest deviation from the response, as in `answers.disagreement`.
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
