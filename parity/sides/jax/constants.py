"""The numbers that a Flax module's code brings with it: what is computed neither of variables nor of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend
import numpy as np
from numpy.typing import NDArray

from parity.records.inputs import Inputs
from parity.sides.jax.module import (
    Side,
    dropout_rate,
    environment,
    is_floating,
    lifted,
    numbers,
    without_attention_dropout,
)

UNKNOWN = object()
OPENED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
"""Primitives that only call a program with their own arguments, one by one."""


def constants(side: Side, variables: Mapping[str, Any], inputs: Inputs, *, train: bool, float64: bool) -> list[NDArray]:
    """The floating constants where they meet what is not constant, in the order of the program; tables and factors.

    Args:
      side: the module as a function.
      variables: flat.
      inputs: in Flax's layout.
      train: train or eval mode; dropout is off.
      float64: computed in float64; else in the module's own dtype.

    Raises:
      Exception: whatever the module raises.
    """

    def intercept(path, call, args, kwargs):
        return call(*args, **kwargs) if dropout_rate(call.module, args, kwargs, train=train) is None else args[0]

    with environment(float64=float64), without_attention_dropout():
        every = {name: lifted(v, float64=float64) for name, v in variables.items()}
        call = inputs.mapped(partial(lifted, float64=float64))

        def run(every, arrays):
            output, _ = side.apply(every, call.filled(arrays), train=train, intercept=intercept, seed=0)
            return [v for _, v in numbers(output)]

        try:
            program = jax.make_jaxpr(run)(every, call.arrays())
        except jax.errors.JAXTypeError:
            return []  # it looks at the values of its arrays and has no program
        found: list[NDArray] = []
        _walk(program.jaxpr, program.consts, [UNKNOWN] * len(program.jaxpr.invars), found)
    return found


def _walk(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: list[NDArray]) -> list[Any]:
    """What the program's results are: a value where it is constant, else UNKNOWN."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def value(v: Any) -> Any:
        return v.val if isinstance(v, jax.extend.core.Literal) else known[v]

    for equation in jaxpr.eqns:
        given = [value(v) for v in equation.invars]
        if not any(a is UNKNOWN for a in given):
            names = dict.fromkeys(v for v in equation.invars if not isinstance(v, jax.extend.core.Literal))
            alone = jaxpr.replace(eqns=[equation], constvars=[], invars=[*names], outvars=equation.outvars)
            results = jax.core.eval_jaxpr(alone, [], *(known[v] for v in names))
        elif (inner := _inner(equation)) is not None:
            results = _walk(inner.jaxpr, inner.consts, given, found)
        else:
            found += [np.asarray(a) for a in given if a is not UNKNOWN and is_floating(a)]
            results = [UNKNOWN] * len(equation.outvars)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _inner(equation: Any) -> Any:
    """The program that is called, where it takes the arguments one by one."""
    if equation.primitive.name not in OPENED:
        return None
    inside = [v for v in equation.params.values() if hasattr(v, "jaxpr") and hasattr(v, "consts")]
    fits = len(inside) == 1 and len(inside[0].jaxpr.invars) == len(equation.invars)
    return inside[0] if fits else None
