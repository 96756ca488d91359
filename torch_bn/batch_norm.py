"""Batch normalisation as a pure function, channels on axis 1 (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`jax_bn/batch_norm.py` is the same page in JAX's words. Statistics, normalisation and the moving average are separate
functions; only `torch_bn/layers.py` keeps state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bn_common.checks import check_batch_norm


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    *,
    train: bool,
    momentum: float = 0.9,
    eps: float = 1e-5,
    unbiased_moving_var: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of x over every axis but axis 1.

    In training, with m values per channel, and gradients flowing through mu and var:

        mu  = sum(x) / m                     var = sum((x - mu)^2) / m
        y   = gamma * (x - mu) / sqrt(var + eps) + beta
        new = momentum * (moving_mean, moving_var) + (1 - momentum) * (mu, var)

    In prediction: y = gamma * (x - moving_mean) / sqrt(moving_var + eps) + beta.

    Pure: nothing is changed in place. The difference x - mu is taken before anything is multiplied, and mu is carried
    in two parts, so that a large mean costs no accuracy.

    Args:
      x: [N, C, ...], rank 2 or more, float16, bfloat16, float32 or float64. Arithmetic is done in the widest dtype
        among x, gamma, beta and the moving statistics, at least float32.
      gamma: [C].
      beta: [C].
      moving_mean: [C].
      moving_var: [C].
      train: take the statistics from x (and move the moving ones), or take the moving ones.
      momentum: weight of the OLD value, in [0, 1]. `torch.nn.BatchNorm2d`'s momentum is the weight of the new one.
      eps: added to the variance, > 0 (not below the smallest normal number of that dtype).
      unbiased_moving_var: move moving_var with var * m / (m - 1), as PyTorch does. y always uses the biased var.

    Returns:
      (y, new moving_mean, new moving_var). y has x's shape and dtype; in prediction the others are those given.

    Raises:
      TypeError: x, gamma, beta, moving_mean or moving_var is no tensor.
      ValueError: see `bn_common.checks.check_batch_norm`.
    """
    named = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_var": moving_var}
    for name, value in ("x", x), *named.items():
        check_tensor(name, value)
    check_batch_norm(
        shape=x.shape,
        dtype=dtype_name(x.dtype),
        channel_axis=1,
        per_channel={name: (value.shape, dtype_name(value.dtype)) for name, value in named.items()},
        train=train,
        momentum=momentum,
        epsilon_name="eps",
        epsilon=eps,
    )
    momentum, eps = float(momentum), float(eps)  # a numpy float64 would widen what it meets
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    wide_x, gamma, beta = x.to(dtype), gamma.to(dtype), beta.to(dtype)
    if not train:
        y = _normalize(wide_x, moving_mean.to(dtype), moving_var.to(dtype), gamma, beta, eps)
        return y.to(x.dtype), moving_mean, moving_var
    function = _NormalizeBatch if torch.compiler.is_compiling() else _NormalizeBatchForward
    y, shift, rest, batch_var = function.apply(wide_x, gamma, beta, eps)
    count = x.numel() // x.shape[1]
    moved_var = batch_var * (count / (count - 1)) if unbiased_moving_var else batch_var
    return (
        y.to(x.dtype),
        _moving_average(moving_mean, shift + rest, momentum),
        _moving_average(moving_var, moved_var, momentum),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name that both frameworks share: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """momentum * old + (1 - momentum) * new, in old's dtype but at least float32."""
    dtype = wide_dtype(old.dtype)
    return momentum * old.to(dtype) + (1 - momentum) * new.to(dtype)


def _second(v: Tensor, x: Tensor) -> Tensor:
    """v [C] as [1, C, 1, ...], to stand beside x."""
    return v.reshape((1, -1) + (1,) * (x.ndim - 2))


def _normalize(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    return (x - _second(mean, x)) * _second(gamma * torch.rsqrt(var + eps), x) + _second(beta, x)


def _mean(x: Tensor) -> Tensor:
    """Mean per channel: of every example, then over the examples.

    Over both at once PyTorch adds the examples one by one: at 256x28x28 values around 1e6 that is off by 2, not 3e-4.
    """
    return (x if x.ndim == 2 else x.mean(tuple(range(2, x.ndim)))).mean(0)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(shift, rest, var): the mean is shift + rest, a float with twice the digits, and var is the biased variance.

    Two passes over x: shift = mean(x); then, of d = x - shift, rest = mean(d) and var = mean(d^2) - rest^2. The
    rounding of the first mean is what the second pass finds as rest.
    """
    shift = _mean(x)
    d = x - _second(shift, x)
    rest = _mean(d)
    return shift, rest, (_mean(d * d) - rest * rest).clamp(min=0)


def _x_hat(x: Tensor, shift: Tensor, rest: Tensor, factor: Tensor) -> Tensor:
    """(x - mu) * factor, with mu = shift + rest taken off in two steps."""
    return ((x - _second(shift, x)) - _second(rest, x)) * _second(factor, x)


class _NormalizeBatch(torch.autograd.Function):
    """(x, gamma, beta, eps) -> (y, shift, rest, var): x normalised with its own statistics, and these."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift, rest, var = _statistics(x)
        y = _x_hat(x, shift, rest, gamma * torch.rsqrt(var + eps)) + _second(beta, x)
        return y, shift, rest, var

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, gamma, _, ctx.eps = inputs
        _, shift, rest, var = output
        # The mean's derivative is shift's; rest is only what rounding left of it.
        ctx.mark_non_differentiable(rest)
        ctx.save_for_backward(x, gamma, shift, rest, var)
        ctx.save_for_forward(x, gamma, shift, rest, var)

    @staticmethod
    def backward(ctx, dy: Tensor, dshift: Tensor, drest: Tensor, dvar: Tensor):
        """The closed form of the gradient (paper, section 3), in operations that autograd can follow once more.

            g  = gamma / sqrt(var + eps) * (dy - mean(dy))
            dx = g - x_hat * mean(x_hat * g)       dgamma = sum(dy * x_hat)       dbeta = sum(dy)

        dy is centred before it meets x_hat: with a common offset in dy the other order cancels. The returned
        statistics add dmu / m and dvar * 2 (x - mu) / m.
        """
        x, gamma, shift, rest, var = ctx.saved_tensors
        m = x.numel() // x.shape[1]
        r = torch.rsqrt(var + ctx.eps)
        x_hat = _x_hat(x, shift, rest, r)
        g = (dy - _second(_mean(dy), x)) * _second(gamma * r, x)
        along = _mean(x_hat * g) - 2 * dvar / (r * m)
        dx = g - x_hat * _second(along, x) + _second(dshift / m, x)
        return dx, m * _mean(dy * x_hat), m * _mean(dy), None


class _NormalizeBatchForward(_NormalizeBatch):
    """The same with forward mode. A class of its own: `torch.compile` traces no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx, x_dot: Tensor | None, gamma_dot: Tensor | None, beta_dot: Tensor | None, _):
        """The tangent map, of which `backward` is the transpose."""
        x, gamma, shift, rest, var = ctx.saved_tensors
        r = torch.rsqrt(var + ctx.eps)
        x_hat = _x_hat(x, shift, rest, r)
        x_dot = torch.zeros_like(x) if x_dot is None else x_dot
        gamma_dot = torch.zeros_like(gamma) if gamma_dot is None else gamma_dot
        beta_dot = torch.zeros_like(gamma) if beta_dot is None else beta_dot
        along = _mean(x_hat * x_dot)
        z = x_dot - x_hat * _second(along, x)
        y_dot = (z - _second(_mean(z), x)) * _second(gamma * r, x) + _second(gamma_dot, x) * x_hat
        return y_dot + _second(beta_dot, x), _mean(x_dot), None, 2 * along / r
