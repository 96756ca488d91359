"""BatchNorm as a Flax NNX module; `jax_bn/layers.py` is the linen form of the same. JAX only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from bn_common.checks import check_epsilon, check_initial_moving_var, check_momentum, require
from jax_bn.arrays import check_array
from jax_bn.batch_norm import BatchStats, batch_statistics
from jax_bn.layers import batch_norm_in_flax, feature_shape, options_of


class Observed(nnx.Variable):
    """What came in at a batch norm with the last call: (num_values, shift, rest, var), [4, C]."""


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation in place of `flax.nnx.BatchNorm`: the same arguments, state, calls and defaults.

    See `jax_bn.BatchNorm` for what differs from Flax's, and for the arguments beyond Flax's. Arithmetic is in
    float32 at least; `promote_dtype` says what dtype y has, as in Flax: with `dtype` None, the widest of all, the
    statistics included.

    State: scale, bias (`nnx.Param`), mean, var (`nnx.BatchStat`), each [C]; with momentum None also
    num_batches_tracked (`nnx.BatchStat`).

    Args:
      num_features: C.
      momentum: weight of the OLD value; None: every batch weighs the same.
      unbiased_moving_var: see `jax_bn.batch_norm`.
      initial_moving_var: value that var starts with.
      frozen_statistics: predict with mean and var in training too, and leave them.
      **kwargs: see `flax.nnx.BatchNorm`; `rngs` is required.

    Raises:
      ValueError: see `jax_bn.BatchNorm`.
    """

    momentum: float | None  # type: ignore[assignment]  # Flax knows no None

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.99,
        unbiased_moving_var: bool = False,
        initial_moving_var: float = 1.0,
        frozen_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        check_momentum(momentum)
        check_epsilon("epsilon", kwargs.get("epsilon", 1e-5))
        check_initial_moving_var(initial_moving_var)
        super().__init__(num_features, momentum=momentum, **kwargs)  # type: ignore[arg-type]
        self.var.set_value(jnp.full_like(self.var.get_value(), initial_moving_var))
        self.unbiased_moving_var = unbiased_moving_var
        self.initial_moving_var = initial_moving_var
        self.frozen_statistics = frozen_statistics
        if momentum is None:
            self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.observed: Any = nnx.data(None)  # `jax_bn.precise_statistics_nnx` sets it

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Normalise x; in training mode the statistics move.

        Args:
          x: [..., C], or with the channels where axis says; rank 2 or more.
          use_running_average: predict, or normalise with x's own statistics; given here it overrules the attribute,
            which `.train()` and `.eval()` set.
          mask: which positions count in the statistics, see `jax_bn.batch_norm`.

        Raises:
          ValueError: use_running_average is given neither as attribute nor here, and all that `jax_bn.batch_norm`
            refuses.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        require(use_running_average is not None, "use_running_average", None, "True or False, here or as attribute")
        x = check_array("x", x)
        shape = feature_shape(x, self.axis)
        require(shape == self.mean.shape, "the shape of the channels of x", shape, f"{self.mean.shape}")
        train = not use_running_average and not self.frozen_statistics
        tracked = self.num_batches_tracked if self.momentum is None else None
        stats = BatchStats(self.mean.get_value(), self.var.get_value())
        gamma = None if self.scale is None else self.scale.get_value()
        beta = None if self.bias is None else self.bias.get_value()
        with jax.numpy_dtype_promotion("standard"):
            promoted, _, _, *affine = self.promote_dtype((x, *stats, gamma, beta), dtype=self.dtype)
        options = options_of(self, mask, None if tracked is None else tracked.get_value())
        y, moved = batch_norm_in_flax(
            x, gamma, beta, stats, options, train=train, dtype=self.dtype, promoted=(promoted, *affine)
        )
        if train and self.observed is not None:
            num_values, *others, _ = batch_statistics(x, options)
            self.observed[...] = jnp.stack([jnp.broadcast_to(num_values, shape), *others])
        if train:
            # A variable that is a reference is written to while a derivative is taken: as in Flax, without its own.
            is_reference = self.mean._can_update or self.var._can_update
            for variable, value in (self.mean, moved.mean), (self.var, moved.var):
                variable[...] = jax.lax.stop_gradient(value) if is_reference else value
            if tracked is not None:
                tracked[...] = tracked[...] + 1
        return y
