"""Recurrent cells that were carried over by hand: gates in each other's place, and a bias that was forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.parameters.looks import same, unexplained

Array = NDArray[Any]


def findings(
    expected: Mapping[str, Array],
    given: Mapping[str, Array],
    gates: Sequence[str],
    halves: Mapping[str, Mapping[str, Array]],
    tolerance: float = 1e-6,
) -> list[Finding]:
    """How the parameters of a cell differ from what PyTorch's become.

    Args:
      expected: weight_ih, weight_hh, bias and bias_hn, their gates side by side on the last axis.
      given: the same of the user's.
      gates: their names, in order.
      halves: {"bias": {PyTorch's name of what was forgotten: the bias then}}.
      tolerance: relative to the largest value.

    Returns:
      weight-order of the gates, bias-missing, or unexplained; nothing where they agree.
    """
    found: list[Finding] = []
    matrices = [name for name in expected if name.startswith("weight")]
    order = _order(expected, given, matrices, len(gates), tolerance)
    for name, truth in expected.items():
        held = given.get(name)
        if held is None or held.shape != truth.shape:
            found.append(Finding("unexplained", f"{name} is missing, or of another shape"))
            continue
        here = order or tuple(range(len(gates)))
        if name in matrices:
            if not same(_moved(truth, here), held, tolerance):
                found.append(unexplained(name, truth, held, tolerance))
            continue
        if name == "bias_hn":
            here = (0,)
        largest = float(np.abs(truth).max(initial=0.0))
        if same(_moved(truth, here), held, tolerance) or same(truth, held, tolerance):
            continue
        known = {forgotten: _moved(a, here) for forgotten, a in halves.get(name, {}).items()}
        forgotten = next((n for n, a in known.items() if same(a, held, tolerance, largest)), None)
        if forgotten is not None:
            found.append(Finding("bias-missing", f"Flax's bias lacks PyTorch's {forgotten}"))
        elif not held.any():
            found.append(Finding("bias-missing", f"Flax's {name} is all zeros, PyTorch's up to {largest:.3g}"))
        else:
            found.append(unexplained(name, truth, held, tolerance))
    if order is not None:
        places = [f"{gates[j]} in the place of {gates[i]}" for i, j in enumerate(order) if i != j]
        found.insert(0, Finding("weight-order", f"the gates are in another order: {', '.join(places)}"))
    return found


def _order(
    expected: Mapping[str, Array], given: Mapping[str, Array], matrices: Sequence[str], count: int, tolerance: float
) -> tuple[int, ...] | None:
    """Which gate's weights stand where, if it is another order and the same in all matrices."""
    for order in itertools.permutations(range(count)):
        fits = all(n in given and same(_moved(expected[n], order), given[n], tolerance) for n in matrices)
        if fits:
            return None if order == tuple(range(count)) else order
    return None


def _moved(a: Array, order: Sequence[int]) -> Array:
    parts = np.split(a, len(order), -1)
    return np.concatenate([parts[i] for i in order], -1)
