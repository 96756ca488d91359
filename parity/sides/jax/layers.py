"""The layers of a Flax module or of variables, in order. Never imports torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.extend.core import get_opaque_trace_state

from parity.records import kinds
from parity.records.constructors import given_to
from parity.records.inputs import Inputs
from parity.records.kinds import Shape, class_names, kind_of
from parity.records.recording import Failure, Layer
from parity.records.structure import Guess, Structure, natural
from parity.sides.jax.linen import LinenSide, linen_interceptor
from parity.sides.jax.matrices import is_out_in
from parity.sides.jax.module import INSIDE, Side, Stopped, environment, shape_of
from parity.sides.jax.module import flat as flat_dict
from parity.sides.jax.nnx import NnxSide, nnx_state

LOG = logging.getLogger(__name__)

CONFIG = (
    "strides",
    "padding",
    "kernel_dilation",
    "feature_group_count",
    "transpose_kernel",
    "epsilon",
    "momentum",
    "num_groups",
)


CARRIED = ("params", "batch_stats")


def layers_of(side: Side, variables: Mapping[str, Any], called: Sequence[tuple[str, Any]]) -> dict[str, Layer]:
    """The modules with variables of their own, in the order of their first call; then those that are never called."""
    own: dict[str, dict[str, str]] = {}
    modules = dict(reversed([*called]))
    attentions = [
        path for path, module in modules.items() if kind_of(class_names(type(module)), {}, frozenset()) == "attention"
    ]
    for full in variables:
        _, _, rest = full.partition("/")
        path, _, local = rest.rpartition("/")
        attention = next((a for a in attentions if path == a or path.startswith(f"{a}/") or a == ""), None)
        if attention is not None:
            path, local = attention, rest.removeprefix(f"{attention}/") if attention else rest
        own.setdefault(path, {})[local] = full
    _with_scales(own, {path: m.feature_axes for path, m in modules.items() if isinstance(m, nn.WeightNorm)})
    # What is kept in collections of the module's own are constants, which only it knows.
    own = {path: t for path, t in own.items() if any(full.split("/")[0] in CARRIED for full in t.values())}
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
        config |= given_to(module, linen=nn, nnx=nnx)
        if kind == "linear" and is_out_in(side, path, module, shapes):
            config[kinds.OUT_IN] = True
        layers[path] = Layer(
            path,
            kind,
            type(module).__name__ if names else "",
            tensors,
            statistics,
            config,
            is_called=not below and path in modules,
        )
        layers[path].is_called &= not layers[path].is_constant
    return layers


def _with_scales(own: dict[str, dict[str, str]], axes: Mapping[str, Any] | None = None) -> None:
    """The scales that linen's WeightNorm keeps of the layers within it, as tensors of these layers.

    Args:
      own: path -> {local name: full name}; changed.
      axes: which axes each WeightNorm scales along, where it is known: those of the outputs alone are understood.
    """
    for path in [path for path, tensors in own.items() if any(INSIDE in local for local in tensors)]:
        for local in [local for local in own[path] if INSIDE in local]:
            *inner, kernel, scale = local.split(INSIDE)
            target = "/".join(filter(None, (path.rpartition("/")[0], *inner)))
            if target in own and kernel == "kernel" and (axes is None or axes.get(path) in (-1, (-1,))):
                own[target][scale] = own[path].pop(local)
        if not own[path]:
            del own[path]


def structure(
    side: Side, inputs: Inputs | Sequence[Any], *, train: bool, may_stop: bool = False
) -> tuple[dict[str, Layer], dict[str, Any], Failure | None]:
    """The layers in the order of execution, and the variables' shapes and dtypes; nothing is computed where it runs.

    Args:
      side: the module as a function.
      inputs: in Flax's layout.
      train: train or eval mode.
      may_stop: a module that raises is looked at as far as it comes.

    Returns:
      The layers, the variables, and what stopped it, if it may.

    Raises:
      Exception: else whatever the module raises on these inputs.
    """
    inputs = Inputs.of(inputs)
    try:
        found = _look(side, inputs, train=train)
    except Exception as error:
        if not may_stop:
            raise
        LOG.info("run on the numbers themselves: %s: %s", type(error).__name__, error)
        found = _look(side, inputs, train=train, on_numbers=True)
    if found.hides:
        # Once more, as if there were no jit and no checkpoint: so their layers are seen. Not if it needs them.
        side.is_opened = True
        try:
            found = _look(side, inputs, train=train, on_numbers=found.stop is not None)
        except Exception as error:  # whatever a stranger's module raises; what stays unseen, the report tells
            LOG.info("not run without its jit and checkpoint: %s: %s", type(error).__name__, error)
            side.is_opened = False
    layers = layers_of(side, found.variables, found.called)
    for path, layer in layers.items():
        feeder = found.feeders.get(path)
        layer.feeder = feeder if feeder in layers else None
    return layers, found.variables, found.stop


class _Seen(NamedTuple):
    """The modules called, in order; what each was fed by; the variables; whether a call was inside a jit; the stop."""

    called: list[tuple[str, Any]]
    feeders: dict[str, str]
    variables: dict[str, Any]
    hides: bool
    stop: Failure | None


def _look(side: Side, inputs: Inputs, *, train: bool, on_numbers: bool = False) -> _Seen:
    """What is seen when the module is called, on shapes alone; or on numbers, and then as far as it comes."""
    called: list[tuple[str, Any]] = []
    made: dict[int, tuple[str, Any]] = {}  # what each array came out of; kept, so that no other gets its id
    feeders: dict[str, str] = {}
    traces: list[Any] = []
    stopped, stop = Stopped(), None
    run = (lambda function, xs: function(xs)) if on_numbers else jax.eval_shape

    def intercept(path, call, args, kwargs):
        called.append((path, call.module))
        traces.append(trace_state())
        if args and id(args[0]) in made:
            feeders.setdefault(path, made[id(args[0])][0])
        with stopped.watched(path):
            output = call(*args, **kwargs)
        made.setdefault(id(output), (path, output))
        return output

    def initial(xs):
        traces.append(trace_state())
        with nn.intercept_methods(linen_interceptor(intercept)):
            return side.initial(xs, train=train)

    def apply(xs):
        traces.append(trace_state())
        return side.apply(variables, xs, train=train, intercept=intercept, seed=0)[0]

    with environment(float64=False):
        given = inputs.mapped(jnp.asarray if on_numbers else shape_of)
        try:
            if isinstance(side, LinenSide):
                variables = run(initial, given)
            else:
                variables = side.initial(inputs, train=train)
                run(apply, given)
        except Exception as error:
            if not on_numbers:
                raise
            stop = Failure.of(error, stopped.path(error), hides=isinstance(side, LinenSide))
            if isinstance(side, LinenSide):
                variables = side.made
            elif isinstance(side, NnxSide):
                called += _defined(side.module_with({}), "", set())
    side.tables = [name for name, v in variables.items() if not _is_floating(v)]
    variables = {name: v for name, v in variables.items() if _is_floating(v)}
    return _Seen(called, feeders, variables, any(trace != traces[0] for trace in traces), stop)


def _is_floating(variable: Any) -> bool:
    return bool(jnp.issubdtype(variable.dtype, jnp.floating))


def trace_state() -> Any:
    """What is being traced: another inside a transformation of the module's own (jit, remat, scan) than outside."""
    return get_opaque_trace_state(convention="flax")


def of_module(side: Side, guess: Guess) -> Structure:
    """The layers in the order of execution on these inputs; nothing is computed.

    Raises:
      Exception: whatever the module raises on these inputs.
    """
    called: list[tuple[str, Any]] = []
    outputs: list[tuple[str, Any]] = []
    feeders: dict[str, str] = {}

    def intercept(path, call, args, kwargs):
        called.append((path, call.module))
        y = call(*args, **kwargs)
        before = next((before for before, v in outputs if args and v is args[0]), None)
        if before is not None:
            feeders.setdefault(path, before)
        outputs.append((path, y))
        return y

    with environment(float64=False):
        shapes = guess.flax.mapped(shape_of)
        if isinstance(side, LinenSide):
            with nn.intercept_methods(linen_interceptor(intercept)):
                variables = jax.eval_shape(lambda xs: side.initial(xs, train=False), shapes)
        else:
            variables = side.initial(guess.flax, train=False)
            jax.eval_shape(lambda xs: side.apply(variables, xs, train=False, intercept=intercept, seed=0)[0], shapes)
    structure = _structure(side, variables, called)
    bare = dict.fromkeys(path for path, m in called if isinstance(m, nn.WeightNorm) and not m.use_scale)
    if bare:
        where = ", ".join(bare)
        structure.told = [
            f"{where} (use_scale=False) divides kernels by their norms: look whether PyTorch does so, too"
        ]
    if structure.tables:
        with environment(float64=False):
            initial = side.initial(guess.flax, train=False)
        structure.tables = {name: np.asarray(initial[name]) for name in structure.tables}
    own = {layer.path for layer in structure.layers}
    structure.feeders = {path: before for path, before in feeders.items() if path in own and before in own}
    return structure


def of_definition(side: Side, module: Any) -> Structure | None:
    """The layers of an NNX module in the order in which its attributes were set; None for linen."""
    if not isinstance(module, nnx.Module):
        return None
    return _structure(side, side.initial(Inputs(), train=False), list(_defined(module, "", set())))


def _defined(node: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nnx.Module):
        yield path, node
    if isinstance(node, Mapping):
        children = [(str(name), child) for name, child in node.items()]
    elif isinstance(node, list | tuple | nnx.List):
        children = [(str(i), child) for i, child in enumerate(node)]
    elif isinstance(node, nnx.Module):
        children = list(vars(node).items())
    else:
        return
    for name, child in children:
        if isinstance(child, nnx.Module | Mapping | list | tuple):
            yield from _defined(child, f"{path}/{name}" if path else name, seen)


def _structure(side: Any, variables: Mapping[str, Any], called: list[tuple[str, Any]]) -> Structure:
    carried = {name: tuple(np.shape(v)) for name, v in variables.items() if name.split("/")[0] in CARRIED}
    counters = {name for name, shape in carried.items() if kinds.is_counter(name, shape)}
    floating = {name: variables[name] for name in carried if name not in counters and _is_floating(variables[name])}
    tables = {name: v for name, v in variables.items() if name not in floating and name not in counters}
    layers = layers_of(side, floating, called)
    for layer in layers.values():
        layer.config = {**layer.config, **_convention(dict(called).get(layer.path))}
    shapes = {name: carried[name] for name in floating}
    return Structure(list(layers.values()), shapes, _counters(counters), tables=tables)


def _convention(module: Any) -> dict[str, Any]:
    """How a batch norm keeps its statistics; Flax's own keeps the biased variance, from 1."""
    if not isinstance(module, nn.BatchNorm | nnx.BatchNorm):
        return {}
    names = {"momentum": None, "epsilon": None, "unbiased_moving_var": False, "initial_moving_var": 1.0}
    return {name: getattr(module, name, usual) for name, usual in names.items()}


def _counters(names: Any) -> dict[str, str]:
    return {"/".join(name.split("/")[1:-1]): name for name in names}


def of_variables(shapes: Mapping[str, Shape]) -> Structure:
    """The layers that the names of variables tell of; kinds only where the names say them.

    JAX sorts the keys of dicts that it passes through; where they are sorted, their order says nothing.
    """
    counters = {name for name, shape in shapes.items() if kinds.is_counter(name, shape)}
    own: dict[str, dict[str, str]] = {}
    for full in shapes:
        if full not in counters:
            path, _, local = full.partition("/")[2].rpartition("/")
            own.setdefault(path, {})[local] = full
    _with_scales(own)
    for path in _attentions(own):
        prefix = f"{path}/" if path else ""
        for part in [p for p in own if p.startswith(prefix) and p != path]:
            own.setdefault(path, {}).update({f"{part.removeprefix(prefix)}/{n}": f for n, f in own.pop(part).items()})
    layers = []
    for path, tensors in own.items():
        statistics = frozenset(local for local, full in tensors.items() if not full.startswith("params/"))
        kind = _kind_of_variables({local: shapes[full] for local, full in tensors.items()}, statistics)
        below = kind != "attention" and any(p != path and (p.startswith(f"{path}/") or path == "") for p in own)
        layer = Layer(path, kind, "", tensors, statistics, is_called=not below)
        layer.is_called &= not layer.is_constant
        layers.append(layer)
    paths = [layer.path for layer in layers]
    ordered = len(paths) == 1 or not _is_sorted([name for name in shapes if name.startswith("params/")])
    if not ordered:
        layers.sort(key=lambda layer: natural(layer.path))
    carried = {full: shapes[full] for layer in layers for full in layer.tensors.values()}
    return Structure(layers, carried, _counters(counters), ordered=ordered)


def flat_in_order(variables: Any) -> dict[str, Any]:
    """Variables by full name, in the order that they have: that of creation, unless JAX has sorted them."""
    if isinstance(variables, nnx.State):
        return nnx_state(variables)
    found = flatten_dict({name: v for name, v in variables.items() if isinstance(v, Mapping)})
    if any(isinstance(v, Mapping) for v in found.values()):  # a FrozenDict
        return flat_dict(variables)
    return {"/".join(str(key).replace("/", INSIDE) for key in path): nn.unbox(v) for path, v in found.items()}


def _attentions(own: Mapping[str, Any]) -> list[str]:
    # In the order of the variables, which a set would lose.
    parents = dict.fromkeys(path.rpartition("/")[0] for path in own if path.rpartition("/")[2] == "query")
    return [p for p in parents if all((f"{p}/{n}" if p else n) in own for n in ("query", "key", "value", "out"))]


def _is_sorted(names: list[str]) -> bool:
    split = [name.split("/") for name in names]
    return split == sorted(split)


def _kind_of_variables(shapes: Mapping[str, Shape], statistics: frozenset[str]) -> str:
    if any(re.fullmatch("query/kernel", name) for name in shapes):
        return "attention"
    if "embedding" in shapes and len(shapes) == 1:
        return "embedding"
    if statistics:
        return kinds.kind_of([], shapes, statistics)
    return "linear" if len(shapes.get("kernel", ())) == 2 else "other"
