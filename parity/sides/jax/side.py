"""A Flax module of either kind as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax import nnx

from parity.sides.jax.linen import LinenSide
from parity.sides.jax.module import Side, Variables
from parity.sides.jax.nnx import NnxSide, flat_variables
from parity.sides.module import inner_module


def own_variables(module: Any) -> Variables:
    """What a FlaxPreTrainedModel holds beside its module; nothing of others."""
    if inner_module(module) is module:
        return {}
    params = module.params
    return flat_variables(params if "params" in params else {"params": params})


def side_of(module: Any, flax_call: Callable | None = None) -> Side:
    """The module as a function; of a FlaxPreTrainedModel that within it.

    Raises:
      TypeError: neither a linen nor an NNX module.
    """
    module = inner_module(module)
    if isinstance(module, nnx.Module):
        return NnxSide(module, flax_call)
    if isinstance(module, nn.Module):
        return LinenSide(module, flax_call)
    if isinstance(module, type):
        raise TypeError(f"flax_module is the class {module.__name__}; allowed: a module of that class")
    raise TypeError(f"flax_module is {type(module).__name__}; allowed: a flax.linen.Module or flax.nnx.Module")
