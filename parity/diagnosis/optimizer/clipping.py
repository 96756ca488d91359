"""Clipping around an update rule, which then sees other gradients than the optimiser was given.

    norm:   h = g + decay p;  h <- h min(1, most / (||h|| + added)), over all tensors, or each by itself
    value:  h <- min(max(h, -most), most), of every element
    or, behind the rule:  u <- u min(1, most / ||u||)

The usual questions are so large that a norm is clipped at every step: with gradients divided by their norms the rule
fits, but for a factor. The ramp, whose first steps are small, shows that factor, which is `most`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.optimizer.descriptions import text
from parity.diagnosis.optimizer.fit import fit
from parity.diagnosis.optimizer.rules import Data, Rule, best_rate, data_of, deviation, direction, fitted_rule
from parity.records.answers import PATTERNS, RAMP, Response

NORM, TENSOR, VALUE = "norm", "tensor", "value"
UPDATES = {NORM: "norm of the updates", TENSOR: "tensor of the updates"}
ADDED = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to the norm; optax adds nothing."""
LEAST_CLIPPED = 10.0
"""Norms above are clipped at all steps, as is tried. Gradients below LEAST_VALUE are not clipped by value."""
LEAST_VALUE = 2e-3
LEAST_COLUMNS = 4
ROUGH = 1e-7
"""Up to which a rule fits gradients divided by norms of at least LEAST_CLIPPED, where ADDED was added to them."""


class Clipping(NamedTuple):
    """What is done around a rule.

    Attributes:
      of: "" nothing; NORM, of all gradients together; TENSOR, of each tensor's; VALUE; or one of UPDATES.
      most: largest norm, or largest absolute value.
      added: to the norm, before it is divided by.
      decay: weight decay that is added to the gradient before.
    """

    of: str = ""
    most: float = np.inf
    added: float = 0.0
    decay: float = 0.0


class Fit(NamedTuple):
    """One explanation of a response.

    Attributes:
      clipping: what is done around the rules.
      rules: those that give the response then, the simplest first.
      response: with the gradients that the rules see.
      steps: at which the learning rate shows, [T]; None: at all.
    """

    clipping: Clipping
    rules: list[Rule]
    response: Response
    steps: NDArray | None = None


def fits(
    response: Response,
    tolerance: float,
    known: Sequence[tuple[Clipping, Rule]] = (),
    only_known: bool = False,
    decays: Sequence[float] = (),
) -> list[Fit]:
    """All explanations of a response that are as close as the closest; [] if there is none.

    Args:
      response: of one side.
      tolerance: largest error that counts as rounding.
      known: what other tensors follow, tried first.
      only_known: nothing else.
      decays: weight decays that may have been added to the gradient before it is clipped.
    """
    for clipping in dict.fromkeys(clipping for clipping, _ in known):
        rules = [rule for other, rule in known if other == clipping]
        if clipping.of in UPDATES.values() and response.asked is not None:
            ramp = _columns(response, response.asked // PATTERNS == RAMP)
            again = [_again(data_of(ramp), rule) for rule in rules]
            norms, most = _update_norms(response, list(UPDATES.values()).index(clipping.of))
            found = [Fit(clipping._replace(most=most), again[:1], ramp, norms[:, -1] < most * (1 - 1e-9))]
        else:
            found = [_fit(response, clipping, tolerance, rules, only_known=True)]
        if found[0].rules and found[0].rules[0].error <= tolerance:
            return found
    if only_known:
        return []
    plain = _fit(response, Clipping(), tolerance)
    if response.sums is None or response.asked is None:
        return [plain] if plain.rules else []
    if plain.rules and plain.rules[0].error <= tolerance:
        return _always_clipped(plain) or [plain]
    return _closest([plain, *_clipped(response, tolerance, decays)])


def _closest(found: Sequence[Fit]) -> list[Fit]:
    fitting = [fit for fit in found if fit.rules]
    least = min((fit.rules[0].error for fit in fitting), default=0.0)
    return [fit for fit in fitting if fit.rules[0].error <= 10 * max(least, 1e-12)]


def _fit(response: Response, clipping: Clipping, tolerance: float, rules: Sequence[Rule] = (), **options) -> Fit:
    seen = seen_by_rule(response, clipping)
    return Fit(clipping, fit(seen, tolerance, rules, **options), seen)


def seen_by_rule(response: Response, clipping: Clipping) -> Response:
    """The response with the gradients that reach the rule."""
    if clipping.of not in (NORM, TENSOR, VALUE):
        return response
    h = response.gradients + clipping.decay * response.parameters
    if clipping.of == VALUE:
        return response._replace(gradients=np.clip(h, -clipping.most, clipping.most))
    norms = _norms(response, clipping.of, clipping.decay)
    return response._replace(gradients=h * np.minimum(1, clipping.most / (norms + clipping.added)))


def _norms(response: Response, of: str, decay: float) -> NDArray:
    """Of gradient + decay * parameter, as each element's step has it, [T, K]."""
    assert response.sums is not None
    assert response.asked is not None
    gg, gp, pp, _ = response.sums[:, int(of == TENSOR)]
    squares = gg + 2 * decay * gp + decay**2 * pp
    return np.sqrt(np.maximum(squares, 0))[:, response.asked // PATTERNS]


def _clipped(response: Response, tolerance: float, decays: Sequence[float]) -> Iterator[Fit]:
    behind = list(_clipped_updates(response, tolerance))
    if behind:
        yield from behind
        return
    for decay in dict.fromkeys((0.0, *decays, *_first_decay(response))):
        for of in (NORM, TENSOR, VALUE):
            found = [
                Fit(Clipping(of, most, added, decay), *rest)
                for added, most in _limits(response, of, decay)
                for rest in [_fit(response, Clipping(of, most, added, decay), tolerance)[1:]]
            ]
            yield from found
            if any(fit.rules and fit.rules[0].error <= tolerance for fit in found):
                break
        else:
            continue
        break


def _first_decay(response: Response) -> list[float]:
    """Of a linear rule, the first step shows what is added to the gradient, whatever the whole is multiplied by."""
    g, p, u = (a[0] for a in (response.gradients, response.parameters, response.updates))
    assert response.asked is not None
    first = response.asked // PATTERNS == 0
    still, moved = first & (p == 0) & (g != 0), first & (p != 0)
    if still.sum() < 2 or not moved.any():
        return []
    rates = u[still] / g[still]
    rate = float(np.median(rates))
    if rate == 0 or not np.allclose(rates, rate, rtol=1e-9, atol=0):
        return []
    decay = (u[moved] / rate - g[moved]) / p[moved]
    found = float(decay[np.argmin(np.abs(g[moved]))])
    return [found] if found > 1e-9 else []


def _limits(response: Response, of: str, decay: float) -> Iterator[tuple[float, float]]:
    """(added, most) with which a rule gives the ramp."""
    assert response.asked is not None
    is_ramp = response.asked // PATTERNS == RAMP
    h = response.gradients + decay * response.parameters
    if of == VALUE:
        usual = _columns(response._replace(gradients=h), ~is_ramp & (np.abs(h) < LEAST_VALUE).all(0))
        rules = fit(usual, ROUGH) if usual.updates.shape[1] >= LEAST_COLUMNS else []
        data = data_of(response._replace(gradients=h))
        yield from ((0.0, _limit(data, lambda most: np.clip(data.g, -most, most), rule)) for rule in rules[:1])
        return
    norms = _norms(response, of, decay)
    chosen = ~is_ramp & (norms > LEAST_CLIPPED).all(0)
    data = data_of(_columns(response._replace(gradients=h), is_ramp))
    for added in (0.0, ADDED) if chosen.sum() >= LEAST_COLUMNS else ():
        whole = norms + added
        divided, of_ramp = whole[:, chosen], whole[:, is_ramp]
        rules = fit(_columns(response._replace(gradients=h), chosen)._replace(gradients=h[:, chosen] / divided), ROUGH)
        # In units of what is allowed at most: that is a factor of the gradients of such a rule.
        for rule in rules[:1]:
            yield added, _limit(data, partial(_shortened, data.g, of_ramp), rule)


def _shortened(h: NDArray, norms: NDArray, most: float) -> NDArray:
    return h * np.minimum(1 / most, 1 / norms)


def _limit(data: Data, clipped: Callable[[float], NDArray], rule: Rule) -> float:
    """The largest norm or value with which the rule fits best."""

    def rest(log: NDArray | float) -> NDArray:
        d = direction(rule.shape, rule.numbers, clipped(float(np.exp(log))), data.p)
        return ((data.u + rule.rate[:, None] * d + rule.decay[:, None] * data.p) * data.weight).ravel()

    from scipy.optimize import least_squares  # late, as in `adaptive`

    grid = np.log(10.0) * np.linspace(-4, 4, 33)
    starts = sorted(grid, key=lambda log: float(np.square(rest(log)).sum()))[:2]
    solved = [
        least_squares(lambda log: rest(log[0]), [start], method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=60)
        for start in starts
    ]
    return float(np.exp(min(solved, key=lambda found: found.cost).x[0]))


def _clipped_updates(response: Response, tolerance: float) -> Iterator[Fit]:
    """The rule fits, but for a factor of each step that is another in the ramp; and no update has a larger norm."""
    assert response.asked is not None
    usual, ramp = (_columns(response, response.asked // PATTERNS == number) for number in (0, RAMP))
    for rule in fit(usual, tolerance)[:1] if usual.updates.shape[1] >= LEAST_COLUMNS else []:
        again = fitted_rule(data_of(ramp), rule.shape, rule.numbers)
        # Of a rule without memory, clipped updates are clipped gradients.
        remembers = rule.shape.second or abs(rule.numbers.beta) > 1e-6
        if again.error > max(tolerance, rule.error) or not remembers:
            continue
        for i, of in enumerate(UPDATES.values()):
            norms, most = _update_norms(response, i)
            at_most = norms >= most * (1 - 1e-9)
            steps = ~at_most[:, -1]
            if at_most.sum() > 1 and (steps.any() or at_most.all()):
                yield Fit(Clipping(of, most), [again], ramp, steps)


def _again(data: Data, rule: Rule) -> Rule:
    """The rule with the rates of other steps. Where a tensor is too small to show it, it has no decay."""
    if data.u.shape[1] >= LEAST_COLUMNS:
        return fitted_rule(data, rule.shape, rule.numbers)
    d = direction(rule.shape, rule.numbers, data.g, data.p)
    rate = best_rate(data, d)
    return Rule(rule.shape, rule.numbers, rate, 0 * rate, deviation(data, -rate[:, None] * d))


def _always_clipped(plain: Fit) -> list[Fit]:
    """The same of a rule whose updates have one norm at every step, and not each element one size."""
    u = np.abs(plain.response.updates)
    if np.ptp(u) <= 1e-6 * u.max():
        return []
    found = []
    for i, of in enumerate(UPDATES.values()):
        norms, most = _update_norms(plain.response, i)
        if (norms >= most * (1 - 1e-9)).all():
            found.append(plain._replace(clipping=Clipping(of, most), steps=np.zeros(len(u), bool)))
    return found


def _update_norms(response: Response, i: int) -> tuple[NDArray, float]:
    """Of every step and episode, the ramp last; and the largest."""
    assert response.sums is not None
    sums = response.sums[3, i]
    norms = np.sqrt(sums[:, ~np.isnan(sums).any(0)])
    return norms, float(norms.max(initial=0.0))


def _columns(response: Response, which: NDArray) -> Response:
    kept = np.flatnonzero(which)
    assert response.asked is not None
    return response._replace(
        gradients=response.gradients[:, kept],
        parameters=response.parameters[:, kept],
        updates=response.updates[:, kept],
        asked=response.asked[kept],
    )


def unlike(a: Clipping, b: Clipping) -> int:
    """In how many ways."""
    if a.of != b.of:
        return 4
    return _differ(a.most, b.most) + _differ(a.added, b.added) + _differ(a.decay, b.decay)


def _differ(x: float, y: float) -> bool:
    return x != y and abs(x - y) > 1e-6 * max(abs(x), abs(y))


def clipping_findings(a: Clipping, b: Clipping) -> Iterator[Finding]:
    """What PyTorch's clipping and Flax's differ in."""
    if not unlike(a, b):
        return
    added, decay = a.added != b.added, _differ(a.decay, b.decay)
    yield Finding("gradient-clipping", f"PyTorch {_in_words(a, added, decay)}; Flax {_in_words(b, added, decay)}")


def _in_words(clipping: Clipping, added: bool, decay: bool) -> str:
    most = text(clipping.most)
    words = {
        "": "clips nothing",
        NORM: f"clips all gradients together to a norm of {most}",
        TENSOR: f"clips the gradient of each tensor to a norm of {most}",
        VALUE: f"clips every element of a gradient to {most}",
        UPDATES[NORM]: f"clips all updates together, behind the rule, to a norm of {most}",
        UPDATES[TENSOR]: f"clips the update of each tensor, behind the rule, to a norm of {most}",
    }[clipping.of]
    if added and clipping.of in (NORM, TENSOR):
        words += f", divided by norm + {text(clipping.added)}" if clipping.added else ", divided by the norm"
    if decay and clipping.of:
        words += (
            f", after weight decay of {text(clipping.decay)} is added" if clipping.decay else ", before weight decay"
        )
    return words
