"""Swaps PyTorch's own batch norms for `torch_bn.BatchNorm` everywhere in a model, and back. PyTorch only."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_bn.layers import BatchNorm


def convert_batch_norm(module: nn.Module, *, to_native: bool = False) -> nn.Module:
    """Swap every native batch norm in a model for `torch_bn.BatchNorm`, or with to_native back again.

    The children are swapped in place, a layer that stands in several places stays one; if the module itself is a batch
    norm, its successor is returned. Predictions, parameters and statistics are the same before and after; their names
    in the state_dict are each kind's own (weight or gamma), so load a checkpoint before the swap. Back again go layers
    that keep the unbiased variance, as PyTorch's do; for others, see `BatchNorm.to_native`.

    Returns:
      The module.

    Raises:
      TypeError: no module.
      ValueError: batch norms that cannot be converted (tracking no statistics, lazy, synchronised, ...), all in one
        message; nothing has been swapped.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the module is {type(module).__name__}; allowed: a torch.nn.Module")
    kind = BatchNorm if to_native else _BatchNorm
    successors: dict[nn.Module, nn.Module] = {}
    problems = []
    for name, old in module.named_modules():
        if isinstance(old, kind):
            try:
                successors[old] = old.to_native() if isinstance(old, BatchNorm) else BatchNorm.from_native(old)
            except (TypeError, ValueError) as error:
                problems.append(f"{name or 'the module itself'}: {error}")
    if problems:
        raise ValueError(f"{len(problems)} batch norm(s) cannot be converted:\n  " + "\n  ".join(problems))
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() names what is there twice once only
            if child in successors:
                setattr(parent, name, successors[child])
    return successors.get(module, module)
