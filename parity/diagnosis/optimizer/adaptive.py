"""Adaptive update rules: nonlinear least squares from starts that the first step gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.optimizer.rules import (
    LOOSER,
    Data,
    Numbers,
    Rule,
    Shape,
    best_rate,
    direction,
    fitted_rule,
    rate_and_decay,
)

STEPS_TO_FIT = 8
BEST_STARTS = 2

_LOG = ("b1", "b2", "epsilon", "epsilon_root", "initial", "l2")


class _Candidate(NamedTuple):
    shape: Shape
    free: tuple[str, ...]


def candidates() -> Iterator[_Candidate]:
    """The usual ones first."""
    epsilons = {"outside": ("epsilon",), "inside": ("epsilon_root",), "both": ("epsilon", "epsilon_root")}

    def shapes(
        free: tuple[str, ...], placements: Sequence[str], second: str = "ema", **options
    ) -> Iterator[_Candidate]:
        for placement in placements:
            yield _Candidate(Shape(second, placement, **options), free + epsilons[placement])

    single = ("outside", "inside")
    yield from shapes(("b2",), single)  # RMSprop
    yield from shapes((), single[:1], "sum")
    yield from shapes(("initial",), single[:1], "sum")  # Adagrad; an epsilon inside the root is an initial value
    for corrected in (True, False):
        yield from shapes(("b1", "b2"), single, corrected=corrected)
    for nesterov, corrected in product(("optax", "plain", "torch"), (True, False)):
        yield from shapes(("b1", "b2"), single, corrected=corrected, nesterov=nesterov)
    for corrected in (True, False):
        yield from shapes(("b1", "b2"), ("both",), corrected=corrected)
    for centred, trace in ((True, ""), (False, "plain"), (True, "plain"), (False, "nesterov"), (True, "nesterov")):
        free = ("b2", "beta") if trace else ("b2",)
        yield from shapes(free, single, centred=centred, trace=trace)
    yield from shapes(("b2", "initial"), single)
    for maximum in ("before", "after"):
        yield from shapes(("b1", "b2"), single, corrected=True, maximum=maximum)


def fit_adaptive(data: Data, tolerance: float) -> list[Rule]:
    """The first shape that fits to the tolerance; if there is none, all that come close."""
    found: list[Rule] = []
    short = data.first(STEPS_TO_FIT)
    for shape, free in candidates():
        numbers = _solve(short, shape, free, tolerance)
        if numbers is None:
            continue
        rule = fitted_rule(data, shape, numbers)
        found.append(rule)
        if rule.error <= tolerance:
            # The same with the correction at the other place, if it cannot be told apart.
            twin = shape._replace(corrected=not shape.corrected)
            numbers = _solve(short, twin, free, tolerance) if shape.second == "ema" else None
            return [rule, *([fitted_rule(data, twin, numbers)] if numbers else [])]
    return found


_GRID: dict[str, Sequence[float]] = {
    "b1": (0.9, 0.5, 0.8, 0.95, 0.99),
    "b2": (0.999, 0.9, 0.95, 0.99, 0.9999),
    "beta": (0.9, 0.5, 0.8, 0.99),
    "initial": (0.0,),
}
# Where the first step says nothing (a rate that starts at 0).
_ANY_EPSILON = [10.0**power for power in range(-10, -1)]


def _starts(data: Data, shape: Shape, free: tuple[str, ...]) -> Iterator[Numbers]:
    """From the first step: |g / u| is a |g| + c with epsilon outside the root, and sqrt(a^2 g^2 + c^2) inside.

    c / a is epsilon (or its root) where v is corrected for its bias; where it is not, v is (1 - b2) g^2 there.
    """
    others = tuple(name for name in free if not name.startswith("epsilon"))
    knees: tuple[list[float], list[float]] = (_ANY_EPSILON, _ANY_EPSILON)
    used = data.u[0] != 0
    if used.sum() > 2:
        y, g = np.abs(data.g[0] / np.where(used, data.u[0], 1))[used], np.abs(data.g[0])[used]
        knees = ([_knee(y, g)], [_knee(y**2, g**2) ** 0.5])
    for values in product(*(_GRID[name] for name in others)):
        given: dict[str, Any] = dict(zip(others, values, strict=True))
        start = Numbers(**given)
        unit = (1 - start.b2) ** 0.5 if shape.second == "ema" and not shape.corrected else 1.0
        for outside, inside in zip(*knees, strict=True):
            if "initial" in free:
                v = (unit * inside) ** 2
                epsilons = [(v**0.5 * part, v * (part if shape.epsilon == "inside" else 0.0)) for part in (1e-6, 1e-2)]
                for epsilon, root in epsilons:
                    filled = start._replace(initial=v, epsilon=epsilon if "epsilon" in free else 0.0)
                    yield filled._replace(epsilon_root=root if "epsilon_root" in free else 0.0)
            elif shape.epsilon == "both":
                for part in (1e-3, 0.1, 0.5, 0.9, 0.999):
                    whole = unit * outside
                    yield start._replace(epsilon=part * whole, epsilon_root=((1 - part) * whole) ** 2)
            elif shape.epsilon == "inside":
                yield start._replace(epsilon_root=(unit * inside) ** 2)
            else:
                yield start._replace(epsilon=unit * outside)


def _knee(y: NDArray, x: NDArray) -> float:
    """c / a of y = a x + c, both at least 0, by relative least squares."""
    a, c = np.linalg.lstsq(np.stack([x / y, 1 / y], 1), np.ones_like(y), rcond=None)[0]
    return float(np.clip(c / a, 1e-30, 1e30)) if a > 0 else 1e-30


def _solve(data: Data, shape: Shape, free: tuple[str, ...], tolerance: float) -> Numbers | None:
    """The numbers of a shape, first where the parameter is 0, then with what decay does; None if none come close."""
    plain = data.columns((data.p == 0).all(0))

    def residual(numbers: Numbers) -> NDArray:
        d = direction(shape, numbers, plain.g, plain.p)
        return ((best_rate(plain, d)[:, None] * d + plain.u) * plain.weight).ravel()

    starts = sorted(_starts(plain, shape, free), key=lambda start: float(np.square(residual(start)).sum()))
    best, least = None, np.inf
    for start in starts[:BEST_STARTS]:
        numbers = _minimise(residual, start, free)
        error = float(np.abs(residual(numbers)).max(initial=0.0))
        if error < least:
            best, least = numbers, error
        if least <= 0.1 * tolerance or error > 1:
            break
    if best is None or least > LOOSER[-1]:
        return None
    without = fitted_rule(data, shape, best)
    if without.error <= max(tolerance, 3 * least):
        return best
    coupled = _with_l2(data, shape, best, free)
    return coupled if fitted_rule(data, shape, coupled).error < 0.1 * without.error else best


def _with_l2(data: Data, shape: Shape, numbers: Numbers, free: tuple[str, ...]) -> Numbers:
    def residual(numbers: Numbers) -> NDArray:
        d = direction(shape, numbers, data.g, data.p)
        rate, decay = rate_and_decay(data, d)
        return ((rate[:, None] * d + decay[:, None] * data.p + data.u) * data.weight).ravel()

    tried = [numbers._replace(l2=float(l2)) for l2 in np.logspace(-8, 1, 28)]
    numbers = min(tried, key=lambda numbers: float(np.square(residual(numbers)).sum()))
    return _minimise(residual, _minimise(residual, numbers, ("l2",)), (*free, "l2"))


def _minimise(residual: Callable[[Numbers], NDArray], start: Numbers, free: tuple[str, ...]) -> Numbers:
    """Levenberg and Marquardt's least squares, over logarithms (of 1 - b for the averages' weights)."""

    def pack(numbers: Numbers) -> list[float]:
        values = [(name, getattr(numbers, name)) for name in free]
        return [_log(1 - v if name in ("b1", "b2") else v) if name in _LOG else v for name, v in values]

    def unpack(theta: NDArray) -> Numbers:
        values: dict[str, Any] = {}
        for name, v in zip(free, np.clip(theta, -80, 5), strict=True):
            value = float(np.exp(v)) if name in _LOG else float(np.clip(v, -1.5, 1.5))
            values[name] = 1 - value if name in ("b1", "b2") else value
        for name in ("b1", "b2"):  # an average has weights between 0 and 1
            if name in values:
                values[name] = float(np.clip(values[name], 0, 1 - 1e-6))
        return start._replace(**values)

    from scipy.optimize import least_squares  # late: it takes a third of a second, and few comparisons need it

    def given(theta: NDArray) -> NDArray:
        return residual(unpack(theta))

    # A right shape converges fast, to nothing; most shapes are wrong, and stop at what they cannot explain.
    theta = np.array(pack(start))
    if len(given(theta)) < len(theta):
        return start  # fewer numbers than unknowns: any would do
    error = float(np.abs(given(theta)).max(initial=0.0))
    stalled = 0
    for _ in range(8):
        theta = least_squares(given, theta, method="lm", xtol=1e-15, ftol=1e-15, max_nfev=6).x
        before, error = error, float(np.abs(given(theta)).max(initial=0.0))
        stalled += error > 0.3 * before
        if error < 1e-13 or stalled == 2:
            break
    return unpack(theta)


def _log(v: float) -> float:
    return float(np.log(max(v, 1e-30)))
