"""How much of a float64 run is rounding: a layer may compute in float32 inside, and that is no mistake.

The measure is the second difference, (y(x + h) + y(x - h)) / 2 - y(x), of runs on inputs and parameters nudged up and
down: of a smooth function of the order of h^2, while whatever is rounded to float32 on the way moves by jumps of an
ulp, 1e-7, whatever h is. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.records.evidence import Noise
from parity.records.kinds import is_floating
from parity.records.recording import NETWORK, Recording

STEP = 1e-6
# So many times the measured rounding are allowed: it is that of one step, and another step rounds otherwise.
MARGIN = 30
# What is 0 but for rounding (a bias's gradient before a batch norm) says nothing of the rest of its layer.
SMALL = 1e-6


def noise_of(base: Recording, plus: Recording, minus: Recording) -> Noise:
    """The rounding of each phase and call, relative to the largest value of its arrays.

    Args:
      base: the run to measure around.
      plus: with inputs and parameters nudged by `STEP`.
      minus: with these nudged by -`STEP`.
    """
    runs = [dict(_arrays(recording)) for recording in (base, plus, minus)]
    largest = _largest(base)
    found: Noise = {}
    for place, a in runs[0].items():
        up, down = (run.get(place) for run in runs[1:])
        size = np.abs(a).max(initial=0.0)
        if a.dtype.kind != "f" or up is None or down is None or up.shape != a.shape or down.shape != a.shape:
            continue
        if not size > SMALL * largest[place[0]]:
            continue
        with np.errstate(invalid="ignore"):  # infinities, of which nothing is measured
            value = float(np.abs((up + down) / 2 - a).max(initial=0.0) / size)
        if np.isfinite(value):
            found[place[:2]] = max(value, found.get(place[:2], 0.0))
    return found


def explained(phase: str, *sides: tuple[Noise, tuple[str, int]]) -> float:
    """What the rounding measured on either side explains; at a place where none was measured, the largest there is.

    Args:
      phase: of what is compared.
      *sides: (what was measured, the side's own call).
    """
    found = 0.0
    for noise, key in sides:
        usual = max((v for (p, _), v in noise.items() if p != "optimizer"), default=0.0)
        found = max(found, noise.get((phase, key), usual))
    return MARGIN * found


def rounding(rough: Recording, exact: Recording) -> Noise:
    """By phase and call, how far a float32 run is from the same side's float64 run, relative to the largest value.

    Args:
      rough: the float32 run.
      exact: the float64 run.
    """
    sizes, exact_arrays = _largest(exact), dict(_arrays(exact))
    found: Noise = {}
    for place, a in _arrays(rough):
        b = exact_arrays.get(place)
        if b is None or a.shape != b.shape or a.dtype.kind != "f":
            continue
        size = max(float(np.abs(b).max(initial=0)), SMALL * sizes[place[0]])
        error = float(np.abs(a - b).max(initial=0) / size) if size else 0.0
        found[place[:2]] = max(found.get(place[:2], 0.0), error)
    return found


def nudged(inputs: Sequence[NDArray], step: float) -> list[NDArray]:
    """Inputs a little larger or smaller, each number by the factor 1 + step or 1 - step."""
    rng = np.random.default_rng(1)
    return [a * (1 + step * rng.choice([-1.0, 1.0], a.shape)) if a.dtype.kind == "f" else a for a in inputs]


def nudged_variables(variables: Mapping[str, Any], step: float) -> dict[str, Any]:
    """Flax's variables, every parameter changed by `step` of its size, up or down."""

    def moved(v: Any) -> NDArray:
        a = np.asarray(v, np.float64)
        return a * (1 + step * (np.arange(a.size).reshape(a.shape) % 2 * 2 - 1))

    return {n: moved(v) if n.startswith("params/") and is_floating(np.asarray(v)) else v for n, v in variables.items()}


def _largest(recording: Recording) -> dict[str, float]:
    """By phase, the largest value of all arrays."""
    sizes = {"forward": 0.0, "backward": 0.0, "statistics": 0.0}
    for (phase, *_), a in _arrays(recording):
        sizes[phase] = max(sizes[phase], float(np.abs(a[np.isfinite(a)]).max(initial=0)))
    return sizes


def _arrays(recording: Recording) -> Iterator[tuple[tuple, NDArray]]:
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
