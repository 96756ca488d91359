"""What the other files ask of a tensor: that it is one, its dtype, its rank. `jax_bn/arrays.py` is its twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_array(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")


def dtype_name(dtype: torch.dtype) -> str:
    """The name that both frameworks share: float32 for torch.float32. PyTorch only: JAX's dtypes know it."""
    return str(dtype).removeprefix("torch.")


def kind_of(value: Tensor | float | None) -> tuple[tuple[int, ...], str] | float | None:
    """(shape, dtype name) of a tensor; what is no tensor, as it is."""
    return (value.shape, dtype_name(value.dtype)) if isinstance(value, Tensor) else value


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def to_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`; to be told that there is nothing to do costs PyTorch 4 us, a tenth of a batch of 256x120."""
    return value if value.dtype == dtype else value.to(dtype)


def can_be_read(x: Tensor) -> bool:
    """Whether what is done may depend on values: on a CPU, outside of all that traces or transforms a function.

    PyTorch only: XLA is told by `jax.lax.cond`.
    """
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def full_rank(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as bool, with x's rank."""
    return (mask != 0).reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
