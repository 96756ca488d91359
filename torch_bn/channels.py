"""Sums and broadcasts by channel, of x [N, C, ...]. `jax_bn/channels.py` has them in JAX's words."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of a channel from which its size is guessed.
SAMPLE = 16
# Rows that are added up first, where there are many.
BLOCK = 32
# Below these, PyTorch's sum is as good. PyTorch only.
MANY_ROWS = 2**12


def spread(v: Tensor, x: Tensor) -> Tensor:
    """v [C] as [1, C, 1, ...], to stand beside x."""
    return v if x.ndim == 2 else v.reshape((1, -1) + (1,) * (x.ndim - 2))


def sum_by_channel(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum per channel: of every example, then over the examples; of the positions in mask only.

    Over both at once PyTorch adds the examples one by one: at 256x28x28 values around 1e6 that is off by 2, not 3e-4.
    Of many rows, blocks first; and on a CPU the few sums that there are then in float64, which costs nothing.
    """
    x = x if mask is None else torch.where(mask, x, 0)
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return (x if x.ndim == 2 else x.sum(tuple(range(2, x.ndim)))).sum(0)
    if x.ndim > 2:
        return x.sum(tuple(range(2, x.ndim))).sum(0, dtype=torch.float64).float()
    whole = len(x) // BLOCK * BLOCK
    if whole < MANY_ROWS:
        return x.sum(0)
    blocks = x[:whole].unflatten(0, (-1, BLOCK)).sum(1)
    return (blocks.sum(0, dtype=torch.float64) + x[whole:].sum(0)).float()


def sum_of_squares(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of x^2 per channel: of images on a CPU in one pass, without x^2 in memory.

    PyTorch only: XLA computes x^2 while it adds.
    """
    if mask is not None or x.device.type != "cpu" or x.dtype != torch.float32 or x.ndim == 2:
        return sum_by_channel(x * x, mask)
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
