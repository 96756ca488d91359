"""Batches as JAX's libraries take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step.network import Data


def place(data: Data) -> list[tuple[jax.Array, jax.Array]]:
    """Images [B, H, W, 1] and labels, on the device."""
    return [(jnp.asarray(x[..., None]), jnp.asarray(labels)) for x, labels in data.batches()]


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def read_loss(loss: jax.Array) -> list[float]:
    """Of one step, when it is finished."""
    return [float(np.asarray(loss))]
