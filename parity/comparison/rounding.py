"""How much of a float64 run is rounding: a layer may compute in float32 inside, and that is no mistake.

The measure is the second difference, (y(x + h) + y(x - h)) / 2 - y(x): of a smooth function of the order of h^2, while
whatever is rounded to float32 on the way moves by jumps of an ulp, 1e-7, whatever h is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.differences import Difference
from parity.pairing.translation import Translation
from parity.records.recording import NETWORK, Recording

STEP = 1e-6


class Noise:
    """The rounding of each call on both sides, relative to the largest value of its arrays.

    Args:
      torch_run, flax_run: run a side again, with `inputs=` and all parameters changed by `nudge=`.
      torch, flax: the runs to measure around.
      translation: which layer is which.
      torch_inputs, flax_inputs: of these runs.
    """

    def __init__(
        self,
        torch_run: Callable[..., Recording],
        flax_run: Callable[..., Recording],
        torch: Recording,
        flax: Recording,
        translation: Translation,
        torch_inputs: Sequence[NDArray],
        flax_inputs: Sequence[NDArray],
    ) -> None:
        path = {pair.flax.path: pair.torch.path for pair in translation.pairing.layers}
        self.measured: dict[tuple[str, tuple[str, int]], float] = {}
        sides: list[tuple] = [(torch, torch_run, torch_inputs, {})]
        if flax.failure is None:
            sides.append((flax, flax_run, flax_inputs, path))
        for base, run, inputs, names in sides:
            nudged = [run(float64=True, inputs=_nudged(inputs, step), nudge=step) for step in (STEP, -STEP)]
            sizes = _largest(base)
            for which, a, plus, minus in zip(*(list(x) for x in _columns(base, *nudged)), strict=True):
                if a is None or a.shape != plus.shape or a.dtype.kind != "f":
                    continue
                # A gradient that is 0 by cancellation is nothing but rounding.
                size = max(float(np.abs(a).max(initial=0)), 1e-6 * sizes[which[0]])
                noise = float(np.abs((plus + minus) / 2 - a).max(initial=0) / size) if size else 0.0
                if not np.isfinite(noise):
                    continue
                key = (which[0], (names.get(which[1], which[1]), which[2]))
                self.measured[key] = max(self.measured.get(key, 0.0), noise)

    def of(self, d: Difference) -> float:
        """The rounding where this difference was found."""
        phase = {"loss": "backward"}.get(d.phase, d.phase)
        return self.measured.get((phase, d.key), max(self.measured.values(), default=0.0))


def rounding(rough: Recording, exact: Recording, names: dict[str, str]) -> dict[tuple[str, tuple[str, int]], float]:
    """By phase and call, how far a float32 run is from the same side's float64 run, relative to the largest value.

    Args:
      rough: the float32 run.
      exact: the float64 run.
      names: other names for the layers.
    """
    sizes, exact_arrays = _largest(exact), dict(_arrays(exact))
    found: dict[tuple[str, tuple[str, int]], float] = {}
    for which, a in _arrays(rough):
        b = exact_arrays.get(which)
        if b is None or a.shape != b.shape or a.dtype.kind != "f":
            continue
        size = max(float(np.abs(b).max(initial=0)), 1e-6 * sizes[which[0]])
        key = (which[0], (names.get(which[1], which[1]), which[2]))
        error = float(np.abs(a - b).max(initial=0) / size) if size else 0.0
        found[key] = max(found.get(key, 0.0), error)
    return found


def _largest(recording: Recording) -> dict[str, float]:
    """By phase, the largest value of all arrays."""
    sizes = {"forward": 0.0, "backward": 0.0, "statistics": 0.0}
    for key, a in _arrays(recording):
        sizes[key[0]] = max(sizes[key[0]], float(np.abs(a[np.isfinite(a)]).max(initial=0)))
    return sizes


def _nudged(inputs: Sequence[NDArray], step: float) -> list[NDArray]:
    signs = np.random.default_rng(1)
    return [
        a * (1 + step * signs.choice([-1.0, 1.0], a.shape)) if (a := np.asarray(v)).dtype.kind == "f" else a
        for v in inputs
    ]


def nudged(variables: Mapping[str, Any], step: float) -> dict[str, Any]:
    """Flax's variables, every parameter changed by `step` of its size, up or down."""

    def moved(v: Any) -> NDArray:
        a = np.asarray(v, np.float64)
        return a * (1 + step * (np.arange(a.size).reshape(a.shape) % 2 * 2 - 1))

    return {n: moved(v) if n.startswith("params/") else v for n, v in variables.items()}


def _columns(base: Recording, plus: Recording, minus: Recording) -> Iterator[list]:
    rows = [dict(_arrays(r)) for r in (base, plus, minus)]
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    yield [key[:3] for key in keys]
    for row in rows:
        yield [row[key] for key in keys]


def _arrays(r: Recording) -> Iterator[tuple[tuple, NDArray]]:
    for call in r.calls:
        yield ("forward", *call.key, "y"), call.output
        for i, a in enumerate(call.arrived):
            yield ("forward", *call.key, i), a
        for i, g in enumerate((call.output_gradient, *call.input_gradients)):
            if g is not None:
                yield ("backward", *call.key, i), g
    for i, a in enumerate(r.outputs):
        yield ("forward", *NETWORK, i), a
    for layer in r.layers.values():
        for full in layer.tensors.values():
            if full in r.gradients:
                yield ("backward", layer.path, 0, full), r.gradients[full]
            if full in r.new_statistics:
                yield ("statistics", layer.path, 0, full), r.new_statistics[full]
