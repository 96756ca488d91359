"""Which layers a Flax module has, in the order of execution; nothing is computed. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from numpy.typing import NDArray

from parity.flax_modules import LinenSide, Side, environment, linen_interceptor
from parity.kinds import class_names, kind_of
from parity.recording import Layer

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
        layers[path] = Layer(
            path,
            kind,
            type(module).__name__ if names else "",
            tensors,
            statistics,
            config,
            is_called=not below and path in modules,
        )
    return layers


def structure(side: Side, inputs: Sequence[NDArray], *, train: bool) -> tuple[dict[str, Layer], dict[str, Any]]:
    """The layers in the order of execution, and the variables' shapes and dtypes, without computing anything.

    Raises:
      Exception: whatever the module raises on these inputs.
    """
    found = _look(side, inputs, train=train)
    if found.hides:
        # Once more, as if there were no jit and no checkpoint: so their layers are seen. Not if it needs them.
        side.is_opened = True
        try:
            found = _look(side, inputs, train=train)
        except Exception:
            side.is_opened = False
    layers = layers_of(side, found.variables, found.called)
    for path, layer in layers.items():
        layer.feeder = found.feeders.get(path)
    return layers, found.variables


class _Seen(NamedTuple):
    """The modules called, in order; what each was fed by; the variables; and whether some call was inside a jit."""

    called: list[tuple[str, Any]]
    feeders: dict[str, str]
    variables: dict[str, Any]
    hides: bool


def _look(side: Side, inputs: Sequence[NDArray], *, train: bool) -> _Seen:
    called: list[tuple[str, Any]] = []
    made: dict[int, tuple[str, Any]] = {}  # what each array came out of; kept, so that no other gets its id
    feeders: dict[str, str] = {}
    traces: list[Any] = []

    def intercept(path, call, args, kwargs):
        called.append((path, call.module))
        traces.append(trace_state())
        if args and id(args[0]) in made:
            feeders.setdefault(path, made[id(args[0])][0])
        output = call(*args, **kwargs)
        made.setdefault(id(output), (path, output))
        return output

    def initial(*xs):
        traces.append(trace_state())
        with nn.intercept_methods(linen_interceptor(intercept)):
            return side.initial(xs, train=train)

    def apply(*xs):
        traces.append(trace_state())
        return side.apply(variables, xs, train=train, intercept=intercept, seed=0)[0]

    with environment(float64=False):
        shapes = [jax.ShapeDtypeStruct(np.shape(a), jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)) for a in inputs]
        if isinstance(side, LinenSide):
            variables = jax.eval_shape(initial, *shapes)
        else:
            variables = side.initial(inputs, train=train)
            jax.eval_shape(apply, *shapes)
    variables = {name: v for name, v in variables.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    return _Seen(called, feeders, variables, any(trace != traces[0] for trace in traces))


def trace_state() -> Any:
    """What is being traced: another inside a transformation of the module's own (jit, remat, scan) than outside."""
    return get_opaque_trace_state(convention="flax")
