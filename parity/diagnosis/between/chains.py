"""One side's glue as a chain: a source or a sum of some, an activation and a pool in either order, dropout, flatten."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import FEWEST, error_of
from parity.diagnosis.between.pools import Pool

Array = NDArray[Any]

LETTERS = {1: "C", 2: "LC", 3: "HWC", 4: "DHWC"}


class Source(NamedTuple):
    """A tensor that both sides have alike: `value` in Flax's layout, the first axis that of the examples."""

    name: str
    value: Array


class Chain(NamedTuple):
    """What one side does between its layers.

    Attributes:
      source: what it starts from: "conv1", "conv1 + input", ...
      activation: a name of `activations`, "identity" for none.
      pool: or None.
      order: "activation first" or "pool first"; "" where that makes no difference.
      layout: "C,H,W" or the like where axes are merged or exchanged; "" where not.
      gain: a constant factor on everything.
      dropout: the probability p; 0 for none.
      gate: what the activation is of, where the source is multiplied by it: "" for none.
    """

    source: str
    activation: str = "identity"
    pool: Pool | None = None
    order: str = ""
    layout: str = ""
    gain: float = 1.0
    dropout: float = 0.0
    gate: str = ""

    def __str__(self) -> str:
        if self.gate:
            applied = self.gate if self.activation == "identity" else f"{self.activation} of {self.gate}"
            return f"{self.source} times {applied}"
        parts = [self.source]
        names = [] if self.activation == "identity" else [self.activation]
        steps = [*names, *([str(self.pool)] if self.pool else [])]
        parts += reversed(steps) if self.order == "pool first" else steps
        parts += [f"times {self.gain:.6g}"] if self.gain != 1 else []
        parts += [f"dropout of {self.dropout:.3g}"] if self.dropout else []
        return " -> ".join([*parts, *([f"flattened as {self.layout}"] if self.layout else [])])


class Target(NamedTuple):
    """A side's result, and what counts as equal to it.

    Attributes:
      value: first axis that of the examples.
      tolerance: relative to the largest value.
      limit: the same, absolute.
      dropout: whether zeros may be dropout's.
    """

    value: Array
    tolerance: float
    limit: float
    dropout: bool


class Match(NamedTuple):
    """A fit up to a factor: `doubt` is how far the share of zeros is from the dropout that the factor says."""

    gain: float
    dropout: float
    doubt: float


def match(w: Array, v: Array, target: Target) -> Match | None:
    """How v is a factor times w where it was not set to 0, or None."""
    kept = (v != 0) if target.dropout else np.ones(v.shape, bool)
    power = float((w * w)[kept].sum())
    if np.count_nonzero(kept & (w != 0)) < 2 * FEWEST or not 0 < power < math.inf:
        return None
    gain = float((w * v)[kept].sum()) / power
    if not math.isfinite(gain) or gain == 0 or error_of(v, np.where(kept, gain * w, 0.0)) > target.limit:
        return None
    there = np.abs(gain * w) > target.limit
    dropped = float((there & ~kept).sum()) / max(1.0, float(there.sum()))
    sure = max(6, int(-math.log10(target.tolerance)))  # digits that rounding leaves
    gain = 1.0 if abs(gain - 1) <= 10 * target.tolerance else float(f"{gain:.{sure}g}")
    if dropped == 0:
        return Match(gain, 0.0, 0.0)
    p = 1 - 1 / gain
    return Match(1.0, float(f"{p:.4g}"), 0.01 + abs(dropped - p)) if gain > 1 else None


def alive(w: Array, v: Array, target: Target, *, loose: bool) -> NDArray[np.bool_]:
    """Which of the hypotheses w [K, ...] may make v [...], judged from these few elements."""
    axes = tuple(range(1, w.ndim))
    with np.errstate(all="ignore"):
        if not loose:
            return np.abs(w - v).max(axis=axes, initial=0.0) <= target.limit
        kept = (v != 0) if target.dropout else np.ones(v.shape, bool)
        square: Array = (w * w * kept).sum(axis=axes, keepdims=True)
        gain = (w * v * kept).sum(axis=axes, keepdims=True) / np.maximum(square, 1e-300)
        return np.abs(np.where(kept, gain * w, 0.0) - v).max(axis=axes, initial=0.0) <= target.limit


def views(v: Array, shape: tuple[int, ...], *, rare: bool = False) -> list[tuple[str, Array]]:
    """v as it was before its axes were merged or exchanged.

    Args:
      v: [N, ...], as many elements as `shape` has.
      shape: [N, *spatial, C] before.
      rare: only the unusual orders (W,H,C, ...) in place of the usual (H,W,C and C,H,W).

    Returns:
      (order, v in `shape`), each order that makes a difference; "" for an unchanged tensor.
    """
    inner = shape[1:]
    k = len(inner)
    if v.shape[0] != shape[0] or v.size != math.prod(shape) or k not in LETTERS:
        return []
    found, seen = [], set()
    usual = [tuple(range(k)), (k - 1, *range(k - 1))]
    for order in dict.fromkeys([*usual, *itertools.permutations(range(k))]):
        key = tuple(axis for axis in order if inner[axis] > 1)
        # Without axes of size 1 many orders are one, and the same name must stand for it on both sides.
        if key in seen:
            continue
        seen.add(key)
        unchanged = v.shape == shape
        is_usual = order == usual[0] or (order == usual[1] and not unchanged)
        if is_usual == rare:
            continue
        before = v.reshape(len(v), *(inner[axis] for axis in order))
        name = "" if unchanged and order == usual[0] else ",".join(LETTERS[k][axis] for axis in order)
        found.append((name, before.transpose(0, *(1 + np.argsort(order)))))
    return found
