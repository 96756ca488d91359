"""How much of a dump is rounding: from runs on inputs nudged up and down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.records.dump_file import Noise
from parity.records.recording import NETWORK, Recording

NOISE_STEP = 1e-6


def nudged(inputs: Sequence[NDArray], step: float) -> list[NDArray]:
    """Inputs a little larger or smaller, each number by the factor 1 + step or 1 - step."""
    rng = np.random.default_rng(1)
    return [a * (1 + step * rng.choice([-1.0, 1.0], a.shape)) if a.dtype.kind == "f" else a for a in inputs]


def noise_of(base: Recording, plus: Recording, minus: Recording) -> Noise:
    """The rounding of each call, see `parity/comparison/rounding.py`: from runs on inputs nudged up and down."""
    runs = [dict(_by_place(recording)) for recording in (base, plus, minus)]
    largest: dict[str, float] = {}
    for (phase, *_), a in runs[0].items():
        largest[phase] = max(largest.get(phase, 0.0), float(np.abs(a).max(initial=0.0)))
    found: Noise = {}
    for place, a in runs[0].items():
        up, down = (run.get(place) for run in runs[1:])
        size = np.abs(a).max(initial=0.0)
        if a.dtype.kind != "f" or up is None or down is None or up.shape != a.shape or down.shape != a.shape:
            continue
        # What is 0 but for rounding (a bias's gradient before a batch norm) says nothing of the rest of its layer.
        if not size > 1e-6 * largest[place[0]]:
            continue
        value = float(np.abs((up + down) / 2 - a).max(initial=0.0) / size)
        if np.isfinite(value):
            found[place[:2]] = max(value, found.get(place[:2], 0.0))
    return found


def _by_place(recording: Recording) -> Iterator[tuple[tuple, NDArray]]:
    for call in recording.calls:
        yield ("forward", call.key, "output"), call.output
        yield from ((("forward", call.key, i), a) for i, a in enumerate(call.arrived))
        gradients = (call.output_gradient, *call.input_gradients)
        yield from ((("backward", call.key, i), g) for i, g in enumerate(gradients) if g is not None)
    yield from ((("forward", NETWORK, i), a) for i, a in enumerate(recording.outputs))
    for phase, named in (("backward", recording.gradients), ("statistics", recording.new_statistics)):
        for layer in recording.layers.values():
            yield from (
                ((phase, (layer.path, 0), full), named[full]) for full in layer.tensors.values() if full in named
            )
