"""A library's attention, which is one layer with its projections inside: what lies between them is looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between import attention
from parity.diagnosis.between.activations import limit_of
from parity.diagnosis.between.chains import Source, Target
from parity.diagnosis.finding import Finding

Array = NDArray[Any]

MOST_CONDITION = 1e6
"""Of the matrix behind the heads: its inverse is to leave most digits."""


def findings(
    inputs: Sequence[Array],
    outputs: tuple[Array, Array],
    tensors: Mapping[str, Array],
    masks: Sequence[Source],
    tolerance: float,
) -> list[Finding]:
    """What two attentions of one input and the same weights differ in.

    Args:
      inputs: of query, key and value, each once: the same array is one input.
      outputs: PyTorch's and Flax's, [N, L, D].
      tensors: Flax's local names ("query/kernel" [D, H, d], "out/kernel" [H, d, D], biases) -> arrays, alike on both
        sides.
      masks: the network's inputs that may say which positions are padding.
      tolerance: relative to the largest value.

    Returns:
      The findings of `between.attention`; [] where either side is no such attention.
    """
    given = [x for x in inputs if x.ndim == 3 and x.dtype.kind == "f"]
    parts = {_part(name): np.asarray(a, np.float64) for name, a in tensors.items()}
    if not given or any((letter, "kernel") not in parts for letter in ("query", "key", "value", "out")):
        return []
    out = parts["out", "kernel"]
    out = out.reshape(-1, out.shape[-1])
    if out.shape[0] != out.shape[1] or (condition := float(np.linalg.cond(out))) > MOST_CONDITION:
        return []
    sources: list[Source] = []
    for letter, x in zip(("query", "key", "value"), (given[0], given[min(1, len(given) - 1)], given[-1]), strict=True):
        kernel = parts[letter, "kernel"]
        kernel = kernel.reshape(x.shape[-1], -1) if kernel.size % x.shape[-1] == 0 else kernel
        if kernel.ndim != 2:
            return []
        made = x @ kernel + parts.get((letter, "bias"), np.zeros(1)).reshape(-1)
        sources.insert(0, Source(f"the output of {letter}", made))
    values = [np.linalg.solve(out.T, (y - parts.get(("out", "bias"), np.zeros(1))).reshape(-1, len(out)).T).T
              .reshape(*y.shape[:2], -1) for y in outputs]  # fmt: skip
    rough = tolerance * condition
    sides = [Target(value, rough, limit_of(value, rough), dropout=False) for value in values]
    return attention.findings(sources, masks, sides[0], sides[1])


def _part(name: str) -> tuple[str, str]:
    """("query", "kernel") of "query/kernel"; the projection behind the heads is "out"."""
    words = re.split(r"[./]", name)
    letter = words[-2] if len(words) > 1 else ""
    return ("out" if letter.startswith("out") else letter), words[-1]
