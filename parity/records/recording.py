"""What one framework did in one run: every layer's call, tensors and gradients, as numpy arrays in its own layout.

Both halves (`sides/torch/record.py`, `sides/jax/record.py`) write it, everything else reads it; neither framework
is needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parity.records.kinds import FROZEN


@dataclass
class Layer:
    """A module that holds parameters or statistics of its own.

    Attributes:
      path: PyTorch's dotted name, or Flax's path "a/b"; "" is the root.
      kind: see `parity.records.kinds`.
      class_name: its class.
      tensors: local name ("weight", "query/kernel") -> full name ("conv.0.weight", "params/attn/query/kernel").
      statistics: the local names that are no parameters.
      config: what it says of itself (stride, padding, ...), hints at best.
      feeder: the layer whose output goes into its first call as it is.
      is_called: False for a module whose tensors are used while other layers are called within it (bare parameters).
    """

    path: str
    kind: str
    class_name: str
    tensors: dict[str, str]
    statistics: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    is_called: bool = True
    feeder: str | None = None

    @property
    def is_constant(self) -> bool:
        """Whether it has buffers alone (a table, the mean and deviation of the inputs), and is no norm.

        Such a one takes part with its tensors only; where the other side has them in its code, it has no partner.
        """
        return bool(self.tensors) and set(self.tensors) <= self.statistics and self.kind != "batch_norm"

    @property
    def frozen_tables(self) -> list[str]:
        """Local names of its parameters that PyTorch does not train, where they may be a table: of positions, say."""
        return [name for name in self.config.get(FROZEN, ()) if self.kind in ("embedding", "other")]


@dataclass
class Call:
    """One call of a layer. Gradients are those of the loss: by what goes in, through this layer only, and by y.

    `arrived` is the input as it came; in single-layer mode `inputs` are the other side's, which the layer was given.
    """

    path: str
    index: int
    inputs: list[NDArray]
    output: NDArray
    arrived: list[NDArray] = field(default_factory=list)
    input_gradients: list[NDArray | None] = field(default_factory=list)
    output_gradient: NDArray | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The layer and which of its calls this is."""
        return self.path, self.index


@dataclass
class GlueCall:
    """One call of a module without tensors (activation, pool, dropout, ...), and how many layers were called before.

    `class_names` are those of its class and its ancestors, the most derived first.
    """

    path: str
    class_names: tuple[str, ...]
    position: int


@dataclass(frozen=True)
class Failure:
    """What stopped a run.

    Attributes:
      error: the exception's type and the first line of its message.
      layer: in whose call it was raised; "" outside of all.
      phase: "forward" | "backward".
      cause: the exception itself, where the run was made here.
      hides: the module makes its layers as it is called, so that what is behind this is not known.
    """

    error: str
    layer: str = ""
    phase: str = "forward"
    cause: Exception | None = field(default=None, compare=False, repr=False)
    hides: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, cause: Exception, layer: str = "", phase: str = "forward", *, hides: bool = False) -> Failure:
        """What this exception says."""
        text = str(cause).strip().splitlines()
        said = f"{type(cause).__name__}: {text[0] if text else ''}".removesuffix(": ")
        return cls(said, layer, phase, cause, hides)


@dataclass
class Recording:
    """One run of one side.

    Attributes:
      framework: which.
      layers: by path, in the order of the module's definition.
      calls: in the order of execution.
      glue: modules without tensors, in the order of execution (PyTorch only).
      tensors: parameters and statistics before the run, by full name.
      new_statistics: statistics after it.
      gradients: by the parameters.
      inputs: as given.
      input_gradients: None where an input is no floating point.
      outputs: the numbers of the output, flattened: floating ones, whole and complex ones, truth values.
      output_names: the keys and fields under which each stands, hidden_states.0; "" where it has only a place.
      output_gradients: of the loss; None where an output is no floating point.
      loss: its value, None where there is nothing to differentiate.
      rounds_loss: the loss computes something in float32, whatever the output's dtype: of float32 targets, say.
      rounds_outputs: an output is float32 or less, though the run is in float64: the network computes in it inside.
      failure: what stopped the run before its end; in the backward pass, what the forward pass gave is there.
      dropout_off: a dropout was in it in training, and was switched off.
      dropout_rates: of those that were switched off in training; None where they are not known.
      dropouts: (rate, after how many calls of layers) of each dropout that was active in prediction, and switched off.
    """

    framework: Literal["torch", "flax"]
    layers: dict[str, Layer]
    calls: list[Call] = field(default_factory=list)
    glue: list[GlueCall] = field(default_factory=list)
    tensors: dict[str, NDArray] = field(default_factory=dict)
    new_statistics: dict[str, NDArray] = field(default_factory=dict)
    gradients: dict[str, NDArray] = field(default_factory=dict)
    inputs: list[NDArray] = field(default_factory=list)
    input_gradients: list[NDArray | None] = field(default_factory=list)
    outputs: list[NDArray] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    output_gradients: list[NDArray | None] = field(default_factory=list)
    loss: float | None = None
    rounds_loss: bool = False
    rounds_outputs: bool = False
    failure: Failure | None = None
    dropout_off: bool = False
    dropouts: list[tuple[float, int]] = field(default_factory=list)
    dropout_rates: frozenset[float] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the forward pass came to its end."""
        return self.failure is None or self.failure.phase == "backward"

    @property
    def loses_gradient(self) -> bool:
        """Whether a gradient is infinite or no number, though the outputs are finite."""
        made = [*self.gradients.values(), *(a for a in self.input_gradients if a is not None)]
        fine, gradients_fine = (all(bool(np.isfinite(a).all()) for a in arrays) for arrays in (self.outputs, made))
        return self.failure is None and fine and not gradients_fine

    @property
    def named_outputs(self) -> list[tuple[str, NDArray]]:
        """(name, array) of each output; an older dump has no names."""
        return [*zip(self.output_names or [""] * len(self.outputs), self.outputs, strict=True)]

    def call(self, key: tuple[str, int]) -> Call | None:
        """The call of that layer and index."""
        return next((call for call in self.calls if call.key == key), None)


NETWORK = ("", -1)
"""In the place of a call: the network as a whole."""


PHASES = "initialisation", "forward", "loss", "backward", "statistics", "optimizer"
"""In the order in which they are gone through; an error in one is carried into those behind it. The first is of new
networks, and is asked for by itself; in the others both sides have the same weights."""
