"""Products in less than float32: each product layer's float32 output against float64 of the same input.

A float32 product of n terms is off by some 1e-7 of its size; TensorFloat-32 and bfloat16 keep 10 and 7 bits of the
factors, and are off by 1e-4 and 1e-3, whatever n is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding, Located
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.recording import NETWORK, Recording

LIMIT = 2e-5
SIDES = "PyTorch", "Flax"

Run = tuple[Recording, Mapping[tuple[str, int], NDArray]]
"""A run in float32; and (layer, call) -> the output in float64 on that run's inputs."""


def precision_findings(translation: Translation, torch: Run, flax: Run, dtypes: tuple[str, str]) -> list[Located]:
    """Where one side's products are in lower precision than the other's and than its own parameters, in float32.

    Args:
      translation: which layer is which.
      torch: PyTorch's run.
      flax: Flax's.
      dtypes: of PyTorch's parameters and of Flax's.
    """
    limits = {side: max(LIMIT, kinds.HALF.get(dtype, 0.0)) for side, dtype in zip(SIDES, dtypes, strict=True)}
    flax_calls = {c.key: c for c in flax[0].calls}
    found = []
    for position, call in enumerate(torch[0].calls):
        pair = translation.pair_of.get(call.path)
        key = (pair.flax.path, call.index) if pair else NETWORK
        if pair is None or pair.kind not in kinds.PRODUCTS or key not in flax_calls:
            continue
        if call.key not in torch[1] or key not in flax[1]:
            continue
        errors = {
            "PyTorch": _error(call.output, torch[1][call.key]),
            "Flax": _error(flax_calls[key].output, flax[1][key]),
        }
        worse, better = sorted(errors, key=errors.__getitem__, reverse=True)
        if errors[worse] > limits[worse] and errors[better] <= LIMIT:
            name = "bfloat16" if errors[worse] > 8e-4 else "TensorFloat-32"
            text = (
                f"{worse}'s product of float32 is off by {errors[worse]:.1e}, as of factors in {name}; "
                f"{better}'s by {errors[better]:.1e}"
            )
            found.append(
                Located("forward", position, call.path, pair.flax.path, Finding("matmul-precision", text), call.key)
            )
    return found


def _error(given: NDArray, truth: NDArray) -> float:
    size = float(np.linalg.norm(truth))
    return float(np.linalg.norm(given - truth)) / size if size and given.shape == truth.shape else 0.0
