"""The sums of a batch norm's gradient, dbeta = sum(dy) and dgamma = r * sum((dy - mean(dy)) * (x - mu)), nearly exact.

Float32 is added in float64, and float64 in two parts: `jax_bn/sums.py`, which has the same in JAX's words, says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bn.channels import spread, sum_by_channel, sum_in_float64, total_of

# From this many values per channel on float32's sums are float64, by device; elsewhere never. On a CPU the copies are a
# third of the time of large images. On a GPU they are half of it, and PyTorch's own kernel adds in a tree.
LONG_SUM = {"cpu": 1, "cuda": 2**16}
# Of the 53 that float64 has: see `jax_bn/sums.py`.
FIRST_BITS = 16
# PyTorch only: every operation here is a loop of its own. Where a CPU takes it piece by piece, by so many values, what
# one has written the next finds in the cache: float64 copies cost half of what they would cost by way of memory.
PIECE = 2**18


def gradient_sums(
    dy: Tensor, d: Tensor, rest: Tensor | None, mean: Tensor, mask: Tensor | None, long_sum: float
) -> tuple[Tensor, Tensor | None]:
    """sum(dy) and sum(dy * (d - mean)), as exact as d's dtype asks for; of the latter None where any sum will do.

    Args:
      dy: the gradient of y.
      d: x's differences to a value near the mean.
      rest: what d has rounded off, of float64, else None.
      mean: of d.
      mask: which positions count.
      long_sum: from so many values per channel on float32 is added in float64.
    """
    if rest is not None:
        return sums_in_parts(dy, d, rest, mean, mask)
    if d.numel() // d.shape[1] >= long_sum:
        return sums_in_float64(dy, d, mask)
    return sum_in_float64(dy), None


def sums_in_float64(dy: Tensor, d: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum(dy) and sum(dy * (d - mean(d))), added in float64: the mean of d is about 0, and may come off last."""
    # Compiled, there are no copies: all is one piece.
    one = torch.compiler.is_compiling() or d.device.type != "cpu"
    pieces = 1 if one else max(1, min(len(d), d.numel() // PIECE))
    if pieces == 1:
        dbeta, along, sum_d = _three_sums(dy, d, mask)
    else:
        masks = [None] * pieces if mask is None else mask.expand(d.shape).tensor_split(pieces)
        sums = torch.zeros(3, d.shape[1], dtype=torch.float64, device=d.device)
        for piece in zip(dy.tensor_split(pieces), d.tensor_split(pieces), masks, strict=True):
            sums = sums + torch.stack(_three_sums(*piece))
        dbeta, along, sum_d = sums
    return dbeta.to(d.dtype), (along - dbeta * (sum_d / total_of(d, mask))).to(d.dtype)


def _three_sums(dy: Tensor, d: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """sum(dy), sum(dy * d) and sum(d), the last of the positions in mask only, in float64.

    PyTorch only: JAX transposes the sums.
    """
    dy, d = dy.double(), d.double()
    return sum_by_channel(dy), sum_by_channel(dy * d), sum_by_channel(d, mask)


def sums_in_parts(dy: Tensor, d: Tensor, rest: Tensor, mean: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of float64 in two parts, where rest is what d has rounded off.

    With c = d - mean, p = dy1 * c1, and dy1, c1, p1 the first bits of dy, c, p:

        sum(dy)     = sum(dy1) + sum(dy - dy1)
        sum(dy * c) = sum(p1) + sum((p - p1) + (dy - dy1) * c1 + dy * (c - c1))

    p is exact, and c - c1 has what d and c round off. The last sum of each line is 2^-16 as large as the one before,
    and so is its rounding.
    """
    c, rounded_off = difference(d, spread(mean, d))
    c1, dy1 = first_bits(c), first_bits(dy)
    low = (c - c1) + (rounded_off + rest)
    p = dy1 * c1
    p1 = first_bits(p)
    dbeta = sum_by_channel(dy1) + sum_by_channel(dy - dy1)
    along = sum_by_channel(p1) + sum_by_channel((p - p1) + (dy - dy1) * c1 + dy * low)
    return dbeta, along - dbeta * ((sum_by_channel(c1, mask) + sum_by_channel(low, mask)) / total_of(d, mask))


def difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a - b, rounded, and what that rounds off, exactly (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    d = a - b
    with torch.no_grad():
        moved = d - a
        return d, (a - (d - moved)) - (b + moved)


def first_bits(v: Tensor) -> Tensor:
    """v rounded to its first bits (Veltkamp's splitting), as a constant: the derivative is that of what is left."""
    v = v.detach()
    large = v * (2.0 ** (53 - FIRST_BITS) + 1)
    first = large - (large - v)
    return torch.where(first.isfinite(), first, 0)  # from 1e297 on, all of it is left
