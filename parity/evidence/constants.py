"""Constants that PyTorch's module keeps in float32 and Flax's code makes in float64."""

from __future__ import annotations

from parity.comparison.constants import Constant, rounded
from parity.evidence.jax import FlaxRuns
from parity.evidence.torch import TorchRuns
from parity.pairing.translation import Translation


def rounded_constants(torch_runs: TorchRuns, flax_runs: FlaxRuns, translation: Translation) -> list[Constant]:
    """Those that are the same but for float32's rounding; what has a partner among Flax's variables is carried."""
    tables = torch_runs.tables({name for name, _, _ in translation.pairing.tensors()})
    if not tables:
        return []
    exact, rough = (flax_runs.constants(float64=float64) for float64 in (True, False))
    return list(rounded(tables, exact, rough)) if len(exact) == len(rough) else []
