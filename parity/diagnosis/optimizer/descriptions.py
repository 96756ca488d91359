"""A fitted update rule in words: what the factor of a step is made of, and what the numbers are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.optimizer.rules import LOOSER, Rule
from parity.records.answers import Response

# An epsilon below these is smaller than rounding at the smallest gradient asked, 1e-9.
# In Adagrad an epsilon inside the root and the accumulator's initial value are one number: this small, an epsilon.
SMALL_ACCUMULATOR = 1e-5
NO_EPSILON, NO_EPSILON_ROOT = 1e-17, 1e-26
# Of the root of one inside: less of one outside is what rounding leaves of the fit.
NO_EPSILON_BESIDE = 1e-7


class Description(NamedTuple):
    """An update rule in words and numbers.

    Attributes:
      algorithm: "SGD", "Adam", "RMSprop", "Adagrad", "AMSGrad".
      lr: learning rate of every step, [T].
      values: its other hyperparameters by name, as far as they have a meaning for it.
      epsilon: (where, value): "outside" the root; "inside"; "before the bias correction"; "both".
      first_corrected, second_corrected: whether the averages are corrected for their bias; None: it has none.
      l2: decay added to the gradient.
      decay: decoupled decay, of every step, [T], in multiples of lr.
      dampening: (1 - weight of a new gradient in the momentum, whether the first one is damped too).
      nesterov: "" or the kind of look-ahead.
      tolerance: up to which learning rates count as equal, relative; optax makes float32 rates from a step's number.
      precision: the same for the other numbers.
    """

    algorithm: str
    lr: NDArray
    values: dict[str, float]
    epsilon: tuple[str, float]
    first_corrected: bool | None
    second_corrected: bool | None
    l2: float
    decay: NDArray
    dampening: tuple[float, bool]
    nesterov: str
    tolerance: float
    precision: float


def readings(rules: list[Rule], response: Response | None) -> list[Description]:
    """All descriptions that give the same numbers, the usual one first."""
    return [reading for rule in rules for reading in _readings_of(rule, response)]


def _readings_of(rule: Rule, response: Response | None) -> Iterator[Description]:
    shape, n = rule.shape, rule.numbers
    t = np.arange(1, len(rule.rate) + 1)
    tolerance = max(LOOSER[0], 10 * rule.error)
    if not shape.second:
        yield from _linear_readings(rule, response, tolerance)
        return
    has_first, has_second = abs(n.b1) > 1e-3, shape.second == "ema"
    first = 1 / (1 - n.b1**t) if has_first else np.ones(len(t))
    second = np.sqrt(1 - n.b2**t) if has_second and not shape.corrected else np.ones(len(t))
    firsts: tuple[bool | None, ...] = (True, False) if has_first else (None,)
    seconds: tuple[bool | None, ...] = (True,) if shape.corrected else (False, True) if has_second else (None,)
    for second_corrected in seconds:
        for first_corrected in firsts:
            factor = (first if first_corrected else 1.0) * (second if second_corrected else 1.0)
            algorithm = _algorithm(rule, has_first, bool(second_corrected))
            yield _describe(rule, algorithm, factor, first_corrected, second_corrected, tolerance)


def _precision(rule: Rule) -> float:
    return max(1e-8, 300 * rule.error)


def _algorithm(rule: Rule, has_first: bool, second_corrected: bool) -> str:
    if rule.shape.second == "sum":
        return "Adagrad"
    if rule.shape.maximum:
        return "AMSGrad"
    return "Adam" if has_first or second_corrected else "RMSprop"


def _describe(rule: Rule, algorithm: str, factor, first, second, tolerance: float) -> Description:
    shape, n = rule.shape, rule.numbers
    lr = rule.rate / factor
    values = {
        "Adam": {"beta1": n.b1, "beta2": n.b2},
        "AMSGrad": {"beta1": n.b1, "beta2": n.b2, "maximum before correction": float(shape.maximum == "before")},
        "RMSprop": {"decay": n.b2, "initial": n.initial, "centred": float(shape.centred)},
        "Adagrad": {"initial accumulator": n.initial if n.initial > SMALL_ACCUMULATOR else 0.0},
    }[algorithm]
    if shape.trace:
        values |= {"momentum": n.beta}
    epsilon = _epsilon(rule, bool(second))
    nesterov = shape.nesterov or ("momentum" if shape.trace == "nesterov" else "")
    decay = _per_rate(rule.decay, lr, max(1e-9, 0.1 * rule.error))
    return Description(
        algorithm, lr, values, epsilon, first, second, n.l2, decay, (0.0, False), nesterov, tolerance, _precision(rule)
    )


def _epsilon(rule: Rule, second_corrected: bool) -> tuple[str, float]:
    outside, inside = rule.numbers.epsilon, rule.numbers.epsilon_root
    if rule.shape.second == "sum" and rule.numbers.initial <= SMALL_ACCUMULATOR:
        inside = rule.numbers.initial
    outside, inside = (outside if outside > NO_EPSILON else 0.0), (inside if inside > NO_EPSILON_ROOT else 0.0)
    if outside > NO_EPSILON_BESIDE * inside**0.5 and inside:
        return f"{text(inside)} inside the root and outside", outside
    late = rule.shape.second == "ema" and second_corrected and not rule.shape.corrected
    if inside:
        return "inside the root" + (", before the bias correction" if late else ""), inside
    return ("outside, before the bias correction" if late and outside else "outside the root"), outside


def _per_rate(decay: NDArray, lr: NDArray, least: float) -> NDArray:
    """Decoupled decay in multiples of the learning rate; 0 below rounding."""
    ratio = np.divide(decay, lr, out=np.zeros_like(decay), where=np.abs(lr) > 1e-6 * np.abs(lr).max(initial=0.0))
    return np.where(np.abs(ratio) > least, ratio, 0.0)


def _linear_readings(rule: Rule, response: Response | None, tolerance: float) -> Iterator[Description]:
    n = rule.numbers
    values = {"momentum": n.beta if abs(n.beta) > 1e-6 else 0.0}
    least = max(1e-10, rule.error)
    l2, beta = (n.l2 if abs(n.l2) > least else 0.0), values["momentum"]
    look = "momentum" if rule.shape.nesterov and beta else ""
    dampening = (n.dampening, n.first_damped) if beta and abs(n.dampening) > 1e-6 else (0.0, False)

    def describe(lr: NDArray, dampening: tuple[float, bool], corrected: bool | None = None) -> Description:
        decay = _per_rate(rule.decay, lr, least)
        return Description(
            "SGD", lr, values, ("", 0.0), corrected, None, l2, decay, dampening, look, tolerance, _precision(rule)
        )

    if not beta or dampening[0]:
        yield describe(rule.rate, dampening)
        return
    # All gradients damped alike is a factor: only the buffer itself tells it from a learning rate.
    damped = 1 - beta
    buffer = None if response is None else response.buffer
    if buffer is not None and abs(buffer - damped) < 1e-6:
        yield describe(rule.rate / damped, (beta, True))
        corrected = rule.rate / damped * (1 - beta ** np.arange(1, len(rule.rate) + 1))
        yield describe(corrected, (beta, True), True)
    else:
        yield describe(rule.rate, dampening)


def choose(
    first: list[Description], second: list[Description], rates: NDArray | None
) -> tuple[Description, Description]:
    """Of equal readings the simplest: PyTorch's own learning rate, then a constant one, then the other side's way."""

    def constant(d: Description) -> bool:
        return bool(np.allclose(d.lr, d.lr[0], rtol=d.tolerance, atol=0))

    def alike(a: Description, b: Description) -> int:
        return sum(
            (
                a.algorithm == b.algorithm,
                a.first_corrected == b.first_corrected,
                a.second_corrected == b.second_corrected,
                a.epsilon[0] == b.epsilon[0],
            )
        )

    def proportional(a: Description, b: Description) -> bool:
        used = np.abs(a.lr) > 1e-9 * np.abs(a.lr).max()
        ratio = np.divide(b.lr, a.lr, out=np.ones_like(a.lr), where=used)[used]
        still = np.abs(b.lr[~used]) <= 1e-9 * np.abs(b.lr).max()
        return bool(np.allclose(ratio, ratio[:1], rtol=max(a.tolerance, b.tolerance), atol=0) and still.all())

    def named(d: Description) -> bool:
        return rates is not None and bool(np.allclose(d.lr, rates, rtol=d.tolerance, atol=0))

    pairs = [(a, b) for a in first for b in second]

    def merit(pair: tuple[Description, Description]) -> tuple[int, ...]:
        a, b = pair
        return named(a), constant(a) + constant(b), proportional(a, b), alike(a, b)

    return max(pairs, key=merit)  # the first of the best


def describe_in_words(d: Description) -> str:
    """Algorithm(lr=..., ...)."""
    values = {"lr": d.lr[0], **d.values}
    if d.epsilon[1]:
        values["epsilon"] = d.epsilon[1]
    return f"{d.algorithm}({', '.join(f'{k}={text(v)}' for k, v in values.items())})"


def series(values: NDArray) -> str:
    """One value if they are all the same, otherwise the first four."""
    if len(values) and np.allclose(values, values[0], rtol=1e-5, atol=0):
        return text(values[0])
    return ", ".join(text(v) for v in values[:4]) + (", ..." if len(values) > 4 else "")


def text(value: float) -> str:
    """Four digits."""
    return f"{float(value):.4g}"
