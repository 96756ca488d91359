"""Which way round a hand-written linear layer of Flax's keeps its matrix. Never imports torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from parity.records import trees
from parity.records.kinds import Shape
from parity.sides.jax.module import Side, environment, flag_of, is_array, nested
from parity.sides.jax.nnx import NnxSide

LOG = logging.getLogger(__name__)

ROUNDED = 0.05
"""Of the largest value: bfloat16 rounds by less, and a product with the transposed matrix is all off."""


def is_out_in(side: Side, path: str, module: Any, shapes: Mapping[str, Shape]) -> bool:
    """Whether a hand-written linear layer keeps its matrix as [out, in], by what it makes of random numbers.

    Args:
      side: whose module the layer is in.
      path: of the layer.
      module: the layer, as it is called.
      shapes: of its tensors, by their local names.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if module is None or len(matrices) != 1 or len(shapes) > 2 or _is_the_librarys(type(module)):
        return False
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    matrix = tensors[matrices[0]]
    shift = sum(a for name, a in tensors.items() if name != matrices[0])
    x = rng.normal(size=(3, matrix.shape[1])).astype(np.float32)
    try:
        with jax.ensure_compile_time_eval(), environment(float64=False):
            found = trees.first(_called(side, path, module, tensors, x), is_array)
            y = np.zeros(()) if found is None else np.asarray(found[1], np.float32)
    except Exception as error:  # whatever a stranger's module raises: then it is no such layer
        LOG.info("%s takes no [3, %d]: %s", type(module).__name__, matrix.shape[1], error)
        return False
    expected = x @ matrix.T + shift
    return y.shape == expected.shape and bool(np.abs(y - expected).max() <= ROUNDED * np.abs(expected).max())


def _is_the_librarys(kind: type) -> bool:
    own = next(c for c in kind.__mro__ if "__call__" in vars(c))
    return own.__module__.split(".")[0] == "flax"


def _called(side: Side, path: str, module: Any, tensors: Mapping[str, NDArray], x: NDArray) -> Any:
    """What the layer makes of x with these tensors, outside of its network."""
    flags = flag_of(type(module).__call__, False)
    if not isinstance(side, NnxSide):
        alone = module.clone(parent=None, name=None)
        return alone.apply({"params": nested(tensors)}, x, **flags, rngs={"params": jax.random.key(0)})
    whole = side.module_with({})
    alone = next(child for at, child in nnx.iter_modules(whole) if "/".join(map(str, at)) == path)
    for name, a in tensors.items():
        getattr(alone, name).set_value(jax.numpy.asarray(a))
    return alone(x, **flags)
