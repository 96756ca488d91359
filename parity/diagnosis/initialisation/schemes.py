"""What a distribution of weights is called: its shape, and its variance by the fans of the layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.initialisation.draws import Drawn

Array = NDArray[Any]

UNIFORM_REACH, CUT_REACH = math.sqrt(3), 2 / 0.87962566
"""The farthest number in standard deviations: of a uniform distribution, of a normal cut at two of its own."""
ENOUGH = 4000
"""Numbers of which a normal has one beyond `CUT_REACH`, even with five deviations of slack, but for once in 1e9."""
SIGMAS = 5
PYTORCHS_OWN = "variance 1/(3 fan_in) (PyTorch's own: within 1/sqrt(fan_in))"


class Fans(NamedTuple):
    """How many numbers go into one of the layer's outputs, and come of one of its inputs; of a table its width."""

    into: int = 0
    out: int = 0
    width: int = 0


def variances(fans: Fans) -> Iterator[tuple[float, str]]:
    """The known ones with their words; of those that are the same number, the first is meant."""
    if fans.into and fans.out:
        yield 1 / fans.into, "variance 1/fan_in (LeCun)"
        yield 2 / fans.into, "variance 2/fan_in (He, Kaiming)"
        yield 2 / (fans.into + fans.out), "variance 2/(fan_in + fan_out) (Glorot, Xavier)"
        yield 1 / (3 * fans.into), PYTORCHS_OWN
        yield 1 / fans.out, "variance 1/fan_out"
        yield 2 / fans.out, "variance 2/fan_out"
        yield 1 / (3 * fans.out), "variance 1/(3 fan_out)"
    if fans.width:
        yield 1 / fans.width, "variance 1/features"
    yield 1.0, "variance 1"


def words(drawn: Drawn, fans: Fans) -> str:
    """In words: "uniform, variance 1/fan_in (LeCun)", "normal, std 0.02", "0"."""
    if not drawn.is_random:
        values = np.unique(drawn.first)
        return f"{float(values[0]):.6g} throughout" if len(values) == 1 else "the same numbers every time"
    share = drawn.fixed.mean()
    among = f", but {int(drawn.fixed.sum())} of {drawn.fixed.size} numbers never change" if share else ""
    return f"{shape(drawn)}, {_centre(drawn)}{_variance(drawn, fans)}{among}"


def shape(drawn: Drawn) -> str:
    """Orthogonal, uniform, normal, normal cut at two deviations, or what the numbers leave open."""
    count = len(drawn.numbers)
    if drawn.is_orthogonal:
        return "orthogonal"
    if count < 30:
        return "of an unknown shape"
    slack = 1 + SIGMAS / math.sqrt(count)
    standard = np.sort((drawn.numbers - drawn.mean) / drawn.std)
    allowed = SIGMAS / 2 / math.sqrt(count)
    fits = {name: _distance(standard, cdf(standard)) for name, cdf in SHAPES.items()}
    for name, farthest in REACHES.items():
        if drawn.reach > farthest * slack:
            del fits[name]
    nearest = min(fits, key=lambda name: fits[name])
    if fits[nearest] > allowed:
        return "of another shape"
    if nearest == "uniform":
        return nearest
    if count < ENOUGH:
        return "normal, cut off or not"
    return "truncated normal" if "truncated normal" in fits else "normal"


def _centre(drawn: Drawn) -> str:
    error = drawn.std / math.sqrt(len(drawn.numbers))
    return "" if abs(drawn.mean) <= SIGMAS * error else f"mean {drawn.mean:.3g}, "


def _variance(drawn: Drawn, fans: Fans) -> str:
    # What a variance is known to: that of a uniform better than that of a normal.
    fourth = float((((drawn.numbers - drawn.mean) / drawn.std) ** 4).mean()) - 1
    relative = SIGMAS * math.sqrt(max(fourth, 0.8) / len(drawn.numbers))
    near = [(round(abs(math.log(drawn.std**2 / value)), 9), text) for value, text in variances(fans)]
    near = [(far, text) for far, text in near if far <= relative]
    # Few numbers allow several, of which the nearest is chance: PyTorch's own is what a layer has if nothing is said.
    own = [text for _, text in near if text == PYTORCHS_OWN and shape(drawn) == "uniform"]
    return own[0] if own else min(near, key=lambda pair: pair[0])[1] if near else f"std {drawn.std:.3g}"


def _uniform(x: Array) -> Array:
    return np.clip((x / UNIFORM_REACH + 1) / 2, 0, 1)


def _normal(x: Array) -> Array:
    return np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x])


def _truncated(x: Array) -> Array:
    ends = _normal(np.array([-2.0, 2.0]))
    return np.clip((_normal(x * 2 / CUT_REACH) - ends[0]) / (ends[1] - ends[0]), 0, 1)


SHAPES = {"uniform": _uniform, "normal": _normal, "truncated normal": _truncated}
REACHES = {"uniform": UNIFORM_REACH, "truncated normal": CUT_REACH}


def _distance(ordered: Array, cdf: Array) -> float:
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max()))
