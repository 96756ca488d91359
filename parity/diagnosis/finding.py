"""What an identification finds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from parity.diagnosis.fixes import Fix
from parity.diagnosis.mistakes import MISTAKES, UNEXPLAINED
from parity.records.recording import NETWORK, PHASES

if TYPE_CHECKING:
    from parity.diagnosis.between.cuts import Cut


class Pads(NamedTuple):
    """What each side pads at stride 1.

    Attributes:
      torch, flax: before and behind, and how far the kernel reaches beyond one position, axis by axis.
    """

    torch: tuple[tuple[int, int, int], ...]
    flax: tuple[tuple[int, int, int], ...]

    def without(self, torch: Sequence[tuple[int, int]], flax: Sequence[tuple[int, int]]) -> Pads:
        """Less what either side leaves out of the result, before and behind, axis by axis."""
        sides = (self.torch, torch), (self.flax, flax)
        return Pads(*(tuple((a - c, b - d, n) for (a, b, n), (c, d) in zip(*side, strict=True)) for side in sides))

    @property
    def rule(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """The same in parts of the reach: one rule has many numbers, a pair for each dilation and each size."""
        return tuple(tuple((a / (n or 1), b / (n or 1)) for a, b, n in side) for side in self)


@dataclass(frozen=True)
class Finding:
    """One known mistake, recognised at one place, or what is not explained there.

    Attributes:
      code: which mistake, one of `mistakes.TABLE`; or "unexplained".
      evidence: one sentence with the numbers that show it.
      charges: what is charged where it lies between two layers, see `mistakes.Mistake`; of a mistake it is the table's.
      fix: the lines of both sides as they are, and as each would be like the other, where the numbers say them.
      pads: of a `padding`, what either side pads, where it is known.
      cut: of a `padding`, which positions of what a layer gives either side leaves out, where one does.
      like: of a `padding`, the one of the same rule of which it is known what is left out behind it.

    Raises:
      ValueError: a code that is not in the table.
    """

    code: str
    evidence: str
    charges: str = ""
    fix: Fix | None = None
    pads: Pads | None = None
    cut: tuple[Cut, Cut] | None = None
    like: Finding | None = None

    @property
    def cause(self) -> Hashable:
        """What two findings of one mistake have alike, though their numbers differ; None: they must be the same."""
        if self.like is not None:
            return self.like.cause
        ends = None if self.cut is None else tuple(tuple(map(bool, (*cut.first, *cut.last))) for cut in self.cut)
        return None if self.pads is None and ends is None else (self.pads and self.pads.rule, ends)

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
