"""What one side was run for, as numpy arrays: all that a comparison knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from parity.records.answers import Response
from parity.records.recording import Recording

Noise = dict[tuple[str, tuple[str, int]], float]
"""(phase, (layer, call)) -> rounding, relative to the largest value, see `parity/comparison/rounding.py`."""


@dataclass
class Evidence:
    """What one side did.

    Attributes:
      free: the run on its own, in float64.
      forced: Flax's run in single-layer mode, fed PyTorch's arrays; None where there is none.
      noise: how much of the free run is rounding; empty where it was not measured.
      own: the run on its own in the module's own dtype; None where there is none.
      exact: outputs of the layers that multiply (`kinds.PRODUCTS`) in float64, on the inputs that they had in `own`.
      answers: what the optimiser answered for each parameter, see `records.answers`.
      states: the parameters before the first step of training and after each.
      given: Flax's own variables, where they are the user's and not PyTorch's; they may not be those of the module.
      notes: what else is to be said.
      details: mode, class, loss, versions, hashes of the inputs.
      name: of the dump's files, for messages.
      sha256: of the dump's file with the arrays.
      passing: PyTorch's calls where the two are cut otherwise, though what follows agrees: there `forced` has Flax's
        own arrays, which have another shape.
    """

    free: Recording
    forced: Recording | None = None
    noise: Noise = field(default_factory=dict)
    own: Recording | None = None
    exact: dict[tuple[str, int], NDArray] = field(default_factory=dict)
    answers: dict[str, Response] = field(default_factory=dict)
    states: list[dict[str, NDArray]] = field(default_factory=list)
    given: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""
    passing: frozenset[tuple[str, int]] = frozenset()
