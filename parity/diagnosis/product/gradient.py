"""Whether the gradients through a product are the derivatives of its forward pass, and how they differ if not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding
from parity.diagnosis.product import formats

Array = NDArray[Any]

FLOAT32 = 1e-5


def gradient_finding(
    layer: str, what: str, given: Array, true: Array, squares: Callable[[], Array], tolerance: float
) -> Finding | None:
    """Compares one gradient with the derivative of the forward pass that was found.

    Args:
      layer: side and layer in words, "Flax's convolution".
      what: "input" or "kernel".
      given: the gradient.
      true: the derivative.
      squares: gives the sums of squares of the terms of the entries of `true`, asked for only if needed: where terms
        cancel, rounding is measured by them.
      tolerance: relative to the largest value.

    Returns:
      None if they agree, to float32 at least.
    """
    allowed = max(tolerance, FLOAT32)
    size = max(float(np.abs(true).max()), 1e-300)
    error = float(np.abs(given - true).max())
    if error <= allowed * size:
        return None
    usual = max(size, float(np.sqrt(squares().max())))
    if error <= allowed * usual:
        return None
    relative = error / size
    words = f"{layer} is not the derivative of its forward pass: "
    rounded = formats.representable(given)
    if rounded and not formats.representable(true) and relative <= formats.LARGEST:
        return Finding("matmul-precision", f"the {what} gradient of {words}it is rounded to {rounded} ({relative:.1e})")
    factor = float(np.vdot(true, given)) / max(float(np.vdot(true, true)), 1e-300)
    if not given.any():
        how = "it is zero"
    elif np.abs(given - factor * true).max() <= allowed * usual:
        how = f"it is {factor:.6g} times that"
    else:
        how = f"off by {relative:.2g} of the largest value"
    return Finding("unexplained", f"the {what} gradient of {words}{how}")
