"""What a report is made of: where two sides part, and which mistake it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
    """

    phase: str
    torch_layer: str
    flax_layer: str
    error: float
    bound: float
    quantity: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """A known porting mistake, recognised from the numbers.

    Attributes:
      code: which, see `docs/parity_mistakes.md`; or "unexplained".
      layer: PyTorch's name of the layer charged.
      evidence: one sentence with the numbers that show it.
      flax_layer: Flax's path of the layer charged, where there is one.
      more: (PyTorch's name, Flax's path) of the layers behind it of which the same sentence is true.
    """

    code: str
    layer: str
    evidence: str
    flax_layer: str = ""
    more: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> list[str]:
        """PyTorch's names of all layers charged."""
        return [self.layer, *(torch_layer for torch_layer, _ in self.more)]

    @property
    def where(self) -> str:
        """All of them, in words."""
        return ", ".join(both_names(*names) for names in ((self.layer, self.flax_layer), *self.more))


def together(diagnoses: Iterable[Diagnosis]) -> list[Diagnosis]:
    """One diagnosis for what is the same mistake, in the same words, in several layers; in the order of the first."""
    same: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for d in diagnoses:
        same.setdefault((d.code, d.evidence), {}).update(dict.fromkeys([(d.layer, d.flax_layer), *d.more]))
    found = []
    for (code, evidence), places in same.items():
        (layer, flax_layer), *more = places
        found.append(Diagnosis(code, layer, evidence, flax_layer, tuple(more)))
    return found


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

    @property
    def ok(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= self.bound

    @property
    def inherited(self) -> bool:
        """Differs, but only by what the layers before (in backward: behind) hand it."""
        return not self.ok and self.local_error is not None and self.local_error <= self.bound


NETWORK = "(network)"
"""In the place of a layer's name: the network itself, or a module that is a single layer."""


def both_names(torch_layer: str, flax_layer: str) -> str:
    """The layer as PyTorch calls it, and in brackets as Flax does where that is another name."""
    names = [name for name in dict.fromkeys((torch_layer, flax_layer)) if name]
    return f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else NETWORK


def number(value: float | None) -> str:
    """Two digits: 3.0e-03, 0, inf, nan; nothing for None."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
