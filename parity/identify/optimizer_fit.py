"""Fits the update rules of `optimizer_rules` to one side's response, and solves their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from parity.identify.optimizer_probe import Response, rounding
from parity.identify.optimizer_rules import Numbers, Shape, direction

# A side may compute in float32 inside (a schedule's rate; 1 - 0.999^t loses three digits there): tried in this order.
# Every known mistake changes some answer by more, since the questions are made to show it.
LOOSER = (1e-6, 1e-4)
STEPS_TO_FIT = 8
BEST_STARTS = 2


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


class _Data(NamedTuple):
    g: NDArray
    p: NDArray
    u: NDArray
    weight: NDArray
    size: NDArray
    slack: NDArray

    def columns(self, chosen: NDArray) -> _Data:
        return _Data(*(a[:, chosen] for a in self))

    def first(self, steps: int) -> _Data:
        return _Data(*(a[:steps] for a in self))


def fit(response: Response, tolerance: float, known: Sequence[Rule] = (), only_known: bool = False) -> list[Rule]:
    """All rules that give the response, the simplest first; [] if none does.

    Two rules may give the same: where epsilon is too small to show, so is whether v was corrected before it was added.

    Args:
      response: of one side.
      tolerance: largest error that counts as rounding.
      known: rules that other tensors follow, tried first.
      only_known: no others.
    """
    data = _data(response)
    again = [_again(data, rule) for rule in known]
    if any(rule.error <= tolerance for rule in again):
        return [rule for rule in again if rule.error <= tolerance]
    if only_known:
        return []
    rules = _fit_linear(data)
    if not rules or rules[0].error > tolerance:
        rules += _fit_adaptive(data, tolerance)
    for allowed in (tolerance, *LOOSER):
        fitting = [rule for rule in rules if rule.error <= allowed]
        if fitting:
            return fitting
    return []


def adopt(response: Response, rule: Rule, other: Rule, tolerance: float) -> Rule:
    """The same rule with the other side's numbers where the response does not show a difference."""
    data = _data(response)
    for name in Numbers._fields:
        value = getattr(other.numbers, name)
        if value != getattr(rule.numbers, name):
            tried = _again(data, rule._replace(numbers=rule.numbers._replace(**{name: value})))
            rule = tried if tried.error <= max(10 * tolerance, 2 * rule.error) else rule
    return rule


def _again(data: _Data, rule: Rule) -> Rule:
    if rule.shape.second:
        return _fitted(data, rule.shape, rule.numbers)
    return _with_linear_decay(data, rule.shape, rule.numbers)


def _data(response: Response) -> _Data:
    g, p, u = response.gradients, response.parameters, response.updates
    finite = np.isfinite(u).all(0)
    g, p, u = g[:, finite], p[:, finite], u[:, finite]
    size = np.maximum.accumulate(np.abs(u), axis=0)
    slack = rounding(p, u)
    scale = size + slack * 1e9
    return _Data(g, p, u, np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0), size, slack)


def _deviation(data: _Data, fitted: NDArray) -> float:
    excess = np.maximum(np.abs(fitted - data.u) - data.slack, 0)
    relative = np.divide(excess, data.size, out=np.where(excess > 0, np.inf, 0.0), where=data.size > 0)
    return float(relative.max(initial=0.0))


def _rate(data: _Data, d: NDArray) -> NDArray:
    """The rate of every step that fits best, without decay."""
    dw, uw = d * data.weight, data.u * data.weight
    power = (dw * dw).sum(1)
    return -np.divide((dw * uw).sum(1), power, out=np.zeros_like(power), where=power > 0)


def _rate_and_decay(data: _Data, d: NDArray) -> tuple[NDArray, NDArray]:
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


def _fitted(data: _Data, shape: Shape, numbers: Numbers) -> Rule:
    d = direction(shape, numbers, data.g, data.p)
    rate, decay = _rate_and_decay(data, d)
    return Rule(shape, numbers, rate, decay, _deviation(data, -rate[:, None] * d - decay[:, None] * data.p))


# Linear rules: SGD and its momentum, in closed form.


def _fit_linear(data: _Data) -> list[Rule]:
    """From the response to each gradient so far: update_t = sum_k A[t, k] g_k where the parameter is 0."""
    plain = data.columns((data.p == 0).all(0))
    if plain.u.shape[1] < 4 or len(plain.u) < 4:
        return []
    last = next((t for t in range(3, len(plain.u)) if _moved(plain.u[t - 3 : t + 1])), None)
    if last is None:
        return []
    response = _impulse_response(plain, last)
    found = [
        rule
        for shape, numbers in _linear_candidates(response)
        for rule in (_with_linear_decay(data, shape, numbers),)
        if rule.error <= LOOSER[-1]
    ]
    return sorted(found, key=lambda rule: rule.error > 100 * max(1e-12, min(r.error for r in found)))


def _moved(u: NDArray) -> bool:
    return bool((np.abs(u).max(1) > 0).all())


def _impulse_response(data: _Data, t: int) -> NDArray:
    """A[t, :t + 1], of step t."""
    a = data.g[: t + 1] * data.weight[t]
    return np.linalg.lstsq(a.T, data.u[t] * data.weight[t], rcond=None)[0]


def _linear_candidates(response: NDArray) -> Iterator[tuple[Shape, Numbers]]:
    """Plain SGD, then whatever momentum, dampening and look-ahead the response shows."""
    yield Shape(), Numbers()
    now, before, earlier, first = response[-1], response[-2], response[-3], response[0]
    if not (now and before and earlier):
        return
    beta = float(earlier / before)
    if not 0 < abs(beta) < 1.5:
        return
    # With a look-ahead, 1 + beta (1 - dampening) stands for now, beta^2 (1 - dampening) for before.
    ahead = float(before / now)
    # The first gradient may have come in undamped.
    undamped = float(first / response[1]) / beta
    for nesterov in ("", "plain"):
        if not nesterov:
            kept = 1 / undamped if undamped else 1.0
        else:
            kept = ahead / (beta * (beta - ahead)) if beta != ahead else 1.0
        for value, first_damped in ((1.0, False), (kept, False), (kept, True)):
            yield Shape(nesterov=nesterov), Numbers(beta=beta, dampening=1 - value, first_damped=first_damped)
    yield Shape(inside=True), Numbers(beta=beta)


def _with_linear_decay(data: _Data, shape: Shape, numbers: Numbers) -> Rule:
    """Solves L2 and decoupled decay together, which are the same for plain SGD: then it counts as L2."""
    if shape.inside:  # what is left after the momentum is taken off is plain SGD
        taken = np.concatenate([data.u[:1], data.u[1:] - numbers.beta * data.u[:-1]])
        slack = data.slack + np.concatenate([data.slack[:1] * 0, abs(numbers.beta) * data.slack[:-1]])
        rule = _with_linear_decay(data._replace(u=taken, slack=slack), shape._replace(inside=False), Numbers())
        return rule._replace(shape=shape, numbers=numbers._replace(l2=rule.numbers.l2))
    plain = (data.p == 0).all(0)
    d = direction(shape, numbers, data.g, data.p)
    rate = _rate(data.columns(plain), d[:, plain])
    rest = -(data.u + rate[:, None] * d) * data.weight
    through = direction(shape, numbers, data.p, data.p) * rate[:, None] * data.weight
    beside = data.p * rate[:, None] * data.weight
    columns = [through.ravel()] if numbers.beta == 0 else [through.ravel(), beside.ravel()]
    solved = np.linalg.lstsq(np.stack(columns, 1), rest.ravel(), rcond=None)[0]
    l2, decay = float(solved[0]), float(solved[1]) if len(solved) > 1 else 0.0
    numbers = numbers._replace(l2=l2)
    d = direction(shape, numbers, data.g, data.p)
    fitted = -rate[:, None] * (d + decay * data.p)
    rule = Rule(shape, numbers, rate, rate * decay, _deviation(data, fitted))
    if rule.error <= LOOSER[-1]:
        return rule
    # Decay that does not follow the rate.
    return min(rule, _fitted(data, shape, numbers._replace(l2=0.0)), key=lambda rule: rule.error)


# Adaptive rules: nonlinear least squares from several starts.

_LOG = ("b1", "b2", "epsilon", "epsilon_root", "initial", "l2")


class _Candidate(NamedTuple):
    shape: Shape
    free: tuple[str, ...]


def _candidates() -> Iterator[_Candidate]:
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


def _fit_adaptive(data: _Data, tolerance: float) -> list[Rule]:
    found: list[Rule] = []
    short = data.first(STEPS_TO_FIT)
    for shape, free in _candidates():
        numbers = _solve(short, shape, free, tolerance)
        if numbers is None:
            continue
        rule = _fitted(data, shape, numbers)
        found.append(rule)
        if rule.error <= tolerance:
            # The same with the correction at the other place, if it cannot be told apart.
            twin = shape._replace(corrected=not shape.corrected)
            numbers = _solve(short, twin, free, tolerance) if shape.second == "ema" else None
            return [rule, *([_fitted(data, twin, numbers)] if numbers else [])]
    return found


_GRID: dict[str, Sequence[float]] = {
    "b1": (0.9, 0.5, 0.8, 0.95, 0.99),
    "b2": (0.999, 0.9, 0.95, 0.99, 0.9999),
    "beta": (0.9, 0.5, 0.8, 0.99),
    "initial": (0.0,),
}
# Where the first step says nothing (a rate that starts at 0).
_ANY_EPSILON = np.logspace(-10, -2, 9)


def _starts(data: _Data, shape: Shape, free: tuple[str, ...]) -> Iterator[Numbers]:
    """From the first step: |g / u| is a |g| + c with epsilon outside the root, and sqrt(a^2 g^2 + c^2) inside.

    c / a is epsilon (or its root) where v is corrected for its bias; where it is not, v is (1 - b2) g^2 there.
    """
    others = tuple(name for name in free if not name.startswith("epsilon"))
    knees: tuple[Sequence[float], Sequence[float]] = _ANY_EPSILON, _ANY_EPSILON
    used = data.u[0] != 0
    if used.sum() > 2:
        y, g = np.abs(data.g[0] / np.where(used, data.u[0], 1))[used], np.abs(data.g[0])[used]
        knees = ([_knee(y, g)], [_knee(y**2, g**2) ** 0.5])
    for values in product(*(_GRID[name] for name in others)):
        start = Numbers(**dict(zip(others, values, strict=True)))
        unit = (1 - start.b2) ** 0.5 if shape.second == "ema" and not shape.corrected else 1.0
        for outside, inside in zip(*knees, strict=True):
            if "initial" in free:
                v = (unit * inside) ** 2
                epsilons = [(v**0.5 * part, v * (part if shape.epsilon == "inside" else 0.0)) for part in (1e-6, 1e-2)]
                for epsilon, root in epsilons:
                    given = start._replace(initial=v, epsilon=epsilon if "epsilon" in free else 0.0)
                    yield given._replace(epsilon_root=root if "epsilon_root" in free else 0.0)
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


def _solve(data: _Data, shape: Shape, free: tuple[str, ...], tolerance: float) -> Numbers | None:
    """The numbers of a shape, first where the parameter is 0, then with what decay does; None if none come close."""
    plain = data.columns((data.p == 0).all(0))

    def residual(numbers: Numbers) -> NDArray:
        d = direction(shape, numbers, plain.g, plain.p)
        return ((_rate(plain, d)[:, None] * d + plain.u) * plain.weight).ravel()

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
    without = _fitted(data, shape, best)
    if without.error <= max(tolerance, 3 * least):
        return best
    coupled = _with_l2(data, shape, best, free)
    return coupled if _fitted(data, shape, coupled).error < 0.1 * without.error else best


def _with_l2(data: _Data, shape: Shape, numbers: Numbers, free: tuple[str, ...]) -> Numbers:
    def residual(numbers: Numbers) -> NDArray:
        d = direction(shape, numbers, data.g, data.p)
        rate, decay = _rate_and_decay(data, d)
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
        values = {}
        for name, v in zip(free, np.clip(theta, -80, 5), strict=True):
            value = float(np.exp(v)) if name in _LOG else float(np.clip(v, -1.5, 1.5))
            values[name] = 1 - value if name in ("b1", "b2") else value
        for name in ("b1", "b2"):  # an average has weights between 0 and 1
            if name in values:
                values[name] = float(np.clip(values[name], 0, 1 - 1e-6))
        return start._replace(**values)

    def given(theta: NDArray) -> NDArray:
        return residual(unpack(theta))

    # A right shape converges fast, to nothing; most shapes are wrong, and stop at what they cannot explain.
    theta = np.array(pack(start))
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
