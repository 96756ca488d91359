"""Attention written by hand between its projections: which heads, rotary pairs, scale, mask and axis of the softmax.

    o = softmax(scale * q k^T, where the mask lets k be seen) v

Each side alone is fitted to it; the mistakes are what the two nearest fits differ in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.activations import error_of
from parity.diagnosis.between.chains import Source, Target
from parity.diagnosis.between.masks import EVERY, Mask, candidates
from parity.diagnosis.between.projections import ORDERS, Arrays, Heads, projections
from parity.diagnosis.family import Family, Property, unlike
from parity.diagnosis.finding import Finding, told_apart

Array = NDArray[Any]

BASES = (10_000.0, 500_000.0, 1_000_000.0, 100.0, 1_000.0, 100_000.0)
"""Of the rotary embeddings' frequencies, base^(-2i/d)."""
ROWS, MOST_ROWS = 4, 128
"""So many queries are looked at first, and then at most."""
REFINED = 4
"""So many scales are solved for: those that come nearest."""
HIDDEN = -1e30


class Rotary(NamedTuple):
    """Rotary embeddings of queries and keys: of the halves of a head's channels, or of neighbouring pairs."""

    pairs: str = ""
    base: float = 0.0

    def __str__(self) -> str:
        return f"turns {self.pairs} with base {self.base:g}" if self.pairs else "turns nothing"


class Attention(NamedTuple):
    """One side's attention."""

    heads: Heads
    rotary: Rotary = Rotary()
    scale: float = 1.0
    mask: str = EVERY
    axis: str = "keys"
    size: int = 1

    @property
    def relative(self) -> float:
        """The scale in units of 1/sqrt(d), d the channels of a head."""
        return self.scale * self.size**0.5


class _Known(NamedTuple):
    """The masks, and what a few queries of the first example see of them, [masks, 1, Q, K]."""

    masks: list[Mask]
    shown: Array

    @classmethod
    def of(cls, masks: list[Mask], queries: int, keys: int) -> _Known:
        rows = _rows(queries, ROWS)
        shown = [np.broadcast_to(mask.keep[0], (queries, keys))[rows] for mask in masks]
        return cls(masks, np.stack(shown)[:, None])


def findings(sources: Sequence[Source], masks: Sequence[Source], torch: Target, flax: Target) -> list[Finding]:
    """What two sides' attention differs in.

    Args:
      sources: what may have been projected, the most recent first.
      masks: the network's inputs that may say which positions are padding.
      torch: what arrives at the next layer in PyTorch, [N, L, D] or [N, L, H, d].
      flax: the same in Flax; one of the two has the heads joined.

    Returns:
      The findings; [] where either side is no attention of these sources.
    """
    if min(torch.value.ndim, flax.value.ndim) != 3:
        return []  # images: no heads are there
    fits = []
    for target in (torch, flax):
        found = search(sources, masks, target)
        if not found:
            return []
        fits.append(found)
    pair = FAMILY.nearest(*fits)
    return [] if pair is None else FAMILY.findings(*pair)


def search(sources: Sequence[Source], masks: Sequence[Source], target: Target) -> list[Attention]:
    """Every attention of the simplest kind that gives the target."""
    if target.value.ndim not in (3, 4) or not np.isfinite(target.value).all():
        return []
    o = target.value.reshape(*target.value.shape[:2], -1)
    sources = [Source(s.name, s.value.reshape(*s.value.shape[:2], -1)) for s in sources if s.value.ndim in (3, 4)]
    sources = [s for s in sources if s.value.size and len(s.value) == len(o)]
    with np.errstate(all="ignore"):
        read = [
            (heads, arrays) for heads, arrays in projections(sources, o) if _within(arrays.v, arrays.o, target.limit)
        ]
        lengths = {arrays.k.shape[1] for _, arrays in read}
        known = {keys: _Known.of(candidates(masks, len(o), o.shape[1], keys), o.shape[1], keys) for keys in lengths}
        for stage in (_usual, _other_axes, _other_scales):
            found = [fit for heads, a in read for fit in stage(heads, a, known[a.k.shape[1]], target.limit)]
            if found:
                return found
        return []


def _within(v: Array, o: Array, limit: float) -> bool:
    """Whether o may be an average of v, or at least a sum of no more than all of it (softmax over another axis)."""
    most = np.abs(v).sum(axis=1, keepdims=True) + limit
    return v.shape[2:] == o.shape[2:] and bool((np.abs(o) <= most).all())


def _average(arrays: Arrays, limit: float) -> bool:
    low, high = arrays.v.min(axis=1, keepdims=True), arrays.v.max(axis=1, keepdims=True)
    return bool(((arrays.o >= low - limit) & (arrays.o <= high + limit)).all())


def _scales(heads: Heads, arrays: Arrays) -> list[float]:
    size, width = arrays.q.shape[-1], arrays.q.shape[-1] * heads.number
    return list(dict.fromkeys([size**-0.5, 1.0, width**-0.5, 1.0 / size, size**-0.25, size**0.5, heads.number**-0.5]))


def _usual(heads: Heads, arrays: Arrays, known: _Known, limit: float) -> Iterator[Attention]:
    """The softmax over the keys."""
    if not _average(arrays, limit):
        return
    scales = _scales(heads, arrays)
    for rotary, one in _turned(_one_head(arrays)):
        off = _off(one, scales, known)
        if not (off <= limit).any():
            continue
        turned = _turn(arrays, rotary)
        off = np.maximum(off, _off(turned, scales, known))
        for i, j in zip(*np.nonzero(off <= limit), strict=True):
            if _gives(turned, scales[i], known.masks[j], limit):
                yield Attention(heads, rotary, scales[i], known.masks[j].text, size=arrays.q.shape[-1])


def _other_axes(heads: Heads, arrays: Arrays, known: _Known, limit: float) -> Iterator[Attention]:
    """The softmax over the queries, or over the heads."""
    if not heads.usual or arrays.q.shape[1] > MOST_ROWS:
        return
    parts = {"queries": _one_head(arrays), "heads": _few(arrays)}
    masks = list(zip(known.masks, known.shown, strict=True))
    for axis, scale, (mask, shown) in itertools.product(parts, _scales(heads, arrays)[:2], masks):
        keep = mask.keep[:1] if axis == "queries" else shown
        falls = error_of(parts[axis].o, apply(parts[axis], scale, keep, axis)) > limit
        if not falls and _gives(arrays, scale, mask, limit, axis):
            yield Attention(heads, Rotary(), scale, mask.text, axis, arrays.q.shape[-1])


def _other_scales(heads: Heads, arrays: Arrays, known: _Known, limit: float) -> Iterator[Attention]:
    """Any scale: solved for from the numbers, with what comes nearest on a grid of scales."""
    if not heads.usual or not _average(arrays, limit):
        return
    grid, near = np.geomspace(0.01, 10.0, 25), []
    for rotary, one in _turned(_one_head(arrays)):
        off = _off(one, grid, known)
        for j, i in enumerate(off.argmin(axis=0)):
            near.append((off[i, j], float(grid[i]), rotary, j))
    for _, start, rotary, j in sorted(near, key=lambda one: one[0])[:REFINED]:
        turned = _turn(arrays, rotary)
        scale, mask = _solved(_few(turned), start, known.shown[j]), known.masks[j]
        if scale is not None and _gives(turned, scale, mask, limit):
            yield Attention(heads, rotary, float(f"{scale:.8g}"), mask.text, size=arrays.q.shape[-1])


def _solved(few: Arrays, scale: float, keep: Array) -> float | None:
    """The scale near this one with which these few come nearest, by Gauss and Newton."""

    def off(scale: float) -> Array:
        return (apply(few, scale, keep) - few.o).ravel()

    for _ in range(20):
        here, step = off(scale), 1e-6 * scale
        slope = (off(scale + step) - off(scale - step)) / (2 * step)
        power = float(slope @ slope)
        move = float(slope @ here) / power if power > 0 else 0.0
        scale -= float(np.clip(move, -0.5 * scale, 0.5 * scale))
        if abs(move) <= 1e-14 * scale:
            break
    return scale if np.isfinite(scale) and scale > 0 else None


def _turned(arrays: Arrays) -> Iterator[tuple[Rotary, Arrays]]:
    for rotary in _rotaries(arrays.q.shape[-1]):
        yield rotary, _turn(arrays, rotary)


def _turn(arrays: Arrays, rotary: Rotary) -> Arrays:
    return arrays._replace(q=turn(arrays.q, rotary), k=turn(arrays.k, rotary))


def _one_head(arrays: Arrays) -> Arrays:
    """The first head of the first example: nearly every hypothesis falls there, for a small part of the work."""
    return Arrays(*(a[:1, :, :1] for a in arrays))


def _rotaries(size: int) -> list[Rotary]:
    if size % 2:
        return [Rotary()]
    pairs = ("the halves of a head's channels", "neighbouring channels")
    return [Rotary(), *(Rotary(*both) for both in itertools.product(pairs, BASES))]


def turn(x: Array, rotary: Rotary) -> Array:
    """Rotary embeddings of x [N, L, H, d]: the i-th pair of channels at position l is turned by l * base^(-2i/d)."""
    if not rotary.pairs:
        return x
    size = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] * rotary.base ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    halves = "halves" in rotary.pairs
    a, b = (x[..., : size // 2], x[..., size // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
    turned = a * cos - b * sin, a * sin + b * cos
    return np.concatenate(turned, axis=-1) if halves else np.stack(turned, axis=-1).reshape(x.shape)


def _rows(queries: int, count: int) -> Array:
    """A few queries, the first and the last with them."""
    return np.unique(np.linspace(0, queries - 1, count).astype(int))


def _few(arrays: Arrays) -> Arrays:
    """A few queries of the first example, on which hypotheses are tried."""
    rows = _rows(arrays.q.shape[1], ROWS)
    return Arrays(arrays.q[:1, rows], arrays.k[:1], arrays.v[:1], arrays.o[:1, rows])


def _off(arrays: Arrays, scales: Sequence[float] | Array, known: _Known) -> Array:
    """[scales, masks]: how far each is off on a few queries."""
    few = _few(arrays)
    products = few.q[0].swapaxes(0, 1) @ few.k[0].transpose(1, 2, 0)
    off = []
    for scale in scales:
        made = _softmax(np.where(known.shown, scale * products, HIDDEN), -1) @ few.v[0].swapaxes(0, 1)
        off.append(np.abs(made - few.o[0].swapaxes(0, 1)).max(axis=(1, 2, 3)))
    return np.nan_to_num(np.stack(off), nan=np.inf)


def _gives(arrays: Arrays, scale: float, mask: Mask, limit: float, axis: str = "keys") -> bool:
    """Whether everything follows; of a long sequence many of the queries."""
    keep = mask.keep
    if arrays.q.shape[1] > MOST_ROWS:
        rows = _rows(arrays.q.shape[1], MOST_ROWS)
        keep = keep[:, rows] if keep.shape[1] > 1 else keep
        arrays = arrays._replace(q=arrays.q[:, rows], o=arrays.o[:, rows])
    return error_of(arrays.o, apply(arrays, scale, keep, axis)) <= limit


def apply(arrays: Arrays, scale: float, keep: Array, axis: str = "keys") -> Array:
    """Attention [N, L, H, d]; `keep` [N or 1, L or 1, K]."""
    products = arrays.q.swapaxes(1, 2) @ arrays.k.transpose(0, 2, 3, 1)
    logits = np.where(keep[:, None], scale * products, HIDDEN)
    weights = _softmax(logits, {"keys": -1, "queries": -2, "heads": 1}[axis])
    return (weights @ arrays.v.swapaxes(1, 2)).swapaxes(1, 2)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _heads_findings(a: Attention, b: Attention) -> list[Finding]:
    texts = []
    for one, other in ((a.heads, b.heads), (b.heads, a.heads)):
        text = f"{one.number} head{'s' * (one.number > 1)}"
        if one.split != other.split or one.merged != other.merged:
            text += f", reads channels as ({one.split})"
            text += f" and joins the heads as ({one.merged})" if one.merged != other.merged else ""
        if one.order != other.order:
            fused = one.order in ORDERS
            text += f", in the order {', '.join(one.order)}" if fused else f", with query, key, value from {one.order}"
        if one.shared != other.shared:
            text += f", repeats those of key and value {'one by one' if one.shared == 'each' else 'as a whole'}"
        texts.append(text)
    return [Finding("attention-heads", f"PyTorch has {texts[0]}; Flax {texts[1]}")]


def _rotary_findings(a: Attention, b: Attention) -> list[Finding]:
    first, second = a.rotary, b.rotary
    if first.pairs and second.pairs and first.pairs != second.pairs:
        evidence = f"the rotary embedding turns {first.pairs} in PyTorch, {second.pairs} in Flax"
        return [Finding("attention-heads", evidence)]
    return [Finding("unexplained", f"of queries and keys PyTorch {first}, Flax {second} (rotary embeddings)")]


def _scale_distance(a: Attention, b: Attention) -> float:
    """Another scale, and not 1/sqrt(d) of heads of another size."""
    return 3 * all(abs(one / other - 1) > 1e-6 for one, other in ((a.scale, b.scale), (a.relative, b.relative)))


def _scale_findings(a: Attention, b: Attention) -> list[Finding]:
    numbers = told_apart(a.scale, b.scale)
    texts = [
        number + (f" = 1/sqrt({one.size})" if abs(one.relative - 1) < 1e-6 and one.size > 1 else "")
        for number, one in zip(numbers, (a, b), strict=True)
    ]
    return [Finding("attention-scale", f"PyTorch multiplies queries times keys by {texts[0]}, Flax by {texts[1]}")]


def _mask_findings(a: Attention, b: Attention) -> list[Finding]:
    return [Finding("attention-mask", f"a query sees {a.mask} in PyTorch, {b.mask} in Flax")]


FAMILY: Family[Attention] = Family(
    Property("heads", lambda a, b: _heads_distance(a.heads, b.heads), _heads_findings),
    Property("rotary", lambda a, b: 4 * (a.rotary != b.rotary), _rotary_findings),
    Property("axis", unlike("axis", 4), lambda a, b: [_axis_finding(a, b)]),
    Property("scale", _scale_distance, _scale_findings),
    Property("mask", unlike("mask", 3), _mask_findings),
)


def _heads_distance(a: Heads, b: Heads) -> float:
    return 4 * sum(one != other for one, other in zip(a, b, strict=True))


def _axis_finding(a: Attention, b: Attention) -> Finding:
    return Finding(
        "softmax-axis", f"attention's softmax is taken over the {a.axis} in PyTorch, over the {b.axis} in Flax"
    )
