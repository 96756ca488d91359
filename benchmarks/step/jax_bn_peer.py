"""jax_bn through its public functions, jitted as its training loop does: in a loop, as one scan, with its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jax_bn
from benchmarks.step.jax_batches import place
from benchmarks.step.network import EPSILON, LEARNING_RATE, MOMENTUM, Data, Network, Weights, linen_variables
from bn_common.memory import keep_memory
from jax_bn.settings import compiler_options, compute_in_the_caller
from jax_bn.training import DeviceData, Metrics, TrainState, train_step

COPIES = 10
"""Of the sample, which make it as large as the whole of Fashion-MNIST: 47 MB are in no cache."""


def _jit_step(step: Callable) -> Any:
    """The one place that says how this project compiles a training step, see `jax_bn.training.train`."""
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(train=True))


def _start(weights: Weights, fig_size: int) -> tuple[jax_bn.BLeNet, Any, TrainState]:
    # In this peer's process, as train_jax.py does in its own.
    keep_memory()
    compute_in_the_caller()
    model = jax_bn.BLeNet(fig_size=fig_size, momentum=MOMENTUM, epsilon=EPSILON, platform=jax.default_backend())
    optimizer = optax.adam(LEARNING_RATE)
    variables = jax.tree.map(jnp.array, linen_variables(weights))
    state = TrainState(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    return model, optimizer, state


def _network(step: Callable, state: TrainState, place: Callable, predict: Callable | None = None) -> Network:
    def train(batch: Any) -> Metrics:
        nonlocal state
        state, metrics = step(state, *batch)
        return metrics

    def losses(metrics: Metrics) -> list[float]:
        return np.atleast_1d(np.asarray(metrics.loss) / np.asarray(metrics.examples)).tolist()

    return Network(place, train, losses, predict, jax.block_until_ready)


def loop(weights: Weights, fig_size: int) -> Network:
    """A step a call."""
    model, optimizer, state = _start(weights, fig_size)
    step = _jit_step(partial(train_step, model, optimizer))
    predict = jax.jit(partial(model.apply, train=False), compiler_options=compiler_options())
    return _network(step, state, place, lambda batch: predict(state.variables, batch[0]))


def scan(weights: Weights, fig_size: int) -> Network:
    """An epoch, of the resident batches, a call: what the call costs is shared by ten steps."""
    model, optimizer, state = _start(weights, fig_size)

    def epoch(state: TrainState, x: jax.Array, labels: jax.Array) -> tuple[TrainState, Metrics]:
        # Over the batches' numbers: of the batches themselves, scan would make a copy for each turn.
        def step(state: TrainState, i: jax.Array) -> tuple[TrainState, Metrics]:
            batch = (lax.dynamic_index_in_dim(v, i, keepdims=False) for v in (x, labels))
            return train_step(model, optimizer, state, *batch)

        # Five steps a turn: a turn of XLA's loop costs 0.1 ms, and a step takes 10. It is compiled for twice as long.
        return lax.scan(step, state, jnp.arange(len(x)), unroll=5)

    def place_epoch(data: Data) -> list[tuple[jax.Array, ...]]:
        return [tuple(map(jnp.stack, zip(*place(data), strict=True)))]

    return _network(_jit_step(epoch), state, place_epoch)


def with_input(weights: Weights, fig_size: int) -> Network:
    """A step a call, from uint8 images on the device and the indices of a batch, as the training loop has it."""
    model, optimizer, state = _start(weights, fig_size)

    def train_batch(state: TrainState, data: DeviceData, indices: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(model, optimizer, state, *data.batch(indices))

    def place_indices(data: Data) -> list[tuple[DeviceData, np.ndarray]]:
        images, labels = np.tile(data.images, (COPIES, 1, 1)), np.tile(data.labels, COPIES)
        device_data = DeviceData(*map(jnp.asarray, (images, labels, np.float32(data.mean), np.float32(data.std))))
        which = np.random.default_rng(2).integers(0, COPIES, data.indices.shape, np.int32)
        return [(device_data, indices) for indices in data.indices + which * np.int32(len(data.images))]

    return _network(_jit_step(train_batch), state, place_indices)
