"""Tensors of a PyTorch module that are neither parameters nor inputs: buffers, and tensors that are mere attributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parity.sides.torch.module import frozen_tables, lifted, numpy


def tables(module: nn.Module) -> dict[str, NDArray]:
    """The floating ones by their dotted names, in their own dtype."""
    return {name: numpy(v) for name, v in _tables(module).items()}


def with_tables(module: nn.Module, arrays: Mapping[str, NDArray]) -> nn.Module:
    """A copy of the module in float64 with these in their places."""
    module = lifted(module, float64=True)
    for name, a in arrays.items():
        path, _, local = name.rpartition(".")
        owner = module.get_submodule(path)
        before = getattr(owner, local)
        after = torch.from_numpy(a).to(before.device)
        is_parameter = isinstance(before, nn.Parameter)
        setattr(owner, local, nn.Parameter(after, requires_grad=False) if is_parameter else after)
    return module


def _tables(module: nn.Module) -> dict[str, Tensor]:
    found = dict(module.named_buffers(remove_duplicate=False)) | frozen_tables(module)
    for path, child in module.named_modules():
        own = {local: v for local, v in vars(child).items() if isinstance(v, Tensor) and not v.requires_grad}
        found |= {f"{path}.{local}" if path else local: v for local, v in own.items()}
    return {name: v for name, v in found.items() if v.is_floating_point()}
