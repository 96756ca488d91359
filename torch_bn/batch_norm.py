"""Batch normalisation as a pure function, channels on axis 1 (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1).

`jax_bn/batch_norm.py` is the same page in JAX's words. Statistics, normalisation and the moving average are separate
functions; only the layer keeps state.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from bn_common.checks import check_batch_norm
from torch_bn.arrays import can_be_read, check_array, dtype_name, full_rank, kind_of, to_dtype, wide_dtype
from torch_bn.channels import num_values, spread, sum_by_channel, total_of
from torch_bn.devices import NormalizeOverGroup, merge, num_shards
from torch_bn.kernels import (
    SMALL_KNOWN_MEAN,
    dgamma_of_kernel,
    is_centred,
    is_offset_small,
    kernel_serves,
)
from torch_bn.statistics import Statistics, mean_and_var, near_the_mean


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
    group: dist.ProcessGroup | None = None,
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
      group: processes over which the batch is spread: their statistics are merged from (m, mu, var), never from sums of
        squares, in one collective, and one in the derivative. They may hold different numbers of examples, one at
        least; no mask. Gradients of gamma and beta are this process's part, which `DistributedDataParallel` adds up;
        there are first derivatives only, in reverse mode, and none by way of the statistics that are returned.
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
    options = Options(momentum, eps, unbiased_moving_var, axis, mask, num_batches_tracked, group=group)
    y, moving_mean, moving_var = batch_norm_with(x, gamma, beta, moving_mean, moving_var, options, train=train)
    return to_dtype(y, x.dtype), moving_mean, moving_var


class Options(NamedTuple):
    """How a batch is normalised: the arguments of `batch_norm` that are no value per channel, carried whole.

    Attributes:
      momentum, axis, mask, group: see `batch_norm`. (PyTorch only: group; JAX has axis_name and groups.)
      epsilon: its eps.
      unbiased: its unbiased_moving_var.
      tracked: its num_batches_tracked.
    """

    momentum: float | None = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    axis: int = 1
    mask: Tensor | None = None
    tracked: Tensor | int | None = None
    group: dist.ProcessGroup | None = None


def batch_norm_with(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moving_mean: Tensor,
    moving_var: Tensor,
    options: Options,
    *,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` as the layer calls it: y stays in the dtype that it was computed in, and is rounded by it."""
    named = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_var": moving_var}
    for name, value in ("x", x), *named.items():
        check_array(name, value)
    options = checked(options, x, named, train=train)
    dtype = wide_dtype(x.dtype, *(value.dtype for value in named.values()))
    axis, mask = options.axis, options.mask
    x_second = x if axis == 1 else x.movedim(axis, 1)
    gamma, beta = to_dtype(gamma, dtype), to_dtype(beta, dtype)
    if not train:
        mean, var = to_dtype(moving_mean, dtype), to_dtype(moving_var, dtype)
        y = normalize(x_second, mean, var, gamma, beta, options.epsilon)
        return y if axis == 1 else y.movedim(1, axis), moving_mean, moving_var
    if mask is not None:
        mask = full_rank(mask, x).movedim(axis, 1)
        x_second = torch.where(mask | x_second.isfinite(), x_second, 0)
    if options.group is None:
        y, batch = normalize_batch(x_second, gamma, beta, mask, options.epsilon)
    else:
        y, batch = _normalize_over_group(to_dtype(x_second, dtype), gamma, beta, options.epsilon, options.group)
    moved = moving_average(moving_mean, moving_var, batch, options)
    return y if axis == 1 else y.movedim(1, axis), *moved


def checked(options: Options, x: Tensor, per_channel: Mapping[str, Tensor], *, train: bool) -> Options:
    """The options, which fit x and the named arguments with a value per channel, or an error."""
    mask = options.mask
    if mask is not None:
        check_array("mask", mask)
    axes = check_batch_norm(
        shape=x.shape,
        dtype=dtype_name(x.dtype),
        axis=options.axis,
        per_channel={name: (value.shape, dtype_name(value.dtype)) for name, value in per_channel.items()},
        mask=None if mask is None else (mask.shape, dtype_name(mask.dtype)),
        train=train,
        momentum=options.momentum,
        num_batches_tracked=kind_of(options.tracked),
        epsilon_name="eps",
        epsilon=options.epsilon,
        shards=num_shards(options.group),
    )
    if options.group is not None and mask is not None:
        raise ValueError("mask is given; allowed with a group: None")
    if len(axes) > 1 or not isinstance(options.axis, int):
        raise ValueError(f"axis is {options.axis!r}; allowed: one axis of x")
    if options.axis == axes[0] and type(options.epsilon) is float:
        return options  # to make them anew costs 1 us, a fifteenth of a small prediction
    # A numpy float64 would widen what it meets.
    return options._replace(axis=axes[0], epsilon=float(options.epsilon))


def moving_average(
    moving_mean: Tensor, moving_var: Tensor, batch: Statistics, options: Options
) -> tuple[Tensor, Tensor]:
    """momentum * old + (1 - momentum) * new, in old's dtype but at least float32; old where the new is not known.

    With momentum None, the weights are n / (n + 1) and 1 / (n + 1).
    """
    m, mean, var = batch.num_values, batch.shift + batch.rest, batch.var
    if options.unbiased:
        var = var * (m / (m - 1).clamp(min=1) if isinstance(m, Tensor) else m / (m - 1))
    weights: tuple[float | Tensor, float | Tensor]
    if options.momentum is None:
        n = torch.as_tensor(options.tracked, device=mean.device).to(mean.dtype)
        weights = n / (n + 1), 1 / (n + 1)
    else:
        weights = float(options.momentum), 1 - float(options.momentum)
    moved = []
    for old, new in (moving_mean, mean), (moving_var, var):
        dtype = wide_dtype(old.dtype)
        old, new = to_dtype(old, dtype), to_dtype(new, dtype)
        value = weights[0] * old + weights[1] * new
        moved.append(torch.where(m >= 2, value, old) if isinstance(m, Tensor) else value)
    return moved[0], moved[1]


def normalize(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """gamma * (x - mean) / sqrt(var + epsilon) + beta. Subtract first: folded into x * a + b, a large mean cancels."""
    if not torch.is_grad_enabled() and is_centred(x, mean, var, SMALL_KNOWN_MEAN):  # x * a + b
        return functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=epsilon)
    x = to_dtype(x, mean.dtype)
    if not torch.is_grad_enabled():  # PyTorch's kernel, whose derivative by gamma would not be as exact
        return functional.batch_norm(
            x - spread(mean, x), torch.zeros_like(mean), var, gamma, beta, training=False, eps=epsilon
        )
    # As large as an example: so that autograd adds gamma's and beta's gradients up over the examples first, and then in
    # each. Over both at once PyTorch adds rows one by one.
    factor, offset = (spread(v, x).expand(1, *x.shape[1:]) for v in (gamma * torch.rsqrt(var + epsilon), beta))
    return torch.addcmul(offset, x - spread(mean, x), factor)


def batch_statistics(x: Tensor, options: Options) -> Statistics:
    """The statistics that `batch_norm` normalises x with."""
    mask = None if options.mask is None else full_rank(options.mask, x).movedim(options.axis, 1)
    x = x.detach().movedim(options.axis, 1)
    x = x.to(wide_dtype(x.dtype))
    near = near_the_mean(x, mask)
    return Statistics(num_values(x, mask), near, *mean_and_var(x - spread(near, x), mask))


def normalize_batch(
    x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor | None, epsilon: float
) -> tuple[Tensor, Statistics]:
    """x normalised with its own statistics, and these.

    All is computed from the differences to a value near the mean: exact where x is nearly constant, 0 where it is
    constant. Their own mean is small, so that PyTorch's kernels, which fold it into d * a + b, lose nothing. On a CPU
    it is looked whether 0 is near enough, which spares the differences; half types, which the kernels read and write
    themselves, are not widened then.
    """
    function = _NormalizeBatch if torch.compiler.is_compiling() else _NormalizeBatchForward
    x = x if wide_dtype(x.dtype) == gamma.dtype else x.to(gamma.dtype)
    if mask is None and can_be_read(x):
        if x.ndim > 2 and not x.is_contiguous() and (last := x.movedim(1, -1)).is_contiguous():
            # Channels last: as the matrix that it is in memory.
            y, batch = normalize_batch(last.flatten(0, -2), gamma, beta, None, epsilon)
            return y.unflatten(0, last.shape[:-1]).movedim(-1, 1), batch
        mean, var = mean_and_var(x.detach(), None)
        if is_centred(x, mean, var):
            y, mean, var = function.apply(x, gamma, beta, None, epsilon, mean, var)
            return y, Statistics(num_values(x, None), torch.zeros_like(mean), mean, var)
    x = to_dtype(x, gamma.dtype)
    near = near_the_mean(x.detach(), mask)
    y, offset, var = function.apply(x - spread(near, x), gamma, beta, mask, epsilon, None, None)
    return y, Statistics(num_values(x, mask), near, offset, var)


def _normalize_over_group(
    x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, group: dist.ProcessGroup
) -> tuple[Tensor, Statistics]:
    """`normalize_batch` of a batch that is spread over a group. PyTorch only: in JAX it is the same function."""
    with torch.no_grad():
        near = near_the_mean(x, None)
        mean, var = mean_and_var(x - spread(near, x), None)
        m = torch.ones_like(near) * num_values(x, None)
        m, shift, rest, var = merge(m, near, mean, var, group)
    y = NormalizeOverGroup.apply(x - spread(shift, x), gamma, beta, rest, var, epsilon, m, group)
    return y, Statistics(m, shift, rest, var)


def tangent(d, gamma, mask, mean, var, d_dot, gamma_dot, beta_dot, epsilon):
    """The tangents of y, mean and var: the map of which `_NormalizeBatch.backward` is the transpose.

    y_dot = factor * d_dot + a + (d - mean) * b      factor = gamma * r,  r = 1 / sqrt(var + epsilon)
        b = r * gamma_dot - factor * r^2 * mean((d - mean) * d_dot)
        a = beta_dot - factor * mean(d_dot)
    """
    total = total_of(d, mask)
    r = torch.rsqrt(var + epsilon)
    factor = gamma * r
    c = d - spread(mean, d)
    mean_dot, along = sum_by_channel(d_dot, mask) / total, sum_by_channel(c * d_dot, mask) / total
    b = r * gamma_dot - factor * (r * r) * along
    a = beta_dot - factor * mean_dot
    return d_dot * spread(factor, d) + spread(a, d) + c * spread(b, d), mean_dot, 2 * along


class _NormalizeBatch(torch.autograd.Function):
    """(d, gamma, beta, mask, epsilon, mean, var) -> (y, mean, var): d normalised, and its statistics, if not given.

    PyTorch only: JAX transposes `tangent` itself.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        d: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mask: Tensor | None,
        epsilon: float,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mask is None and d.device.type != "cpu":
            # One kernel for all. (A CPU's adds the statistics one value at a time, six times as slow as sums.)
            m, mean, unbiased = num_values(d, mask), d.new_zeros(d.shape[1]), d.new_zeros(d.shape[1])
            # momentum 1: the running statistics become the batch's; of the variance nothing else is given.
            y, _, _ = torch.native_batch_norm(d, gamma, beta, mean, unbiased, True, 1.0, epsilon)
            return y, mean, unbiased * ((m - 1) / m)
        mean, var = mean_and_var(d, mask) if mean is None or var is None else (mean.clone(), var.clone())
        y, _, _ = torch.native_batch_norm(d, gamma, beta, mean, var, False, 0.0, epsilon)
        return y, mean, var

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        d, gamma, _, mask, ctx.epsilon, *_ = inputs
        _, mean, var = output
        ctx.save_for_backward(d, gamma, mask, mean, var)
        ctx.save_for_forward(d, gamma, mask, mean, var)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None):
        """The closed form of the gradient (paper, section 3), in operations that autograd can follow once more.

            dbeta = sum(dy)       dgamma = r * sum((dy - dbeta / m) * (d - mean))       r = 1 / sqrt(var + epsilon)
            dd    = gamma * r * (dy - dbeta / m - (d - mean) * r * dgamma / m)

        dy is centred before it meets d - mean: with a common offset in dy, mean's rounding would be added up m times.
        The returned statistics add dmean / m and dvar * 2 (d - mean) / m.
        """
        d, gamma, mask, mean, var = ctx.saved_tensors
        dtype = d.dtype
        r = torch.rsqrt(var + ctx.epsilon)
        total = total_of(d, mask)
        only_y = dy is not None and dmean is None and dvar is None
        dy = torch.zeros_like(d) if dy is None else dy
        dbeta = sum_by_channel(dy)
        # With autograd following (for second derivatives) the kernel's own derivative would have to be exact as well.
        if only_y and not torch.is_grad_enabled() and kernel_serves(d, mask):
            centred = dy
            if not is_offset_small(dy, dbeta, d, mean):
                d, centred = to_dtype(d, mean.dtype), dy - spread(dbeta / total, d)
            dd, dgamma, _ = torch.ops.aten.native_batch_norm_backward(
                centred, d, gamma, None, None, mean, r, True, ctx.epsilon, [True, True, False]
            )
            dgamma = dgamma_of_kernel(dgamma, centred, d, mean, r)
            return to_dtype(dd, dtype), dgamma, dbeta, None, None, None, None
        d, dy = to_dtype(d, mean.dtype), to_dtype(dy, mean.dtype)
        centred = dy - spread(dbeta / total, d)
        c = d - spread(mean, d)
        along = sum_by_channel((centred if mask is None else torch.where(mask, centred, dy)) * c)
        dgamma = along * r
        factor = gamma * r
        share = factor / -total
        a, b = share * dbeta, share * r * dgamma
        a = a if dmean is None else a + dmean / total
        b = b if dvar is None else b + 2 * dvar / total
        through = torch.addcmul(spread(a, d), c, spread(b, d))
        through = through if mask is None else torch.where(mask, through, 0)
        dd = torch.addcmul(through, dy, spread(factor, d))
        return to_dtype(dd, dtype), dgamma, dbeta, None, None, None, None


# `apply` asks for it at every call; found anew each time, it is a tenth of the time of a small batch.
_NormalizeBatch.forward.__signature__ = inspect.signature(_NormalizeBatch.forward)  # type: ignore[attr-defined]


class _NormalizeBatchForward(_NormalizeBatch):
    """The same with forward mode. PyTorch only: `torch.compile` traces no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx, d_dot: Tensor | None, gamma_dot: Tensor | None, beta_dot: Tensor | None, *_):
        """See `tangent`."""
        d, gamma, mask, mean, var = ctx.saved_tensors
        d_dot, gamma_dot, beta_dot = (
            torch.zeros_like(like) if given is None else given
            for given, like in ((d_dot, d), (gamma_dot, gamma), (beta_dot, gamma))
        )
        y_dot, *moved = tangent(d, gamma, mask, mean, var, d_dot, gamma_dot, beta_dot, ctx.epsilon)
        return to_dtype(y_dot, d.dtype), *moved
