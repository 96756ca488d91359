"""Where a convolution looks: stride, dilation and padding of one call, every plausible one, and their names.

Along one axis, output o of a convolution sees the inputs `o * stride - low + dilation * t` for the taps t = 0 .. k-1; a
transposed convolution sees `o - low + dilation * t` of the input with `stride - 1` zeros between its elements. Only
`low` is a matter of behaviour: how many elements are added at the end follows from the number of outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Sizes = tuple[int, ...]

MODES = ("zeros", "circular", "reflect", "replicate")
LARGEST = 4  # of stride and dilation


class Geometry(NamedTuple):
    """Stride, dilation and padding of each axis, and what the padding is filled with."""

    stride: Sizes
    dilation: Sizes
    low: Sizes
    mode: str = "zeros"


class Call(NamedTuple):
    """The sizes of one call: spatial axes of the input, of the output and of the kernel that was applied."""

    inputs: Sizes
    outputs: Sizes
    kernel: Sizes
    transposed: bool = False

    def span(self, dilation: Sizes) -> Sizes:
        """Distance of the kernel's first and last tap, d (k - 1)."""
        return tuple(d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True))

    def high(self, geometry: Geometry) -> Sizes:
        """Elements that must be added at each end; below zero if that many stay unseen."""
        stride, dilation, low, _ = geometry
        span = self.span(dilation)
        axes = zip(self.inputs, self.outputs, stride, span, low, strict=True)
        if self.transposed:
            return tuple(out + e - ((n - 1) * s + 1) - lo for n, out, s, e, lo in axes)
        return tuple((out - 1) * s + e + 1 - n - lo for n, out, s, e, lo in axes)

    def axis(self, index: int) -> Call:
        """The same call along one axis."""
        return Call((self.inputs[index],), (self.outputs[index],), (self.kernel[index],), self.transposed)

    def possible(self, geometry: Geometry) -> bool:
        """Whether some layer has this geometry and this number of outputs."""
        span, high = self.span(geometry.dilation), self.high(geometry)
        for lo, hi, s, d, e, k, n in zip(
            geometry.low, high, geometry.stride, geometry.dilation, span, self.kernel, self.inputs, strict=True
        ):
            if self.transposed:
                if not (e - k <= lo <= e + 1 and e - k <= hi <= e + max(s, d)):
                    return False
            elif not (0 <= lo <= max(k, e) and -s < hi <= max(k, e)):
                return False
            if geometry.mode == "reflect" and max(lo, hi) >= n:
                return False
        return True

    def pads(self, geometry: Geometry) -> bool:
        """Whether anything outside the input is seen, so that the mode matters."""
        return any(size > 0 for size in geometry.low + self.high(geometry))


def taps(call: Call, geometry: Geometry, positions: Sequence[NDArray[Any]]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """For each axis, which input each tap of each output sees, and 0 instead of 1 where it sees a padding of zeros.

    Returns:
      (index, weight) for each axis, both `[outputs, k]`.
    """
    found = []
    for axis, out in enumerate(positions):
        n, s, d = call.inputs[axis], geometry.stride[axis], geometry.dilation[axis]
        where = out[:, None] * (1 if call.transposed else s) - geometry.low[axis] + d * np.arange(call.kernel[axis])
        if call.transposed:
            where = where % (n * s) if geometry.mode == "circular" else where
            seen = (where >= 0) & (where <= (n - 1) * s) & (where % s == 0)
            found.append((np.clip(where // s, 0, n - 1), seen.astype(np.float64)))
            continue
        seen = (where >= 0) & (where < n) if geometry.mode == "zeros" else np.ones_like(where, bool)
        if geometry.mode == "circular":
            where = where % n
        elif geometry.mode == "reflect":
            where = np.abs((where + n - 1) % max(2 * n - 2, 1) - (n - 1))
        found.append((np.clip(where, 0, n - 1), seen.astype(np.float64)))
    return found


def _same(call: Call, stride: Sizes, dilation: Sizes, *, lower: bool = False) -> Sizes:
    """What XLA's SAME adds in front: half of what is missing, the odd one at the end (SAME_LOWER: in front)."""
    low = []
    for n, s, e in zip(call.inputs, stride, call.span(dilation), strict=True):
        if call.transposed:
            total = e + s - 1
            low.append(e if s > e else -(-total // 2))
        else:
            total = max((-(-n // s) - 1) * s + e + 1 - n, 0)
            low.append((total + lower) // 2)
    return tuple(low)


def _no_low(call: Call, stride: Sizes, dilation: Sizes) -> Sizes:
    return call.span(dilation) if call.transposed else tuple(0 for _ in stride)


# By name: what is added in front, and how many outputs there are then (None: any).
_RULES: dict[str, Callable[[Call, Sizes, Sizes], Sizes]] = {
    "SAME": _same,
    "SAME_LOWER": lambda call, stride, dilation: _same(call, stride, dilation, lower=True),
    "VALID": _no_low,
    "CAUSAL": lambda call, stride, dilation: call.span(dilation),
}


def _outputs(rule: str, call: Call, stride: Sizes, dilation: Sizes) -> Sizes:
    sizes = zip(call.inputs, stride, call.span(dilation), strict=True)
    if call.transposed:
        return tuple(n * s if rule != "VALID" else n * s + max(e + 1 - s, 0) for n, s, e in sizes)
    return tuple(-(-n // s) if rule != "VALID" else (n - e - 1) // s + 1 for n, s, e in sizes)


def rules(call: Call, geometry: Geometry) -> list[str]:
    """The names that this padding has: SAME, SAME_LOWER, VALID, CAUSAL (one axis only)."""
    names = []
    for name, low in _RULES.items():
        if name == "CAUSAL" and (call.transposed or len(call.inputs) != 1):
            continue
        if name == "SAME_LOWER" and call.transposed:
            continue
        fits = low(call, geometry.stride, geometry.dilation) == geometry.low
        if fits and _outputs(name, call, geometry.stride, geometry.dilation) == call.outputs:
            names.append(name)
    return names


def hinted(call: Call, config: Mapping[str, Any]) -> Geometry | None:
    """The geometry that a layer's own configuration claims; None if it claims too little."""
    rank = len(call.inputs)
    stride, dilation = _per_axis(config.get("stride", 1), rank), _per_axis(config.get("dilation", 1), rank)
    padding = config.get("padding", 0)
    mode = str(config.get("padding_mode", "zeros")).lower()
    if stride is None or dilation is None or mode not in MODES:
        return None
    if isinstance(padding, str):
        name = padding.upper()
        if name in ("CIRCULAR", "REFLECT"):
            return Geometry(stride, dilation, tuple(e // 2 for e in call.span(dilation)), name.lower())
        return Geometry(stride, dilation, _RULES[name](call, stride, dilation), mode) if name in _RULES else None
    if isinstance(padding, Sequence) and padding and isinstance(padding[0], Sequence):
        pairs = True
        padding = [pair[0] for pair in padding]
    else:
        pairs = False
    low = _per_axis(padding, rank)
    if low is None:
        return None
    if call.transposed and not pairs:  # PyTorch's padding of a transposed convolution takes away
        low = tuple(e - p for e, p in zip(call.span(dilation), low, strict=True))
    return Geometry(stride, dilation, low, mode)


def _per_axis(value: Any, rank: int) -> Sizes | None:
    if isinstance(value, (int, np.integer)):
        return (int(value),) * rank
    try:
        sizes = tuple(int(size) for size in value)
    except (TypeError, ValueError):
        return None
    return sizes * rank if len(sizes) == 1 else sizes if len(sizes) == rank else None


def isotropic(call: Call) -> Iterator[Geometry]:
    """Every plausible geometry with one stride and one dilation for all axes, and a padding that has a name."""
    rank = len(call.inputs)
    seen = set()
    numbers = range(1, LARGEST + 1) if rank else (1,)
    for stride, dilation in itertools.product(numbers, numbers):
        s, d = (stride,) * rank, (dilation,) * rank
        span = call.span(d)
        lows = [rule(call, s, d) for rule in _RULES.values()]
        lows.append(tuple(e // 2 for e in span))
        for padding in range(max((max(k, e) for k, e in zip(call.kernel, span, strict=True)), default=0) + 1):
            lows.append((padding,) * rank)
            if call.transposed:
                lows.append(tuple(e - padding for e in span))
        for low, mode in itertools.product(lows, MODES):
            geometry = Geometry(s, d, low, mode)
            if geometry in seen or not _sensible(call, geometry):
                continue
            seen.add(geometry)
            yield geometry


def anisotropic(call: Call) -> Iterator[Geometry]:
    """Every plausible geometry, those padded with zeros first; of three axes fewer, as there are too many."""
    rank = len(call.inputs)
    axes = []
    if not rank:
        return
    for axis in range(rank):
        line = call.axis(axis)
        numbers = range(1, LARGEST + 1)
        every = [
            (s, d, low)
            for s, d in itertools.product(numbers, numbers[: 4 if rank < 3 else 2] if line.kernel[0] > 1 else (1,))
            for low in range(-1 if call.transposed else 0, max(line.kernel[0], line.span((d,))[0]) + 2)
            if line.possible(Geometry((s,), (d,), (low,)))
        ]
        axes.append(every)
    choices = []
    for combination in itertools.product(*axes):
        dilated = {d for (_, d, _), k in zip(combination, call.kernel, strict=True) if k > 1}
        if rank < 3 or len(dilated) < 2:
            choices.append(tuple(zip(*combination, strict=True)))
    for mode, (stride, dilation, low) in itertools.product(MODES if rank < 3 else MODES[:1], choices):
        geometry = Geometry(stride, dilation, low, mode)
        if _sensible(call, geometry):
            yield geometry


def _sensible(call: Call, geometry: Geometry) -> bool:
    if not call.possible(geometry):
        return False
    if geometry.mode == "zeros":
        return True
    return call.pads(geometry) and (not call.transposed or geometry.mode == "circular")


def same_padding(a: Geometry, b: Geometry, call_a: Call, call_b: Call) -> bool:
    """Whether two calls pad by the same rule, so that only stride, dilation or kernel size make them differ."""
    if a.mode != b.mode:
        return not (call_a.pads(a) or call_b.pads(b))
    if (a.stride, a.dilation, call_a.kernel) == (b.stride, b.dilation, call_b.kernel):
        return (a.low, call_a.outputs) == (b.low, call_b.outputs)
    if set(rules(call_a, a)) & set(rules(call_b, b)):
        return True
    if call_a.transposed:
        return _taken_away(call_a, a) == _taken_away(call_b, b)
    ends = zip(call_a.high(a), a.stride, call_b.high(b), b.stride, strict=True)
    return a.low == b.low and all(ha < hb + sb and hb < ha + sa for ha, sa, hb, sb in ends)


def _taken_away(call: Call, geometry: Geometry) -> Sizes:
    """PyTorch's padding of a transposed convolution."""
    return tuple(e - low for e, low in zip(call.span(geometry.dilation), geometry.low, strict=True))


def padding_words(call: Call, geometry: Geometry, config: Mapping[str, Any]) -> str:
    """How a padding is called: "(1, 1)", "SAME = (0, 1)", "VALID", "padding=1, output_padding=1"."""
    names = rules(call, geometry)
    hint = config.get("padding")
    mode = "" if geometry.mode == "zeros" else f" {geometry.mode}"
    if call.transposed:
        away = _taken_away(call, geometry)
        more = tuple(
            hi - (e - p) for hi, e, p in zip(call.high(geometry), call.span(geometry.dilation), away, strict=True)
        )
        explicit = f"padding={_short(away)}, output_padding={_short(more)}"
        name = hint.upper() if isinstance(hint, str) and hint.upper() in names else next(iter(names), None)
        plain = name is None or (min(more, default=0) >= 0 and not isinstance(hint, str))
        return (explicit if plain else f"{name} (in PyTorch's terms {explicit})") + mode
    low, high = geometry.low, call.high(geometry)
    # What the end gets is known up to what the stride leaves out: symmetric, if that is possible.
    symmetric = all(hi <= lo < hi + s for lo, hi, s in zip(low, high, geometry.stride, strict=True))
    pairs = tuple((lo, lo if symmetric else max(hi, 0)) for lo, hi in zip(low, high, strict=True))
    if isinstance(hint, str) and hint.upper() in names:
        name = hint.upper()
    elif symmetric or not names:
        name = "VALID" if "VALID" in names else ""
    else:
        name = names[0]
    return (f"{name} = " if name else "") + str(_short(pairs)) + mode


def _short(sizes: tuple[Any, ...]) -> Any:
    return sizes[0] if len(set(sizes)) == 1 else sizes
