"""Inputs that a network may take, by the shapes of its first layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.pairing.layouts import goes_last
from parity.records import kinds
from parity.records.inputs import Inputs
from parity.records.kinds import Shape
from parity.records.recording import Layer
from parity.records.structure import Guess

# Sizes of images to try, the usual ones first: some networks only take the one that they were made for.
USUAL_SIZES = (32, 28, 64, 224, 96, 128, 48, 16, 24, 12, 8, 256, 299, 227, 112, 56, 384, 512)
SIZES = tuple(dict.fromkeys((*USUAL_SIZES, *range(1, 161))))
LENGTHS = (*SIZES, 1000, 1024, 2048, 4096, 8000, 16000)
BATCH = 2


def image_guess(batch: Shape) -> Guess:
    """A floating input [N, C, *spatial] in PyTorch's layout."""
    x = np.full(batch, 0.5, np.float32)
    return Guess(Inputs((x,)), Inputs((np.moveaxis(x, 1, -1),)))


def plain_guess(shape: Shape, copies: int = 1, dtype: type = np.float32) -> Guess:
    """An input whose axes have the same order on both sides."""
    x: NDArray = np.full(shape, 0.5 if dtype is np.float32 else 0, dtype)
    return Guess(Inputs((x,) * copies), Inputs((x,) * copies))


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
    tables = [layer for layer in layers if layer.kind in ("other", "embedding") and not layer.is_constant]
    bare = [shapes[full] for layer in tables for full in layer.tensors.values()]
    lengths = list(dict.fromkeys([n for shape in bare for n in shape[:-1] if n > 1] + [4, 8, 16]))
    if first.kind in ("conv", "conv_transpose") or (first.kind == "other" and len(weight) >= 3):
        yield from _convolution_guesses(first, weight, groups)
    elif first.kind == "embedding":
        yield from (plain_guess((BATCH, length), dtype=np.int32) for length in [*lengths, 1])
        yield plain_guess((BATCH,), dtype=np.int32)
    elif first.kind == "attention":
        matrix = next((shape for shape in own if len(shape) == 2), (1, 1))
        yield from (plain_guess((BATCH, length, matrix[1]), n) for length in lengths for n in (1, 3, 2))
    elif first.kind in kinds.NORMS or len(weight) < 2:
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


def given_guesses(inputs: Inputs, flax_inputs: Inputs | None) -> list[Guess]:
    """Inputs that the caller gives; floating ones of rank 3 and more are channels last in Flax."""
    if flax_inputs is not None:
        return [Guess(inputs, flax_inputs)]
    moved = inputs.mapped(lambda a: np.moveaxis(a, 1, -1) if goes_last(a) else a)
    return [Guess(inputs, moved), Guess(inputs, inputs)]
