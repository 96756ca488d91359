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

        if isinstance(inner_module(module), linen.Module | nnx.Module):
            return "flax"
    return None


def inner_module(module: Any) -> Any:
    """The linen module within a FlaxPreTrainedModel of Hugging Face's, told by its attributes; else what was given."""
    from flax import linen, nnx

    is_own = isinstance(module, linen.Module | nnx.Module)
    # By `dir`: params is a property, that raises where there are none yet.
    is_wrapped = not is_own and {"module", "params", "config"} <= {*dir(module)}
    return module.module if is_wrapped and isinstance(module.module, linen.Module) else module


def is_torch_module(module: Any) -> TypeGuard[torch.nn.Module]:
    """Whether it is one of PyTorch's modules."""
    return framework_of(module) == "torch"


def is_tensor(value: Any) -> bool:
    """Whether it is one of PyTorch's tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
