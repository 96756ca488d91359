"""Products of rounded numbers (bfloat16, TF32, float16), recognised by repeating them or by the size of the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.product.contraction import Product

Array = NDArray[Any]

SMALLEST, LARGEST = 1e-5, 3e-2  # relative error of rounded products
_ACCUMULATED = 3e-6  # what float32 sums of exactly known terms may be off


class Rounding(NamedTuple):
    """The format that products were rounded to, and how that is known, in words."""

    format: str
    words: str


def _to_bits(bits: int, *, truncate: bool = False) -> Callable[[Array], Array]:
    """Rounds to `bits` significant bits, to nearest even or towards zero."""

    def rounded(values: Array) -> Array:
        mantissa, exponent = np.frexp(values)
        scaled = np.ldexp(mantissa, bits)
        return np.ldexp(np.trunc(scaled) if truncate else np.rint(scaled), exponent - bits)

    return rounded


def _float16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)


# TF32 and float16 have the same significant bits; only a float16 is subnormal below 6e-5.
FORMATS: dict[str, Callable[[Array], Array]] = {
    "bfloat16": _to_bits(8),
    "TF32": _to_bits(11),
    "TF32, truncated": _to_bits(11, truncate=True),
    "float16": _float16,
    "bfloat16, truncated": _to_bits(8, truncate=True),
}


def representable(values: Array) -> str:
    """Which format, "bfloat16" or "float16", every value is a number of; "" if neither."""
    if not np.isfinite(values).all():
        return ""
    for name in ("bfloat16", "float16"):
        if np.array_equal(FORMATS[name](values), values):
            return name
    return ""


def recognised(product: Product, y: Array) -> Rounding | None:
    """The format of which y is known beyond doubt to be a product, if there is one."""
    exact = product.forward()
    error = np.abs(exact - y).max()
    size = _relative(exact - y, y)
    if size > LARGEST:
        return None
    outputs = representable(y)
    if outputs and not representable(exact) and y.size > 1:
        return Rounding(outputs, f"rounded to {outputs} (every output is such a number; relative error {size:.1e})")
    allowed = min(_ACCUMULATED * max(product.scale(), np.abs(y).max()), 0.1 * error)
    for (name, rounded), (x_too, kernel_too) in itertools.product(
        FORMATS.items(), ((True, True), (False, True), (True, False))
    ):
        x = rounded(product.x) if x_too else product.x
        kernel = rounded(product.kernel) if kernel_too else product.kernel
        without_bias = product._replace(x=x, kernel=kernel, bias=np.zeros_like(product.bias)).forward()
        for bias in (product.bias, rounded(product.bias)):
            if np.abs(without_bias + bias - y).max() <= allowed:
                what = "operands" if x_too and kernel_too else "input" if x_too else "kernel"
                return Rounding(name, f"{what} rounded to {name} (relative error {size:.1e})")
    return None


def guessed(product: Product, y: Array) -> Rounding | None:
    """The likeliest format, if y is off by noise of the size that rounded products have."""
    exact = product.forward()
    error = y - exact
    size = _relative(error, y)
    if not SMALLEST <= size <= LARGEST or not _noise(error, exact):
        return None
    # Two operands, each off by 0.41 units of 2^-bits in the root mean square: 2.3e-3 and 2.8e-4.
    likely = "bfloat16" if size > 8e-4 else "TF32 or float16" if size > 5e-5 else "several bfloat16 parts"
    return Rounding(likely, f"off by a relative {size:.1e} without structure, as with {likely}")


def _relative(error: Array, y: Array) -> float:
    return float(np.sqrt(np.mean(error**2)) / max(np.sqrt(np.mean(y**2)), 1e-300))


def _noise(error: Array, exact: Array) -> bool:
    """Whether the error is spread evenly, and is no scale or offset of a channel."""
    size = np.sqrt(np.mean(error**2))
    if np.abs(error).max() > 12 * size:
        return False
    error, exact = error.reshape(-1, error.shape[-1]), exact.reshape(-1, exact.shape[-1])
    if len(error) < 8:
        return True
    centred, steady = exact - exact.mean(0), error - error.mean(0)
    slope = (centred * steady).sum(0) / np.maximum((centred**2).sum(0), 1e-300)
    return bool(np.sqrt(np.mean((steady - slope * centred) ** 2)) > 1e-3 * size)
