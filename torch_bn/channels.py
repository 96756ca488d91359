"""Sums and broadcasts by channel, of x [N, C, ...]. `jax_bn/channels.py` has them in JAX's words."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bn.arrays import can_be_read, to_dtype, wide_dtype

# Values of a channel from which its size is guessed.
SAMPLE = 16
# Rows that are added up first, where there are many.
BLOCK = 32
# Below these, PyTorch's sum is as good. PyTorch only.
MANY_ROWS = 2**12
# Values that stay in the cache of a core while they are worked on. PyTorch only.
PIECE = 2**17


def spread(v: Tensor, x: Tensor) -> Tensor:
    """v [C] as [1, C, 1, ...], to stand beside x."""
    return v if x.ndim == 2 else v.reshape((1, -1) + (1,) * (x.ndim - 2))


def sum_by_channel(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum per channel: of every example, then over the examples; of the positions in mask only.

    Over both at once PyTorch adds the examples one by one: at 256x28x28 values around 1e6 that is off by 2, not 3e-4.
    Of many rows, blocks first; and on a CPU the few sums that there are then in float64, which costs nothing.
    """
    x = x if mask is None else torch.where(mask, x, 0)
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return (x if x.ndim == 2 else x.sum(tuple(range(2, x.ndim)))).sum(0)
    if x.dtype != torch.float32:
        return _sum_of_pieces(x) if x.numel() > PIECE and can_be_read(x) else sum_by_channel(x.float())
    return to_dtype(_sum(x, MANY_ROWS), torch.float32)


def _sum(x: Tensor, many: int) -> Tensor:
    """In float64, but of rows fewer than `many`: in float32. PyTorch only."""
    if x.ndim > 2:
        return x.sum(tuple(range(2, x.ndim))).sum(0, dtype=torch.float64)
    whole = len(x) // BLOCK * BLOCK
    if whole < many:
        return x.sum(0)
    blocks = x[:whole].unflatten(0, (-1, BLOCK)).sum(1)
    return blocks.sum(0, dtype=torch.float64) + x[whole:].sum(0)


def sum_of_products(a: Tensor, b: Tensor, mean: Tensor | None = None) -> Tensor:
    """Sum of a * b per channel, or of a * (b - mean), at least in float32.

    Where it can, piece by piece, so that a * b is never in memory. PyTorch only: XLA multiplies while it adds.
    """
    if a.dtype == torch.float64 or a.numel() <= PIECE or not can_be_read(a):
        return sum_by_channel(to_dtype(a, wide_dtype(a.dtype)) * (b if mean is None else b - spread(mean, b)))
    return _sum_of_pieces(a, b, mean)


def _sum_of_pieces(a: Tensor, b: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """`sum_by_channel` of a, or `sum_of_products`, in float32: a piece of a batch is widened and multiplied at a time.

    PyTorch only.
    """
    number = max(1, PIECE * torch.get_num_threads() // a[0].numel())
    number = number if a.ndim > 2 else -(-number // BLOCK) * BLOCK
    total: Tensor | float = 0.0
    for piece, other in zip(a.split(number), (a if b is None else b).split(number), strict=True):
        wide = to_dtype(piece, torch.float32)
        if b is not None:
            factor = wide if b is a else to_dtype(other, torch.float32)
            wide = wide * (factor if mean is None else factor - spread(mean, factor))
        total = _sum(wide, BLOCK) + total
    return to_dtype(torch.as_tensor(total), torch.float32)


def sum_of_squares(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of x^2 per channel: of images on a CPU in one pass, without x^2 in memory.

    PyTorch only: XLA computes x^2 while it adds.
    """
    if mask is not None:
        return sum_by_channel(x * x, mask)
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim == 2:
        return sum_of_products(x, x)
    norms = torch.linalg.vector_norm(x, dim=tuple(range(2, x.ndim)))
    return norms.double().square().sum(0).float()


def num_values(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """Number of values per channel."""
    return x.numel() // x.shape[1] if mask is None else sum_by_channel(mask.expand(x.shape).to(x.dtype))


def total_of(x: Tensor, mask: Tensor | None) -> int | Tensor:
    """What sums over a channel are divided by: m, and 1 where no value counts."""
    m = num_values(x, mask)
    return m.clamp(min=1) if isinstance(m, Tensor) else m


def one_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """One value of each channel, the first; with a mask the largest that counts, and 0 where none does."""
    if mask is None:
        return x[0] if x.ndim == 2 else x[(0, slice(None)) + (0,) * (x.ndim - 2)]
    largest = torch.where(mask, x, -torch.inf).amax([0, *range(2, x.ndim)])
    return torch.where(largest.isneginf(), 0, largest)


def largest_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The largest |x| of each channel: of a sample, SAMPLE of its values, or of all that the mask counts.

    PyTorch only: see `torch_bn.statistics.near_the_mean`.
    """
    some = torch.where(mask, x, 0) if mask is not None else x[: max(1, SAMPLE * x.shape[1] // x[0].numel())]
    return some.abs().amax([0, *range(2, x.ndim)])
