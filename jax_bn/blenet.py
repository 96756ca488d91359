"""BLeNet: LeNet-5 (LeCun et al. 1998) with batch norm before every sigmoid, as a Flax module.

`torch_bn/blenet.py` is the same network in PyTorch. On a CPU `blenet_cpu.py` computes it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array, lax

from bn_common.checks import check_blenet, check_blenet_input, check_epsilon, check_momentum, require
from jax_bn import blenet_cpu
from jax_bn.batch_norm import as_array
from jax_bn.layers import BatchNorm

# Uniform in +-1/sqrt(fan_in): a variance of (1/3) / fan_in. PyTorch's default for weights.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default for biases (a bias does not know its layer's fan_in itself)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _average_pool(x: Array) -> Array:
    """Mean of every 2x2. `nn.avg_pool` divides by a numpy integer, which strict dtype promotion refuses."""
    return nn.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID") / 4


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
    platform: str | None = None

    def __post_init__(self) -> None:
        check_blenet(channels=self.channels, fig_size=self.fig_size, num_class=self.num_class)
        check_momentum(self.momentum)
        check_epsilon("epsilon", self.epsilon)
        # Any name: JAX's platforms are plugins.
        require(isinstance(self.platform, str | None), "platform", repr(self.platform), "None, or a name such as 'cpu'")
        super().__post_init__()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, [H, W, C]."""
        return self.fig_size, self.fig_size, self.channels

    def __call__(self, x: Array, train: bool) -> Array:
        """Logits [N, num_class] of images x [N, fig_size, fig_size, channels].

        Args:
          x: a float array.
          train: normalise with the batch's statistics and move "batch_stats" (which must be mutable), or predict.

        Raises:
          ValueError: another shape, a dtype that is no float, or fewer than two images in training.
        """
        x = as_array("x", x)
        check_blenet_input(
            shape=x.shape,
            dtype=x.dtype.name,
            layout="NHWC",
            image=self.image_shape,
            train=train and not self.is_initializing(),
            shards=1 if self.axis_name is None or self.is_initializing() else lax.axis_size(self.axis_name),
        )

        if not self._has_cpu_form(x, train):
            return self.layers(x, train)
        variables = {name: self.variables[name] for name in ("params", "batch_stats")}
        logits, batch_stats = _by_platform(self.clone(parent=None, name=None), variables, x, train)
        if train:
            for name, value in batch_stats.items():
                self.put_variable("batch_stats", name, value)
        return logits

    @nn.compact
    def layers(self, x: Array, train: bool) -> Array:
        """The same, layer by layer: what `init` makes, and what runs everywhere but on a CPU. x is not checked."""

        def affine(layer: type[nn.Module], fan_in: int, *args, **kwargs) -> nn.Module:
            return layer(
                *args, kernel_init=kernel_init, bias_init=bias_init(fan_in), param_dtype=self.param_dtype, **kwargs
            )

        def norm() -> nn.Module:
            return BatchNorm(
                use_running_average=not train,
                momentum=self.momentum,
                epsilon=self.epsilon,
                initial_moving_var=0.0,
                param_dtype=self.param_dtype,
                axis_name=self.axis_name,
            )

        x = affine(nn.Conv, 25 * self.channels, 6, (5, 5), padding=2)(x)
        x = _average_pool(nn.sigmoid(norm()(x)))
        x = affine(nn.Conv, 25 * 6, 16, (5, 5), padding="VALID")(x)
        x = _average_pool(nn.sigmoid(norm()(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.sigmoid(norm()(affine(nn.Dense, x.shape[-1], 120)(x)))
        x = nn.sigmoid(norm()(affine(nn.Dense, 120, 84)(x)))
        return affine(nn.Dense, 84, self.num_class)(x)

    def _has_cpu_form(self, x: Array, train: bool) -> bool:
        """Whether `blenet_cpu` may compute this call: not where layers are made or looked at, or dtypes are mixed."""
        if self.platform not in (None, "cpu"):
            return False
        # Flax has no public name for the interceptors; a test sees that they see the layers.
        watched = self.is_mutable_collection("intermediates") or bool(nn.module._global_interceptor_stack)
        if watched or self.is_initializing() or x.shape[0] < blenet_cpu.FEWEST_EXAMPLES:
            return False
        if not train and self.fig_size > blenet_cpu.LARGEST_PREDICTED:
            return False
        given = {path: (v.shape, v.dtype) for path, v in _flat(self.variables).items() if hasattr(v, "shape")}
        # Of variables that do not fit, `layers` says in Flax's words what is wrong.
        wanted = _shapes(self.clone(parent=None, name=None))
        return x.dtype in (jnp.float32, jnp.float64) and given == {path: (shape, x.dtype) for path, shape in wanted}


def _flat(variables: Any) -> dict[tuple[str, ...], Any]:
    return flatten_dict({name: variables[name] for name in ("params", "batch_stats") if name in variables})


@functools.lru_cache(maxsize=64)
def _shapes(model: BLeNet) -> frozenset[tuple[tuple[str, ...], tuple[int, ...]]]:
    """The shapes of a model's variables by their paths."""
    x = jax.ShapeDtypeStruct((1, *model.image_shape), model.param_dtype)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    return frozenset((path, v.shape) for path, v in _flat(variables).items())


# Compiled as one, so that a call outside of `jax.jit` compiles neither form twice.
@functools.partial(jax.jit, static_argnums=(0, 3), inline=True)
def _by_platform(model: BLeNet, variables: Any, x: Array, train: bool) -> tuple[Array, Any]:
    """Logits and the new batch_stats: `BLeNet.layers`, or on a CPU `blenet_cpu.forward`."""

    def layers(variables: Any, x: Array) -> tuple[Array, Any]:
        logits, updated = model.apply(variables, x, train, method="layers", mutable=["batch_stats"])
        return logits, updated["batch_stats"]

    def cpu(variables: Any, x: Array) -> tuple[Array, Any]:
        return blenet_cpu.forward(
            variables["params"],
            variables["batch_stats"],
            x,
            train=train,
            momentum=model.momentum,
            epsilon=model.epsilon,
            axis_name=model.axis_name,
        )

    if model.platform == "cpu":
        return cpu(variables, x)
    return lax.platform_dependent(variables, x, cpu=cpu, default=layers)
