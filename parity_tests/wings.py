"""Both wings behind one call: arrays in PyTorch's layout in, arrays in PyTorch's layout out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from numpy.typing import NDArray

import jax_bn
import torch_bn


class Result(NamedTuple):
    """y and dx are [N, C, ...], the others [C]."""

    y: NDArray
    moving_mean: NDArray
    moving_var: NDArray
    dx: NDArray
    dgamma: NDArray
    dbeta: NDArray


def channels_last(x):
    """[N, C, ...] -> [N, ..., C]."""
    return np.moveaxis(x, 1, -1)


def channels_second(x):
    """[N, ..., C] -> [N, C, ...]."""
    return np.moveaxis(np.asarray(x), -1, 1)


def run_jax(x, gamma, beta, moving_mean, moving_var, dy, *, eps=1e-5, **options) -> Result:
    """jax_bn.batch_norm, jitted, and the gradients of sum(y * dy)."""

    def loss(x, gamma, beta):
        stats = jax_bn.BatchStats(jnp.asarray(moving_mean), jnp.asarray(moving_var))
        y, stats = jax_bn.batch_norm(x, gamma, beta, stats, epsilon=eps, **options)
        return (y * jnp.asarray(channels_last(dy))).sum(), (y, stats)

    arguments = jnp.asarray(channels_last(x)), jnp.asarray(gamma), jnp.asarray(beta)
    (dx, dgamma, dbeta), (y, stats) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    return Result(channels_second(y), *map(np.asarray, stats), channels_second(dx), *map(np.asarray, (dgamma, dbeta)))


def run_torch(x, gamma, beta, moving_mean, moving_var, dy, **options) -> Result:
    """torch_bn.batch_norm, and the gradients of sum(y * dy)."""
    x, gamma, beta = (torch.tensor(v, requires_grad=True) for v in (x, gamma, beta))
    y, *stats = torch_bn.batch_norm(x, gamma, beta, torch.tensor(moving_mean), torch.tensor(moving_var), **options)
    gradients = torch.autograd.grad((y * torch.tensor(dy)).sum(), (x, gamma, beta))
    return Result(*(v.detach().numpy() for v in (y, *stats, *gradients)))


WINGS = {"jax": run_jax, "torch": run_torch}


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser in an environment that is strict about dtypes: optax itself relies on implicit promotion."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(*args, **kwargs)

    return optax.GradientTransformation(optimizer.init, update)
