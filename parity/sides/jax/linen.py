"""A linen module as a function of a flat dict of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from parity.sides.jax.module import (
    FLAGS,
    Intercept,
    Variables,
    call_flax_call,
    flag_of,
    flat,
    lift_layer,
    named_call,
    nested,
    opened,
)


def _rngs(seed: int) -> dict[str, Array]:
    return {name: jax.random.key(seed + i) for i, name in enumerate(("params", "dropout", "default"))}


class LinenSide:
    """A linen module: its variables are given with every call."""

    def __init__(self, module: nn.Module, flax_call: Callable | None = None) -> None:
        self.module, self.flax_call, self.is_opened, self.lifts = module, flax_call, False, False
        self.tables: list[str] = []
        self.turns: frozenset[int] = frozenset()
        self.made: Variables = {}

    def _bound(self, train: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The module and the keywords of its call. A flag that is set as an attribute is set there."""
        flags = flag_of(type(self.module).__call__, train)
        attributes = {
            name: train != opposite
            for name, opposite in FLAGS.items()
            if name in getattr(type(self.module), "__dataclass_fields__", {})
        }
        set_before: dict[str, Any] = {
            name: v for name, v in attributes.items() if name not in flags or getattr(self.module, name) is not None
        }
        module = self.module.clone(**set_before) if set_before else self.module
        return module, {name: v for name, v in flags.items() if name not in set_before}

    def apply(self, variables, inputs, *, train, intercept, seed):
        """See `Side`."""
        given = nested(variables)
        mutable = sorted({"batch_stats", *given} - {"params"})
        lifts = self.lifts and jnp.result_type(float) == jnp.float64
        interceptor = linen_interceptor(intercept, lifts=lifts)
        with opened(self.is_opened, self.turns), nn.intercept_methods(interceptor):
            if self.flax_call is not None:
                out = call_flax_call(self.flax_call, self.module, given, inputs, train)
            else:
                module, flags = self._bound(train)
                options = {**inputs.keywords, **flags}
                out = module.apply(given, *inputs.args, **options, rngs=_rngs(seed), mutable=mutable)
        updated: Mapping[str, Any] = {}
        if self.flax_call is None or _is_pair_with_state(out, given):
            out, updated = out
        kept = {name: v for name, v in variables.items() if not name.startswith("params/")}
        return out, kept | {name: v for name, v in flat(updated).items() if not name.startswith("params/")}

    def initial(self, inputs, *, train, seed=0):
        """See `Side`."""
        self.made = {}
        with opened(self.is_opened, self.turns), nn.intercept_methods(self._keeping_what_is_made):
            if self.flax_call is not None:
                proxy: Any = _Initialising(self.module, seed)
                call_flax_call(self.flax_call, proxy, {}, inputs, train)
                return flat(proxy.variables)
            module, flags = self._bound(train)
            return flat(module.init(_rngs(seed), *inputs.args, **{**inputs.keywords, **flags}))

    def _keeping_what_is_made(self, call, args, kwargs, context):
        try:
            return call(*args, **kwargs)
        except Exception:
            if context.module.scope is not None:  # the outermost module, which comes last, has all
                self.made = flat(context.module.scope.root.variables())
            raise


class _Initialising:
    """Stands in for a module in the user's `flax_call`: `apply` initialises, so that the variables become known."""

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._module = module
        self._seed = seed
        self.variables: Any = {}

    def apply(self, variables: Any, *args: Any, rngs: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
        output, self.variables = self._module.init_with_output(_rngs(self._seed), *args, **kwargs)
        state = {name: v for name, v in self.variables.items() if name != "params"}
        return (output, state) if mutable is not False else output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _is_pair_with_state(out: Any, nested: Mapping[str, Any]) -> bool:
    collections = {"batch_stats", "intermediates", "cache", *nested}
    return isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) and set(out[1]) <= collections


def linen_interceptor(intercept: Intercept, *, lifts: bool = False) -> Callable:
    """What `flax.linen.intercept_methods` takes: layers' calls go through `intercept`, their own methods' do not.

    lifts: see `Side`; the modules that are called are copies.
    """
    inside: list[nn.Module] = []

    def interceptor(call, args, kwargs, context):
        if lifts:
            lift_layer(context.module)
        if context.method_name == "setup" or context.module in inside:
            return call(*args, **kwargs)
        if context.method_name != "__call__" and not isinstance(context.module, nn.Embed):
            return call(*args, **kwargs)
        inside.append(context.module)
        try:
            path = "/".join(context.module.path)
            return intercept(path, named_call(call, context.module), args, kwargs)
        finally:
            inside.pop()

    return interceptor
