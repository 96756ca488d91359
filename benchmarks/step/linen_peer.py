"""flax.linen as its guide on batch norm has it: a TrainState with batch_stats; the state is donated."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from benchmarks.step.jax_batches import mean_cross_entropy, place, read_loss
from benchmarks.step.network import EPSILON, LEARNING_RATE, MOMENTUM, NUM_CLASS, Network, Weights, linen_variables


class BLeNet(nn.Module):
    """BLeNet with Flax's own batch norm."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of images [B, H, W, 1]."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)
        x = nn.Conv(6, (5, 5), padding=2)(x)
        x = nn.avg_pool(nn.sigmoid(norm()(x)), (2, 2), strides=(2, 2))
        x = nn.Conv(16, (5, 5), padding="VALID")(x)
        x = nn.avg_pool(nn.sigmoid(norm()(x)), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.sigmoid(norm()(nn.Dense(120)(x)))
        x = nn.sigmoid(norm()(nn.Dense(84)(x)))
        return nn.Dense(NUM_CLASS)(x)


class TrainState(train_state.TrainState):
    """With the moving statistics."""

    batch_stats: Any


@partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, x: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """A step, and the loss before it."""

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return mean_cross_entropy(logits, labels), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads).replace(batch_stats=updates["batch_stats"]), loss


@jax.jit
def predict(state: TrainState, x: jax.Array) -> jax.Array:
    """Logits."""
    return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, train=False)


def make(weights: Weights, fig_size: int) -> Network:
    """The peer."""
    variables = jax.tree.map(jnp.array, linen_variables(weights))
    state = TrainState.create(apply_fn=BLeNet().apply, tx=optax.adam(LEARNING_RATE), **variables)

    def train(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        nonlocal state
        state, loss = train_step(state, *batch)
        return loss

    return Network(place, train, read_loss, lambda batch: predict(state, batch[0]), jax.block_until_ready)
