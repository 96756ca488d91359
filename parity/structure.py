"""What a module looks like to the bridge: its layers in order, its tensors' shapes, what stands behind a flatten.

Needs neither framework; `torch_structure.py` and `flax_structure.py` fill it in.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.kinds import Shape
from parity.recording import Layer


class Flattened(NamedTuple):
    """What a layer's flat input was before: channels * positions numbers, with the channels in front or last."""

    channels: int
    positions: int
    channels_first: bool


@dataclass
class Structure:
    """A module, or a set of weights.

    Attributes:
      layers: in the order of execution where that is known, else of definition.
      shapes: full name -> shape of every tensor that has to be carried; no counters.
      counters: path of a layer -> full name of its counter of batches.
      flattened: path of a layer -> what its input was before it was flattened.
      feeders: path of a layer -> of the layer whose output it takes as it is; None if no run has shown them.
      ordered: whether the order of the layers means anything.
    """

    layers: list[Layer]
    shapes: dict[str, Shape]
    counters: dict[str, str] = field(default_factory=dict)
    flattened: dict[str, Flattened] = field(default_factory=dict)
    feeders: dict[str, str] | None = None
    ordered: bool = True


class Guess(NamedTuple):
    """Inputs that a module may take, in either layout."""

    torch: tuple[NDArray, ...]
    flax: tuple[NDArray, ...]


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
    kinds = {"conv", "conv_transpose", "batch_norm", "group_norm"}
    tensors = [full for layer in layers if layer.kind in kinds for full in layer.tensors.values()]
    return {shapes[full][axis] for full in tensors if shapes.get(full)}


# Sizes of images to try, the usual ones first: some networks only take the one that they were made for.
USUAL_SIZES = (32, 28, 64, 224, 96, 128, 48, 16, 24, 12, 8, 256, 299, 227, 112, 56, 384, 512)
SIZES = tuple(dict.fromkeys((*USUAL_SIZES, *range(1, 161))))
LENGTHS = (*SIZES, 1000, 1024, 2048, 4096, 8000, 16000)
BATCH = 2


def image_guess(batch: Shape) -> Guess:
    """A floating input [N, C, *spatial] in PyTorch's layout."""
    x = np.full(batch, 0.5, np.float32)
    return Guess((x,), (np.moveaxis(x, 1, -1),))


def plain_guess(shape: Shape, copies: int = 1, dtype: type = np.float32) -> Guess:
    """An input whose axes have the same order on both sides."""
    x: NDArray = np.full(shape, 0.5 if dtype is np.float32 else 0, dtype)
    return Guess((x,) * copies, (x,) * copies)


def guesses(layers: Sequence[Layer], shapes: Mapping[str, Shape], groups: int = 1) -> Iterator[Guess]:
    """Inputs that a network may take, by PyTorch's first layer, the likely ones first.

    Args:
      layers: PyTorch's, the first to be called first.
      shapes: of PyTorch's tensors.
      groups: of the first convolution, where the layer does not say it.
    """
    called = [layer for layer in layers if layer.is_called]
    is_matrix = {x.path: any(len(shapes.get(full, ())) >= 2 for full in x.tensors.values()) for x in called}
    first = next((x for x in called if x.kind != "other" or is_matrix[x.path]), next(iter(called), None))
    if first is None:
        return
    own = [shapes[full] for full in first.tensors.values() if full in shapes]
    weight = max(own, key=len, default=())
    # Sequences are as long as a table of positions, if there is one.
    bare = [shapes[full] for layer in layers for full in layer.tensors.values() if layer.kind in ("other", "embedding")]
    lengths = list(dict.fromkeys([n for shape in bare for n in shape[:-1] if n > 1] + [4, 8, 16]))
    if first.kind in ("conv", "conv_transpose") or (first.kind == "other" and len(weight) >= 3):
        yield from _convolution_guesses(first, weight, groups)
    elif first.kind == "embedding":
        yield from (plain_guess((BATCH, length), dtype=np.int32) for length in [*lengths, 1])
        yield plain_guess((BATCH,), dtype=np.int32)
    elif first.kind == "attention":
        matrix = next((shape for shape in own if len(shape) == 2), (1, 1))
        yield from (plain_guess((BATCH, length, matrix[1]), n) for length in lengths for n in (1, 3, 2))
    elif first.kind in ("batch_norm", "group_norm", "layer_norm", "rms_norm") or len(weight) < 2:
        yield from _norm_guesses(first.kind, weight, lengths)
    else:
        yield from _matrix_guesses(weight[1], lengths)
        if first.kind == "other" and first.tensors.keys() == {"weight"}:
            yield from (plain_guess((BATCH, length), dtype=np.int32) for length in lengths)


def _convolution_guesses(first: Layer, weight: Shape, groups: int) -> Iterator[Guess]:
    spatial = max(len(weight) - 2, 1)
    given = first.config.get("groups", groups)
    channels = weight[0] if first.kind == "conv_transpose" else weight[1] * (given if isinstance(given, int) else 1)
    for size in LENGTHS if spatial == 1 else SIZES:
        if size**spatial <= 2**21:
            yield image_guess((BATCH, channels, *(size,) * spatial))


def _norm_guesses(kind: str, weight: Shape, lengths: Sequence[int]) -> Iterator[Guess]:
    channels = math.prod(weight)
    if kind in ("layer_norm", "rms_norm"):
        if len(weight) == 3:
            yield image_guess((BATCH, *weight))
        yield plain_guess((BATCH, *weight))
        yield from (plain_guess((BATCH, length, *weight)) for length in lengths)
    ranks = (4, 3, 2, 5) if kind == "group_norm" else (2, 4, 3, 5)
    yield from (image_guess((BATCH, channels, *(4,) * (rank - 2))) for rank in ranks)


def _matrix_guesses(features: int, lengths: Sequence[int]) -> Iterator[Guess]:
    # Images of three colours that the network itself flattens; a network that does not flatten refuses them.
    side = math.isqrt(features // 3)
    if 3 * side * side == features and side > 1:
        yield image_guess((BATCH, 3, side, side))
    yield plain_guess((BATCH, features))
    yield from (plain_guess((BATCH, length, features)) for length in lengths)
    yield plain_guess((BATCH, 4, 4, features))


def given_guesses(inputs: Sequence[NDArray], flax_inputs: Sequence[NDArray] | None) -> list[Guess]:
    """Inputs that the caller gives; floating ones of rank 3 and more are channels last in Flax."""
    torch = tuple(np.asarray(a) for a in inputs)
    if flax_inputs is not None:
        return [Guess(torch, tuple(np.asarray(a) for a in flax_inputs))]
    moved = tuple(np.moveaxis(a, 1, -1) if a.ndim >= 3 and a.dtype.kind == "f" else a for a in torch)
    return [Guess(torch, moved), Guess(torch, torch)]


def natural(path: str) -> list[tuple[int, int | str]]:
    """A key to sort names by, in which block_10 comes after block_2."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path) if part]
