"""The same two modules a little aside: off the kinks and ties that rounding decides.

Where two maxima, or a number and 0, are equal but for rounding, either side takes the gradient that its own rounding
leaves: both are right, and far apart. A step aside, the same on both sides, nothing of it is left to rounding, while
what is a mistake stays one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.bounds import MOST_CARRIED
from parity.comparison.differences import Difference
from parity.evidence.jax import FlaxRuns
from parity.evidence.torch import TorchRuns
from parity.pairing.translation import Translation, flat_layout_inputs
from parity.records.inputs import Calls
from parity.records.recording import Recording
from parity.report import Report
from parity.report.findings import both_names
from parity.sides import jax as flax_side
from parity.sides import torch as torch_side

ASIDE = 1e-4
"""Of each number: a thousand times float32's rounding, in which a side may compute inside, and no other network."""


def aside(a: NDArray, seed: int, size: float = ASIDE) -> NDArray:
    """Each number by a factor of its own, so that equal ones part; 0 stays, which a mask may be made of."""
    random = np.random.default_rng(seed).uniform(-1.0, 1.0, a.shape).astype(a.dtype if a.dtype.kind == "f" else float)
    return np.asarray(a * (1 + size * random)) if a.dtype.kind == "f" else a  # numpy makes a number of no axes a scalar


def module_aside(runs: TorchRuns) -> Any:
    """A copy of PyTorch's module with its parameters aside, by no less than their dtype can tell."""
    return torch_side.changed(runs.module, lambda a, i, eps: aside(a, i, max(ASIDE, 4 * eps)))


def calls_aside(torch_runs: TorchRuns, flax_runs: FlaxRuns, free: Recording, called: Calls) -> Calls:
    """The calls of both sides with inputs aside; as they are, where Flax is given others than PyTorch's."""
    given = torch_runs.inputs.arrays()
    moved = [aside(a, i) for i, a in enumerate(given)]
    there = called._replace(torch=torch_runs.inputs.filled(moved))
    if called.flax is None:
        return there
    theirs = []
    usual = flat_layout_inputs(torch_runs.inputs, free).arrays()
    in_layout = [b if u is a else np.moveaxis(b, 1, -1) for a, u, b in zip(given, usual, moved, strict=True)]
    for a in flax_runs.inputs.arrays():
        same = (b for u, b in zip(usual, in_layout, strict=True) if np.array_equal(a, u))
        b = next(same, None if a.dtype.kind == "f" else a)
        if b is None:
            return called
        theirs.append(b)
    return there._replace(flax=flax_runs.inputs.filled(theirs))


def variables_aside(
    given: Mapping[str, Any] | None, translation: Translation, before: Mapping[str, NDArray], after: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The user's own variables, changed by what PyTorch's weights are, so that what is wrong in them stays.

    Args:
      given: flat; None: there are none.
      translation: how PyTorch's weights go across.
      before: PyTorch's tensors.
      after: the parameters of the module aside.
    """
    if given is None:
        return None
    to_flax = translation.pairing.to_flax
    there = {name: torch_side.numpy(after[name]).astype(a.dtype) if name in after else a for name, a in before.items()}
    old, new = to_flax(before), to_flax(there)
    fits = {name for name, a in given.items() if name in old and np.shape(a) == old[name].shape}
    moved = {name: np.asarray(a) + (new[name] - old[name]) if name in fits else a for name, a in given.items()}
    return flax_side.nested(moved)


def told(decided: Sequence[Difference], report: Report) -> str:
    """What is to be said where a step aside has settled what rounding decides; nothing where it has not.

    Args:
      decided: the gradients that rounding decides, from behind.
      report: of the modules aside.
    """
    if not report.agrees_at(decided[0].phase, decided[0].key[0], decided[0].quantity):
        return ""
    if told := _told_of_what_cancels(report):
        return told
    first = decided[0]
    return (
        f"decided by rounding at {both_names(first.key[0], first.flax_layer)}: two values of which one counts (a "
        f"maximum, or a number beside 0) are equal but for rounding, or what is added up there nearly cancels; the "
        f"{first.quantity} differs by "
        f"{first.error:.1e}, as either side's own does when it is nudged; all was compared with inputs and weights "
        f"changed by {ASIDE:g} of themselves, where rounding decides nothing"
    )


def _told_of_what_cancels(report: Report) -> str:
    """Where float32's rounding is made larger than it is anywhere else, and what it hides there."""
    rows = [row for row in report.layers if row.phase == "backward" and row.ok and row.error > MOST_CARRIED]
    if not rows:
        return ""
    layers = dict.fromkeys(both_names(row.torch_layer, row.flax_layer) for row in rows)
    return (
        f"float32's rounding is all that differs at {', '.join(layers)}: what is added up there nearly cancels, and "
        f"gradients differ by {max(row.error for row in rows):.1e}, as either side's own do when it is nudged. A "
        f"mistake of gradients alone is not seen there below {max(row.bound for row in rows):.1e}. All was compared "
        f"with inputs and weights changed by {ASIDE:g} of themselves"
    )
