"""What both halves of `parity dump`, and `parity compare`, have in common. Needs neither framework."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parity.pairing import Pairing, pair_layers
from parity.recording import Layer, Recording
from parity.recording_file import Noise
from parity.trace import NETWORK, Forcing, Translation

NOISE_STEP = 1e-6


def read_weights(path: Path, option: str = "--weights") -> dict[str, NDArray]:
    """Weights by full names from any file that `parity.files` reads.

    Raises:
      ValueError: no such file, or one that can't be read.
    """
    from parity import files

    try:
        return files.load(path).tensors
    except ValueError as error:
        allowed = "" if "allowed:" in str(error) else f"; allowed: {', '.join(files.SUFFIXES)}"
        raise ValueError(f"{option}: {error}{allowed}") from None


def loss_weights(count: int) -> NDArray:
    """The w of the default loss, sum over n of w[n] * (sum over all y in entry n of the first axis of sin(y + 1)).

    It does not ask for the order of y within an entry, so it is the same in either layout; and its gradient,
    w[n] cos(y + 1), differs from number to number.

    Args:
      count: length of the first axis.

    Returns:
      [count], fixed.
    """
    return np.random.default_rng(20150211).normal(size=count)


def pairing_of(torch: Recording, flax: Recording, layer_map: Mapping[str, str] | None = None) -> Pairing:
    """Which layer is which, in the order of execution.

    Raises:
      ValueError: a name in layer_map that is no layer.
    """
    shapes = tuple({name: tuple(a.shape) for name, a in recording.tensors.items()} for recording in (torch, flax))
    return pair_layers(in_order(torch), in_order(flax), (shapes[0], shapes[1]), layer_map)


def in_order(recording: Recording) -> list[Layer]:
    """The layers in the order of their first call; then those that were not called, of which only the tensors count."""
    called = list(dict.fromkeys(call.path for call in recording.calls))
    layers = [recording.layers[path] for path in called]
    rest = [layer for path, layer in recording.layers.items() if path not in called]
    for layer in rest:
        layer.is_called = False  # takes part with its tensors only
    return layers + rest


def translated(torch: Recording, flax: Recording, pairing: Pairing) -> Translation:
    """Decides from both runs in which layout each array goes across, and what stands behind a flatten."""
    translation = Translation(torch, pairing)
    translation.settle(flax)
    for path, shape in dict(translation.flattens()).items():
        pairing.with_flatten(path, shape)
    return translation


def forcing(torch: Recording, pairing: Pairing) -> Forcing:
    """Single-layer mode on the arrays of a dump."""
    return Forcing(Translation(torch, pairing))


def nudged(inputs: Sequence[NDArray], step: float) -> list[NDArray]:
    """Inputs a little larger or smaller, each number by the factor 1 + step or 1 - step."""
    rng = np.random.default_rng(1)
    return [a * (1 + step * rng.choice([-1.0, 1.0], a.shape)) if a.dtype.kind == "f" else a for a in inputs]


def noise_of(base: Recording, plus: Recording, minus: Recording) -> Noise:
    """The rounding of each call, see `parity/noise.py`: from runs on inputs nudged up and down."""
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
