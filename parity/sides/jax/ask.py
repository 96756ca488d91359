"""What an optax transformation answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from numpy.typing import NDArray

from parity.records.answers import ProbeError, Response, Run, ask
from parity.sides.jax.precision import rounds

LOG = logging.getLogger(__name__)


def answers(
    transform: Any, shapes: Mapping[str, tuple[int, ...]], serials: Mapping[str, NDArray] | None = None
) -> dict[str, Response]:
    """What the transformation answers for each of these parameters.

    Args:
      transform: optax's `GradientTransformation`, of which every episode has a fresh state.
      shapes: of the parameters by path, "params/a/b".
      serials: of some of them, the serial numbers of the elements that they correspond to on the other side.

    Raises:
      ProbeError: it cannot be asked.
    """
    known = {name: a for name, a in (serials or {}).items() if name in shapes and a.shape == tuple(shapes[name])}
    # As JAX orders a tree's leaves.
    paths = {name: tuple(name.removeprefix("params/").split("/")) for name in shapes}
    order = sorted(shapes, key=paths.__getitem__)
    every = {name: known.get(name, np.arange(math.prod(shapes[name])).reshape(shapes[name])) for name in order}
    offsets = np.cumsum([0, *(a.size for a in every.values())])

    def tree(flat: NDArray) -> Any:
        parts = zip(order, offsets[:-1], offsets[1:], strict=True)
        return unflatten_dict({paths[n]: jnp.asarray(flat[a:b].reshape(shapes[n])) for n, a, b in parts})

    return ask(every, lambda gradients, parameters: _run(transform, tree, gradients, parameters), whole_state=False)


def check_transform(transform: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError for a transformation that makes no update from gradients alone, as one that wants the loss."""
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    tree = unflatten_dict({tuple(name.removeprefix("params/").split("/")): v for name, v in tree.items()})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = jax.eval_shape(transform.init, tree)
        try:
            jax.eval_shape(transform.update, tree, state, tree)
        except TypeError as error:
            told = f"TypeError: {' '.join(str(error).split())}"
            allowed = "one that makes an update from gradients alone"
            raise ValueError(
                f"optimizers has a transformation of optax's that says {told}; allowed: {allowed}"
            ) from error


def is_float32_inside(transform: Any, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether it computes something in float32 though its gradients and parameters are float64: by its program."""
    tree = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in shapes.items()}
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            state = jax.eval_shape(transform.init, tree)
            return rounds(transform.update, tree, state, tree)
        except Exception as error:  # whatever a stranger's transformation raises: its steps will tell
            LOG.info("the optimiser has no program: %s", error)
            return False


def _run(transform: Any, tree: Any, gradients: NDArray, parameters: NDArray) -> Run:
    """One episode, from a fresh state."""
    updates, first_state = np.zeros_like(gradients), []
    # Optax itself relies on implicit promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            state = transform.init(tree(parameters[0]))
            for t, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
                update, state = transform.update(tree(gradient), state, tree(parameter))
                updates[t] = np.concatenate([np.ravel(np.asarray(u, np.float64)) for u in jax.tree.leaves(update)])
                if t == 0:
                    arrays = (np.ravel(np.asarray(v)) for v in jax.tree.leaves(state))
                    first_state = [a.astype(np.float64) for a in arrays if np.issubdtype(a.dtype, np.floating)]
        except TypeError as error:
            raise ProbeError(f"Flax's optimiser makes no update from gradients alone: {error}") from error
    return Run(updates, first_state, None)
