"""Which tensor of a layer is which in the other framework, and how its axes move: one table, `RULES`.

A rule is a line: the kind of layer, the tensor's name in PyTorch and in Flax (regular expressions), and the layouts it
may have, the usual first; the first that fits the two shapes is taken. `register` adds a line of your own.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.pairing.layouts import (
    CHANNELS_LAST,
    EACH_OUTPUT,
    FIRST_LAST,
    OIHW,
    OUT_IN,
    SAME,
    TRANSPOSE_KERNEL,
    TRANSPOSED,
    Layout,
    Move,
)
from parity.records import kinds
from parity.records.kinds import Shape, is_counter


class Rule(NamedTuple):
    """One line of the table.

    Attributes:
      kind: of the layer, one of `kinds.KINDS`.
      torch_name, flax_name: regular expressions that the tensor's local name must match whole, in any case of letters.
      layouts: how its axes may move, the usual first.
      part: (i, n): the i-th of n equal parts of PyTorch's tensor, along its first axis.
    """

    kind: str
    torch_name: str
    flax_name: str
    layouts: tuple[Layout, ...] = (SAME,)
    part: tuple[int, int] | None = None


class TensorPair(NamedTuple):
    """A tensor in both frameworks.

    Attributes:
      torch_name, flax_name: local to the layer.
      to_flax: takes PyTorch's array, whole, to Flax's. A permutation, so gradients and moments go the same way.
      to_torch: the inverse; where there is a `part`, it gives that part only (see `to_torch_arrays`).
      part: (start, stop, length) on the first axis of PyTorch's tensor, None if it is all of it.
      fits: the two shapes agree. If not, the moves only do what the usual layout does.
    """

    torch_name: str
    flax_name: str
    to_flax: Move
    to_torch: Move
    part: tuple[int, int, int] | None = None
    fits: bool = True


class Paired(NamedTuple):
    """What belongs together in a layer, and what is left over; counters are in none of them."""

    pairs: list[TensorPair]
    torch_left: list[str]
    flax_left: list[str]


_SCALE, _SHIFT, _MEAN, _VAR = (p.pattern for p in (kinds.SCALE, kinds.SHIFT, kinds.MEAN, kinds.VAR))
_WEIGHT = kinds.WEIGHT.pattern
_NORM_LAYOUTS = (SAME, FIRST_LAST, CHANNELS_LAST)
_LINEAR = (OUT_IN, OIHW)  # the second is a convolution of size 1
_CONV = (OIHW, OUT_IN)
_Q, _K, _V, _OUT = (
    rf"({'|'.join(names)})"
    for names in (
        ("query", "q", "q_proj", "to_q", "w_?q"),
        ("key", "k", "k_proj", "to_k", "w_?k"),
        ("value", "v", "v_proj", "to_v", "w_?v"),
        ("out", "o", "o_proj", "out_proj", "to_out", "proj", "w_?o"),
    )
)

RULES: list[Rule] = [
    Rule("linear", "weight_g", "scale", (EACH_OUTPUT,)),  # of a weight norm, which keeps length and direction apart
    Rule("linear", "weight_v", "kernel", _LINEAR),
    Rule("conv", "weight_g", "scale", (EACH_OUTPUT,)),
    Rule("conv", "weight_v", "kernel", _CONV),
    Rule("linear", "weight", _WEIGHT, _LINEAR),
    Rule("linear", _WEIGHT, _WEIGHT, (*_LINEAR, SAME)),  # by another name a hand-written one may be [in, out]
    Rule("linear", _SHIFT, _SHIFT),
    Rule("conv", "weight", _WEIGHT, _CONV),
    Rule("conv", _WEIGHT, _WEIGHT, (*_CONV, SAME)),
    Rule("conv", _SHIFT, _SHIFT),
    Rule("conv_transpose", _WEIGHT, _WEIGHT, (TRANSPOSED, TRANSPOSE_KERNEL)),
    Rule("conv_transpose", _SHIFT, _SHIFT),
    *(
        rule
        for norm in kinds.NORMS
        for rule in (
            Rule(norm, _SCALE, _SCALE, _NORM_LAYOUTS),
            Rule(norm, _SHIFT, _SHIFT, _NORM_LAYOUTS),
            Rule(norm, _MEAN, _MEAN, _NORM_LAYOUTS),
            Rule(norm, _VAR, _VAR, _NORM_LAYOUTS),
        )
    ),
    Rule("embedding", "weight|embedding|table|embeddings?", "weight|embedding|table|embeddings?"),
    *(
        rule
        for i, (name, letter) in enumerate(((_Q, "q"), (_K, "k"), (_V, "v")))
        for rule in (
            Rule("attention", "in_proj_weight", f"{name}/kernel", (OUT_IN,), (i, 3)),
            Rule("attention", "in_proj_bias", f"{name}/bias", (SAME,), (i, 3)),
            Rule("attention", rf"{letter}_proj_weight|{name}\.weight", f"{name}/kernel", (OUT_IN,)),
            Rule("attention", rf"{name}\.bias", f"{name}/bias"),
        )
    ),
    Rule("attention", rf"{_OUT}\.weight", f"{_OUT}/kernel", (OUT_IN,)),
    Rule("attention", rf"{_OUT}\.bias", f"{_OUT}/bias"),
    Rule("other", _SCALE, _SCALE, (SAME, CHANNELS_LAST, FIRST_LAST, OUT_IN)),
    Rule("other", _SHIFT, _SHIFT, (SAME, CHANNELS_LAST, FIRST_LAST, OUT_IN)),
]


def register(kind: str, torch_name: str, flax_name: str, *layouts: Layout) -> None:
    """Add a line to the table, before all others: `register("linear", "theta", "Theta", SAME)`.

    Args:
      kind: of the layers that it holds for, one of `kinds.KINDS`.
      torch_name: regular expression of the tensor's local name in PyTorch.
      flax_name: of its name in Flax.
      *layouts: how its axes may move, the usual first; default `SAME`.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in kinds.KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(kinds.KINDS)}")
    RULES.insert(0, Rule(kind, torch_name, flax_name, layouts or (SAME,)))


def pair_tensors(
    kind: str,
    torch_shapes: Mapping[str, Shape],
    flax_shapes: Mapping[str, Shape],
    options: Mapping[str, Any] | None = None,
) -> Paired:
    """Which tensor of a layer is which in the other framework.

    By the table's names first; for bare parameters by equal names before that; then what is left by shapes, where they
    leave no choice (bare parameters: by shape, the most similar name first).

    Args:
      kind: of the layer, one of `kinds.KINDS`.
      torch_shapes: local name -> shape, parameters and statistics ("out_proj.weight" for a sub-layer's).
      flax_shapes: local name -> shape, without the collection ("query/kernel" for a sub-layer's).
      options: what shapes do not say: {"in_out": True} of a linear layer whose PyTorch matrix is [in, out], as GPT-2's;
        {"out_in": True} of one whose Flax matrix is [out, in];
        {"transpose_kernel": True} of a transposed convolution with as many channels in
        as out (default: False, as in Flax).

    Returns:
      Every tensor once, but for PyTorch's tensors that are several in Flax; counters are left out.
    """
    torch_left = [name for name, shape in torch_shapes.items() if not is_counter(name, tuple(shape))]
    flax_left = [name for name, shape in flax_shapes.items() if not is_counter(name, tuple(shape))]
    pairs: list[TensorPair] = []

    def take(torch_name: str, flax_name: str, layouts: Sequence[Layout], part: tuple[int, int] | None = None) -> None:
        shapes = tuple(torch_shapes[torch_name]), tuple(flax_shapes[flax_name])
        pairs.append(_pair(torch_name, flax_name, shapes, layouts, part))
        flax_left.remove(flax_name)

    rules = [_with_options(rule, options or {}) for rule in RULES if rule.kind == kind]
    # Of bare parameters what is registered for others comes last: it would turn a square matrix.
    every = _layouts([*reversed(rules)] if kind == "other" else rules)
    if kind == "other":
        for name in [name for name in torch_left if name in flax_left]:
            known = [
                rule for rule in rules if _first_match(rule.torch_name, [name]) and _first_match(rule.flax_name, [name])
            ]
            take(name, name, _layouts([*known, *reversed(rules)]))
            torch_left.remove(name)
    for rule in rules:
        torch_name = _first_match(rule.torch_name, torch_left)
        flax_name = _first_match(rule.flax_name, flax_left)
        if torch_name is not None and flax_name is not None:
            take(torch_name, flax_name, rule.layouts, rule.part)
            if rule.part is None:
                torch_left.remove(torch_name)
    shared = {pair.torch_name for pair in pairs if pair.part is not None}
    torch_left = [name for name in torch_left if name not in shared]
    for torch_name, flax_name in _by_shape(kind, torch_shapes, flax_shapes, torch_left, flax_left, every):
        take(torch_name, flax_name, every)
        torch_left.remove(torch_name)
    return Paired(pairs, torch_left, flax_left)


def _layouts(rules: Sequence[Rule]) -> tuple[Layout, ...]:
    """How the axes may move by these rules, the usual first."""
    return tuple(dict.fromkeys(layout for rule in rules for layout in rule.layouts)) or (SAME,)


def with_flatten(pair: TensorPair, shape: Sequence[int], *, out_in: bool = False) -> TensorPair:
    """The pair of a linear layer's matrix, its inputs reordered: it stands behind a flatten of [C, *spatial].

    Args:
      pair: of a linear kernel.
      shape: (C, *spatial), what PyTorch flattens, without the batch.
      out_in: Flax's matrix is [out, in].

    Returns:
      The pair with both moves extended: Flax's inputs come as *spatial, C.
    """
    channels, *spatial = shape
    size = channels * int(np.prod(spatial))
    order = np.arange(size).reshape(channels, *spatial)
    to_flax = np.moveaxis(order, 0, -1).ravel()
    to_torch = np.argsort(to_flax)

    def ordered(b: NDArray, order: NDArray) -> NDArray:
        return b[..., order] if out_in else b.reshape(size, -1)[order].reshape(b.shape)

    def forward(a: NDArray) -> NDArray:
        return ordered(pair.to_flax(a), to_flax)

    def backward(b: NDArray) -> NDArray:
        return pair.to_torch(ordered(b, to_torch))

    return pair._replace(to_flax=forward, to_torch=backward)


def each_with_flatten(pair: TensorPair, shape: Sequence[int]) -> TensorPair:
    """The pair of a norm's tensor, a value for each input, behind a flatten of (C, *spatial): see `with_flatten`."""
    order = np.moveaxis(np.arange(int(np.prod(shape))).reshape(shape), 0, -1).ravel()
    back = np.argsort(order)
    return pair._replace(
        to_flax=lambda a: pair.to_flax(a)[order],
        to_torch=lambda b: pair.to_torch(b[back]),
    )


def to_flax_arrays(pairs: Iterable[TensorPair], arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """PyTorch's arrays of a layer by Flax's names; those not there are left out."""
    return {pair.flax_name: pair.to_flax(arrays[pair.torch_name]) for pair in pairs if pair.torch_name in arrays}


def to_torch_arrays(pairs: Iterable[TensorPair], arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """Flax's arrays of a layer by PyTorch's names, parts put together; a tensor that lacks a part is left out."""
    found: dict[str, NDArray] = {}
    parts: dict[str, dict[int, NDArray]] = {}
    lengths: dict[str, int] = {}
    for pair in pairs:
        if pair.flax_name not in arrays:
            continue
        array = pair.to_torch(arrays[pair.flax_name])
        if pair.part is None:
            found[pair.torch_name] = array
        else:
            parts.setdefault(pair.torch_name, {})[pair.part[0]] = array
            lengths[pair.torch_name] = pair.part[2]
    for name, given in parts.items():
        if sum(len(array) for array in given.values()) == lengths[name]:
            found[name] = np.concatenate([array for _, array in sorted(given.items())])
    return found


def _by_shape(
    kind: str,
    torch_shapes: Mapping[str, Shape],
    flax_shapes: Mapping[str, Shape],
    torch_left: Sequence[str],
    flax_left: Sequence[str],
    layouts: Sequence[Layout],
) -> list[tuple[str, str]]:
    """Names no rule knows, by shape: only what leaves no choice; of bare parameters, the most similar names first."""
    fitting = [
        (difflib.SequenceMatcher(None, t, f).ratio(), t, f)
        for t in torch_left
        for f in flax_left
        if _fitting(torch_shapes[t], flax_shapes[f], layouts) is not None and not t.startswith(kinds.MADE_OF)
    ]
    if kind != "other":
        torch_counts, flax_counts = Counter(t for _, t, _ in fitting), Counter(f for _, _, f in fitting)
        return [(t, f) for _, t, f in fitting if torch_counts[t] == flax_counts[f] == 1]
    found: dict[str, str] = {}
    for _, t, f in sorted(fitting, key=lambda candidate: -candidate[0]):
        if t not in found and f not in found.values():
            found[t] = f
    return list(found.items())


def _with_options(rule: Rule, options: Mapping[str, Any]) -> Rule:
    if rule.kind == "conv_transpose" and options.get("transpose_kernel"):
        return rule._replace(layouts=tuple(reversed(rule.layouts)))
    if rule.kind == "linear" and OUT_IN in rule.layouts:
        torch_is_usual, flax_is_usual = (not options.get(name) for name in (kinds.IN_OUT, kinds.OUT_IN))
        if torch_is_usual != flax_is_usual:
            return rule._replace(layouts=(SAME,))
    return rule


def _first_match(pattern: str, names: Sequence[str]) -> str | None:
    return next((name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)), None)


def _pair(
    torch_name: str,
    flax_name: str,
    shapes: tuple[Shape, Shape],
    layouts: Sequence[Layout],
    part: tuple[int, int] | None,
) -> TensorPair:
    torch_shape, flax_shape = shapes
    where = None
    if part is not None:
        i, count = part
        step = torch_shape[0] // count
        where = (i * step, (i + 1) * step, torch_shape[0])
        torch_shape = (step, *torch_shape[1:])
    layout = _fitting(torch_shape, flax_shape, layouts)
    fits = layout is not None
    if layout is None:
        layout = next((layout for layout in layouts if _moved_shape(layout, torch_shape) is not None), SAME)
    moved = _moved_shape(layout, torch_shape)
    chosen = layout

    def to_flax(a: NDArray) -> NDArray:
        a = a if where is None else a[where[0] : where[1]]
        a = chosen.to_flax(a)
        return a.reshape(flax_shape) if fits else a

    def to_torch(b: NDArray) -> NDArray:
        return chosen.to_torch(b.reshape(moved) if fits else b)

    return TensorPair(torch_name, flax_name, to_flax, to_torch, where, fits)


def _fitting(torch_shape: Shape, flax_shape: Shape, layouts: Sequence[Layout]) -> Layout | None:
    """The first layout that makes PyTorch's shape Flax's, but for axes that are split, joined or of length 1."""
    moved = [(layout, _moved_shape(layout, tuple(torch_shape))) for layout in layouts]
    exact = next((layout for layout, shape in moved if shape == tuple(flax_shape)), None)
    if exact is not None:
        return _preferred(exact, tuple(torch_shape), layouts)
    return next((layout for layout, shape in moved if shape is not None and _same_axes(shape, tuple(flax_shape))), None)


def _preferred(layout: Layout, shape: Shape, layouts: Sequence[Layout]) -> Layout:
    """A norm over [C, H, W], all of one length, moves; over [T, C] it is channels last in both."""
    is_norm = layouts is _NORM_LAYOUTS and len(shape) >= 3 and len(set(shape)) == 1
    return FIRST_LAST if is_norm and layout is SAME else layout


def _moved_shape(layout: Layout, shape: Shape) -> Shape | None:
    try:
        return layout.to_flax(np.empty(shape, np.bool_)).shape
    except (ValueError, IndexError):  # not of the rank that this layout is for
        return None


def _same_axes(a: Shape, b: Shape) -> bool:
    """One is the other with axes split in two or more, or with axes of length 1 beside."""
    if np.prod(a, dtype=np.int64) != np.prod(b, dtype=np.int64):
        return False
    ends_a, ends_b = set(np.cumprod(a, dtype=np.int64).tolist()), set(np.cumprod(b, dtype=np.int64).tolist())
    return ends_a - {1} <= ends_b or ends_b - {1} <= ends_a
