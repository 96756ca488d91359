"""The derivative of a normalising layer, fitted: do mean and variance take part in it, or are they constants.

With g = gamma * dy and d = x - mean, for a group of m values:

    dx = g / s - mean(g) / s - d * sum(g * d) / (m * s^2) * 2 ds/dvar

The second term is what flows through the mean, the third what flows through the variance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parity.diagnosis.family import SIDES
from parity.diagnosis.finding import Finding
from parity.diagnosis.norm.affine import affine_maps
from parity.diagnosis.norm.forward import NormBehaviour, gradient_rounding, viewed
from parity.diagnosis.norm.sources import Array, NormSide, Source

STOPPED = {
    "mean and variance": "mean and variance are constants in the derivative: dx = gamma / s * dy",
    "variance": "the variance is a constant in the derivative, the mean is not",
    "mean": "the mean is a constant in the derivative, the variance is not",
}


def input_gradients(side: NormSide, fit: NormBehaviour) -> dict[str, Array]:
    """Dx by name of what is taken as constant; "" is nothing, the true derivative of how the side normalises."""
    assert side.dy is not None
    source = fit.source
    g = _at_x_hat(side, fit)
    offset, s = side.x.reshape(source.view) - source.mean, fit.divisor()
    direct = g / s
    if source.values is None:
        return {"": direct.reshape(side.x.shape)}
    var = source.var
    slope = np.sqrt(fit.factor / np.where(var > 0, var, 1.0)) if fit.outside else fit.factor / s
    by_mean = direct.sum(axis=source.axes, keepdims=True) / source.values * _members(fit)
    by_mean = by_mean if source.centred else np.zeros(())
    by_var = (
        (g * offset).sum(axis=source.axes, keepdims=True) / (source.values * s * s) * slope * offset * _members(fit)
    )
    found = {"": direct - by_mean - by_var, "mean and variance": direct, "variance": direct - by_mean}
    if source.centred:
        found["mean"] = direct - by_var
    return {name: np.broadcast_to(dx, source.view).reshape(side.x.shape) for name, dx in found.items()}


def gradients_agree(torch: NormSide, flax: NormSide, sources: Iterable[Source], tolerance: float) -> bool:
    """Whether the input's gradients are the same, or not recorded; `sources` say how they may round."""
    if torch.dx is None or flax.dx is None or torch.dy is None:
        return True
    slack = tolerance * np.maximum(np.abs(torch.dx).max(), np.abs(flax.dx).max())
    g = torch.dy if torch.gamma is None else torch.gamma * torch.dy
    for source in sources:
        slack = np.maximum(slack, gradient_rounding(torch.x, source, g))
    return bool((np.abs(torch.dx - flax.dx) <= slack).all())


def gradient_findings(
    torch: NormSide,
    flax: NormSide,
    forward: tuple[NormBehaviour | None, NormBehaviour | None],
    tolerance: float,
    *,
    agree: bool,
) -> list[Finding]:
    """stopped-statistics-gradient for a side whose gradient is that of constants, judged by how itself normalises."""
    sides = (torch, flax)
    stopped = [_stopped(side, fit, tolerance) for side, fit in zip(sides, forward, strict=True)]
    if stopped[0] == stopped[1] and stopped[0] is not None:
        return []
    found = [
        Finding("stopped-statistics-gradient", f"{name}: {STOPPED[what]}")
        for name, what in zip(SIDES, stopped, strict=True)
        if what
    ]
    unknown = [name for name, what in zip(SIDES, stopped, strict=True) if what is None]
    if agree and unknown and not found:
        found = [Finding("unexplained", f"the input's gradient fits no known derivative in {' and '.join(unknown)}")]
    return found


def _at_x_hat(side: NormSide, fit: NormBehaviour) -> Array:
    assert side.dy is not None
    scale = next(scale for name, scale, _ in affine_maps(side) if name == fit.affine)
    return viewed(scale, side.x, fit.source.view) * side.dy.reshape(fit.source.view)


def _members(fit: NormBehaviour) -> Array:
    """1 where an element takes part in the statistics that it is normalised with."""
    if fit.source.chunk is None:
        return np.ones(())
    axis, index = fit.source.chunk
    shape = [1] * len(fit.source.view)
    shape[axis] = fit.source.view[axis]
    member = np.zeros(shape)
    member.reshape(-1)[index] = 1.0
    return member


def _stopped(side: NormSide, fit: NormBehaviour | None, tolerance: float) -> str | None:
    """What this side takes as constant ("" nothing); None: cannot be said."""
    if fit is None or side.dy is None or side.dx is None:
        return None
    variants = input_gradients(side, fit)
    # Epsilon is fitted too, and the true gradient may be a small difference of large terms.
    largest = max(float(np.abs(side.dx).max()), float(np.abs(variants.get("mean and variance", side.dx)).max()))
    x, view = side.x.reshape(fit.source.view), fit.source.view
    slack = 10 * tolerance * largest + gradient_rounding(x, fit.source, _at_x_hat(side, fit))
    slack = np.broadcast_to(slack, view).reshape(side.x.shape)
    return next((name for name, dx in variants.items() if (np.abs(dx - side.dx) <= slack).all()), None)
