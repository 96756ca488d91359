"""What a report is made of: where two sides part, and which mistake it is."""

from __future__ import annotations

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
    """

    code: str
    layer: str
    evidence: str
    flax_layer: str = ""


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
