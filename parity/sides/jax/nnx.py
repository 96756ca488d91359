"""An NNX module as a function of a flat dict of arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_common.checks import require
from parity.records.kinds import as_native, is_too_wide
from parity.sides.jax.module import Intercept, Variables, call_flax_call, flag_of, flat, lift_layer, named_call, opened

PATH = "path_in_parity"


class NnxSide:
    """An NNX module: it holds its variables; every call is on a copy."""

    def __init__(self, module: nnx.Module, flax_call: Callable | None = None) -> None:
        self.flax_call, self.is_opened, self.lifts = flax_call, False, False
        self.tables: list[str] = []
        self.turns: frozenset[int] = frozenset()
        self.made: Variables = {}  # `initial` calls nothing that may raise
        _refuse_weight_norm(module)
        self.graph, state = nnx.split(module)
        leaves = dict(nnx.to_flat_state(state))
        # An array that is an attribute, such as a table of frequencies, is trained by nobody: it stays as it is.
        self.constants = {path: v for path, v in leaves.items() if not isinstance(v, nnx.Variable)}
        self.state = {path: v for path, v in leaves.items() if path not in self.constants}
        self.names = {path: _nnx_name(path, variable) for path, variable in self.state.items()}

    def module_with(self, variables: Variables) -> nnx.Module:
        """A new module that holds these variables."""
        leaves = [
            # Made anew also where nothing changes: a variable may only be written to where it was made.
            (path, v.replace(variables.get(self.names[path], _value(v))))
            for path, v in self.state.items()
        ]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves + list(self.constants.items())))

    def apply(self, variables, inputs, *, train, intercept, seed):
        """See `Side`."""
        module = self.module_with(variables)
        (module.train if train else module.eval)()
        if self.lifts and jnp.result_type(float) == jnp.float64:
            for _, child in nnx.iter_modules(module):
                lift_layer(child)
        flags = flag_of(type(module).__call__, train)  # before it is exchanged
        with opened(self.is_opened, self.turns), _patched(module, intercept):
            if self.flax_call is not None:
                nested = nnx.state(module)
                out = call_flax_call(self.flax_call, module, nested, inputs, train)
            else:
                out = module(*inputs.args, **{**inputs.keywords, **flags})
        after = dict(nnx.to_flat_state(nnx.state(module)))
        statistics = {
            name: _value(after[path])
            for path, name in self.names.items()
            if path in after and name in variables and not name.startswith("params/")
        }
        return out, statistics

    def initial(self, inputs, *, train, seed=0):
        """See `Side`."""
        return {self.names[path]: _value(v) for path, v in self.state.items() if not _is_random(v)}


def _refuse_weight_norm(module: nnx.Module) -> None:
    """Raise ValueError where an `nnx.WeightNorm` stands: its scales are arrays, into which nothing is carried."""
    kind = getattr(nnx, "WeightNorm", ())
    found = [".".join(map(str, path)) for path, child in nnx.iter_modules(module) if isinstance(child, kind)]
    if found:
        names = ", ".join(name or "the module itself" for name in found)
        raise ValueError(f"nnx.WeightNorm stands at {names}; allowed: linen's, or the layer without it")


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _nnx_name(path: tuple, variable: Any) -> str:
    kind = getattr(variable, "type", type(variable))
    collection = (
        "params" if issubclass(kind, nnx.Param) else "batch_stats" if issubclass(kind, nnx.BatchStat) else kind.__name__
    )
    return "/".join((collection, *map(str, path)))


def nnx_state(state: Any) -> Variables:
    """An `nnx.State` as a flat dict, without arrays that are no variables."""
    leaves = nnx.to_flat_state(state)
    return {_nnx_name(p, v): _value(v) for p, v in leaves if isinstance(v, nnx.Variable) and not _is_random(v)}


def flat_variables(variables: Any) -> Variables:
    """A linen module's variables, an `nnx.State` or the NNX module that has it, as a flat dict of numpy arrays."""
    variables = nnx.state(variables) if isinstance(variables, nnx.Module) else variables
    given = nnx_state(variables) if isinstance(variables, nnx.State) else flat(variables)
    # Off whatever device they are on: the float64 run is the CPU's.
    arrays = {
        name: v if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else as_native(np.asarray(v))
        for name, v in given.items()
    }
    for name, a in arrays.items():
        require(not (isinstance(a, np.ndarray) and is_too_wide(a.dtype)), name, a.dtype, "numbers of up to 64 bits")
    return arrays


def _is_random(variable: Any) -> bool:
    """Whether it is the state of a random number generator: no variable of the network, it stays in the module."""
    return issubclass(getattr(variable, "type", type(variable)), nnx.RngState)


@contextlib.contextmanager
def _patched(module: nnx.Module, intercept: Intercept) -> Iterator[None]:
    """Calls of the layers in `module` go through `intercept`: the classes' `__call__` is exchanged for a while.

    Each has its path as an attribute: NNX's transformations call copies.
    """
    for path, child in nnx.iter_modules(module):
        setattr(child, PATH, "/".join(map(str, path)))
    kept: dict[Any, Any] = {}
    inside: list[int] = []

    def exchange(kind: Any) -> None:
        original = kind.__call__

        def patched(self, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, PATH) or id(self) in inside:
                return original(self, *args, **kwargs)
            inside.append(id(self))
            try:
                call = named_call(lambda *a, **k: original(self, *a, **k), self)
                return intercept(getattr(self, PATH), call, args, kwargs)
            finally:
                inside.pop()

        kept[kind] = kind.__dict__.get("__call__")
        kind.__call__ = patched

    try:
        for _, child in nnx.iter_modules(module):
            if callable(child) and type(child) not in kept:
                exchange(type(child))
        yield
    finally:
        for kind, function in kept.items():
            if function is None:
                del kind.__call__
            else:
                kind.__call__ = function
