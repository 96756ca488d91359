"""The two numbers that are farthest apart in an array that both sides have, and where they stand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.comparison.differences import Compared, Difference, compared
from parity.comparison.shapes import Shapes
from parity.pairing.translation import Translation
from parity.records.recording import Recording


class Values(NamedTuple):
    """The two numbers that are farthest apart at a place; or the shapes, where these differ.

    Attributes:
      phase: see `parity.records.recording.PHASES`.
      quantity: "input", "output", "weight gradient", "running_var", ...
      torch_layer: PyTorch's dotted name of the layer whose it is; "" is the network.
      torch: PyTorch's number; None where the shapes differ.
      flax: Flax's.
      flax_index: where it stands in Flax's array.
      torch_index: where it stands in PyTorch's; None where an array of Flax's is made of several of PyTorch's.
      torch_shape: of PyTorch's array, in Flax's layout.
      flax_shape: of Flax's.
      shapes: both as their sides have them, where they differ.
    """

    phase: str
    quantity: str
    torch_layer: str
    torch: float | complex | None
    flax: float | complex | None
    flax_index: tuple[int, ...]
    torch_index: tuple[int, ...] | None
    torch_shape: tuple[int, ...]
    flax_shape: tuple[int, ...]
    shapes: Shapes | None = None


def values_at(translation: Translation, flax: Recording, wanted: Difference, *, train: bool) -> Values | None:
    """The numbers behind a difference.

    Args:
      translation: how PyTorch's arrays go across.
      flax: the run of Flax's in which they differ.
      wanted: the difference; of several of its name, as the inputs of one call, the one that is farthest apart.
      train: as the runs were made.

    Returns:
      None where there are no arrays, or nothing differs.
    """
    found = [
        c
        for c in compared(translation, flax, train=train)
        if (c.phase, c.key, c.quantity) == (wanted.phase, wanted.key, wanted.quantity)
    ]
    found = [c for c in found if c.given is not None and c.truth is not None]
    if not found:
        return None
    # As `error_of` ranks them, infinity where shapes differ; what is NaN has no numbers to show.
    errors = [0.0 if np.isnan(c.difference.error) else c.difference.error for c in found]
    best = int(np.argmax(errors))
    return _farthest(found[best]) if errors[best] > 0 else None


def _farthest(c: Compared) -> Values | None:
    assert c.given is not None
    assert c.truth is not None
    a, b = np.asarray(c.truth), np.asarray(c.given)
    place = c.phase, c.quantity, c.key[0]
    if a.shape != b.shape:
        return Values(*place, None, None, (), None, a.shape, b.shape, c.difference.shapes)
    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    with np.errstate(invalid="ignore"):
        apart = np.abs(a.astype(wide) - b.astype(wide))
    # NaN: infinities of one sign, which agree, or a NaN on one side, or on both.
    alike = (a == b) | (np.isnan(a.astype(wide)) & np.isnan(b.astype(wide)))
    apart = np.where(alike, 0.0, np.where(np.isnan(apart), np.inf, apart))
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(apart)), apart.shape))
    return Values(*place, a[at].item(), b[at].item(), at, _in_torch(c, a, at), a.shape, b.shape)


def _in_torch(c: Compared, truth: NDArray, at: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where PyTorch has it: numbers from 0 in the place of its array's are sent the same way."""
    if c.source is None or c.way is None:
        return None
    source = np.asarray(c.source)
    # Of float64, exact up to 2^53: what adds or scales on its way is seen, as the number that comes is another one.
    sent = np.asarray(c.way(np.arange(source.size, dtype=np.float64).reshape(source.shape)))
    if sent.shape != truth.shape or not 0 <= sent[at] < source.size or sent[at] % 1:
        return None
    there = tuple(int(i) for i in np.unravel_index(int(sent[at]), source.shape))
    return there if np.array_equal(source[there], truth[at], equal_nan=True) else None
