"""What a report is made of: where two sides part, and which mistake it is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from bn_common.shown import printable as shown

if TYPE_CHECKING:
    from parity.comparison.shapes import Shapes
    from parity.comparison.values import Values
    from parity.diagnosis.fixes import Fix


class Place(NamedTuple):
    """Where something is, in a layer or between two.

    Attributes:
      torch_layer: PyTorch's dotted name of the layer, or of the module between two; "" where neither has one.
      flax_layer: Flax's path, "a/b"; between two layers: of the one behind, or before the network's output of the last.
      class_name: what PyTorch calls it, "GELU"; "" where that is not known.
      before: between two layers, PyTorch's name of the one behind; `NETWORK` in front of the network's output; "" in a
        layer.
    """

    torch_layer: str
    flax_layer: str = ""
    class_name: str = ""
    before: str = ""

    @property
    def text(self) -> str:
        """In words, with the preposition."""
        named = both_names(self.torch_layer, self.class_name)
        if not self.before:
            return f"at {both_names(self.torch_layer, self.flax_layer)}"
        if self.before == NETWORK:
            last = f"behind {both_names(self.torch_layer, self.flax_layer)}"
            return f"in front of the output, at {named}" if self.class_name else last
        behind = f"in front of {both_names(self.before, self.flax_layer)}"
        return behind if self.torch_layer == self.before else f"{behind}, at {named}"


@dataclass(frozen=True)
class Divergence:
    """The first place where the two sides differ by more than rounding.

    Attributes:
      phase: one of `PHASES`.
      torch_layer: PyTorch's dotted name.
      flax_layer: Flax's path, "a/b".
      error: how far apart, relative; infinite where the shapes differ or a value is not finite.
      bound: what rounding explains.
      quantity: which number of the layer, see `LayerRow`.
      before: between two layers, PyTorch's name of the one behind, see `Place`.
      class_name: of what is between them, see `Place`.
      shapes: of both, where these differ.
    """

    phase: str
    torch_layer: str
    flax_layer: str
    error: float
    bound: float
    quantity: str = ""
    before: str = ""
    class_name: str = ""
    shapes: Shapes | None = None

    @property
    def apart(self) -> str:
        """How far, in words: the error with its bound, or both shapes."""
        if self.shapes is not None:
            return self.shapes.text
        return f"error {number(self.error)}, bound {number(self.bound)}"

    @property
    def place(self) -> Place:
        """Where."""
        return Place(self.torch_layer, self.flax_layer, self.class_name, self.before)

    def is_at(self, row: LayerRow) -> bool:
        """Whether this is the number of that row, which differs."""
        layer = {NETWORK: "", "": self.torch_layer}.get(self.before, self.before)
        flax_layer = "" if self.before == NETWORK else self.flax_layer
        same = (row.phase, row.torch_layer, row.flax_layer) == (self.phase, layer, flax_layer)
        return same and self.quantity in ("", row.quantity) and not row.ok


@dataclass(frozen=True)
class Diagnosis:
    """A known porting mistake, recognised from the numbers.

    Attributes:
      code: which, see `docs/parity_mistakes.md`; or "unexplained".
      layer: PyTorch's name of the layer charged.
      evidence: one sentence with the numbers that show it.
      flax_layer: Flax's path of the layer charged, where there is one.
      more: (PyTorch's name, Flax's path) of the layers behind it of which the same sentence is true.
      places: of it and of those, where more is known of them than their names.
      values: the two numbers that are farthest apart in the first; None where there are none.
      cause: what the same mistake has alike elsewhere, though its numbers are others; None: nothing but its evidence.
      fix: the first's own lines, as they are and as each would be like the other's; None where they are not known.
    """

    code: str
    layer: str
    evidence: str
    flax_layer: str = ""
    more: tuple[tuple[str, str], ...] = ()
    places: tuple[Place, ...] = ()
    values: Values | None = None
    fix: Fix | None = None
    cause: Hashable = None

    @property
    def layers(self) -> list[str]:
        """PyTorch's names of all layers charged."""
        return [self.layer, *(torch_layer for torch_layer, _ in self.more)]

    @property
    def where(self) -> str:
        """All of them, in words: names alone, or where one is between two layers, all with the preposition."""
        if any(place.before for place in self.at):
            return "; ".join(place.text for place in self.at)
        return ", ".join(both_names(*names) for names in ((self.layer, self.flax_layer), *self.more))

    @property
    def at(self) -> tuple[Place, ...]:
        """All places."""
        return self.places or tuple(Place(*names) for names in ((self.layer, self.flax_layer), *self.more))


def together(diagnoses: Iterable[Diagnosis]) -> list[Diagnosis]:
    """One diagnosis for what is the same mistake, in the same words, in several layers; in the order of the first.

    Where the cause is the same and the numbers are not, as a padding by another rule, the others' are told as well.
    """
    same: dict[tuple[str, Hashable], list[Diagnosis]] = {}
    for d in diagnoses:
        same.setdefault((d.code, d.evidence if d.cause is None else (d.cause,)), []).append(d)
    found = []
    for alike in same.values():
        places = dict.fromkeys(place for d in alike for place in d.at)
        first, *more = dict.fromkeys((place.torch_layer, place.flax_layer) for place in places)
        others = {d.evidence: d for d in reversed(alike) if d.evidence != alike[0].evidence}
        told = [f"{d.at[0].text}: {evidence}" for evidence, d in reversed(others.items())]
        more_told = [f"and {len(told) - MOST_ALIKE} more"] if len(told) > MOST_ALIKE else []
        evidence = "; likewise ".join([alike[0].evidence, *told[:MOST_ALIKE], *more_told])
        found.append(
            replace(
                alike[0], layer=first[0], flax_layer=first[1], evidence=evidence, more=tuple(more), places=tuple(places)
            )
        )
    return found


MOST_ALIKE = 3
"""Places whose own numbers are told beside the first's, where one cause has others in each."""


@dataclass(frozen=True)
class LayerRow:
    """One number of one layer, on both sides.

    Attributes:
      phase: one of `PHASES`.
      torch_layer: PyTorch's dotted name.
      flax_layer: Flax's path, "a/b".
      kind: of layer, "conv", "batch_norm", ...
      quantity: "output", "input gradient", "weight gradient", "running_var", ...
      error: in float64, each side on its own, so that errors of the layers before are carried along.
      bound: what rounding explains.
      error32: the difference in float32; None where float32 was not run.
      rounding32: of both sides together, each against itself in float64; None where float32 was not run.
      local_error: in float64 with the other side's input, so that only the layer's own error shows; None where that
        was not run.
      shapes: of both, where these differ; then the error is infinite.
      explained: why it is no mistake, though it differs: `CUT_OTHERWISE` or `ROUNDING`; "" where nothing explains it.
    """

    phase: str
    torch_layer: str
    flax_layer: str
    kind: str
    quantity: str
    error: float
    bound: float
    error32: float | None = None
    rounding32: float | None = None
    local_error: float | None = None
    shapes: Shapes | None = None
    explained: str = ""

    @property
    def ok(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= self.bound

    @property
    def inherited(self) -> bool:
        """Differs, but only by what the layers before (in backward: behind) hand it."""
        return not self.ok and self.local_error is not None and self.local_error <= self.bound


CUT_OTHERWISE = "cut otherwise"
"""Of what lies inside, where the two are the same function all the same."""
ROUNDING = "rounding"
"""Of what is rounding carried along: every layer by itself agrees."""
NETWORK = "(network)"
"""In the place of a layer's name: the network itself, or a module that is a single layer."""


def both_names(torch_layer: str, flax_layer: str) -> str:
    """The layer as PyTorch calls it, and in brackets as Flax does where that is another name."""
    names = [name for name in dict.fromkeys((torch_layer, flax_layer)) if name]
    return shown(f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else NETWORK)


def number(value: float | None) -> str:
    """Two digits: 3.0e-03, 0, inf, nan; nothing for None."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def apart(row: LayerRow, value: float | None) -> str:
    """One of the row's errors in two digits; or that it is none, as the shapes differ."""
    return OTHER_SHAPE if row.shapes is not None and value == math.inf else number(value)


OTHER_SHAPE = "shape"
"""In the place of an error."""


def escaped(text: str) -> str:
    """The text for HTML, with all that is not printable escaped as well."""
    return escape(shown(text))
