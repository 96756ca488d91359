"""BatchNorm: the Flax module over `jax_bn.batch_norm`. It only keeps the state."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jax import Array

from bn_common.checks import check_epsilon, check_initial_moving_var, check_momentum, require
from jax_bn.batch_norm import BatchStats, as_array, batch_norm, wide_dtype


class BatchNorm(nn.Module):
    """Batch normalisation over every axis but the last; variables and calls as `flax.linen.BatchNorm`.

    Variables: params/scale, params/bias, batch_stats/mean, batch_stats/var, each [C]. In training the collection
    "batch_stats" must be mutable; it moves as `jax_bn.batch_norm` says. While the module is being initialised the
    moving statistics stay as they are, and a single value per channel is accepted.

    The defaults are this project's convention: momentum 0.9 and a moving variance that starts at 0 (Flax: 0.99 and 1).

    Attributes:
      use_running_average: predict with batch_stats (True) or normalise with x's own statistics (False); given here or
        in the call.
      momentum: weight of the OLD value.
      epsilon: added to the variance.
      dtype: of y (None: x's own).
      param_dtype: dtype of scale and bias; the statistics have it too, but at least float32.
      use_bias, use_scale: have beta, have gamma.
      bias_init, scale_init: initialisers of beta and gamma.
      initial_moving_var: value that batch_stats/var starts with.
      axis_name: see `jax_bn.batch_norm`.
      unbiased_moving_var: see `jax_bn.batch_norm`.

    Raises:
      ValueError: a momentum or epsilon that `jax_bn.batch_norm` refuses, or a negative initial_moving_var.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: str | None = None
    unbiased_moving_var: bool = False
    initial_moving_var: float = 0.0

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_epsilon("epsilon", self.epsilon)
        check_initial_moving_var(self.initial_moving_var)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Normalise x [..., C].

        Raises:
          ValueError: use_running_average is given neither as attribute nor here, or in both places; and all that
            `jax_bn.batch_norm` refuses.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = as_array("x", x)
        require(x.ndim >= 2, "the rank of x", f"{x.ndim} (shape {x.shape})", "2 or more: a batch and channels")
        shape, stats_dtype = (x.shape[-1],), wide_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.full, shape, self.initial_moving_var, stats_dtype)
        gamma = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else jnp.ones(shape)
        beta = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else jnp.zeros(shape)
        # Initialising only asks for shapes, often with a batch of one, which has no variance.
        initializing = self.is_initializing()
        single = x.size == x.shape[-1]
        y, moved = batch_norm(
            x if self.dtype is None else x.astype(wide_dtype(x.dtype, self.dtype)),
            gamma,
            beta,
            BatchStats(mean.value, var.value),
            train=not use_running_average and not (initializing and single),
            momentum=self.momentum,
            epsilon=self.epsilon,
            unbiased_moving_var=self.unbiased_moving_var,
            axis_name=None if initializing else self.axis_name,
        )
        if not use_running_average and not initializing:
            mean.value, var.value = moved
        return y if self.dtype is None else y.astype(self.dtype)
