"""Flax's half of the bridge: runs a linen or NNX module and records every layer. Never imports torch.

Both kinds of module are functions here, of a flat dict of arrays: "params/Conv_0/kernel", "batch_stats/BatchNorm_0/mean".
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from numpy.typing import NDArray

from parity.kinds import class_names, kind_of
from parity.recording import Call, Layer, Recording

# How a module is told to train (True) or to predict (False): the names in use, and whether they mean the opposite.
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
CONFIG = ("strides", "padding", "kernel_dilation", "feature_group_count", "transpose_kernel", "epsilon", "momentum", "num_groups")

Variables = dict[str, Any]
Intercept = Callable[[str, Callable[..., Any], tuple, dict], Any]


class Side(Protocol):
    """A Flax module as a function."""

    def apply(
        self, variables: Variables, inputs: Sequence[Array], *, train: bool, intercept: Intercept, seed: int
    ) -> tuple[Any, Variables]:
        """(output, statistics after it). `intercept(path, call, args, kwargs)` stands between every layer and its call."""

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
        self.module, self.flax_call = module, flax_call

    def _bound(self, train: bool) -> tuple[nn.Module, dict[str, bool]]:
        """The module and the keywords of its call. A flag that is set as an attribute is set there."""
        flags = flag_of(type(self.module).__call__, train)
        attributes = {
            name: train != opposite
            for name, opposite in FLAGS.items()
            if name in getattr(type(self.module), "__dataclass_fields__", {})
        }
        set_before = {name: v for name, v in attributes.items() if name not in flags or getattr(self.module, name) is not None}
        module = self.module.clone(**set_before) if set_before else self.module
        return module, {name: v for name, v in flags.items() if name not in set_before}

    def apply(self, variables, inputs, *, train, intercept, seed):
        nested = unflatten_dict(variables, sep="/")
        mutable = sorted({"batch_stats", *nested} - {"params"})
        with nn.intercept_methods(_linen_interceptor(intercept)):
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
        if self.flax_call is not None:
            proxy: Any = _Initialising(self.module)
            _call_flax_call(self.flax_call, proxy, {}, inputs, train)
            return flat(proxy.variables)
        module, flags = self._bound(train)
        return flat(module.init(_rngs(0), *inputs, **flags))


class _Initialising:
    """Stands in for a module in the user's `flax_call`: `apply` initialises, so that the variables become known."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.variables = module, {}

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


def _linen_interceptor(intercept: Intercept) -> Callable:
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
        self.flax_call = flax_call
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
        module = self.module_with(variables)
        (module.train if train else module.eval)()
        with _patched(module, intercept):
            if self.flax_call is not None:
                nested = nnx.state(module)
                out = _call_flax_call(self.flax_call, module, nested, inputs, train)
            else:
                out = module(*inputs, **flag_of(type(module).__call__, train))
        after = dict(nnx.to_flat_state(nnx.state(module)))
        statistics = {
            name: _value(after[path])
            for path, name in self.names.items()
            if path in after and name in variables and not name.startswith("params/")
        }
        return out, statistics

    def initial(self, inputs, *, train):
        return {self.names[path]: _value(v) for path, v in self.state.items() if not _is_random(v)}


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _nnx_name(path: tuple, variable: Any) -> str:
    kind = getattr(variable, "type", type(variable))
    collection = "params" if issubclass(kind, nnx.Param) else "batch_stats" if issubclass(kind, nnx.BatchStat) else kind.__name__
    return "/".join((collection, *map(str, path)))


def nnx_state(state: Any) -> Variables:
    """An `nnx.State` as a flat dict."""
    return {_nnx_name(path, v): _value(v) for path, v in nnx.to_flat_state(state) if not _is_random(v)}


def _is_random(variable: Any) -> bool:
    """Whether it is the state of a random number generator: no variable of the network, it stays in the module."""
    return issubclass(getattr(variable, "type", type(variable)), nnx.RngState)


@contextlib.contextmanager
def _patched(module: nnx.Module, intercept: Intercept) -> Iterator[None]:
    """Calls of the layers in `module` go through `intercept`: the classes' `__call__` is exchanged for a while."""
    paths = {id(child): "/".join(map(str, path)) for path, child in nnx.iter_modules(module)}
    kept: dict[type, Any] = {}
    inside: list[int] = []

    def exchange(kind: type) -> None:
        original = kind.__call__  # type: ignore[operator]

        def patched(self, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths or id(self) in inside:
                return original(self, *args, **kwargs)
            inside.append(id(self))
            try:
                call = _named_call(lambda *a, **k: original(self, *a, **k), self)
                return intercept(paths[id(self)], call, args, kwargs)
            finally:
                inside.pop()

        kept[kind] = kind.__dict__.get("__call__")
        kind.__call__ = patched  # type: ignore[operator]

    try:
        for _, child in nnx.iter_modules(module):
            # The class that a call is defined in, so that a subclass and its parent are not both exchanged.
            if callable(child) and type(child) not in kept:
                exchange(type(child))
        yield
    finally:
        for kind, function in kept.items():
            if function is None:
                del kind.__call__  # type: ignore[operator]
            else:
                kind.__call__ = function  # type: ignore[operator]


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


class Force(Protocol):
    """What single-layer mode puts in the place of this side's own arrays; in this side's layout.

    Each answer is (array, its gradient), a gradient of None is 0; or None, to leave the array as it is.
    """

    def input(self, key: tuple[str, int], i: int, arrived: Any) -> tuple[NDArray, NDArray | None] | None:
        """In place of what arrived as the i-th input of that call."""

    def output(self, key: tuple[str, int], output: Any) -> tuple[NDArray, NDArray | None] | None:
        """In place of the output of that call."""

    def result(self, i: int, output: Any) -> tuple[NDArray, NDArray | None] | None:
        """In place of the i-th output of the network."""


@jax.custom_vjp
def _replace(value, probe, forced, forced_gradient):
    """`forced`; backwards `forced_gradient` goes to `value`, and what really arrives to `probe`."""
    return forced


_replace.defvjp(lambda value, probe, forced, gradient: (forced, gradient), lambda gradient, g: (gradient, g, None, None))


def layers_of(side: Side, variables: Mapping[str, Any], called: Sequence[tuple[str, Any]]) -> dict[str, Layer]:
    """The modules with variables of their own, in the order of their first call; then those that are never called."""
    own: dict[str, dict[str, str]] = {}
    modules = dict(reversed([*called]))
    attentions = [
        path for path, module in modules.items() if kind_of(class_names(type(module)), {}, frozenset()) == "attention"
    ]
    for full in variables:
        collection, _, rest = full.partition("/")
        path, _, local = rest.rpartition("/")
        attention = next((a for a in attentions if path == a or path.startswith(f"{a}/") or a == ""), None)
        if attention is not None:
            path, local = attention, rest.removeprefix(f"{attention}/") if attention else rest
        own.setdefault(path, {})[local] = full
    order = [path for path in dict.fromkeys(path for path, _ in called) if path in own]
    order += [path for path in own if path not in order]
    layers = {}
    for path in order:
        tensors = own[path]
        statistics = frozenset(local for local, full in tensors.items() if not full.startswith("params/"))
        module = modules.get(path)
        names = [] if module is None else class_names(type(module))
        shapes = {local: tuple(np.shape(variables[full])) for local, full in tensors.items()}
        kind = kind_of(names, shapes, statistics)
        below = kind != "attention" and any(p != path and (p.startswith(f"{path}/") or path == "") for p in own)
        config = {name: getattr(module, name) for name in CONFIG if hasattr(module, name)}
        layers[path] = Layer(path, kind, type(module).__name__ if names else "", tensors, statistics, config, is_called=not below and path in modules)
    return layers


def structure(side: Side, inputs: Sequence[NDArray], *, train: bool) -> tuple[dict[str, Layer], dict[str, Any]]:
    """The layers in the order of execution, and the variables' shapes and dtypes, without computing anything.

    Raises:
      Exception: whatever the module raises on these inputs.
    """
    called: list[tuple[str, Any]] = []

    def intercept(path, call, args, kwargs):
        called.append((path, call.module))
        return call(*args, **kwargs)

    with environment(float64=False):
        shapes = [jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)) for a in inputs]
        if isinstance(side, LinenSide):
            with nn.intercept_methods(_linen_interceptor(intercept)):
                variables = jax.eval_shape(lambda *xs: side.initial(xs, train=train), *shapes)
        else:
            variables = side.initial(inputs, train=train)
            jax.eval_shape(
                lambda *xs: side.apply(variables, xs, train=train, intercept=intercept, seed=0)[0], *shapes
            )
        variables = {name: v for name, v in variables.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    return layers_of(side, variables, called), variables


def record(
    side: Side,
    layers: dict[str, Layer],
    variables: Mapping[str, Any],
    inputs: Sequence[NDArray],
    *,
    train: bool,
    float64: bool = True,
    loss: Callable[[Any], Any] | None = None,
    projections: Callable[[Sequence[Any]], list[NDArray]] | None = None,
    force: Force | None = None,
    gradients: bool = True,
    compiled: bool = True,
    programs: dict | None = None,
    seed: int = 0,
) -> Recording:
    """Run the module forward and backward, and record every layer.

    Args:
      side: the module as a function.
      layers: from `structure`.
      variables: flat.
      inputs: in Flax's layout.
      train: train or eval mode. In training, Flax's dropout is switched off.
      float64: lift variables and inputs.
      loss: of the output; None: sum(output * projection) over all floating outputs.
      projections: of the outputs; needed where loss is None.
      force: for single-layer mode.
      gradients: take them too.
      programs: keeps what was compiled for the next run of the same module, variables' statistics and inputs' shapes.
      compiled: as one function. Without, and without gradients, a run that fails is recorded as far as it went.
      seed: of the random numbers in the run.
    """
    with environment(float64=float64):
        every = {name: lifted(v, float64=float64) for name, v in variables.items()}
        # In JAX what is differentiated must be floating point.
        parameters = {name: v for name, v in every.items() if name.startswith("params/") and jnp.issubdtype(v.dtype, jnp.floating)}
        others = {name: v for name, v in every.items() if name not in parameters}
        given = [lifted(a, float64=float64) for a in inputs]
        floating = [i for i, v in enumerate(given) if jnp.issubdtype(v.dtype, jnp.floating)]
        run = _Run(side, layers, others, given, floating, train, loss, projections, force, seed)
        recording = Recording("flax", layers, inputs=[np.asarray(v) for v in given])
        recording.tensors = {name: _numpy(v) for name, v in every.items()}
        xs = [given[i] for i in floating]
        if gradients:
            # A run without another side's arrays differs from the next in its arguments only.
            key = None if force is not None or programs is None else (train, float64, tuple((v.shape, v.dtype) for v in given))
            if key is None or key not in programs:
                program = run, _program(run, parameters, xs, compiled=compiled)
                programs = {} if programs is None else programs
                programs[key] = program
            run, whole = programs[key]
            total, (by_parameter, by_input, by_probe), seen = whole(parameters, xs)
        else:
            by_parameter, by_input, by_probe = {}, [], None
            try:
                total, seen = _compiled(lambda p, x: run(p, x, None), compiled)(parameters, xs)
            except Exception as error:
                if compiled:
                    raise
                # As far as it went: where layers of other shapes make what follows impossible.
                recording.failure = error
                seen = run.seen | {"statistics": {}, "result": []}
                del seen["inputs"][len(seen["outputs"]) :], seen["arrived"][len(seen["outputs"]) :]
                total = jnp.full((), jnp.nan)
        _fill(recording, run, seen, total, by_parameter, by_input, by_probe, floating)
    return recording


def _program(run: _Run, parameters: Any, xs: Any, *, compiled: bool) -> Callable:
    """(parameters, floating inputs) -> (loss, gradients by them and by the probes, what was seen)."""
    probes = jax.eval_shape(lambda p, x: run(p, x, None)[1]["probes"], parameters, xs)
    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), probes)

    def whole(parameters, xs):
        total, pull, seen = jax.vjp(run, parameters, xs, zeros, has_aux=True)
        return total, pull(jnp.ones_like(total)), seen

    return _compiled(whole, compiled)


def _compiled(function: Callable, compiled: bool) -> Callable:
    """The function compiled as one; as it is where it cannot be, as it looks at the values of its arrays."""

    program = jax.jit(function)

    def run(*args: Any) -> Any:
        try:
            return program(*args)
        except jax.errors.JAXTypeError:
            return function(*args)

    return run if compiled else function


def _numpy(v: Any) -> NDArray:
    a = np.asarray(v)
    return a.astype(np.float32) if a.dtype.name in ("bfloat16", "float16") else np.array(a)


class _Run:
    """The module as a function of (parameters, floating inputs, probes) -> (loss, what was seen)."""

    def __init__(self, side, layers, others, inputs, floating, train, loss, projections, force, seed) -> None:
        self.side, self.layers, self.others, self.inputs, self.floating = side, layers, others, inputs, floating
        self.train, self.loss, self.projections, self.force, self.seed = train, loss, projections, force, seed
        self.keys: list[tuple[str, int]] = []
        self.has_dropout = False

    def __call__(self, parameters, xs, probes):
        given = list(self.inputs)
        for i, x in zip(self.floating, xs, strict=True):
            given[i] = x
        self.keys, seen = [], {"inputs": [], "arrived": [], "outputs": [], "probes": []}
        self.seen = seen
        counts: dict[str, int] = {}
        active: list[str] = []

        def probe(value, forced=None):
            """Adds a zero whose gradient is the value's; or puts another side's array in its place."""
            if forced is not None and value.shape != forced[0].shape:
                value = jnp.broadcast_to(value.ravel()[:1].sum(), forced[0].shape)
            seen["probes"].append(value)
            zero = jnp.zeros_like(value) if probes is None else probes[len(seen["probes"]) - 1]
            if forced is None:
                return value + zero
            gradient = jnp.zeros_like(value) if forced[1] is None else jnp.asarray(forced[1], value.dtype)
            return _replace(value, zero, jnp.asarray(forced[0], value.dtype), gradient)

        def intercept(path, call, args, kwargs):
            if self.train and is_dropout(call.module):
                self.has_dropout = self.has_dropout or getattr(call.module, "rate", 0) > 0
                return args[0]
            layer = self.layers.get(path)
            if layer is None or not layer.is_called or active:
                return call(*args, **kwargs)
            key = (path, counts.get(path, 0))
            counts[path] = key[1] + 1
            arrived, used = [], []
            mine: dict[int, Any] = {}  # one array given several times (attention) is one input

            def own(v):
                if not isinstance(v, Array | np.ndarray) or v.dtype == bool or jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key):
                    return v
                if id(v) in mine:
                    return mine[id(v)]
                given, v = v, jnp.asarray(v)
                arrived.append(v)
                if jnp.issubdtype(v.dtype, jnp.floating):
                    v = probe(v, None if self.force is None else self.force.input(key, len(arrived) - 1, v))
                used.append(v)
                mine[id(given)] = v
                return v

            args, kwargs = tuple(own(v) for v in args), {name: own(v) for name, v in kwargs.items()}
            active.append(path)
            try:
                output = call(*args, **kwargs)
            finally:
                active.pop()
            y = output[0] if isinstance(output, tuple) else output
            self.keys.append(key)
            seen["arrived"].append(arrived)
            seen["inputs"].append(used)
            seen["outputs"].append(y)
            y = probe(y, None if self.force is None else self.force.output(key, y))
            return (y, *output[1:]) if isinstance(output, tuple) else y

        output, seen["statistics"] = self.side.apply(
            {**parameters, **self.others}, given, train=self.train, intercept=intercept, seed=self.seed
        )
        leaves, tree = jax.tree.flatten(output)
        places = [i for i, v in enumerate(leaves) if jnp.issubdtype(jnp.asarray(v).dtype, jnp.floating)]
        seen["result"] = [leaves[i] for i in places]
        for n, i in enumerate(places):
            leaves[i] = probe(leaves[i], None if self.force is None else self.force.result(n, leaves[i]))
        if self.loss is not None:
            total = self.loss(jax.tree.unflatten(tree, leaves))
        else:
            results = [leaves[i] for i in places]
            weights = self.projections(results) if self.projections else [np.ones(v.shape) for v in results]
            total = sum((jnp.sum(v * jnp.asarray(w, v.dtype)) for v, w in zip(results, weights, strict=True)), jnp.zeros(()))
        return jnp.asarray(total), seen


def _fill(recording, run, seen, total, by_parameter, by_input, by_probe, floating) -> None:
    probes = iter([] if by_probe is None else by_probe)

    def gradient(value):
        if by_probe is None or not jnp.issubdtype(value.dtype, jnp.floating):
            return None
        return _numpy(next(probes))

    for key, inputs, arrived, output in zip(run.keys, seen["inputs"], seen["arrived"], seen["outputs"], strict=True):
        call = Call(*key, [_numpy(v) for v in inputs], _numpy(output), [_numpy(v) for v in arrived])
        call.input_gradients = [gradient(v) for v in inputs]
        call.output_gradient = gradient(output)
        recording.calls.append(call)
    recording.outputs = [_numpy(v) for v in seen["result"]]
    recording.output_gradients = [gradient(v) for v in seen["result"]]
    recording.loss = float(total)
    recording.new_statistics = {name: _numpy(v) for name, v in seen["statistics"].items()}
    recording.gradients = {name: _numpy(v) for name, v in by_parameter.items()}
    recording.input_gradients = [None] * len(recording.inputs)
    for i, g in zip(floating, by_input, strict=False):
        recording.input_gradients[i] = _numpy(g)
