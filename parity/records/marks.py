"""Marks on a layer's channels, by which it is seen how they were flattened."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.records.kinds import CHANNELS_SECOND, Shape
from parity.records.recording import Layer
from parity.records.structure import Flattened


def code(name: str, size: int) -> NDArray:
    """[size] distinct numbers, the same for the same name: marks a layer's channels, whatever happens to them later.

    Activations and pools keep a channel that is one number everywhere such a channel; what reaches a linear layer
    shows by its repetitions how it was flattened.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return (0.2 + 0.6 * rng.permutation(size) / max(size, 1)).astype(np.float32)


def read_code(x: NDArray, counts: Collection[int] = ()) -> Flattened | None:
    """How a flat input [F] of coded channels was flattened; None if it does not show any repetition.

    Args:
      x: [F].
      counts: how many channels the network's layers have. Where a pool that counts its padding has made the values at
        the border smaller, the channels' order still is the same everywhere; that shows less, and is asked of these.
    """
    size = len(x)
    scale = np.abs(x).max(initial=0.0)
    if not np.isfinite(scale) or scale == 0:
        return None

    def constant(blocks: NDArray, axis: int) -> bool:
        return bool((np.ptp(blocks, axis=axis) <= 1e-5 * scale).all()) and np.ptp(blocks) > 1e-5 * scale

    divisors = [n for n in range(1, size) if size % n == 0]
    for channels in divisors:
        # The fewest channels that explain it: what repeats with a period repeats with its multiples as well.
        if channels > 1 and constant(x.reshape(size // channels, channels), 0):
            return Flattened(channels, size // channels, False)
        if channels > 1 and constant(x.reshape(channels, size // channels), 1):
            return Flattened(channels, size // channels, True)
    for channels in sorted(n for n in set(counts) if 1 < n < size and size % n == 0):
        for first in True, False:
            rows = x.reshape(channels, -1) if first else x.reshape(-1, channels).T
            order = np.argsort(rows, axis=0, kind="stable")
            # All channels' marks are distinct, those of an axis of pixels are not.
            distinct = np.diff(np.sort(rows, axis=0), axis=0).min() > 1e-6 * scale
            if distinct and (order == order[:, :1]).all():
                return Flattened(channels, size // channels, first)
    return None


def channel_counts(layers: Sequence[Layer], shapes: Mapping[str, Shape], axis: int) -> set[int]:
    """How many channels convolutions and their norms have; `axis` is where their tensors have them."""
    tensors = [full for layer in layers if layer.kind in CHANNELS_SECOND for full in layer.tensors.values()]
    return {shapes[full][axis] for full in tensors if shapes.get(full)}
