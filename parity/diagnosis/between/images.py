"""Images that a function resizes or pads: how it interpolates, and what it puts around them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import ELEMENTWISE, FUNCTIONS, error_of, known
from parity.diagnosis.between.chains import Source, Target
from parity.diagnosis.between.pools import pads
from parity.diagnosis.family import Family, Property, unlike
from parity.diagnosis.finding import Finding

Array = NDArray[Any]

FIRST = ELEMENTWISE[:8]
"""Activations that are looked for before a resize."""
MOST_SOURCES = 8


def findings(sources: Sequence[Source], torch: Target, flax: Target) -> list[Finding]:
    """What two sides' resizing or padding of one image differs in; [] where a side does neither."""
    if torch.value.ndim not in (3, 4) or torch.value.ndim != flax.value.ndim:
        return []
    few = sources[:MOST_SOURCES]
    resized = RESIZE.nearest(list(_resizes(few, torch)), list(_resizes(few, flax)))
    if resized is not None and resized[0].source == resized[1].source:
        return RESIZE.findings(*resized)
    padded = PAD.nearest(list(_paddings(few, torch)), list(_paddings(few, flax)))
    return [] if padded is None or padded[0].source != padded[1].source else PAD.findings(*padded)


class Resize(NamedTuple):
    """A source, resized: the method, and an activation before or behind it; `plus` is added behind all."""

    source: str
    method: str
    activation: str = "identity"
    plus: str = ""


def _resizes(sources: Sequence[Source], target: Target) -> Iterator[Resize]:
    v = target.value
    for source in sources:
        u = source.value
        sizes, outputs = u.shape[1:-1], v.shape[1:-1]
        if u.ndim != v.ndim or u.shape[-1] != v.shape[-1] or len(u) != len(v) or sizes == outputs:
            continue
        rest = [("", v), *((s.name, v - s.value) for s in sources if s.value.shape == v.shape)]
        activated = [FUNCTIONS[name](u) for name in FIRST]
        for method in METHODS:
            plain, *made = (_resized(x, method, outputs) for x in (u, *activated))
            for plus, wanted in rest:
                names = known(plain, wanted, target.limit)
                first = [n for n, w in zip(FIRST, made, strict=True) if error_of(wanted, w) <= target.limit]
                for name in [*names, *(n for n in first if n not in names)]:
                    yield Resize(source.name, method, name, plus)


def _resized(u: Array, method: str, outputs: Sequence[int]) -> Array:
    for axis, size in enumerate(outputs, 1):
        u = np.moveaxis(np.tensordot(_matrix(method, u.shape[axis], size), u, (1, axis)), 0, axis)
    return u


def _triangle(x: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(a: float) -> Callable[[Array], Array]:
    def weight(x: Array) -> Array:
        x = np.abs(x)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return weight


def _lanczos(x: Array) -> Array:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS: dict[str, tuple[Callable[[Array], Array], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic with a = -0.75": (_cubic(-0.75), 2),
    "bicubic with a = -0.5": (_cubic(-0.5), 2),
    "Lanczos": (_lanczos, 3),
}
CORNERS, ANTIALIAS, REPEATED = ", corners aligned", ", antialiased", ", the border repeated"
METHODS = (
    "nearest, rounded down",
    "nearest, from the centre",
    *(f"{name}{how}" for name in KERNELS for how in ("", CORNERS, ANTIALIAS, REPEATED)),
    "the average over an area",
)


@functools.lru_cache(maxsize=512)
def _matrix(method: str, size: int, outputs: int) -> Array:
    """[outputs, size]: what each output is made of."""
    out, scale = np.arange(outputs), size / outputs
    if method.startswith("nearest"):
        shift = 0.0 if "down" in method else 0.5
        return np.eye(size)[np.minimum(np.floor((out + shift) * scale + 1e-9).astype(int), size - 1)]
    if "area" in method:
        start, stop = out * size // outputs, -(-(out + 1) * size // outputs)
        inside = (np.arange(size) >= start[:, None]) & (np.arange(size) < stop[:, None])
        return inside / inside.sum(axis=1, keepdims=True)
    kernel, reach = KERNELS[method.partition(",")[0]]
    at = out * ((size - 1) / max(1, outputs - 1)) if CORNERS in method else (out + 0.5) * scale - 0.5
    stretch = max(scale, 1.0) if ANTIALIAS in method else 1.0
    if ANTIALIAS in method or not (CORNERS in method or REPEATED in method):
        weights = kernel((np.arange(size) - at[:, None]) / stretch)
        total = weights.sum(axis=1, keepdims=True)
        return weights / np.where(np.abs(total) > 1e-12, total, 1.0)
    matrix = np.zeros((outputs, size))
    for offset in range(-reach, reach + 1):
        place = np.floor(at).astype(int) + offset
        np.add.at(matrix, (out, np.clip(place, 0, size - 1)), kernel(place - at))
    return matrix


RESIZE: Family[Resize] = Family(
    Property("source", unlike("source", 8), lambda a, b: []),
    Property("plus", unlike("plus", 8), lambda a, b: [_sum_finding(a, b)]),
    Property(
        "method",
        unlike("method", 3),
        lambda a, b: [Finding("resize", f"PyTorch resizes {a.source} by: {a.method}; Flax by: {b.method}")],
    ),
    Property("activation", unlike("activation", 4), lambda a, b: [_activation_finding(a, b)]),
)


def _sum_finding(a: Resize, b: Resize) -> Finding:
    texts = [fit.plus or "nothing" for fit in (a, b)]
    return Finding("unexplained", f"PyTorch adds {texts[0]} to what it resized, Flax {texts[1]}")


def _activation_finding(a: Any, b: Any) -> Finding:
    texts = ["no activation" if fit.activation == "identity" else fit.activation for fit in (a, b)]
    return Finding("activation", f"PyTorch applies {texts[0]}, Flax {texts[1]}")


class Pad(NamedTuple):
    """A source with an activation, padded: the mode, and how much before and behind along each axis."""

    source: str
    mode: str
    widths: tuple[tuple[int, int], ...]
    activation: str = "identity"


# numpy's names for them
MODES = {"reflect": "reflect", "edge": "the border repeated", "wrap": "circular", "symmetric": "symmetric"}


def _paddings(sources: Sequence[Source], target: Target) -> Iterator[Pad]:
    v = target.value
    for source in sources:
        u = source.value
        grown = [n - m for n, m in zip(v.shape, u.shape, strict=False)]
        if u.ndim != v.ndim or min(grown) < 0 or grown[0] or grown[-1] or not 0 < sum(grown) <= 32:
            continue
        for before in itertools.product(*(range(n + 1) for n in grown[1:-1])):
            inner = v[(slice(None), *(slice(b, b + n) for b, n in zip(before, u.shape[1:-1], strict=True)))]
            widths = tuple((b, n - b) for b, n in zip(before, grown[1:-1], strict=True))
            for name in known(u, inner, target.limit)[:1]:
                yield from (
                    Pad(source.name, mode, widths, name) for mode in _modes(FUNCTIONS[name](u), v, widths, target.limit)
                )


def _modes(inner: Array, v: Array, widths: tuple[tuple[int, int], ...], limit: float) -> Iterator[str]:
    whole = ((0, 0), *widths, (0, 0))
    for mode, name in MODES.items():
        sizes = zip(widths, inner.shape[1:-1], strict=True)
        fits = all(max(width) < size + (mode != "reflect") for width, size in sizes)
        if fits and error_of(v, np.pad(inner, whole, mode=mode)) <= limit:  # type: ignore[call-overload]
            yield name
    corner = tuple(0 if before else -1 for before, _ in widths)
    value = float(v[(0, *corner, 0)])
    if math.isfinite(value) and error_of(v, np.pad(inner, whole, constant_values=value)) <= limit:
        yield "zeros" if abs(value) <= limit else f"{value:.6g} everywhere"


def _mode_finding(a: Pad, b: Pad) -> Finding:
    return Finding("pad-mode", f"around {a.source} PyTorch puts: {a.mode}; Flax: {b.mode}")


def _widths_finding(a: Pad, b: Pad) -> Finding:
    return Finding("padding", f"PyTorch pads {a.source} by {pads(a.widths)}, Flax by {pads(b.widths)}")


PAD: Family[Pad] = Family(
    Property("source", unlike("source", 8), lambda a, b: []),
    Property("mode", unlike("mode", 3), lambda a, b: [_mode_finding(a, b)]),
    Property("widths", unlike("widths", 3), lambda a, b: [_widths_finding(a, b)]),
    Property("activation", unlike("activation", 4), lambda a, b: [_activation_finding(a, b)]),
)
