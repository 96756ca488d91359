"""The forward pass of a normalising layer, fitted: which statistics, which variance, which epsilon, which affine map.

    y = gamma * (x - mean) / s + beta,   s = sqrt(k * var + epsilon)  or  sqrt(k * var) + epsilon

For every source of mean and var, s of a group is found by least squares from the numbers alone, with the interval that
the tolerance leaves it; what epsilon must be follows from it, and where no epsilon serves all groups, the source does
not fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.intervals import EPSILONS, Interval, intersection
from parity.diagnosis.norm.affine import HELD, WRONG, affine_maps
from parity.diagnosis.norm.sources import Array, NormSide, Source

EPS = float(np.finfo(np.float64).eps)
# Variances below it are rounding, at the sizes that networks have; it bounds how much rounding is allowed for.
SMALLEST_VARIANCE = 1e-13
# 1 / s with variance 0 and the smallest usual epsilon, 1e-12.
LARGEST_INVERSE = 1e6


class NormBehaviour(NamedTuple):
    """What a normalising layer does in its forward pass, as fitted.

    Attributes:
      source: where its mean and variance come from.
      affine: what it does with its scale and bias, the name of an `AffineMap`.
      unbiased: whether it divides by the root of the unbiased variance, m/(m-1) times the biased one.
      outside: whether epsilon is added to the root, not inside it.
      epsilon: every epsilon that fits.
    """

    source: Source
    affine: str
    unbiased: bool
    outside: bool
    epsilon: Interval

    @property
    def factor(self) -> float:
        """What the biased variance is multiplied by."""
        return unbiased_factor(self.source.values) if self.unbiased else 1.0

    @property
    def round_epsilon(self) -> float:
        """The roundest epsilon that fits."""
        return self.epsilon.round(EPSILONS)[0]

    def divisor(self) -> Array:
        """S, which broadcasts to the source's view."""
        var = self.factor * self.source.var
        return np.sqrt(var) + self.round_epsilon if self.outside else np.sqrt(var + self.round_epsilon)


def unbiased_factor(count: int | None) -> float:
    """m/(m-1)."""
    return count / (count - 1) if count is not None and count > 1 else math.nan


def viewed(parameter: Array, x: Array, view: Sequence[int]) -> Array:
    """A parameter of the trailing axes, so that it broadcasts to a view of x."""
    if parameter.ndim == 0 or (parameter.ndim == 1 and view[-1] == x.shape[-1]):
        return parameter
    return np.broadcast_to(parameter, x.shape).reshape(view)


def rounding(x: Array, source: Source, scale: Array, axes: tuple[int, ...]) -> Array:
    """How far y may be off by float64 rounding alone, in the ways in which frameworks compute.

    Folding into x * a + b rounds by the size of x / s, E[x^2] - E[x]^2 rounds the variance by the mean's square; both
    matter where the mean is large or the variance next to nothing only.
    """
    var = np.maximum(source.var, 0.0) + SMALLEST_VARIANCE
    largest = np.abs(scale * x).max(axis=axes, keepdims=True)
    folded = 64 * largest / np.sqrt(var)
    if source.values is None:
        return EPS * folded
    offset = np.abs(scale * (x - source.mean)).max(axis=axes, keepdims=True)
    return EPS * folded + np.where(_lost(source), LARGEST_INVERSE, _loss(source) / np.sqrt(var)) * offset


def gradient_rounding(x: Array, source: Source, g: Array) -> Array:
    """The same for dx, where g is the gradient at x_hat: both ways of rounding x_hat and the variance enter it."""
    var = np.maximum(source.var, 0.0) + SMALLEST_VARIANCE
    largest = np.abs(g).max(axis=source.axes, keepdims=True)
    if source.values is None:
        return 64 * EPS * largest / np.sqrt(var)
    offset = np.abs(x - source.mean).max(axis=source.axes, keepdims=True)
    inverse = np.where(_lost(source), LARGEST_INVERSE, 1 / np.sqrt(var))
    folded = 256 * EPS * np.abs(x).max(axis=source.axes, keepdims=True) * inverse * (1 + offset * inverse)
    return largest * inverse * (folded + 4 * _loss(source) * (1 + np.square(offset * inverse)))


def _loss(source: Source) -> Array:
    """Relative error of a variance computed as E[x^2] - E[x]^2."""
    return 16 * EPS * np.square(source.mean) / (np.maximum(source.var, 0.0) + SMALLEST_VARIANCE)


def _lost(source: Source) -> NDArray[np.bool_]:
    """Where such a variance has no correct digit: it may as well be 0, and s next to nothing."""
    return _loss(source) > 0.05


def fits(side: NormSide, source: Source, tolerance: float, affine: Container[str] | None = None) -> list[NormBehaviour]:
    """Every behaviour with this source that gives side.y within the tolerance."""
    found = []
    x, y = side.x.reshape(source.view), side.y.reshape(source.view)
    offset = x - source.mean
    for name, scale, bias in affine_maps(side):
        if affine is not None and name not in affine:
            continue
        a, b = viewed(scale, side.x, source.view), viewed(bias, side.x, source.view)
        slack = tolerance * _largest(side.y) + rounding(x, source, a, source.axes)
        inverse = _inverse_divisors(a * offset, y - b, source.axes, slack)
        if inverse is not None:
            found += _with_epsilon(source, name, *inverse)
    return found


def _largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))


def _inverse_divisors(p: Array, r: Array, axes: tuple[int, ...], slack: Array) -> tuple[Array, Array, Array] | None:
    """All 1/s of each group with |r - p / s| <= slack: the lowest, the highest and the best; None: there is none."""
    some = p != 0
    if (np.abs(r) > slack)[~some].any():
        return None
    safe, width = np.where(some, p, 1.0), slack / np.where(some, np.abs(p), 1.0)
    low = np.where(some, r / safe - width, -np.inf).max(axis=axes, keepdims=True)
    high = np.where(some, r / safe + width, np.inf).min(axis=axes, keepdims=True)
    if (low > high).any() or (high <= 0).any():
        return None
    squares = np.square(p).sum(axis=axes, keepdims=True)
    best = (r * p).sum(axis=axes, keepdims=True) / np.where(squares > 0, squares, 1.0)
    return low, high, np.where(squares > 0, np.clip(best, low, high), np.nan)


def _with_epsilon(source: Source, affine: str, low: Array, high: Array, best: Array) -> list[NormBehaviour]:
    """Every way of putting epsilon into the divisors for which one epsilon serves all groups."""
    # From 1/s to s; high is positive.
    low, high = 1 / high, np.where(low > 0, 1 / np.where(low > 0, low, 1.0), np.inf)
    best = np.where(best > 0, 1 / np.where(best > 0, best, 1.0), np.nan)
    found = []
    for unbiased, outside in itertools.product((False, True), (False, True)):
        factor = unbiased_factor(source.values) if unbiased else 1.0
        if not math.isfinite(factor) or (source.var < 0).any():
            continue
        var = factor * source.var
        given = np.sqrt(var) if outside else var
        power: Callable[[Array], Array] = np.positive if outside else np.square
        # The variance itself is known to rounding only; epsilon = 0 must not fail by that.
        near = 8 * EPS * given
        epsilon = intersection(power(low) - given - near, power(high) - given + near, power(best) - given)
        epsilon = epsilon.meet(Interval(0.0, math.inf, max(epsilon.best, 0.0)))
        if not epsilon.empty:
            found.append(NormBehaviour(source, affine, unbiased, outside, epsilon))
    return found


def candidates(
    side: NormSide, tolerance: float, likely: Sequence[Source], others: Callable[[], Iterable[Source]]
) -> list[NormBehaviour]:
    """All behaviours that fit; the unlikely sources are tried where no likely one fits with a usual epsilon."""
    found = [fit for source in likely for fit in fits(side, source, tolerance)]
    if any(fit.epsilon.round(EPSILONS)[1] < 1 for fit in found):
        return found
    unlikely = list(others())
    for affine in ({HELD.name}, {way.name for way in WRONG}):
        more = [fit for source in unlikely for fit in fits(side, source, tolerance, affine)]
        found += more
        if more:
            break
    return found


def oddity(fit: NormBehaviour, order: dict[str, int]) -> float:
    """How far a behaviour is from what such a layer should do."""
    source = order.get(fit.source.name, len(order))
    return (
        0.1 * (fit.affine != HELD.name) + 0.1 * fit.unbiased + 0.1 * fit.outside + (0.1 + 0.001 * source) * (source > 0)
    )


def likeliest(fitted: Sequence[NormBehaviour], order: dict[str, int]) -> NormBehaviour | None:
    """The most usual behaviour of those that fit one side."""
    return min(fitted, key=lambda fit: oddity(fit, order) + fit.epsilon.round(EPSILONS)[1], default=None)


def pair_oddity(torch: NormBehaviour, flax: NormBehaviour, order: dict[str, int]) -> float:
    """How unusual two behaviours are, one epsilon counted once where it fits both."""
    shared = torch.epsilon.meet(flax.epsilon)
    epsilons = [torch.epsilon, flax.epsilon] if shared.empty else [shared]
    return sum(oddity(fit, order) for fit in (torch, flax)) + sum(epsilon.round(EPSILONS)[1] for epsilon in epsilons)
