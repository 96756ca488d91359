"""Explains what each side makes of the network's input before its first layer: scale, normalisation, layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between import family as between
from parity.diagnosis.between.activations import error_of, limit_of
from parity.diagnosis.between.chains import LETTERS, Source
from parity.diagnosis.family import Family, Property
from parity.diagnosis.finding import Finding, told_apart

Array = NDArray[Any]

_REVERSED = " reversed"


class _Reading(NamedTuple):
    """One side's reading of the input: scale * arranged input + shift, both a number or one per channel."""

    layout: str
    scale: Array
    shift: Array


def findings(
    network_input: Array,
    torch_first: Array,
    flax_first: Array,
    *,
    torch_input: Array,
    flax_input: Array,
    tolerance: float = 1e-9,
) -> list[Finding]:
    """Names what differs between the two sides' readings of the input.

    Args:
      network_input: the input in Flax's layout, [N, ..., C].
      torch_first: what arrives at PyTorch's first layer, in Flax's layout.
      flax_first: what arrives at Flax's.
      torch_input: the input as PyTorch got it, [N, C, ...].
      flax_input: the input as Flax got it.
      tolerance: relative to the largest value.

    Returns:
      "input-scale" (a factor, or a normalisation) and "input-layout", alone or both; "unexplained" of an image turned
      over or with its channels reversed (BGR for RGB), and says which; what `family.findings` says where more than that
      happens before the first layer; else "unexplained"; [] if the numbers agree.
    """
    arrays = (network_input, torch_first, flax_first, torch_input, flax_input)
    true, torch, flax, raw_torch, raw_flax = (np.asarray(array, np.float64) for array in arrays)
    if torch.shape == flax.shape and _equal(torch, flax, tolerance):
        return []
    readings = [_read(true, side, raw, tolerance) for side, raw in ((torch, raw_torch), (flax, raw_torch))]
    if readings[0] is None or readings[1] is None:
        # Something else comes first on both sides; then one side's reading tells what it is of the other's.
        direct = _read(torch, flax, raw_torch, tolerance) if torch.ndim > 1 else None
        plain = _Reading("", np.ones(1), np.zeros(1))
        if direct and readings == [None, None]:
            readings = [plain, direct]
    if readings[0] and readings[1]:
        found = FAMILY.findings(readings[0], readings[1])
        if found:
            return found
    if rounded := _rounded(true, torch, flax, raw_flax, tolerance):
        return [rounded]
    return between.findings([Source("the network's input", true)], torch, flax, train=False, tolerance=tolerance)


def _equal(a: Array, b: Array, tolerance: float) -> bool:
    return np.array_equal(a, b, equal_nan=True) or error_of(a, b) <= max(limit_of(a, tolerance), limit_of(b, tolerance))


def _read(true: Array, side: Array, raw: Array, tolerance: float) -> _Reading | None:
    """The simplest reading that gives this side's tensor: layouts outside, scales inside."""
    arranged = list(_arrangements(true, raw, side.shape))
    for affine in (_constant, _per_channel):
        for layout, value in arranged:
            solved = affine(value, side, tolerance)
            if solved and error_of(side, solved[0] * value + solved[1]) <= limit_of(side, tolerance):
                scale, shift = (np.where(np.abs(a) > 10 * tolerance, a, 0.0) for a in solved)
                return _Reading(layout, scale, shift)
    return None


def _arrangements(true: Array, raw: Array, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """The input's values in `shape`, arranged in every way that a mistake may arrange them."""
    if true.shape == shape:
        yield "", true
    elif [n for n in true.shape if n != 1] == [n for n in shape if n != 1]:
        yield "", true.reshape(shape)
    if true.size != math.prod(shape) or true.ndim < 2 or not shape or shape[0] != len(true):
        return
    if true.shape == shape and true.ndim > 2:
        yield from _mirrored(true)
    if raw.size == true.size and len(raw) == len(true) and true.ndim > 2 and len(shape) > 2:
        # As it came, without a transposition: the axes are called otherwise, or the memory is read otherwise.
        yield ("N,C,... read as it is" if raw.shape == shape else "N,C,... reshaped to N,...,C"), raw.reshape(shape)
        unchannelled = np.moveaxis(true.reshape(len(true), true.shape[-1], *true.shape[1:-1]), 1, -1)
        if unchannelled.shape == shape:
            yield "N,...,C reshaped to N,C,...", unchannelled
    names = LETTERS.get(true.ndim - 1, "")
    for order in itertools.permutations(range(1, true.ndim)) if names else ():
        value = true.transpose(0, *order)
        text = ",".join(names[axis - 1] for axis in order)
        if len(shape) == 2 and true.ndim > 2:
            yield f"flattened as {text}", value.reshape(shape)
        elif value.shape == shape and order != tuple(range(1, true.ndim)):
            yield f"axes in the order N,{text}", value


def _mirrored(true: Array) -> Iterator[tuple[str, Array]]:
    names = LETTERS.get(true.ndim - 1, "?" * (true.ndim - 1))
    for axis in range(1, true.ndim):
        last = axis == true.ndim - 1
        if true.shape[axis] > 1:
            what = f"channels{_REVERSED} (BGR for RGB)" if last else f"{names[axis - 1]}{_REVERSED}"
            yield what, np.flip(true, axis)


def _constant(x: Array, y: Array, tolerance: float) -> tuple[Array, Array] | None:
    """scale and shift with y = scale * x + shift; a shift only if a scale alone does not do."""
    return _line(x.reshape(-1, 1), y.reshape(-1, 1), tolerance)


def _per_channel(x: Array, y: Array, tolerance: float) -> tuple[Array, Array] | None:
    """The same for each channel; not for features, of which any number may be."""
    if x.ndim < 2 or x.shape[-1] > 16:
        return None
    return _line(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), tolerance)


def _line(x: Array, y: Array, tolerance: float) -> tuple[Array, Array] | None:
    """Column by column a line through the points; through 0 if that fits as well."""
    if len(x) < 4 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    square = (x * x).sum(axis=0)
    if np.all(square > 0):
        scale = (x * y).sum(axis=0) / square
        if error_of(y, scale * x) <= limit_of(y, tolerance):
            return scale, np.zeros_like(scale)
    centred = x - x.mean(axis=0)
    square = (centred**2).sum(axis=0)
    if not np.all(square > 1e-20 * (x * x).sum(axis=0)):
        return None
    scale = (centred * (y - y.mean(axis=0))).sum(axis=0) / square
    return (scale, y.mean(axis=0) - scale * x.mean(axis=0)) if np.any(scale) else None


def _mirrored_alone(torch: _Reading, flax: _Reading) -> bool:
    """No layout holds an image so: it was turned over, or its colours exchanged, on one side only."""
    return torch.layout != flax.layout and (_REVERSED in torch.layout or _REVERSED in flax.layout)


def _scaled(torch: _Reading, flax: _Reading) -> bool:
    pairs = ((torch.scale, flax.scale), (torch.shift, flax.shift))
    return any(np.any(np.abs(a - b) > 1e-6 * np.maximum(np.abs(a), np.abs(b))) for a, b in pairs)


def _mirrored_finding(torch: _Reading, flax: _Reading) -> list[Finding]:
    evidence = _layout_sentence(torch, flax)
    text = f"{evidence}; {_scale_sentence(torch, flax)}" if _scaled(torch, flax) else evidence
    return [Finding("unexplained", text)]


def _layout_finding(torch: _Reading, flax: _Reading) -> list[Finding]:
    flattened = all(reading.layout.startswith("flattened") for reading in (torch, flax))
    evidence = _layout_sentence(torch, flax).replace("reads the input axes", "reads the input with axes")
    return [Finding("flatten-order" if flattened else "input-layout", evidence)]


def _layout_sentence(torch: _Reading, flax: _Reading) -> str:
    texts = [reading.layout or "as it is meant" for reading in (torch, flax)]
    return f"PyTorch reads the input {texts[0]}, Flax {texts[1]}"


FAMILY: Family[_Reading] = Family(
    Property("mirrored", _mirrored_alone, _mirrored_finding),
    Property("layout", lambda a, b: a.layout != b.layout and not _mirrored_alone(a, b), _layout_finding),
    Property(
        "scale",
        lambda a, b: _scaled(a, b) and not _mirrored_alone(a, b),
        lambda a, b: [Finding("input-scale", _scale_sentence(a, b))],
    ),
)


def _scale_sentence(torch: _Reading, flax: _Reading) -> str:
    if not (torch.shift.any() or flax.shift.any()) and torch.scale.all():
        factors = np.unique(np.round(np.divide(*np.broadcast_arrays(flax.scale, torch.scale)), 6))
        if len(factors) == 1:
            ratio = float((flax.scale / torch.scale).flat[0])
            names = {255: " (0..255 for 0..1)", 1 / 255: " = 1/255 (0..1 for 0..255)"}
            name = next((text for k, text in names.items() if math.isclose(ratio, k, rel_tol=1e-5)), "")
            return f"Flax's input is {told_apart(ratio, 1.0)[0]} times PyTorch's{name}"
    pairs = [(_formula(torch, digits), _formula(flax, digits)) for digits in range(4, 18)]
    return "PyTorch's first layer gets {}, Flax's {}".format(*next((p for p in pairs if p[0] != p[1]), pairs[-1]))


def _formula(reading: _Reading, digits: int) -> str:
    scale, shift = reading.scale, reading.shift
    if np.all(scale == 1) and not shift.any():
        return "the input x as it is"
    if not shift.any():
        return f"{_numbers(scale, digits)} * x"
    mean, std = (_numbers(a, digits) for a in (-shift / scale, 1 / scale)) if scale.all() else ("", "")
    return f"(x - {mean}) / {std}" if mean else f"{_numbers(scale, digits)} * x + {_numbers(shift, digits)}"


def _numbers(values: Array, digits: int) -> str:
    texts = [f"{value:.{digits}g}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _rounded(true: Array, torch: Array, flax: Array, raw_flax: Array, tolerance: float) -> Finding | None:
    """Whole numbers in place of the input's values."""
    for name, side, other in (("Flax", flax, torch), ("PyTorch", torch, flax)):
        whole = bool(np.all(side == np.round(side))) and not np.all(other == np.round(other))
        if whole and side.shape == other.shape and np.abs(side - other).max(initial=0.0) <= 1:
            return Finding(
                "unexplained",
                f"{name}'s input is rounded to whole numbers: an integer dtype, or a division of integers",
            )
    for name, side, other in (("Flax", flax, torch), ("PyTorch", torch, flax)):
        if side.shape == other.shape and np.array_equal(side, other.astype(np.float16).astype(np.float64)):
            return Finding("unexplained", f"{name}'s input is rounded to float16")
    if (
        torch.shape == flax.shape
        and raw_flax.size == true.size
        and not _equal(np.sort(raw_flax, axis=None), np.sort(true, axis=None), tolerance)
    ):
        return Finding("unexplained", "the two sides were given inputs of different values")
    return None
