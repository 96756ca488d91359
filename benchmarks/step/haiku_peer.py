"""Haiku as its examples have it: transform_with_state, a NamedTuple of state; the state is donated."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step.jax_batches import mean_cross_entropy, place, read_loss
from benchmarks.step.network import (
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASS,
    Affine,
    Network,
    Norm,
    Weights,
    channels_last,
)


class TrainState(NamedTuple):
    """All that a step changes."""

    params: hk.Params
    state: hk.State
    opt_state: optax.OptState


def forward(x: jax.Array, is_training: bool) -> jax.Array:
    """Logits of images [B, H, W, 1]."""

    def normalize(x: jax.Array) -> jax.Array:
        return hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=MOMENTUM, eps=EPSILON)(x, is_training)

    def pool(x: jax.Array) -> jax.Array:
        return hk.avg_pool(x, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    x = hk.Conv2D(6, 5, padding=(2, 2))(x)
    x = pool(jax.nn.sigmoid(normalize(x)))
    x = hk.Conv2D(16, 5, padding="VALID")(x)
    x = pool(jax.nn.sigmoid(normalize(x)))
    x = hk.Flatten()(x)
    x = jax.nn.sigmoid(normalize(hk.Linear(120)(x)))
    x = jax.nn.sigmoid(normalize(hk.Linear(84)(x)))
    return hk.Linear(NUM_CLASS)(x)


network = hk.without_apply_rng(hk.transform_with_state(forward))
optimizer = optax.adam(LEARNING_RATE)


@partial(jax.jit, donate_argnums=0)
def train_step(train_state: TrainState, x: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """A step, and the loss before it."""

    def loss_fn(params):
        logits, state = network.apply(params, train_state.state, x, is_training=True)
        return mean_cross_entropy(logits, labels), state

    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
    updates, opt_state = optimizer.update(grads, train_state.opt_state)
    return TrainState(optax.apply_updates(train_state.params, updates), state, opt_state), loss


@jax.jit
def predict(train_state: TrainState, x: jax.Array) -> jax.Array:
    """Logits."""
    return network.apply(train_state.params, train_state.state, x, is_training=False)[0]


def make(weights: Weights, fig_size: int) -> Network:
    """The peer."""
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    names = "conv2_d", "batch_norm", "conv2_d_1", "batch_norm_1", "linear", "batch_norm_2", "linear_1", "batch_norm_3"
    layers: tuple[Affine | Norm, ...] = channels_last(weights)
    for i, (name, given) in enumerate(zip((*names, "linear_2"), layers, strict=True)):
        if isinstance(given, Norm):
            wide = (1, 1, 1, -1) if i < 4 else (1, -1)
            params[name] = {"scale": given.gamma.reshape(wide), "offset": given.beta.reshape(wide)}
            for kind, value in (("mean", given.mean), ("var", given.var)):
                # After this many steps its debiasing divides by 1 exactly: average is the moving statistic.
                ema = {"counter": np.int32(10**6), "hidden": value.reshape(wide), "average": value.reshape(wide)}
                state[f"{name}/~/{kind}_ema"] = ema
        else:
            params[name] = {"w": given.weight, "b": given.bias}
    params, state = jax.tree.map(jnp.array, (params, state))
    train_state = TrainState(params, state, optimizer.init(params))

    def train(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        nonlocal train_state
        train_state, loss = train_step(train_state, *batch)
        return loss

    return Network(place, train, read_loss, lambda batch: predict(train_state, batch[0]), jax.block_until_ready)
