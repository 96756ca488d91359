"""BLeNet: LeNet-5 (LeCun et al. 1998) with batch norm before every sigmoid, as a Flax module.

`torch_bn/blenet.py` is the same network in PyTorch. On a CPU `blenet_cpu.py` computes it.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from bn_common.checks import (
    FLOAT_DTYPES,
    check_blenet,
    check_blenet_input,
    check_epsilon,
    check_momentum,
    check_platform,
    require,
)
from jax_bn import blenet_cpu
from jax_bn.arrays import check_array, wide_dtype
from jax_bn.devices import promote_dtype
from jax_bn.layers import BatchNorm


class BLeNet(nn.Module):
    """LeNet-5 with batch norm: 62,158 parameters at the defaults.

    Conv 5x5 channels->6 padding 2, BN, sigmoid, average pool 2x2; Conv 5x5 6->16 no padding, BN, sigmoid, average pool
    2x2; flatten; Dense 16 f f->120, BN, sigmoid; Dense 120->84, BN, sigmoid; Dense 84->num_class, where
    f = (fig_size // 2 - 4) // 2. Initial weights and biases are uniform in +-1/sqrt(fan_in), PyTorch's default.

    Attributes:
      channels: channels of the images, >= 1.
      fig_size: height and width of the images, >= 12.
      num_class: number of classes, >= 1.
      momentum: of every batch norm, the weight of the OLD value.
      epsilon: of every batch norm.
      axis_name: of every batch norm, see `jax_bn.batch_norm`.
      param_dtype: dtype of the parameters.
      dtype: to compute in (None: that of x and the parameters). jnp.bfloat16 is what PyTorch's autocast makes of the
        twin: convolutions, linear layers and what lies between are computed in it; parameters, their gradients, the
        statistics and arithmetic of batch norm, and the logits are float32.
      platform: what this will run on, as `jax.Device.platform` names it, where that is known: then only the form for
        it is traced, in half the time. None: both are, and the compiler takes the one for its platform.

    Raises:
      ValueError: channels, fig_size or num_class is no integer or too small; a momentum or epsilon that
        `jax_bn.batch_norm` refuses; platform is neither a name nor None.
    """

    channels: int = 1
    fig_size: int = 28
    num_class: int = 10
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    param_dtype: Any = jnp.float32
    dtype: Any = None
    platform: str | None = None

    @nn.compact
    def layers(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """The network, layer by layer: what `init` makes, and what runs everywhere but on a CPU. x is not checked."""

        def affine(layer: type[nn.Module], fan_in: int, *args, **kwargs) -> nn.Module:
            return layer(
                *args,
                kernel_init=kernel_init,
                bias_init=bias_init(fan_in),
                param_dtype=self.param_dtype,
                dtype=self.dtype,
                promote_dtype=promote_dtype,
                **kwargs,
            )

        def norm(x: Array) -> Array:
            layer = BatchNorm(
                use_running_average=not train,
                momentum=self.momentum,
                epsilon=self.epsilon,
                initial_moving_var=0.0,
                param_dtype=self.param_dtype,
                dtype=self.dtype,
                axis_name=self.axis_name,
                platform=self.platform,
            )
            return layer(x, mask=None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1)))

        x = affine(nn.Conv, 25 * self.channels, 6, (5, 5), padding=2)(x)
        x = average_pool(nn.sigmoid(norm(x)))
        x = affine(nn.Conv, 25 * 6, 16, (5, 5), padding="VALID")(x)
        x = average_pool(nn.sigmoid(norm(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.sigmoid(norm(affine(nn.Dense, x.shape[-1], 120)(x)))
        x = nn.sigmoid(norm(affine(nn.Dense, 120, 84)(x)))
        logits = affine(nn.Dense, 84, self.num_class)(x)
        return logits if self.dtype is None else logits.astype(wide_dtype(self.dtype))

    def __call__(self, x: Array, train: bool, mask: Array | None = None) -> Array:
        """Logits [N, num_class] of images x [N, fig_size, fig_size, channels].

        Args:
          x: a float array.
          train: normalise with the batch's statistics and move "batch_stats" (which must be mutable), or predict.
          mask: bool [N], which images count in the statistics: those that only fill up a device's share do not.

        Raises:
          ValueError: another shape, a dtype that is no float, or fewer than two images in training.
        """
        x = check_array("x", x)
        if mask is not None:
            mask = check_array("mask", mask)
            allowed = f"bool {x.shape[:1]}, one for each image"
            require((mask.shape, mask.dtype) == (x.shape[:1], bool), "mask", f"{mask.dtype} {mask.shape}", allowed)
        check_blenet_input(
            shape=x.shape,
            dtype=x.dtype.name,
            layout="NHWC",
            image=self.image_shape,
            train=train and not self.is_initializing(),
            shards=1 if self.axis_name is None or self.is_initializing() else lax.axis_size(self.axis_name),
        )
        if blenet_cpu.takes(self, x, train):
            return blenet_cpu.apply(self, x, train, mask)
        return self.layers(x, train, mask)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, [H, W, C]."""
        return self.fig_size, self.fig_size, self.channels

    def __post_init__(self) -> None:
        check_blenet(channels=self.channels, fig_size=self.fig_size, num_class=self.num_class)
        check_momentum(self.momentum)
        check_epsilon("epsilon", self.epsilon)
        name = self.dtype if self.dtype is None else jnp.dtype(self.dtype).name
        require(name in (None, *FLOAT_DTYPES), "dtype", name, f"None, {', '.join(FLOAT_DTYPES)}")
        check_platform(self.platform)
        super().__post_init__()


# JAX only, PyTorch's default for weights: uniform in +-1/sqrt(fan_in), a variance of (1/3) / fan_in.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in); a bias does not know its layer's fan_in. JAX only: PyTorch's default for biases."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def average_pool(x: Array) -> Array:
    """Mean of every 2x2. JAX only: `nn.avg_pool` divides by a numpy integer, which strict dtype promotion refuses."""
    return nn.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID") / 4
