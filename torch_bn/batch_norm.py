"""Batch normalisation as a pure function, channels on axis 1 (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`jax_bn/batch_norm.py` is the same page in JAX's words. Statistics, normalisation and the moving average are separate
functions; only the layer keeps state.
"""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bn_common.checks import check_batch_norm
from torch_bn.channels import largest_of, num_values, one_of, spread, sum_by_channel, sum_in_float64, total_of
from torch_bn.sums import LONG_SUM, difference, sums_in_float64, sums_in_parts


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    *,
    train: bool,
    momentum: float | None = 0.9,
    eps: float = 1e-5,
    unbiased_moving_var: bool = False,
    axis: int = 1,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation of x over every axis but the channels'.

    In training, with m values per channel, and gradients flowing through mu and var:

        mu  = sum(x) / m                     var = sum((x - mu)^2) / m
        y   = gamma * (x - mu) / sqrt(var + eps) + beta
        new = momentum * (moving_mean, moving_var) + (1 - momentum) * (mu, var)

    In prediction: y = gamma * (x - moving_mean) / sqrt(moving_var + eps) + beta.

    Pure: nothing is changed in place. The difference to a value near the channel's mean is taken before anything is
    multiplied, so that a large mean costs no accuracy; a constant channel becomes exactly beta. The derivative is the
    closed form (paper, section 3): in reverse mode of any order, in forward mode of the first, and one over the other.
    (Of forward over forward mode PyTorch makes a wrong number without a word, as of every `autograd.Function`.)

    Args:
      x: [N, C, ...], rank 2 or more, float16, bfloat16, float32 or float64, in any memory format. Arithmetic is done
        in the widest dtype among x, gamma, beta and the moving statistics, at least float32: float16 x with float32
        gamma is float32 inside.
      gamma: [C].
      beta: [C].
      moving_mean: [C].
      moving_var: [C].
      train: take the statistics from x (and move the moving ones), or take the moving ones (also to train with frozen
        ones).
      momentum: weight of the OLD value, in [0, 1]. `torch.nn.BatchNorm2d`'s momentum is the weight of the new one.
        None: every batch weighs the same, new = (n * old + (mu, var)) / (n + 1) after n batches.
      eps: added to the variance, > 0 (not below the smallest normal number of that dtype).
      unbiased_moving_var: move moving_var with var * m / (m - 1), as PyTorch does. y always uses the biased var.
      axis: the channel axis.
      mask: bool or integer, broadcastable to x: which positions count in the statistics, so that m is their number;
        y is given everywhere. A channel in which fewer than two count leaves its moving statistics as they were. A
        NaN or an infinity that does not count is read as 0.
      num_batches_tracked: n, for momentum None only.

    Returns:
      (y, new moving_mean, new moving_var). y has x's shape and dtype; in prediction the others are those given.

    Raises:
      TypeError: x, gamma, beta, a moving statistic or mask is no tensor.
      ValueError: see `bn_common.checks.check_batch_norm`.
    """
    return batch_norm_with(
        x,
        gamma,
        beta,
        moving_mean,
        moving_var,
        train=train,
        momentum=momentum,
        eps=eps,
        unbiased_moving_var=unbiased_moving_var,
        axis=axis,
        mask=mask,
        num_batches_tracked=num_batches_tracked,
    )


def batch_norm_with(
    x, gamma, beta, moving_mean, moving_var, *, train, momentum, eps, unbiased_moving_var, axis, mask,
    num_batches_tracked, long_sum=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`batch_norm` with another long_sum, in place of LONG_SUM."""
    named = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_var": moving_var}
    for name, value in ("x", x), *named.items():
        check_tensor(name, value)
    if mask is not None:
        check_tensor("mask", mask)
    axes = check_batch_norm(
        shape=x.shape,
        dtype=dtype_name(x.dtype),
        axis=axis,
        per_channel={name: (value.shape, dtype_name(value.dtype)) for name, value in named.items()},
        mask=None if mask is None else (mask.shape, dtype_name(mask.dtype)),
        train=train,
        momentum=momentum,
        num_batches_tracked=(
            (num_batches_tracked.shape, dtype_name(num_batches_tracked.dtype))
            if isinstance(num_batches_tracked, Tensor)
            else num_batches_tracked
        ),
        epsilon_name="eps",
        epsilon=eps,
    )
    if len(axes) > 1 or not isinstance(axis, int):
        raise ValueError(f"axis is {axis!r}; allowed: one axis of x")
    eps = float(eps)  # a numpy float64 would widen what it meets
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    (axis,) = axes
    wide_x = _to(x if axis == 1 else x.movedim(axis, 1), dtype)
    gamma, beta = _to(gamma, dtype), _to(beta, dtype)
    if not train:
        y = _normalize(wide_x, _to(moving_mean, dtype), _to(moving_var, dtype), gamma, beta, eps)
        return _to(y if axis == 1 else y.movedim(1, axis), x.dtype), moving_mean, moving_var
    if mask is not None:
        mask = (mask != 0).reshape((1,) * (x.ndim - mask.ndim) + mask.shape).movedim(axis, 1)
        wide_x = torch.where(mask | wide_x.isfinite(), wide_x, 0)
    y, batch = _normalize_batch(wide_x, gamma, beta, eps, mask, (long_sum or LONG_SUM).get(x.device.type, math.inf))
    moved_mean, moved_var = _move(moving_mean, moving_var, batch, momentum, num_batches_tracked, unbiased_moving_var)
    return _to(y if axis == 1 else y.movedim(1, axis), x.dtype), moved_mean, moved_var


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


def _to(v: Tensor, dtype: torch.dtype) -> Tensor:
    """v.to(dtype); to be told that there is nothing to do costs PyTorch 4 us, a tenth of its batch norm of 256x120."""
    return v if v.dtype == dtype else v.to(dtype)


class Statistics(NamedTuple):
    """Statistics of a batch, a value per channel: the biased variance, the mean, and m (a number, or by channel)."""

    num_values: int | Tensor
    mean: Tensor
    var: Tensor


def _move(
    moving_mean: Tensor,
    moving_var: Tensor,
    batch: Statistics,
    momentum: float | None,
    num_batches_tracked: Tensor | int | None,
    unbiased_moving_var: bool,
) -> list[Tensor]:
    """The moving statistics after this batch, in their dtype but at least float32; old where the new is not known."""
    m, mean, var = batch
    bessel = m / (m - 1).clamp(min=1) if isinstance(m, Tensor) else m / (m - 1)
    weights: tuple[float | Tensor, float | Tensor]
    if momentum is None:
        n = torch.as_tensor(num_batches_tracked, device=mean.device).to(mean.dtype)
        weights = n / (n + 1), 1 / (n + 1)
    else:
        weights = float(momentum), 1 - float(momentum)
    moved = []
    for old, new in (moving_mean, mean), (moving_var, var * bessel if unbiased_moving_var else var):
        dtype = wide_dtype(old.dtype)
        old, new = _to(old, dtype), _to(new, dtype)
        value = weights[0] * old + weights[1] * new
        moved.append(torch.where(m >= 2, value, old) if isinstance(m, Tensor) else value)
    return moved


def _normalize(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """gamma * (x - mean) / sqrt(var + eps) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    if not torch.is_grad_enabled():  # PyTorch's kernel, whose derivative by gamma would not be as exact
        return functional.batch_norm(
            x - spread(mean, x), torch.zeros_like(mean), var, gamma, beta, training=False, eps=eps
        )
    return torch.addcmul(spread(beta, x), x - spread(mean, x), spread(gamma * torch.rsqrt(var + eps), x))


def _near_the_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """A value near the mean of each channel, which of a constant channel is its value exactly.

    It is the mean of a quarter of the examples, from the differences to one of the channel's values: whatever the
    others hold, the mean of all is at most sqrt(3) standard deviations away.
    """
    one = one_of(x, mask)
    some = x if mask is not None else x[: (len(x) + 3) // 4]
    near = one + sum_by_channel(some - spread(one, x), mask) / total_of(some, mask)
    # Rounded to the grid of the largest values: these, and most that are smaller, less near are then exact. Else all
    # of a size would round the same way, and their mean be off by as much: more than it is, in a long batch around 0.
    largest = largest_of(x, mask).copysign(near)
    return (near - largest) + largest


def _mean_and_var(d: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of d, whose mean is at most a few standard deviations."""
    total = total_of(d, mask)
    mean = sum_by_channel(d, mask) / total
    return mean, (sum_by_channel(d * d, mask) / total - mean * mean).clamp(min=0)


def batch_statistics(
    x: Tensor, axis: int = 1, mask: Tensor | None = None
) -> tuple[int | Tensor, Tensor, Tensor, Tensor]:
    """(m, near, offset, var) of x, a value per channel; the mean is near + offset, two floats for twice the digits."""
    x = x.detach().movedim(axis, 1)
    x = x.to(wide_dtype(x.dtype))
    if mask is not None:
        mask = (mask != 0).reshape((1,) * (x.ndim - mask.ndim) + mask.shape).movedim(axis, 1)
    near = _near_the_mean(x, mask)
    return num_values(x, mask), near, *_mean_and_var(x - spread(near, x), mask)


def _normalize_batch(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, mask: Tensor | None, long_sum: float
) -> tuple[Tensor, Statistics]:
    """x normalised with its own statistics, and these. long_sum: from so many values on sums are float64.

    All is computed from the differences to a value near the mean: exact where x is nearly constant, 0 where it is
    constant. Their own mean is small, so that PyTorch's kernels, which fold it into d * a + b, lose nothing.
    """
    near = _near_the_mean(x.detach(), mask)
    d, rest = difference(x, spread(near, x)) if x.dtype == torch.float64 else (x - spread(near, x), None)
    function = _NormalizeBatch if torch.compiler.is_compiling() else _NormalizeBatchForward
    y, offset, var = function.apply(d, gamma, beta, eps, mask, long_sum, rest)
    return y, Statistics(num_values(x, mask), near + offset, var)


def _kernel_adds_well(d: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's own kernel of the gradient sums well enough here: then it is taken, being the fastest.

    On a CPU it adds images, a channel in a plane, plane by plane, and the planes in float64; what is laid out otherwise
    it adds one by one. On other devices it adds in a tree. Of float64 that is not enough.
    """
    if mask is not None or d.dtype != torch.float32:
        return False
    planes = d.ndim > 2 and d.shape[1] > 1 and d[0, 0].numel() > 1 and d.is_contiguous()
    return d.device.type != "cpu" or planes


class _NormalizeBatch(torch.autograd.Function):
    """(d, gamma, beta, eps, mask, long_sum, rest) -> (y, mean, var): d normalised with its own statistics, and these.

    rest is what d, of float64, has rounded off.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        d: Tensor, gamma: Tensor, beta: Tensor, eps: float, mask: Tensor | None, long_sum: float, rest: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mask is None and d.device.type != "cpu":
            # One kernel for all. (A CPU's adds the statistics one value at a time, three times as slow as sums.)
            m, mean, unbiased = num_values(d, mask), d.new_zeros(d.shape[1]), d.new_zeros(d.shape[1])
            # momentum 1: the running statistics become the batch's; of the variance nothing else is given.
            y, _, _ = torch.native_batch_norm(d, gamma, beta, mean, unbiased, True, 1.0, eps)
            return y, mean, unbiased * ((m - 1) / m)
        mean, var = _mean_and_var(d, mask)
        y, _, _ = torch.native_batch_norm(d, gamma, beta, mean, var, False, 0.0, eps)
        return y, mean, var

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        d, gamma, _, ctx.eps, mask, ctx.long_sum, rest = inputs
        _, mean, var = output
        ctx.save_for_backward(d, gamma, mask, mean, var, rest)
        ctx.save_for_forward(d, gamma, mask, mean, var, rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None):
        """The closed form of the gradient (paper, section 3), in operations that autograd can follow once more.

            dbeta = sum(dy)       dgamma = r * sum((dy - dbeta / m) * (d - mean))       r = 1 / sqrt(var + eps)
            dd    = gamma * r * (dy - dbeta / m - (d - mean) * r * dgamma / m)

        dy is centred before it meets d - mean: with a common offset in dy, mean's rounding would be added up m times.
        The returned statistics add dmean / m and dvar * 2 (d - mean) / m.
        """
        d, gamma, mask, mean, var, rest = ctx.saved_tensors
        r = torch.rsqrt(var + ctx.eps)
        total = total_of(d, mask)
        only_y = dy is not None and dmean is None and dvar is None
        dy = torch.zeros_like(d) if dy is None else dy
        if rest is not None:
            dbeta, along = sums_in_parts(dy, d, rest, mean, mask)
        elif d.numel() // d.shape[1] >= ctx.long_sum:
            dbeta, along = sums_in_float64(dy, d, mask)
        else:
            dbeta, along = sum_in_float64(dy), None
        # With autograd following (for second derivatives) the kernel's own derivative would have to be exact as well.
        if only_y and not torch.is_grad_enabled() and _kernel_adds_well(d, mask):
            centred = dy - spread(dbeta / total, d)
            dd, dgamma, _ = torch.ops.aten.native_batch_norm_backward(
                centred, d, gamma, None, None, mean, r, True, ctx.eps, [True, True, False]
            )
            return dd, dgamma if along is None else along * r, dbeta, None, None, None, None
        c = d - spread(mean, d)
        if along is None:
            centred = dy - spread(dbeta / total, d)
            along = sum_by_channel((centred if mask is None else torch.where(mask, centred, dy)) * c)
        dgamma = along * r
        factor = gamma * r
        share = factor / -total
        a, b = share * dbeta, share * r * dgamma
        a = a if dmean is None else a + dmean / total
        b = b if dvar is None else b + 2 * dvar / total
        through = torch.addcmul(spread(a, d), c, spread(b, d))
        through = through if mask is None else torch.where(mask, through, 0)
        return torch.addcmul(through, dy, spread(factor, d)), dgamma, dbeta, None, None, None, None


# `apply` asks for it at every call; found anew each time, it is a tenth of the time of a small batch.
_NormalizeBatch.forward.__signature__ = inspect.signature(_NormalizeBatch.forward)  # type: ignore[attr-defined]


class _NormalizeBatchForward(_NormalizeBatch):
    """The same with forward mode. A class of its own: `torch.compile` traces no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx, d_dot: Tensor | None, gamma_dot: Tensor | None, beta_dot: Tensor | None, *_):
        """The tangent map, of which `backward` is the transpose."""
        d, gamma, mask, mean, var, _ = ctx.saved_tensors
        d_dot, gamma_dot, beta_dot = (
            torch.zeros_like(like) if given is None else given
            for given, like in ((d_dot, d), (gamma_dot, gamma), (beta_dot, gamma))
        )
        total = total_of(d, mask)
        r = torch.rsqrt(var + ctx.eps)
        factor = gamma * r
        c = d - spread(mean, d)
        mean_dot, along = sum_by_channel(d_dot, mask) / total, sum_by_channel(c * d_dot, mask) / total
        b = r * gamma_dot - factor * (r * r) * along
        a = beta_dot - factor * mean_dot
        return d_dot * spread(factor, d) + spread(a, d) + c * spread(b, d), mean_dot, 2 * along
