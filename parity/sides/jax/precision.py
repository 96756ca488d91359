"""Whether a function of JAX's computes in float32 though it is given float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Copies of numbers, and numbers that float32 holds exactly: nothing is rounded.
EXACT = frozenset((
    "abs", "argmax", "argmin", "broadcast_in_dim", "concatenate", "dynamic_slice", "eq", "expand_dims", "gather",
    "ge", "gt", "iota", "le", "lt", "max", "min", "ne", "neg", "pad", "reduce_max", "reduce_min", "reshape", "rev",
    "select_n", "sign", "slice", "squeeze", "stop_gradient", "transpose",
))  # fmt: skip
HALF_OR_FLOAT32 = (np.float32, np.float16, jax.numpy.bfloat16)


def rounds(function: Callable, *args: Any) -> bool:
    """Whether its program, traced on these arguments, rounds to float32 or less somewhere.

    Of a constant in float32 that is only widened nothing is rounded.

    Raises:
      Exception: whatever the function raises.
    """
    return _rounds(jax.make_jaxpr(function)(*args).jaxpr)


def _rounds(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        inside = [j for value in equation.params.values() for j in _jaxprs(value)]
        if inside:
            if any(_rounds(j) for j in inside):
                return True
        elif equation.primitive.name not in EXACT and any(_is_short(v) for v in equation.outvars):
            source = equation.invars[0].aval.dtype if equation.primitive.name == "convert_element_type" else None
            # A whole number, or a shorter number, is exact in float32 as far as it is of a usual size.
            if source is None or source == np.float64:
                return True
    return False


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def _is_short(variable: Any) -> bool:
    return getattr(variable.aval, "dtype", None) in HALF_OR_FLOAT32
