"""Scale, bias and moving statistics of a norm layer that were carried over by hand, and what became of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.parameters.looks import close, same, unexplained

Array = NDArray[Any]


def findings(truth: dict[str, Array], held: dict[str, Array], tolerance: float) -> list[Finding]:
    """What happened to the parameters (scale, bias) and the statistics (mean, var) of a norm layer.

    Args:
      truth: what is expected, by role.
      held: what Flax's variables hold, by role.
      tolerance: relative to the largest value.
    """
    return _affine(truth, held, tolerance) + _statistics(truth, held, tolerance)


def _affine(truth: dict[str, Array], held: dict[str, Array], tolerance: float) -> list[Finding]:
    absent = [role for role in ("scale", "bias") if (role in truth) != (role in held)]
    if absent:
        has, lacks = ("PyTorch", "Flax") if absent[0] in truth else ("Flax", "PyTorch")
        code = "affine-missing" if "scale" in absent else "bias-missing"
        return [Finding(code, f"{has}'s layer has {' and '.join(absent)}, {lacks}'s has none")]
    wrong = [role for role in ("scale", "bias") if role in truth and not same(truth[role], held[role], tolerance)]
    if not wrong:
        return []
    if {"scale", "bias"} <= truth.keys():
        exchanged = same(truth["bias"], held["scale"], tolerance) and same(truth["scale"], held["bias"], tolerance)
        if exchanged:
            evidence = "Flax's scale holds PyTorch's bias (beta), and its bias holds PyTorch's weight (gamma)"
            return [Finding("affine-swapped", evidence)]
    found = []
    initial = {"scale": 1.0, "bias": 0.0}
    at_start = [role for role in wrong if np.all(held[role] == initial[role])]
    if "scale" in at_start:
        words = " and ".join(f"{role} is all {'ones' if role == 'scale' else 'zeros'}" for role in at_start)
        off = max(float(np.abs(truth[role] - held[role]).max()) for role in at_start)
        found.append(Finding("affine-missing", f"Flax's {words}: not loaded, PyTorch's differs by up to {off:.3g}"))
    elif "bias" in at_start:
        size = np.abs(truth["bias"]).max()
        found.append(Finding("bias-missing", f"Flax's bias is all zeros, where PyTorch's has values up to {size:.3g}"))
    return found + [unexplained(role, truth[role], held[role], tolerance) for role in wrong if role not in at_start]


def _statistics(truth: dict[str, Array], held: dict[str, Array], tolerance: float) -> list[Finding]:
    roles = [role for role in ("mean", "var") if role in truth or role in held]
    one_sided = [role for role in roles if role not in truth or role not in held]
    found = []
    for role in one_sided:
        has, lacks = ("PyTorch", "Flax") if role in truth else ("Flax", "PyTorch")
        found.append(Finding("unexplained", f"{has}'s layer keeps a moving {role}, {lacks}'s does not"))
    wrong = [r for r in roles if r not in one_sided and not same(truth[r], held[r], tolerance)]
    exchanged = wrong == ["mean", "var"] and same(truth["mean"], held["var"], tolerance)
    if exchanged and same(truth["var"], held["mean"], tolerance):
        return [*found, Finding("unexplained", "Flax's moving mean holds the variance, and its variance the mean")]
    for role in wrong:
        finding = _variance(truth["var"], held["var"], tolerance) if role == "var" else None
        if finding is not None and "mean" in wrong and not held["mean"].any() and finding.code == "initial-variance":
            # One cause: the statistics were not carried over at all.
            found = [f for f in found if not f.evidence.startswith("Flax's mean is all zeros")]
            finding = replace(finding, evidence=f"{finding.evidence}; its moving mean is still 0")
        found.append(finding or unexplained(role, truth[role], held[role], tolerance))
    return found


def _variance(truth: Array, held: Array, tolerance: float) -> Finding | None:
    if truth.shape != held.shape:
        return None
    for value in (0.0, 1.0):
        if np.all(held == value):
            if np.all(truth == 1 - value):
                return Finding("initial-variance", f"Flax's moving_var starts at {value:g}, PyTorch's at {1 - value:g}")
            evidence = (
                f"Flax's moving_var is still {value:g} everywhere, PyTorch's is {truth.min():.3g} to {truth.max():.3g}"
            )
            return Finding("initial-variance", evidence)
    if truth.size < 2 or not (truth > 0).all() or not (held > 0).all():
        return None
    ratios = held / truth
    ratio = float(ratios.mean())
    even = bool(np.all(np.abs(ratios - ratio) <= tolerance * ratio))
    larger = max(ratio, 1 / ratio)
    m = larger / (larger - 1) if larger > 1 else np.inf
    # m is as exact as the ratio is, times m squared.
    if even and 2 <= m <= 1e5 and abs(m - round(m)) <= min(0.1, 4 * tolerance * m * m + 1e-9):
        m = round(m)
        which = "Flax's" if ratio > 1 else "PyTorch's"
        fraction = f"{m}/{m - 1}" if ratio > 1 else f"{m - 1}/{m}"
        evidence = f"Flax's moving_var is PyTorch's times {fraction}: {which} is the unbiased one, with m = {m}"
        return Finding("unbiased-variance", evidence)
    if close(np.sqrt(truth), held, tolerance):
        return Finding("unexplained", "Flax's moving_var holds the standard deviation, not the variance")
    return None
