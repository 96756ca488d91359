"""Flax's variables as numpy arrays by full name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from parity.records.kinds import as_native
from parity.sides.jax import layers
from parity.sides.jax.module import nested
from parity.sides.jax.nnx import NnxSide
from parity.sides.jax.side import own_variables
from parity.sides.module import inner_module


def checked_module(module: Any) -> nn.Module | nnx.Module:
    """The module; of a FlaxPreTrainedModel that within it. TypeError for what is no Flax module."""
    module = inner_module(module)
    if not isinstance(module, nn.Module | nnx.Module):
        raise TypeError(f"flax_module is {type(module).__name__}; allowed: a flax.linen.Module or nnx.Module")
    return module


def opened(variables: Any) -> tuple[Any, nn.Module | nnx.Module | None]:
    """The variables, and the module that holds them, if one was given in their place.

    Raises:
      TypeError: neither a dict of collections nor an `nnx.State` nor an NNX module.
    """
    if isinstance(variables, nnx.Module):
        return nnx.state(variables), variables
    if (module := inner_module(variables)) is not variables:
        return nested(own_variables(variables)), module
    if not isinstance(variables, Mapping | nnx.State):
        raise TypeError(f"the variables are {type(variables).__name__}; allowed: a dict of collections, an nnx.State")
    return variables, None


def named(variables: Any) -> dict[str, NDArray[Any]]:
    """Flax's variables by full name."""
    return {name: as_native(np.asarray(v)) for name, v in layers.flat_in_order(variables).items()}


def carried(variables: Any) -> dict[str, NDArray[Any]]:
    """Those of them that are carried: parameters and statistics."""
    return {name: a for name, a in named(variables).items() if name.split("/")[0] in layers.CARRIED}


def would_round(array: NDArray) -> bool:
    """Whether JAX would round the array: float64 while jax_enable_x64 is off."""
    return array.dtype == np.float64 and jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype


def packed(module: nn.Module | nnx.Module, arrays: Mapping[str, NDArray], counters: Mapping[str, NDArray]) -> Any:
    """Arrays by full name as a module's variables: {"params": ..., "batch_stats": ...}, or an `nnx.State`.

    Args:
      module: whose they are to be.
      arrays: by full name.
      counters: counts of batches by full name, which are integers.
    """
    leaves = {name: jnp.array(a) for name, a in arrays.items()}
    leaves |= {name: jnp.array(a, jnp.int32) for name, a in counters.items()}
    if isinstance(module, nnx.Module):
        side = NnxSide(module)
        return nnx.from_flat_state(
            [
                (path, v.replace(leaves[side.names[path]]))
                for path, v in side.state.items()
                if side.names[path] in leaves
            ]
        )
    variables = nested(leaves)
    return {collection: variables.get(collection, {}) for collection in ("params", "batch_stats")}
