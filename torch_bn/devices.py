"""A batch spread over the processes of a group: its statistics merged, and its sums. `jax_bn/devices.py` is its twin.

`nn.SyncBatchNorm` has the same for GPUs only, and merges in float32 what E[x^2] - E[x]^2 has lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from torch_bn.channels import spread, sum_by_channel


def num_shards(group: dist.ProcessGroup | None) -> int:
    """Over how many processes the batch is spread."""
    return 1 if group is None else dist.get_world_size(group)


def psum(values: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Sums over the processes, of values of one shape, in one collective; the same to the bit in each."""
    return tuple(_gather(torch.stack(list(values)), group).sum(0))


def merge(
    num_values: Tensor, shift: Tensor, rest: Tensor, var: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the whole batch from those of its pieces (Chan, Golub and LeVeque 1979), in one collective."""
    counts, shifts, rests, variances = _gather(torch.stack([num_values, shift, rest, var]), group).unbind(1)
    total = counts.sum(0)
    weights = counts / total
    # Around the shift of the largest piece.
    shift = shifts.gather(0, counts.argmax(0, keepdim=True))[0]
    offsets = (shifts - shift) + rests
    rest = (weights * offsets).sum(0)
    apart = offsets - rest
    return total, shift, rest, (weights * (variances + apart * apart)).sum(0)


def _gather(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value of every process, in order. PyTorch only: gloo and NCCL promise no order in which they add."""
    found = [torch.empty_like(value) for _ in range(num_shards(group))]
    dist.all_gather(found, value.contiguous(), group)
    return torch.stack(found)


class NormalizeOverGroup(torch.autograd.Function):
    """(d, gamma, beta, rest, var, epsilon, m, group) -> y: d, whose mean is rest, normalised.

    The derivative by d is that of the whole batch, whose statistics rest and var are; those by gamma and beta are this
    process's part, which the group's are the sum of. PyTorch only: JAX transposes its collectives.
    """

    @staticmethod
    def forward(ctx, d, gamma, beta, rest, var, epsilon, m, group):  # noqa: D102
        r = torch.rsqrt(var + epsilon)
        factor = gamma * r
        ctx.save_for_backward(d, gamma, rest, r, m)
        ctx.group = group
        return torch.addcmul(spread(beta - rest * factor, d), d, spread(factor, d))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """The closed form of the gradient, as in `torch_bn.batch_norm`, with the group's sums."""
        d, gamma, rest, r, m = ctx.saved_tensors
        c = d - spread(rest, d)
        dbeta, along = sum_by_channel(dy), sum_by_channel(dy * c)
        all_dbeta, all_along = psum((dbeta, along), ctx.group)
        share = gamma * r / m
        through = torch.addcmul(spread(share * all_dbeta, d), c, spread(share * r * r * all_along, d))
        return dy * spread(gamma * r, d) - through, along * r, dbeta, None, None, None, None, None
