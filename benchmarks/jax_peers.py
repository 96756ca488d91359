"""JAX's batch norms, each as its own users write it, behind one call.

jax_bn, Flax, Keras and Haiku take channels last; Equinox takes one example, channels first, under `jax.vmap`.
Those that the project doesn't depend on are imported by name, so that types are checked alike without them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import EPSILON, Layer, Peer, Result, Start


def _jax_bn(start: Start) -> Layer:
    import jax_bn

    def train(params, stats, x):
        scale, bias = params
        return jax_bn.batch_norm(x, scale, bias, stats, train=True, momentum=start.momentum, epsilon=EPSILON)

    def predict(params, stats, x):
        scale, bias = params
        return jax_bn.batch_norm(x, scale, bias, stats, train=False, epsilon=EPSILON)[0]

    stats = jax_bn.BatchStats(jnp.asarray(start.mean), jnp.asarray(start.var))
    return Layer(train, predict, (jnp.asarray(start.gamma), jnp.asarray(start.beta)), stats, tuple, tuple, -1)


def _linen(start: Start) -> Layer:
    from flax import linen

    layer = linen.BatchNorm(momentum=start.momentum, epsilon=EPSILON)

    def train(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return y, new["batch_stats"]

    def predict(params, stats, x):
        return layer.apply({"params": params, "batch_stats": stats}, x, use_running_average=True)

    params = {"scale": jnp.asarray(start.gamma), "bias": jnp.asarray(start.beta)}
    stats = {"mean": jnp.asarray(start.mean), "var": jnp.asarray(start.var)}
    return Layer(
        train,
        predict,
        params,
        stats,
        lambda params: (params["scale"], params["bias"]),
        lambda stats: (stats["mean"], stats["var"]),
        -1,
    )


def _nnx(start: Start) -> Layer:
    from flax import nnx

    layer = nnx.BatchNorm(start.shape[1], momentum=start.momentum, epsilon=EPSILON, rngs=nnx.Rngs(0))
    values = {"scale": start.gamma, "bias": start.beta, "mean": start.mean, "var": start.var}
    nnx.update(layer, nnx.State({name: jnp.asarray(value) for name, value in values.items()}))
    graph, *states = nnx.split(layer, nnx.Param, nnx.BatchStat)
    params, stats = states

    def train(params, stats, x):
        layer = nnx.merge(graph, params, stats, copy=True)  # stats are an outer trace's where this is differentiated
        return layer(x, use_running_average=False), nnx.state(layer, nnx.BatchStat)

    def predict(params, stats, x):
        return nnx.merge(graph, params, stats)(x, use_running_average=True)

    return Layer(
        train,
        predict,
        params,
        stats,
        lambda params: (params["scale"][...], params["bias"][...]),
        lambda stats: (stats["mean"][...], stats["var"][...]),
        -1,
    )


def _keras(start: Start) -> Layer:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = importlib.import_module("keras")

    assert keras.config.backend() == "jax", "keras was imported before, with another backend"
    layer = keras.layers.BatchNormalization(momentum=start.momentum, epsilon=EPSILON)
    layer.build((*start.shape[:1], *start.shape[2:], start.shape[1]))
    layer.set_weights([start.gamma, start.beta, start.mean, start.var])

    def train(params, stats, x):
        return layer.stateless_call(params, stats, x, training=True)

    def predict(params, stats, x):
        return layer.stateless_call(params, stats, x, training=False)[0]

    params = [v.value for v in layer.trainable_variables]
    stats = [v.value for v in layer.non_trainable_variables]
    return Layer(train, predict, params, stats, tuple, tuple, -1)


def _equinox(start: Start) -> Layer:
    eqx = importlib.import_module("equinox")

    # mode="batch": its default "ema" normalises with the moving statistics in training too, another function.
    layer, stats = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        start.shape[1], "batch", eps=EPSILON, momentum=start.momentum, mode="batch"
    )
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(start.gamma), jnp.asarray(start.beta))
    )
    # Its counter stays 0, which in prediction means statistics that need no debiasing.
    stats = stats.set(layer.batch_state_index, (jnp.asarray(start.mean), jnp.asarray(start.var)))
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def mapped(layer, stats, x):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, stats)

    def train(params, stats, x):
        return mapped(eqx.combine(params, static), stats, x)

    def predict(params, stats, x):
        return mapped(eqx.nn.inference_mode(eqx.combine(params, static)), stats, x)[0]

    return Layer(
        train,
        predict,
        params,
        stats,
        lambda params: (params.weight, params.bias),
        lambda stats: stats.get(layer.batch_state_index),
        1,
    )


def _haiku(start: Start) -> Layer:
    hk = importlib.import_module("haiku")

    def forward(x, train):
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=start.momentum, eps=EPSILON)(x, train)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    wide = (1,) * (len(start.shape) - 1) + start.shape[1:2]
    params = {"batch_norm": {"scale": start.gamma.reshape(wide), "offset": start.beta.reshape(wide)}}
    # After this many steps its debiasing divides by 1 exactly; what it calls average is then the moving statistic.
    counter = np.int32(10**6)
    stats = {
        f"batch_norm/~/{name}_ema": {"counter": counter, "hidden": v.reshape(wide), "average": v.reshape(wide)}
        for name, v in (("mean", start.mean), ("var", start.var))
    }

    def read_stats(stats):
        return tuple(stats[f"batch_norm/~/{name}_ema"]["average"].reshape(-1) for name in ("mean", "var"))

    return Layer(
        lambda params, stats, x: net.apply(params, stats, x, True),
        lambda params, stats, x: net.apply(params, stats, x, False)[0],
        jax.tree.map(jnp.asarray, params),
        jax.tree.map(jnp.asarray, stats),
        lambda params: tuple(params["batch_norm"][name].reshape(-1) for name in ("scale", "offset")),
        read_stats,
        -1,
    )


PEERS = {
    "jax_bn": Peer(_jax_bn, "jax_bn"),
    "flax.linen": Peer(_linen, "flax"),
    "flax.nnx": Peer(_nnx, "flax"),
    "keras": Peer(_keras, "keras"),
    "equinox": Peer(_equinox, "equinox"),
    "haiku": Peer(_haiku, "haiku"),
}


def about() -> dict[str, str]:
    """Versions and device, for the report."""
    names = {"jax": "jax", "flax": "flax", "keras": "keras", "equinox": "equinox", "haiku": "dm-haiku"}
    found = {name: _version(distribution) for name, distribution in names.items()}
    device = jax.devices()[0]
    return {name: version for name, version in found.items() if version} | {"JAX device": device.device_kind}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def calls(layer: Layer, x: NDArray, dy: NDArray) -> Mapping[str, Callable[[], Any]]:
    """Mode -> a function that computes it once, and returns the leaves of all there is when it is done.

    The trees are flattened outside: in a network that is done once a step, not once a batch norm, and it would be most
    of the time at small shapes.
    """
    state, tree = jax.tree.flatten((layer.params, layer.stats))
    placed_x, placed_dy = _place(layer, x), _place(layer, dy)

    def flat(function: Callable, *arrays: jax.Array) -> Callable[[], Any]:
        jitted = jax.jit(lambda state, *arrays: jax.tree.leaves(function(*jax.tree.unflatten(tree, state), *arrays)))
        return lambda: jax.block_until_ready(jitted(state, *arrays))

    functions = flat(layer.train, placed_x), flat(_step(layer), placed_x, placed_dy), flat(layer.predict, placed_x)
    return dict(zip(("forward", "forward+backward", "eval"), functions, strict=True))


def read_step(layer: Layer, leaves: Sequence[jax.Array]) -> Result:
    """What forward+backward has returned."""
    structure = jax.tree.structure((0, layer.stats, (layer.params, 0)))
    y, stats, (dparams, dx) = jax.tree.unflatten(structure, leaves)
    mean, var, dgamma, dbeta = map(np.asarray, (*layer.read_stats(stats), *layer.read_params(dparams)))
    return Result(_back(layer, y), mean, var, _back(layer, dx), dgamma, dbeta)


def read_eval(layer: Layer, leaves: Sequence[jax.Array]) -> NDArray:
    """The y that eval has returned."""
    (y,) = leaves
    return _back(layer, y)


def _step(layer: Layer) -> Callable:
    """(params, stats, x, dy) -> (y, stats, gradients by params and x)."""

    def step(params, stats, x, dy):
        y, pull_back, stats = jax.vjp(lambda params, x: layer.train(params, stats, x), params, x, has_aux=True)
        return y, stats, pull_back(dy)

    return step


def _place(layer: Layer, x: NDArray) -> jax.Array:
    return jnp.asarray(np.ascontiguousarray(np.moveaxis(x, 1, layer.channel_axis)))


def _back(layer: Layer, x: Any) -> NDArray:
    return np.moveaxis(np.asarray(x), layer.channel_axis, 1)
