"""Flax's half of `parity dump`. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from numpy.typing import NDArray

from parity.comparison.forcing import forcing
from parity.comparison.nudging import NOISE_STEP, noise_of, nudged
from parity.pairing.layers import pair
from parity.records.dump_file import Dump
from parity.records.recording import Layer, Recording
from parity.records.structure import of_layers, of_recording
from parity.records.weight_files import read_weights
from parity.sides import jax as flax_side
from parity.sides.jax.module import default_loss


def dump_flax(
    module: Any,
    inputs: Sequence[NDArray],
    *,
    train: bool,
    weights: str | Path | None = None,
    other: Dump | None = None,
    loss: Callable | None = None,
    flax_call: Callable | None = None,
    layer_map: Mapping[str, str] | None = None,
) -> Dump:
    """Record the module on these inputs, see `parity.offline.dump`."""
    side = flax_side.side_of(module, flax_call)
    layers, shapes = flax_side.structure(side, inputs, train=train)

    def run(variables: Mapping[str, Any], arrays: Sequence[NDArray] = inputs, **given: Any) -> Recording:
        # Operation by operation: several runs of the same shapes share what is compiled for each.
        options: dict[str, Any] = {"train": train, "loss": loss or default_loss, "compiled": False} | given
        return flax_side.record(side, layers, variables, arrays, **options)

    with flax_side.environment(float64=False):
        variables = {name: np.asarray(v) for name, v in side.initial(inputs, train=train).items()}
    forced = None
    if other is not None and other.free.framework == "torch":
        variables, forced = _carry(run, layers, variables, other.free, layer_map)
    elif other is not None:
        variables |= _checked(other.free.tensors, shapes, str(weights))
    elif weights is not None:
        variables |= _checked(read_weights(Path(weights)), shapes, str(weights))
    try:
        free = run(variables)
    except Exception:
        if forced is None:
            raise
        free = run(variables, gradients=False)  # as far as it goes with PyTorch's weights
    noise = {}
    if free.failure is None:
        noise = noise_of(free, *(run(variables, nudged(inputs, step)) for step in (NOISE_STEP, -NOISE_STEP)))
    details = {"jax": jax.__version__, "flax": flax.__version__}
    return Dump(free, forced, noise, details | ({} if other is None else {"fed_by": other.sha256}))


def _carry(
    run: Callable,
    layers: dict[str, Layer],
    variables: dict[str, Any],
    other: Recording,
    layer_map: Mapping[str, str] | None,
) -> tuple[dict[str, Any], Recording]:
    """The variables with a PyTorch dump's weights in them; and the run in single-layer mode with these."""
    pairing = pair(of_recording(other), of_layers(layers, variables), layer_map)
    carried = _fitting(pairing.to_flax(other.tensors), variables)
    # Layer by layer on PyTorch's inputs: what is flattened shows in which order it arrives.
    probe = forcing(other, pairing)
    first = run(carried, force=probe, gradients=False)
    probe.translation.settle(first)
    for path, shape in dict(probe.translation.flattens()).items():
        pairing.with_flatten(path, shape)
    carried = _fitting(pairing.to_flax(other.tensors), variables)
    return carried, run(carried, force=probe)


def _fitting(carried: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    return {n: carried[n] if n in carried and np.shape(carried[n]) == np.shape(v) else v for n, v in variables.items()}


def _checked(given: Mapping[str, NDArray], shapes: Mapping[str, Any], name: str) -> Mapping[str, NDArray]:
    problems = [f"lacks {n}" for n in shapes if n not in given]
    problems += [f"has {n} of another shape" for n, v in shapes.items() if n in given and given[n].shape != v.shape]
    problems += [f"has {n}, too" for n in given if n not in shapes]
    if problems:
        raise ValueError(f"--weights {name} {', '.join(problems)}; allowed: those of this module")
    return given
