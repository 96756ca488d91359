"""Where PyTorch's own kernels are exact enough, and so are taken, being the fastest. PyTorch only: XLA has none."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bn.arrays import can_be_read, to_dtype
from torch_bn.channels import spread, sum_of_products

# Values from which it pays to look at some of them first.
LARGE = 2**17
# Standard deviations within which a mean is small: what is near the mean of a quarter of the batch is as far off at
# most (sqrt(3)), and of a variance taken from the sum of squares, 1 + 3 roundings are lost then.
SMALL_MEAN = 3**0.5
# The same to predict with statistics that are known, of which nothing is lost.
SMALL_KNOWN_MEAN = 4
# A CPU's kernel of the gradient adds a plane up in 8 to 16 running sums: of n terms each, rounding is sqrt(n / 50) eps
# of their Euclidean norm, and may be three times as much; here up to 1.6.
LARGEST_PLANE = 2**10
# Rows, which it adds one by one: 0.7 sqrt(n / 24) eps of the norm, three times as much 6.9, of the 8 that are allowed.
MOST_ROWS = 2**8


def is_centred(x: Tensor, mean: Tensor, var: Tensor, most: float = SMALL_MEAN) -> bool:
    """Whether no channel's mean is more than `most` standard deviations from 0: then x * a + b is exact enough.

    Half a rounding each of x * a, mean * a, b and y: with x_hat up to 3 and a mean of 4 standard deviations
    (3 + 4 + 4 + 4 + 3) / 2 eps of gamma, 3 of the largest y; with one of sqrt(3), 1.9. Not of a constant channel, which
    becomes exactly beta: its variance is 0; nor where a sum was too large. A NaN is one in any form, and decides
    nothing for the other channels.
    """
    if not can_be_read(x):
        return False
    beyond = mean.abs().sub(var.sqrt(), alpha=most)
    return bool((((beyond <= 0) & (beyond > -torch.inf)) | mean.isnan()).all())


def kernel_serves(d: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel of the gradient gives dd well enough here; `dgamma_of_kernel` is for dgamma.

    On a CPU it adds images, a channel in a plane, plane by plane, and the planes in float64; rows, and what is laid out
    otherwise, it adds one by one. That is sqrt(n / 50) eps of the norm of the n terms, which in dd is divided by n: a
    seventh of an eps of the terms, however many. On other devices it adds in a tree. Of float64 that is not enough.
    """
    if mask is not None or d.dtype == torch.float64:
        return False
    if d.device.type != "cpu":
        return d.dtype == torch.float32
    return d.is_contiguous() and (d.ndim == 2 or (d.shape[1] > 1 and d[0, 0].numel() > 1))


def is_offset_small(dy: Tensor, dbeta: Tensor, d: Tensor, mean: Tensor) -> bool:
    """Whether dy may go into the sum of dy (d - mean) as it is, uncentred: whether that is known to lose little.

    The mean is rounded, within eps |mean| with its sum's own rounding, and dgamma by |dbeta| times as much. That is
    held to 3 eps of the norm of the terms, of which a part of the examples has no more than all.
    """
    if d.numel() < LARGE or not can_be_read(d):  # to look takes as long
        return False
    some = max(1, len(d) // 32)
    terms = to_dtype(dy[:some], mean.dtype) * (d[:some] - spread(mean, d))
    sizes = torch.linalg.vector_norm(terms, dim=[0, *range(2, d.ndim)])
    return bool((mean.abs() * dbeta.abs() <= 3 * sizes).all())


def dgamma_of_kernel(dgamma: Tensor, dy: Tensor, d: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """dgamma as the kernel has it, but where a CPU's has not added it up well enough: anew.

    That is of planes above LARGEST_PLANE, of rows above MOST_ROWS, and of half types.
    """
    few = d[0, 0].numel() <= LARGEST_PLANE if d.ndim > 2 else len(d) <= MOST_ROWS
    if d.device.type != "cpu" or (few and d.dtype == torch.float32):
        return dgamma
    return r * sum_of_products(dy, d, mean)
