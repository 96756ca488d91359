"""Both wings behind one call: arrays in PyTorch's layout in, arrays in PyTorch's layout out."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from numpy.typing import NDArray

import jax_bn
import torch_bn

# JAX computes on an accelerator where it finds one; so does PyTorch here.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


def run_jax(x, gamma, beta, moving_mean, moving_var, dy, *, eps=1e-5, mask=None, **options) -> Result:
    """jax_bn.batch_norm, jitted, and the gradients of sum(y * dy)."""
    arrays = channels_last(x), gamma, beta, moving_mean, moving_var, channels_last(dy)
    mask = None if mask is None else jnp.asarray(channels_last(mask))
    (dx, dgamma, dbeta), (y, stats) = _jax_step(
        *map(jnp.asarray, arrays), mask, tuple(sorted((options | {"epsilon": eps}).items()))
    )
    return Result(channels_second(y), *map(np.asarray, stats), channels_second(dx), *map(np.asarray, (dgamma, dbeta)))


@functools.partial(jax.jit, static_argnums=7)  # compiled once for all calls with the same shapes and options
def _jax_step(x, gamma, beta, moving_mean, moving_var, dy, mask, options):
    def loss(x, gamma, beta):
        stats = jax_bn.BatchStats(moving_mean, moving_var)
        y, stats = jax_bn.batch_norm(x, gamma, beta, stats, mask=mask, **dict(options))
        return (y * dy).sum(), (y, stats)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gamma, beta)


def run_torch(x, gamma, beta, moving_mean, moving_var, dy, *, mask=None, **options) -> Result:
    """torch_bn.batch_norm, and the gradients of sum(y * dy)."""
    if mask is not None:
        options["mask"] = _tensor(mask)
    x, gamma, beta = (_tensor(v).requires_grad_() for v in (x, gamma, beta))
    y, *stats = torch_bn.batch_norm(x, gamma, beta, _tensor(moving_mean), _tensor(moving_var), **options)
    gradients = torch.autograd.grad((y * _tensor(dy)).sum(), (x, gamma, beta))
    return Result(*(v.detach().cpu().numpy() for v in (y, *stats, *gradients)))


def _tensor(v) -> torch.Tensor:
    return torch.tensor(v, device=DEVICE)


WINGS = {"jax": run_jax, "torch": run_torch}


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser in an environment that is strict about dtypes: optax itself relies on implicit promotion."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(*args, **kwargs)

    return optax.GradientTransformation(optimizer.init, update)
