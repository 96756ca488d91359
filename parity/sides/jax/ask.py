"""What an optax transformation answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from parity.records.answers import ProbeError, Run


def run_flax(transform, tree, gradients: NDArray, parameters: NDArray) -> Run:
    """One episode of an optax transformation, from a fresh state."""
    updates, first_state = np.zeros_like(gradients), []
    # Optax itself relies on implicit promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):

        def on_device(flat: NDArray):
            return jax.tree.map(jnp.asarray, tree(flat))

        try:
            state = transform.init(on_device(parameters[0]))
            for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
                update, state = transform.update(on_device(gradient), state, on_device(parameter))
                updates[t] = np.concatenate([np.ravel(np.asarray(u, np.float64)) for u in jax.tree.leaves(update)])
                if t == 0:
                    arrays = (np.ravel(np.asarray(v)) for v in jax.tree.leaves(state))
                    first_state = [a.astype(np.float64) for a in arrays if np.issubdtype(a.dtype, np.floating)]
        except TypeError as error:
            raise ProbeError(f"Flax's optimiser makes no update from gradients alone: {error}") from error
    return Run(updates, first_state, None)
