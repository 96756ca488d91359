"""What a module looks like to the bridge: its layers in order, its tensors' shapes, what stands behind a flatten.

Needs neither framework; `sides/torch/layers.py`, `sides/jax/layers.py` and `sides/jax/flattens.py` fill it in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from parity.records.inputs import Inputs
from parity.records.kinds import Shape
from parity.records.recording import Layer, Recording


class Flattened(NamedTuple):
    """What a layer's flat input was before: channels * positions numbers, with the channels in front or last."""

    channels: int
    positions: int
    channels_first: bool


@dataclass
class Structure:
    """A module, or a set of weights.

    Attributes:
      layers: in the order of execution where that is known, else of definition.
      shapes: full name -> shape of every tensor that has to be carried; no counters.
      counters: path of a layer -> full name of its counter of batches.
      flattened: path of a layer -> what its input was before it was flattened.
      feeders: path of a layer -> of the layer whose output it takes as it is; None if no run has shown them.
      ordered: whether the order of the layers means anything.
      tables: full name -> array of what is the module's own: no floating point, or in no collection that is carried.
      unseen: why a run did not show what stands behind a flatten; "" where it did, or nothing can.
      told: what the module makes of its weights before it uses them, which no tensor shows, in sentences.
    """

    layers: list[Layer]
    shapes: dict[str, Shape]
    counters: dict[str, str] = field(default_factory=dict)
    flattened: dict[str, Flattened] = field(default_factory=dict)
    feeders: dict[str, str] | None = None
    ordered: bool = True
    tables: dict[str, Any] = field(default_factory=dict)
    unseen: str = ""
    told: list[str] = field(default_factory=list)


UNSEEN = "no run shows what stands behind a flatten; its weights are carried as if nothing did"
"""What is said of a structure that has `unseen`."""


class Guess(NamedTuple):
    """Inputs that a module may take, in either layout."""

    torch: Inputs
    flax: Inputs


def natural(path: str) -> list[tuple[int, int | str]]:
    """A key to sort names by, in which block_10 comes after block_2."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]


def of_layers(layers: Mapping[str, Layer], variables: Mapping[str, Any]) -> Structure:
    """Layers in the order of their first call, and all their tensors, or these tensors' shapes and dtypes."""
    feeders = {path: layer.feeder for path, layer in layers.items() if layer.feeder is not None}
    return Structure(list(layers.values()), {name: tuple(v.shape) for name, v in variables.items()}, feeders=feeders)


def of_recording(recording: Recording) -> Structure:
    """The layers in the order of their first call; then those that were not called, of which only the tensors count.

    Behind what stopped the run they are taken to be called, in the order of the module's definition. Which layer's
    output goes into which layer as it is, the numbers say.
    """
    called = list(dict.fromkeys(call.path for call in recording.calls))
    layers = [recording.layers[path] for path in called]
    rest = [layer for path, layer in recording.layers.items() if path not in called]
    for layer in rest:
        layer.is_called &= not recording.has_ended  # else it takes part with its tensors only
    feeders = {}
    for i, call in enumerate(recording.calls):
        if call.index == 0 and call.inputs:
            before = (c.path for c in reversed(recording.calls[:i]) if np.array_equal(c.output, call.inputs[0]))
            if (feeder := next(before, None)) is not None:
                feeders[call.path] = feeder
    return Structure(layers + rest, {name: tuple(a.shape) for name, a in recording.tensors.items()}, feeders=feeders)
