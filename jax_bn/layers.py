"""BatchNorm: the linen module over `jax_bn.batch_norm`; `jax_bn/nnx.py` has the NNX form. They only keep the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from bn_common.checks import (
    channel_axes,
    check_epsilon,
    check_initial_moving_var,
    check_momentum,
    check_platform,
    check_rank,
)
from jax_bn.arrays import check_array, wide_dtype
from jax_bn.batch_norm import BatchStats, Options, batch_norm_with


class BatchNorm(nn.BatchNorm):
    """Batch normalisation in place of `flax.linen.BatchNorm`: the same attributes, variables, calls and defaults.

    A checkpoint of either loads in the other. What differs: the variance is exact (use_fast_variance is taken, and
    makes no difference); statistics and arithmetic are float32 at least, and float64 from the start where the
    parameters are; a channel whose mask leaves it less than two values keeps its statistics, where Flax makes them NaN.
    Refused are one value per channel in training, for which Flax returns bias, rank 1, a mask of floats and an epsilon
    of 0. While the module is being initialised the moving statistics stay as they are, and a single value per channel
    is accepted.

    Variables: params/scale, params/bias, batch_stats/mean, batch_stats/var, each [C]; with momentum None also
    batch_stats/num_batches_tracked. In training the collection "batch_stats" must be mutable.

    For this project's convention, which `jax_bn.BLeNet` has: momentum=0.9, initial_moving_var=0.0. For PyTorch's:
    momentum=1 - m, unbiased_moving_var=True.

    Attributes:
      use_running_average: predict with batch_stats (True) or normalise with x's own statistics (False); given here or
        in the call.
      axis: the channel axis, or several.
      momentum: weight of the OLD value; None: every batch weighs the same.
      epsilon: added to the variance.
      dtype: of y (None: the widest of x, scale and bias).
      param_dtype: dtype of scale and bias; the statistics have it too, but at least float32.
      use_bias, use_scale: have beta, have gamma.
      bias_init, scale_init: initialisers of beta and gamma.
      axis_name, axis_index_groups: see `jax_bn.batch_norm`.
      use_fast_variance, force_float32_reductions: taken from calls written for Flax; the statistics are exact, and
        float32 at least, whatever they say.
      unbiased_moving_var: see `jax_bn.batch_norm`.
      initial_moving_var: value that batch_stats/var starts with.
      frozen_statistics: predict with batch_stats in training too, and leave them: scale and bias are trained on.
      platform: what this will run on, as `jax.Device.platform` names it, where that is known: then only the form for
        it is traced. None: both are, and the compiler takes the one for its platform. JAX only.

    Raises:
      ValueError: a momentum or epsilon that `jax_bn.batch_norm` refuses, a negative initial_moving_var, or a platform
        that is neither a name nor None.
    """

    momentum: float | None = 0.99  # type: ignore[assignment]  # Flax knows no None
    unbiased_moving_var: bool = False
    initial_moving_var: float = 1.0
    frozen_statistics: bool = False
    platform: str | None = None

    def __post_init__(self) -> None:
        check_momentum(self.momentum)
        check_epsilon("epsilon", self.epsilon)
        check_initial_moving_var(self.initial_moving_var)
        check_platform(self.platform)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Normalise x.

        Args:
          x: [..., C], or with the channels where axis says; rank 2 or more; complex too.
          use_running_average: see the attribute.
          mask: which positions count in the statistics, see `jax_bn.batch_norm`.

        Raises:
          ValueError: use_running_average is given neither as attribute nor here, or in both places; and all that
            `jax_bn.batch_norm` refuses.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = check_array("x", x)
        shape = feature_shape(x, self.axis)
        stats_dtype = wide_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.full, shape, self.initial_moving_var, stats_dtype)
        gamma = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        beta = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        tracked = None
        if self.momentum is None:
            tracked = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        # Initialising only asks for shapes, often with a batch of one, which has no variance.
        initializing = self.is_initializing()
        single = x.size == len(mean.value.ravel())
        train = not use_running_average and not self.frozen_statistics and not (initializing and single)
        options = options_of(self, mask, None if tracked is None else tracked.value)._replace(platform=self.platform)
        if initializing:
            options = options._replace(axis_name=None)
        stats = BatchStats(mean.value, var.value)
        y, moved = batch_norm_in_flax(x, gamma, beta, stats, options, train=train, dtype=self.dtype)
        if train and not initializing:
            mean.value, var.value = moved
            if tracked is not None:
                tracked.value = tracked.value + 1
        return y


def options_of(layer: Any, mask: Array | None, tracked: Array | None) -> Options:
    """The attributes of a layer, linen or NNX, as `batch_norm` takes them."""
    return Options(
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        unbiased=layer.unbiased_moving_var,
        axis=layer.axis,
        mask=mask,
        axis_name=layer.axis_name,
        groups=layer.axis_index_groups,
        tracked=tracked,
    )


def feature_shape(x: Array, axis: int) -> tuple[int, ...]:
    """The shape of a value per channel of x; ValueError where x has no batch beside its channels.

    JAX only: a layer of PyTorch's is told num_features.
    """
    check_rank(x.shape)
    return tuple(x.shape[a] for a in channel_axes(axis, x.ndim))


def batch_norm_in_flax(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    stats: BatchStats,
    options: Options,
    *,
    train: bool,
    dtype: Any,
    promoted: Sequence[Array | None] | None = None,
) -> tuple[Array, BatchStats]:
    """`batch_norm` without gamma or beta, too; y in the layer's dtype (None: Flax's result dtype, of `promoted`).

    JAX only: in PyTorch y has x's dtype.
    """
    ones, zeros = jnp.ones_like(stats.mean), jnp.zeros_like(stats.mean)
    promoted = (x, gamma, beta) if promoted is None else promoted
    with jax.numpy_dtype_promotion("standard"):  # asked of dtypes only, no value is promoted here
        result = dtype or jnp.result_type(*(v.dtype for v in promoted if v is not None))
        wide = jnp.result_type(x.dtype, result, jnp.float32)
    gamma, beta = ones if gamma is None else gamma, zeros if beta is None else beta
    x = x if wide == jnp.float32 else x.astype(wide)  # to that it is widened where it is read, which costs no copy
    y, stats = batch_norm_with(x, gamma, beta, stats, options, train=train)
    return y.astype(result), stats
