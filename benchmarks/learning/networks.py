"""BLeNet without batch norm, in both wings: LeNet-5 with sigmoids, and all else as BLeNet has it."""

from __future__ import annotations

import flax.linen as linen
import jax.numpy as jnp
from jax import Array
from torch import nn

import jax_bn
import torch_bn
from jax_bn.blenet import average_pool, bias_init, kernel_init


class LeNet(jax_bn.BLeNet):
    """`jax_bn.BLeNet` without its batch norms. `train` and `mask` change nothing."""

    @linen.compact
    def layers(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """The network, layer by layer."""

        def affine(layer: type[linen.Module], fan_in: int, *args, **kwargs) -> linen.Module:
            return layer(*args, kernel_init=kernel_init, bias_init=bias_init(fan_in), **kwargs)

        # A training step moves batch_stats: here they are a number that nothing reads.
        self.variable("batch_stats", "none", jnp.zeros, (), self.param_dtype)
        x = average_pool(linen.sigmoid(affine(linen.Conv, 25 * self.channels, 6, (5, 5), padding=2)(x)))
        x = average_pool(linen.sigmoid(affine(linen.Conv, 25 * 6, 16, (5, 5), padding="VALID")(x)))
        x = x.reshape(x.shape[0], -1)
        x = linen.sigmoid(affine(linen.Dense, x.shape[-1], 120)(x))
        x = linen.sigmoid(affine(linen.Dense, 120, 84)(x))
        return affine(linen.Dense, 84, self.num_class)(x)

    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """Logits [N, num_class] of images x [N, fig_size, fig_size, channels]."""
        return self.layers(x, train, mask)


def torch_lenet() -> torch_bn.BLeNet:
    """`torch_bn.BLeNet` without its batch norms."""
    model = torch_bn.BLeNet()
    for part in (model.conv, model.fc):
        for name, layer in part.named_children():
            if isinstance(layer, torch_bn.BatchNorm):
                part[int(name)] = nn.Identity()
    return model
