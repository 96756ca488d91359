"""What stands behind a flatten in a Flax module. Never imports torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.records import kinds
from parity.records.marks import channel_counts, code, read_code
from parity.records.recording import Failure
from parity.records.structure import Flattened, Guess, Structure
from parity.sides.jax.module import Side, environment, shape_of


def flattened(side: Side, structure: Structure, guess: Guess) -> dict[str, Flattened]:
    """Which layers stand behind a flatten, from a run in which every layer's channels are marked."""
    layers = {layer.path: layer for layer in structure.layers if layer.is_called}
    seen: dict[str, Any] = {}

    def intercept(path, call, args, kwargs):
        y = call(*args, **kwargs)
        if path not in layers or not args or not hasattr(y, "ndim"):
            return y
        x = args[0]
        if path not in seen and getattr(x, "ndim", 0) == 2:
            seen[path] = x[0].astype(jnp.float32)
        if y.ndim == 2 and layers[path].kind in kinds.NORMS and x.shape == y.shape:
            return x
        return jnp.broadcast_to(jnp.asarray(code(path, y.shape[-1]), y.dtype), y.shape)

    def run(variables, inputs):
        seen.clear()
        side.apply(variables, inputs, train=False, intercept=intercept, seed=0)
        return dict(seen)

    marked = [
        np.broadcast_to(code(f"input {i}", a.shape[-1]), a.shape) if a.ndim >= 3 and a.dtype.kind == "f" else a
        for i, a in enumerate(guess.flax.arrays())
    ]
    inputs = guess.flax.filled(marked)
    try:
        with environment(float64=False):
            shapes = jax.eval_shape(lambda xs: side.initial(xs, train=False), inputs.mapped(shape_of))
            ones = {name: jnp.ones(v.shape, v.dtype) for name, v in shapes.items()}
            # Compiled: what the marks replace is never computed.
            inputs_by_path = jax.jit(run)(ones, inputs.mapped(jnp.asarray))
    except Exception as error:  # whatever a stranger's module raises
        structure.unseen = f"Flax: {Failure.of(error).error}"
        return {}
    counts = channel_counts(structure.layers, structure.shapes, -1)
    found = {path: read_code(np.asarray(x), counts) for path, x in inputs_by_path.items()}
    return {path: shape for path, shape in found.items() if shape is not None}
