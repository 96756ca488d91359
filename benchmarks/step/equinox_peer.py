"""Equinox as its example of stateful layers has it: one image under jax.vmap, filter_jit; the state is donated."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from benchmarks.step.jax_batches import mean_cross_entropy, read_loss
from benchmarks.step.network import (
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASS,
    Data,
    Network,
    Norm,
    Weights,
    pooled_size,
)

optimizer = optax.adam(LEARNING_RATE)


class BLeNet(eqx.Module):
    """BLeNet with Equinox's own batch norm, for one image."""

    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    linear3: eqx.nn.Linear
    norm3: eqx.nn.BatchNorm
    linear4: eqx.nn.Linear
    norm4: eqx.nn.BatchNorm
    linear5: eqx.nn.Linear
    pool: eqx.nn.AvgPool2d

    def __init__(self, fig_size: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 5)

        def norm(size: int) -> eqx.nn.BatchNorm:
            # mode="batch", which it advises: "ema" normalises with the moving statistics in training too.
            return eqx.nn.BatchNorm(size, axis_name="batch", eps=EPSILON, momentum=MOMENTUM, mode="batch")

        self.conv1 = eqx.nn.Conv2d(1, 6, 5, padding=2, key=keys[0])
        self.norm1 = norm(6)
        self.conv2 = eqx.nn.Conv2d(6, 16, 5, key=keys[1])
        self.norm2 = norm(16)
        self.linear3 = eqx.nn.Linear(16 * pooled_size(fig_size) ** 2, 120, key=keys[2])
        self.norm3 = norm(120)
        self.linear4 = eqx.nn.Linear(120, 84, key=keys[3])
        self.norm4 = norm(84)
        self.linear5 = eqx.nn.Linear(84, NUM_CLASS, key=keys[4])
        self.pool = eqx.nn.AvgPool2d(2, 2)

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        """Logits of an image [1, H, W], and the new moving statistics."""
        x, state = self.norm1(self.conv1(x), state)
        x = self.pool(jax.nn.sigmoid(x))
        x, state = self.norm2(self.conv2(x), state)
        x = self.pool(jax.nn.sigmoid(x))
        x, state = self.norm3(self.linear3(x.reshape(-1)), state)
        x, state = self.norm4(self.linear4(jax.nn.sigmoid(x)), state)
        return self.linear5(jax.nn.sigmoid(x)), state


def batched(model: BLeNet, state: eqx.nn.State, x: jax.Array) -> tuple[jax.Array, eqx.nn.State]:
    """Logits of images [B, 1, H, W], and the new moving statistics."""
    return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def loss_fn(model: BLeNet, state: eqx.nn.State, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, eqx.nn.State]:
    """The loss of a batch, and the new moving statistics."""
    logits, state = batched(model, state, x)
    return mean_cross_entropy(logits, labels), state


@eqx.filter_jit(donate="all-except-first")
def train_step(batch: tuple[jax.Array, jax.Array], model: BLeNet, state: eqx.nn.State, opt_state: Any) -> tuple:
    """A step, and the loss before it."""
    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state, *batch)
    updates, opt_state = optimizer.update(grads, opt_state)
    return eqx.apply_updates(model, updates), state, opt_state, loss


@eqx.filter_jit
def predict(model: BLeNet, state: eqx.nn.State, x: jax.Array) -> jax.Array:
    """Logits."""
    return batched(model, state, x)[0]


def place(data: Data) -> list[tuple[jax.Array, jax.Array]]:
    """Images [B, 1, H, W] and labels, on the device."""
    return [(jnp.asarray(x[:, None]), jnp.asarray(labels)) for x, labels in data.batches()]


def make(weights: Weights, fig_size: int) -> Network:
    """The peer."""
    model, state = eqx.nn.make_with_state(BLeNet)(fig_size, jax.random.key(0))
    for name, given in weights._asdict().items():
        layer = getattr(model, name)
        if isinstance(given, Norm):
            values = jnp.array(given.gamma), jnp.array(given.beta)
            # Its counter stays 0, which in prediction means statistics that need no debiasing.
            state = state.set(layer.batch_state_index, (jnp.array(given.mean), jnp.array(given.var)))
        else:
            values = jnp.array(given.weight), jnp.array(given.bias).reshape(layer.bias.shape)
        new = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, values)
        model = eqx.tree_at(lambda model, name=name: getattr(model, name), model, new)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    inference_model, inference_state = eqx.nn.inference_mode(model), state

    def train(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        nonlocal model, state, opt_state
        model, state, opt_state, loss = train_step(batch, model, state, opt_state)
        return loss

    return Network(
        place,
        train,
        read_loss,
        lambda batch: predict(inference_model, inference_state, batch[0]),
        jax.block_until_ready,
    )
