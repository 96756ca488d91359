"""Where PyTorch's own kernels are exact enough, and so are taken, being the fastest. PyTorch only: XLA has none."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_bn.channels import sum_by_channel

# A CPU's kernel of the gradient adds a plane up in 8 to 16 running sums: of n terms each, rounding is sqrt(n / 50) eps
# of their Euclidean norm, and may be three times as much; here up to 1.6.
LARGEST_PLANE = 2**10


def kernel_adds_well(d: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's own kernel of the gradient sums well enough here: then it is taken, being the fastest.

    On a CPU it adds images, a channel in a plane, plane by plane, and the planes in float64; what is laid out otherwise
    it adds one by one. On other devices it adds in a tree. Of float64 that is not enough.
    """
    if mask is not None or d.dtype != torch.float32:
        return False
    planes = d.ndim > 2 and d.shape[1] > 1 and d[0, 0].numel() > 1 and d.is_contiguous()
    return d.device.type != "cpu" or planes


def dgamma_of_kernel(dgamma: Tensor, centred: Tensor, d: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """dgamma as PyTorch's kernel has it, but on a CPU of planes above LARGEST_PLANE, where it is added up anew."""
    if d.device.type != "cpu" or d[0, 0].numel() <= LARGEST_PLANE:
        return dgamma
    return r * (sum_by_channel(centred * d) - mean * sum_by_channel(centred))
