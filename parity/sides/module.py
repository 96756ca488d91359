"""Whose module it is, by what is imported already."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch


def framework_of(module: Any) -> str | None:
    """Which framework's module it is, "torch" or "flax", by what is imported already; None if neither's."""
    torch, flax = sys.modules.get("torch"), sys.modules.get("flax")
    if torch is not None and isinstance(module, torch.nn.Module):
        return "torch"
    if flax is not None:
        from flax import linen, nnx

        if isinstance(module, linen.Module | nnx.Module):
            return "flax"
    return None


def is_torch_module(module: Any) -> TypeGuard[torch.nn.Module]:
    """Whether it is one of PyTorch's modules."""
    return framework_of(module) == "torch"


def is_tensor(value: Any) -> bool:
    """Whether it is one of PyTorch's tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
