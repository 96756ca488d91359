"""Batch norm as a user writes it in Flax, and the ways to write it wrongly: each class changes one method."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class HandNorm(nn.Module):
    """Biased variance; momentum is the weight of the old value; var starts at 1."""

    eps: float = 1e-5
    momentum: float = 0.9

    axes = (0, 1, 2)
    starts_at = 1.0

    def uses_batch(self, train):
        return train

    def statistics(self, x):
        mean = x.mean(self.axes, keepdims=True)
        return mean, ((x - mean) ** 2).mean(self.axes, keepdims=True)

    def moved(self, old, new, x):
        return self.momentum * old + (1 - self.momentum) * new.mean((0, 1, 2))

    def moved_var(self, old, new, x):
        return self.moved(old, new, x)

    def normalise(self, x, mean, var):
        return (x - mean) / jnp.sqrt(var + self.eps)

    def affine(self, x_hat, scale, bias):
        return x_hat * scale + bias

    @nn.compact
    def __call__(self, x, train: bool):
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        moving_var = self.variable("batch_stats", "var", lambda shape: jnp.full(shape, self.starts_at), shape)
        mean, var = moving_mean.value, moving_var.value
        if self.uses_batch(train):
            mean, var = self.statistics(x)
            if train and not self.is_initializing():
                moving_mean.value = self.moved(moving_mean.value, mean, x)
                moving_var.value = self.moved_var(moving_var.value, var, x)
        return self.affine(self.normalise(x, mean, var), scale, bias)


class Unbiased(HandNorm):
    def moved_var(self, old, new, x):
        m = x.size // x.shape[-1]
        return super().moved_var(old, new * m / (m - 1), x)


class Ddof(HandNorm):
    def statistics(self, x):
        mean, var = super().statistics(x)
        m = x.size // x.shape[-1]
        return mean, var * m / (m - 1)

    def moved_var(self, old, new, x):
        m = x.size // x.shape[-1]
        return super().moved_var(old, new * (m - 1) / m, x)


class Frozen(HandNorm):
    def moved(self, old, new, x):
        return old


class EpsOutside(HandNorm):
    def normalise(self, x, mean, var):
        return (x - mean) / (jnp.sqrt(var) + self.eps)


class AlwaysBatch(HandNorm):
    def uses_batch(self, train):
        return True


class AlwaysMoving(HandNorm):
    def uses_batch(self, train):
        return False


class PerRow(HandNorm):
    axes = (0, 2)


class PerPixel(HandNorm):
    axes = (0,)


class PerImage(HandNorm):
    axes = (1, 2)


class Swapped(HandNorm):
    def affine(self, x_hat, scale, bias):
        return x_hat * bias + scale


class NoAffine(HandNorm):
    def affine(self, x_hat, scale, bias):
        return x_hat


class NoBeta(HandNorm):
    def affine(self, x_hat, scale, bias):
        return x_hat * scale


class Stopped(HandNorm):
    def statistics(self, x):
        return jax.lax.stop_gradient(super().statistics(x))


class StoppedMean(HandNorm):
    def statistics(self, x):
        mean, var = super().statistics(x)
        return jax.lax.stop_gradient(mean), var


class PerDevice(HandNorm):
    """As on two devices without axis_name; the moving statistics are their average."""

    parts = 2

    def statistics(self, x):
        pieces = x.reshape(self.parts, -1, *x.shape[1:])
        mean = pieces.mean((1, 2, 3), keepdims=True)
        var = ((pieces - mean) ** 2).mean((1, 2, 3), keepdims=True)
        return tuple(
            jnp.broadcast_to(v, (*pieces.shape[:2], 1, 1, x.shape[-1])).reshape(-1, 1, 1, x.shape[-1])
            for v in (mean, var)
        )


class PerFourDevices(PerDevice):
    parts = 4


class PerDeviceFirstKept(PerDevice):
    """The moving statistics are the first device's."""

    def moved(self, old, new, x):
        return super().moved(old, new[:1], x)
