"""Linear update rules: SGD and its momentum, found in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.optimizer.rules import (
    LOOSER,
    Data,
    Numbers,
    Rule,
    Shape,
    best_rate,
    deviation,
    direction,
    fitted_rule,
)


def fit_linear(data: Data) -> list[Rule]:
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
        for rule in (with_linear_decay(data, shape, numbers),)
        if rule.error <= LOOSER[-1]
    ]
    return sorted(found, key=lambda rule: rule.error > 100 * max(1e-12, min(r.error for r in found)))


def _moved(u: NDArray) -> bool:
    return bool((np.abs(u).max(1) > 0).all())


def _impulse_response(data: Data, t: int) -> NDArray:
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


def with_linear_decay(data: Data, shape: Shape, numbers: Numbers) -> Rule:
    """Solves L2 and decoupled decay together, which are the same for plain SGD: then it counts as L2."""
    if shape.inside:  # what is left after the momentum is taken off is plain SGD
        taken = np.concatenate([data.u[:1], data.u[1:] - numbers.beta * data.u[:-1]])
        slack = data.slack + np.concatenate([data.slack[:1] * 0, abs(numbers.beta) * data.slack[:-1]])
        rule = with_linear_decay(data._replace(u=taken, slack=slack), shape._replace(inside=False), Numbers())
        return rule._replace(shape=shape, numbers=numbers._replace(l2=rule.numbers.l2))
    plain = (data.p == 0).all(0)
    d = direction(shape, numbers, data.g, data.p)
    rate = best_rate(data.columns(plain), d[:, plain])
    rest = -(data.u + rate[:, None] * d) * data.weight
    through = direction(shape, numbers, data.p, data.p) * rate[:, None] * data.weight
    beside = data.p * rate[:, None] * data.weight
    columns = [through.ravel()] if numbers.beta == 0 else [through.ravel(), beside.ravel()]
    solved = np.linalg.lstsq(np.stack(columns, 1), rest.ravel(), rcond=None)[0]
    l2, decay = float(solved[0]), float(solved[1]) if len(solved) > 1 else 0.0
    numbers = numbers._replace(l2=l2)
    d = direction(shape, numbers, data.g, data.p)
    fitted = -rate[:, None] * (d + decay * data.p)
    rule = Rule(shape, numbers, rate, rate * decay, deviation(data, fitted))
    if rule.error <= LOOSER[-1]:
        return rule
    # Decay that does not follow the rate.
    return min(rule, fitted_rule(data, shape, numbers._replace(l2=0.0)), key=lambda rule: rule.error)
