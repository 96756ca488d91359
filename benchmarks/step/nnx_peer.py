"""flax.nnx as its guides have it: nnx.Optimizer, nnx.jit; with nnx.cached_partial, its advice for fast loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.step.jax_batches import mean_cross_entropy, place, read_loss
from benchmarks.step.network import (
    EPSILON,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASS,
    Network,
    Norm,
    Weights,
    channels_last,
    pooled_size,
)


class BLeNet(nnx.Module):
    """BLeNet with Flax's own batch norm."""

    def __init__(self, fig_size: int, rngs: nnx.Rngs) -> None:
        def norm(num_features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(num_features, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)

        self.conv1 = nnx.Conv(1, 6, (5, 5), padding=2, rngs=rngs)
        self.norm1 = norm(6)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.norm2 = norm(16)
        self.linear3 = nnx.Linear(16 * pooled_size(fig_size) ** 2, 120, rngs=rngs)
        self.norm3 = norm(120)
        self.linear4 = nnx.Linear(120, 84, rngs=rngs)
        self.norm4 = norm(84)
        self.linear5 = nnx.Linear(84, NUM_CLASS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images [B, H, W, 1]."""
        x = nnx.avg_pool(nnx.sigmoid(self.norm1(self.conv1(x))), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.sigmoid(self.norm2(self.conv2(x))), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nnx.sigmoid(self.norm3(self.linear3(x)))
        x = nnx.sigmoid(self.norm4(self.linear4(x)))
        return self.linear5(x)


# Both hold their state in place: there is nothing that the caller could use afterwards, so it is donated.
@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: BLeNet, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    """A step, and the loss before it."""
    loss, grads = nnx.value_and_grad(lambda model: mean_cross_entropy(model(x), labels))(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: BLeNet, x: jax.Array) -> jax.Array:
    """Logits."""
    return model(x)


def make(weights: Weights, fig_size: int) -> Network:
    """The peer."""
    model = BLeNet(fig_size, nnx.Rngs(0))
    for name, given in channels_last(weights)._asdict().items():
        layer = getattr(model, name)
        if isinstance(given, Norm):
            values = {"scale": given.gamma, "bias": given.beta, "mean": given.mean, "var": given.var}
        else:
            values = {"kernel": given.weight, "bias": given.bias}
        nnx.update(layer, nnx.State({name: jnp.array(value) for name, value in values.items()}))
    optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    model.train()
    cached_step = nnx.cached_partial(train_step, model, optimizer)
    cached_predict = nnx.cached_partial(predict, nnx.view(model, use_running_average=True))
    return Network(
        place,
        lambda batch: cached_step(*batch),
        read_loss,
        lambda batch: cached_predict(batch[0]),
        jax.block_until_ready,
    )
