"""New networks of Flax's, one for each seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from parity.records.inputs import Inputs
from parity.sides.jax.module import environment
from parity.sides.jax.side import side_of
from parity.sides.module import inner_module
from parity.sides.seed import sown

ALLOWED = (
    "a linen module, a function or class without arguments that makes one, or a function or class of rngs, which is "
    "given nnx.Rngs(seed), that makes an nnx.Module"
)


def new_module(flax: Any, seed: int) -> nn.Module | nnx.Module:
    """A linen module, which draws when it is initialised, or an NNX module that has drawn with this seed.

    Raises:
      TypeError: it is neither, or makes neither.
      ValueError: an NNX module that is made without the seed.
    """
    flax = inner_module(flax)
    if isinstance(flax, nn.Module):
        return flax
    if isinstance(flax, nnx.Module):
        raise ValueError(f"flax is {type(flax).__name__}, an nnx.Module, which draws nothing anew; allowed: {ALLOWED}")
    if not callable(flax):
        raise TypeError(f"flax is {type(flax).__name__}; allowed: {ALLOWED}")
    wanted = _wanted(flax)
    with sown(seed), environment(float64=False):
        rngs = nnx.Rngs(seed)
        by_name = any(p.name == "rngs" and p.kind is not p.POSITIONAL_ONLY for p in wanted)
        module = inner_module(flax() if not wanted else flax(rngs=rngs) if by_name else flax(rngs))
    if isinstance(module, nnx.Module) and not wanted:
        name = getattr(flax, "__name__", repr(flax))
        raise ValueError(f"flax is {name}, which makes an nnx.Module without rngs; allowed: {ALLOWED}")
    if not isinstance(module, nn.Module | nnx.Module):
        raise TypeError(f"flax makes {type(module).__name__}; allowed: {ALLOWED}")
    return module


def _wanted(flax: Any) -> list[inspect.Parameter]:
    """What must be given to make a module, and `rngs`."""
    is_class = isinstance(flax, type)
    if is_class and issubclass(flax, nn.Module):
        return []  # its fields
    # The metaclass of an nnx.Module takes anything.
    every = list(inspect.signature(flax.__init__ if is_class else flax).parameters.values())[int(is_class) :]
    return [
        p
        for p in every
        if p.name == "rngs" or (p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    ]


def drawer(flax: Any, inputs: Inputs, flax_call: Callable | None) -> Callable[[int], dict[str, NDArray[Any]]]:
    """Seed -> the variables of a new network by full name.

    Args:
      flax: see `new_module`.
      inputs: in Flax's layout, which a linen module is initialised on.
      flax_call: see `parity.check`.
    """
    module = new_module(flax, 0)
    if isinstance(module, nnx.Module):
        return lambda seed: _arrays(side_of(new_module(flax, seed), flax_call).initial(inputs, train=False))
    side = side_of(module, flax_call)
    with environment(float64=False):
        given = inputs.mapped(lambda a: jax.numpy.asarray(a))
    # One program for all seeds; the inputs are constants in it, as their shapes alone count.
    compiled = jax.jit(lambda seed: side.initial(given, train=False, seed=seed))

    def draw(seed: int) -> dict[str, NDArray[Any]]:
        with environment(float64=False):
            return _arrays(compiled(seed))

    return draw


def _arrays(variables: dict[str, Any]) -> dict[str, NDArray[Any]]:
    floating = {name: v for name, v in variables.items() if jax.numpy.issubdtype(v.dtype, jax.numpy.floating)}
    return {name: np.asarray(v, np.float32) for name, v in floating.items()}
