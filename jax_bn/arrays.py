"""What the other files ask of an array: that it is one, its dtype, its rank. `torch_bn/arrays.py` is its twin."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def check_array(name: str, value: Array) -> Array:
    """`value` as a JAX array; raise TypeError unless it is an array already."""
    # Only what already is an array: a list would be a silent copy to the device in every call.
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array")
    return jnp.asarray(value)


def kind_of(value: Array | float | None) -> tuple[tuple[int, ...], str] | float | None:
    """(shape, dtype name) of an array; what is no array, as it is."""
    return (value.shape, value.dtype.name) if isinstance(value, Array | np.ndarray) else value


def wide_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype to compute in: float64 if one of them is (or complex128), else float32."""
    return np.dtype(np.float64 if any(jnp.finfo(dtype).dtype == np.float64 for dtype in dtypes) else np.float32)


def to_dtype(value: Array, dtype: np.dtype) -> Array:
    """`value` in `dtype`, or in the complex dtype of that precision."""
    if jnp.iscomplexobj(value):
        return value.astype(np.complex128 if dtype == np.float64 else np.complex64)
    return value.astype(dtype)


def full_rank(mask: Array, x: Array) -> Array:
    """The mask as bool, with x's rank (rank promotion is never relied on)."""
    return mask.astype(np.bool_).reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def product(a: Array, b: Array) -> Array:
    """a * b, or the real part of conj(a) * b: the scalar product of complex numbers as vectors of two.

    JAX only: Flax's layers take complex x.
    """
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b
