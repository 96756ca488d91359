"""A Flax module, linen or NNX, as a function of a flat dict of arrays, "params/Conv_0/kernel" and so on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

FLAGS = {
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "deterministic": True,
    "use_running_average": True,
    "eval": True,
    "inference": True,
}
PATH = "path_in_parity"
Variables = dict[str, Any]
Intercept = Callable[[str, Callable[..., Any], tuple, dict], Any]


class Side(Protocol):
    """A Flax module as a function.

    Attributes:
      is_opened: it is run as if there were no jit and no checkpoint in it, see `_opened`.
    """

    is_opened: bool

    def apply(
        self, variables: Variables, inputs: Sequence[Array], *, train: bool, intercept: Intercept, seed: int
    ) -> tuple[Any, Variables]:
        """(output, statistics after it); `intercept(path, call, args, kwargs)` makes every layer's call."""

    def initial(self, inputs: Sequence[Any], *, train: bool) -> Variables:
        """Variables as the module makes them, or as an NNX module holds them."""


def side_of(module: Any, flax_call: Callable | None = None) -> Side:
    """The module as a function.

    Raises:
      TypeError: neither a linen nor an NNX module.
    """
    if isinstance(module, nnx.Module):
        return NnxSide(module, flax_call)
    if isinstance(module, nn.Module):
        return LinenSide(module, flax_call)
    if isinstance(module, type):
        raise TypeError(f"flax_module is the class {module.__name__}; allowed: a module of that class")
    raise TypeError(f"flax_module is {type(module).__name__}; allowed: a flax.linen.Module or flax.nnx.Module")


def flag_of(function: Callable, train: bool) -> dict[str, bool]:
    """The keyword that tells `function` to train or to predict, by its signature; none if it has none."""
    names = inspect.signature(function).parameters
    return {name: train != opposite for name, opposite in FLAGS.items() if name in names}


def flat(variables: Mapping[str, Any]) -> Variables:
    """Nested collections as one flat dict."""
    return dict(flatten_dict(dict(nn.unbox(_plain(variables))), sep="/"))


def _plain(tree: Any) -> Any:
    return {name: _plain(v) for name, v in tree.items()} if isinstance(tree, Mapping) else tree


def _rngs(seed: int) -> dict[str, Array]:
    return {name: jax.random.key(seed + i) for i, name in enumerate(("params", "dropout", "default"))}


class LinenSide:
    """A linen module: its variables are given with every call."""

    def __init__(self, module: nn.Module, flax_call: Callable | None = None) -> None:
        self.module, self.flax_call, self.is_opened = module, flax_call, False

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
        nested = unflatten_dict(variables, sep="/")
        mutable = sorted({"batch_stats", *nested} - {"params"})
        with _opened(self.is_opened), nn.intercept_methods(linen_interceptor(intercept)):
            if self.flax_call is not None:
                out = _call_flax_call(self.flax_call, self.module, nested, inputs, train)
            else:
                module, flags = self._bound(train)
                out = module.apply(nested, *inputs, **flags, rngs=_rngs(seed), mutable=mutable)
        updated: Mapping[str, Any] = {}
        if self.flax_call is None or _is_pair_with_state(out, nested):
            out, updated = out
        kept = {name: v for name, v in variables.items() if not name.startswith("params/")}
        return out, kept | {name: v for name, v in flat(updated).items() if not name.startswith("params/")}

    def initial(self, inputs, *, train):
        """See `Side`."""
        with _opened(self.is_opened):
            if self.flax_call is not None:
                proxy: Any = _Initialising(self.module)
                _call_flax_call(self.flax_call, proxy, {}, inputs, train)
                return flat(proxy.variables)
            module, flags = self._bound(train)
            return flat(module.init(_rngs(0), *inputs, **flags))


class _Initialising:
    """Stands in for a module in the user's `flax_call`: `apply` initialises, so that the variables become known."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.variables: Any = {}

    def apply(self, variables: Any, *args: Any, rngs: Any = None, mutable: Any = False, **kwargs: Any) -> Any:
        output, self.variables = self._module.init_with_output(_rngs(0), *args, **kwargs)
        state = {name: v for name, v in self.variables.items() if name != "params"}
        return (output, state) if mutable is not False else output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _is_pair_with_state(out: Any, nested: Mapping[str, Any]) -> bool:
    collections = {"batch_stats", "intermediates", "cache", *nested}
    return isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) and set(out[1]) <= collections


def _call_flax_call(flax_call: Callable, module: Any, variables: Any, inputs: Sequence[Any], train: bool) -> Any:
    parameters = inspect.signature(flax_call).parameters.values()
    named = any(p.name == "train" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if named:
        return flax_call(module, variables, *inputs, train=train)
    return flax_call(module, variables, *inputs, train)


def linen_interceptor(intercept: Intercept) -> Callable:
    """What `flax.linen.intercept_methods` takes: layers' calls go through `intercept`, their own methods' do not."""
    inside: list[nn.Module] = []

    def interceptor(call, args, kwargs, context):
        if context.method_name == "setup" or context.module in inside:
            return call(*args, **kwargs)
        if context.method_name != "__call__" and not isinstance(context.module, nn.Embed):
            return call(*args, **kwargs)
        inside.append(context.module)
        try:
            path = "/".join(context.module.path)
            return intercept(path, _named_call(call, context.module), args, kwargs)
        finally:
            inside.pop()

    return interceptor


def _named_call(call: Callable, module: Any) -> Callable:
    def function(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    function.module = module  # type: ignore[attr-defined]  # what `intercept` learns the class from
    return function


class NnxSide:
    """An NNX module: it holds its variables; every call is on a copy."""

    def __init__(self, module: nnx.Module, flax_call: Callable | None = None) -> None:
        self.flax_call, self.is_opened = flax_call, False
        self.graph, state = nnx.split(module)
        self.state = dict(nnx.to_flat_state(state))
        self.names = {path: _nnx_name(path, variable) for path, variable in self.state.items()}

    def module_with(self, variables: Variables) -> nnx.Module:
        """A new module that holds these variables."""
        leaves = [
            # Made anew also where nothing changes: a variable may only be written to where it was made.
            (path, v.replace(variables.get(self.names[path], _value(v))))
            for path, v in self.state.items()
        ]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))

    def apply(self, variables, inputs, *, train, intercept, seed):
        """See `Side`."""
        module = self.module_with(variables)
        (module.train if train else module.eval)()
        flags = flag_of(type(module).__call__, train)  # before it is exchanged
        with _opened(self.is_opened), _patched(module, intercept):
            if self.flax_call is not None:
                nested = nnx.state(module)
                out = _call_flax_call(self.flax_call, module, nested, inputs, train)
            else:
                out = module(*inputs, **flags)
        after = dict(nnx.to_flat_state(nnx.state(module)))
        statistics = {
            name: _value(after[path])
            for path, name in self.names.items()
            if path in after and name in variables and not name.startswith("params/")
        }
        return out, statistics

    def initial(self, inputs, *, train):
        """See `Side`."""
        return {self.names[path]: _value(v) for path, v in self.state.items() if not _is_random(v)}


@contextlib.contextmanager
def _opened(is_opened: bool) -> Iterator[None]:
    """For a while jit and checkpoint (remat) do nothing, so that what is called inside them can be seen and replaced.

    JAX and Flax have no public way to look into either. A scan stays what it is: there a layer is one call, with the
    variables of all its turns.
    """
    if not is_opened:
        yield
        return
    scan = jax.lax.scan

    def closed_scan(*args: Any, **kwargs: Any) -> Any:
        with jax.disable_jit(False):
            return scan(*args, **kwargs)

    def nothing(function: Any = None, **_: Any) -> Any:
        return nothing if function is None else function

    exchanged = (jax, "checkpoint", nothing), (jax, "remat", nothing), (jax.lax, "scan", closed_scan)
    with contextlib.ExitStack() as stack:
        for module, name, function in exchanged:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        stack.enter_context(jax.disable_jit())
        yield


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _nnx_name(path: tuple, variable: Any) -> str:
    kind = getattr(variable, "type", type(variable))
    collection = (
        "params" if issubclass(kind, nnx.Param) else "batch_stats" if issubclass(kind, nnx.BatchStat) else kind.__name__
    )
    return "/".join((collection, *map(str, path)))


def nnx_state(state: Any) -> Variables:
    """An `nnx.State` as a flat dict."""
    return {_nnx_name(path, v): _value(v) for path, v in nnx.to_flat_state(state) if not _is_random(v)}


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
                call = _named_call(lambda *a, **k: original(self, *a, **k), self)
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


def is_dropout(module: Any) -> bool:
    """Whether it is one of Flax's own dropouts."""
    return isinstance(module, nn.Dropout | nnx.Dropout)


def lifted(value: Any, *, float64: bool) -> Any:
    """The array in float64, if that is asked for and it is floating point."""
    value = jnp.asarray(value)
    return value.astype(jnp.float64) if float64 and jnp.issubdtype(value.dtype, jnp.floating) else value


@contextlib.contextmanager
def environment(*, float64: bool) -> Iterator[None]:
    """JAX as most users have it, whatever the caller's settings; float64 known, and then on the CPU, if asked for.

    Every program runs once, so that on a CPU XLA's optimisations cost more than they gain.
    """
    hurried = jax.config.read("jax_disable_most_optimizations")
    with contextlib.ExitStack() as stack:
        if float64 or jax.default_backend() == "cpu":
            jax.config.update("jax_disable_most_optimizations", True)
            stack.callback(jax.config.update, "jax_disable_most_optimizations", hurried)
        stack.enter_context(jax.enable_x64(float64))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if float64:
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield
