"""What an identification finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from parity.records.recording import NETWORK


class Finding(NamedTuple):
    """One known mistake, recognised at one place.

    Attributes:
      code: which mistake, see `docs/parity_mistakes.md`; or "unexplained".
      evidence: one sentence with the numbers that show it.
      role: what is charged there: "" the layer itself, or "activation", "pool", "dropout", "flatten" of what lies
        between two layers.
    """

    code: str
    evidence: str
    role: str = ""


PHASE_ORDER = {"forward": 0, "loss": 1, "backward": 2, "statistics": 3, "optimizer": 4}


class Located(NamedTuple):
    """A finding, and where.

    Attributes:
      phase: see `parity.records.recording.PHASES`.
      position: in PyTorch's order of execution.
      layer: PyTorch's name of what is charged.
      flax_layer: Flax's path.
      finding: what was found.
      key: PyTorch's call at which it shows.
    """

    phase: str
    position: float
    layer: str
    flax_layer: str
    finding: Finding
    key: tuple[str, int] = NETWORK


def in_order(found: Sequence[Located]) -> list[Located]:
    """By phase; forward in the order of execution, backward from behind."""
    return sorted(found, key=lambda f: (PHASE_ORDER[f.phase], -f.position if f.phase == "backward" else f.position))
