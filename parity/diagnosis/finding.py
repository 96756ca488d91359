"""What an identification finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parity.diagnosis.fixes import Fix
from parity.diagnosis.mistakes import MISTAKES, UNEXPLAINED
from parity.records.recording import NETWORK, PHASES


@dataclass(frozen=True)
class Finding:
    """One known mistake, recognised at one place, or what is not explained there.

    Attributes:
      code: which mistake, one of `mistakes.TABLE`; or "unexplained".
      evidence: one sentence with the numbers that show it.
      charges: what is charged where it lies between two layers, see `mistakes.Mistake`; of a mistake it is the table's.
      fix: the lines of both sides as they are, and as each would be like the other, where the numbers say them.

    Raises:
      ValueError: a code that is not in the table.
    """

    code: str
    evidence: str
    charges: str = ""
    fix: Fix | None = None

    def __post_init__(self) -> None:
        if self.code == UNEXPLAINED:
            return
        if self.code not in MISTAKES:
            raise ValueError(f"code is {self.code!r}; allowed: {', '.join(map(repr, [*MISTAKES, UNEXPLAINED]))}")
        object.__setattr__(self, "charges", MISTAKES[self.code].charges)


def told_apart(a: float, b: float, digits: int = 6) -> tuple[str, str]:
    """Two different numbers as text, with so many digits as it takes to see that they differ, and at least these."""
    texts = ((f"{a:.{n}g}", f"{b:.{n}g}") for n in range(digits, 18))
    return next((pair for pair in texts if pair[0] != pair[1]), (repr(float(a)), repr(float(b))))


PHASE_ORDER = {phase: place for place, phase in enumerate(PHASES)}


class Located(NamedTuple):
    """A finding, and where.

    Attributes:
      phase: see `parity.records.recording.PHASES`.
      position: in PyTorch's order of execution.
      layer: PyTorch's name of what is charged.
      flax_layer: Flax's path.
      finding: what was found.
      key: PyTorch's call at which it shows.
      is_between: whether it lies in front of that call, or of the network's output, and not in a layer.
    """

    phase: str
    position: float
    layer: str
    flax_layer: str
    finding: Finding
    key: tuple[str, int] = NETWORK
    is_between: bool = False


def in_order(found: Sequence[Located]) -> list[Located]:
    """By phase; forward in the order of execution, backward from behind."""
    return sorted(found, key=lambda f: (PHASE_ORDER[f.phase], -f.position if f.phase == "backward" else f.position))
