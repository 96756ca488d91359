"""Which layer is which on the other side: by order, kind and shapes, or by the user's map."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from parity.pairing import rules
from parity.pairing.rules import TensorPair
from parity.records import kinds
from parity.records.recording import Layer, Recording

# What a pair of layers is worth in the alignment, and what a layer without a partner costs.
SAME_KIND, LIKE_KIND, FITTING, MISFIT, LEFT, ALONE = 10.0, 4.0, 5.0, -2.0, -1.0, -3.0
FORBIDDEN = -1e9
LIKE = (
    {"conv", "linear"},
    {"batch_norm", "layer_norm", "group_norm", "rms_norm"},
    {"conv", "conv_transpose"},
    {"linear", "embedding"},
)


@dataclass
class LayerPair:
    """A layer on both sides, and its tensors; the names are local ("weight", "kernel")."""

    torch: Layer
    flax: Layer
    tensors: list[TensorPair]
    torch_left: list[str]
    flax_left: list[str]

    @property
    def kind(self) -> str:
        """The kind; PyTorch's where they differ and it is known."""
        return self.torch.kind if self.torch.kind != "other" else self.flax.kind


@dataclass
class Pairing:
    """All layers that have a partner, in PyTorch's order, and what has none.

    Attributes:
      layers: the pairs.
      torch_alone, flax_alone: layers without a partner.
      loose: (PyTorch's full name, Flax's full name, pair) of tensors whose layers are no pair.
    """

    layers: list[LayerPair]
    torch_alone: list[Layer] = field(default_factory=list)
    flax_alone: list[Layer] = field(default_factory=list)
    loose: list[tuple[str, str, TensorPair]] = field(default_factory=list)

    def tensors(self) -> list[tuple[str, str, TensorPair]]:
        """(PyTorch's full name, Flax's full name, pair) of every tensor that both sides have."""
        found = [
            (pair.torch.tensors[t.torch_name], pair.flax.tensors[t.flax_name], t)
            for pair in self.layers
            for t in pair.tensors
        ]
        return found + self.loose

    def to_flax(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """PyTorch's tensors, gradients or moments by Flax's full names, in Flax's layout."""
        # Not by np.ascontiguousarray, which makes an array of one number of a number.
        return {f: np.array(pair.to_flax(tensors[t]), order="C") for t, f, pair in self.tensors() if t in tensors}

    def to_torch(self, variables: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Flax's arrays by PyTorch's full names, in PyTorch's layout; a tensor that lacks a part is left out."""
        renamed = [pair._replace(torch_name=t, flax_name=f) for t, f, pair in self.tensors()]
        return {n: np.array(a, order="C") for n, a in rules.to_torch_arrays(renamed, variables).items()}

    def left(self) -> tuple[list[str], list[str]]:
        """Full names of the tensors without a partner, on either side."""
        used_torch, used_flax = {t for t, _, _ in self.loose}, {f for _, f, _ in self.loose}
        torch = [pair.torch.tensors[n] for pair in self.layers for n in pair.torch_left]
        flax = [pair.flax.tensors[n] for pair in self.layers for n in pair.flax_left]
        torch += [full for layer in self.torch_alone for full in layer.tensors.values()]
        flax += [full for layer in self.flax_alone for full in layer.tensors.values()]
        return [n for n in torch if n not in used_torch], [n for n in flax if n not in used_flax]

    def with_flatten(self, torch_path: str, shape: Sequence[int]) -> None:
        """That linear layer (or norm) stands behind a flatten of `shape`: (C, *spatial)."""
        for pair in self.layers:
            if pair.torch.path == torch_path:
                each = pair.kind in kinds.NORMS
                pair.tensors = [
                    rules.each_with_flatten(t, shape)
                    if each
                    else rules.with_flatten(t, shape)
                    if _is_matrix(pair, t)
                    else t
                    for t in pair.tensors
                ]


def _is_matrix(pair: LayerPair, tensor: TensorPair) -> bool:
    return kinds.WEIGHT.fullmatch(tensor.torch_name) is not None and pair.kind == "linear"


def pair_layers(
    torch: Sequence[Layer],
    flax: Sequence[Layer],
    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]],
    layer_map: Mapping[str, str] | None = None,
) -> Pairing:
    """Align two lists of layers.

    The alignment is the one of largest total worth that keeps the order on both sides (Needleman and Wunsch 1970):
    layers of the same kind, with tensors of the same shapes. Called layers first, then bare parameters; tensors that
    are left are paired one by one, by name and shape.

    Args:
      torch: PyTorch's, in the order of execution.
      flax: Flax's, likewise.
      shapes: of all tensors by full name, PyTorch's and Flax's.
      layer_map: {PyTorch's dotted name: Flax's path} of some layers.

    Raises:
      ValueError: a name in the map that is no layer.
    """
    layer_map = layer_map or {}
    by_path = {layer.path: layer for layer in torch}, {layer.path: layer for layer in flax}
    problems = [f"{t!r} (PyTorch)" for t in layer_map if t not in by_path[0]]
    problems += [f"{f!r} (Flax)" for f in layer_map.values() if f not in by_path[1]]
    if problems:
        raise ValueError(
            f"layer_map names {', '.join(problems)}; allowed: {', '.join(map(repr, by_path[0]))} "
            f"to {', '.join(map(repr, by_path[1]))}"
        )
    pairs = [_pair(by_path[0][t], by_path[1][f], shapes) for t, f in layer_map.items()]
    # First what fits, in the common order; then what fits out of order (parallel branches may be called either way
    # round); then what does not fit, as where a mistake has changed a shape.
    for called in True, False:
        for misfits in False, False, True:
            paired = {p.torch.path for p in pairs}, {p.flax.path for p in pairs}
            a = [x for x in torch if x.is_called == called and x.path not in paired[0]]
            b = [x for x in flax if x.is_called == called and x.path not in paired[1]]
            pairs += _align(a, b, shapes, misfits=misfits)
    pairs = _with_feeders(pairs, layer_map, shapes)
    order = {layer.path: i for i, layer in enumerate(torch)}
    pairs.sort(key=lambda pair: order[pair.torch.path])
    paired = {p.torch.path for p in pairs}, {p.flax.path for p in pairs}
    pairing = Pairing(
        pairs, [x for x in torch if x.path not in paired[0]], [x for x in flax if x.path not in paired[1]]
    )
    _pair_loose(pairing, shapes)
    return pairing


def _with_feeders(pairs: list[LayerPair], layer_map: Mapping[str, str], shapes) -> list[LayerPair]:
    """Layers that only the order told apart, as the norms of two branches, exchanged where what feeds them says so."""
    flax_of = {pair.torch.path: pair.flax for pair in pairs}
    for pair in pairs:
        feeder = flax_of.get(pair.torch.feeder or "")
        if pair.torch.feeder is None or feeder is None or pair.torch.path in layer_map:
            continue
        mine = flax_of[pair.torch.path]
        if mine.feeder == feeder.path:
            continue
        for other in pairs:
            theirs = flax_of[other.torch.path]
            same = theirs.kind == mine.kind and _shapes_of(theirs, shapes[1]) == _shapes_of(mine, shapes[1])
            if theirs.feeder == feeder.path and same and other.torch.path not in layer_map:
                flax_of[pair.torch.path], flax_of[other.torch.path] = theirs, mine
                break
    return [p if flax_of[p.torch.path] is p.flax else _pair(p.torch, flax_of[p.torch.path], shapes) for p in pairs]


def _shapes_of(layer: Layer, shapes) -> dict[str, tuple[int, ...]]:
    return {local: tuple(shapes[full]) for local, full in layer.tensors.items()}


def _pair(torch: Layer, flax: Layer, shapes) -> LayerPair:
    kind = torch.kind if torch.kind != "other" else flax.kind
    found = rules.pair_tensors(
        kind,
        {name: tuple(shapes[0][full]) for name, full in torch.tensors.items()},
        {name: tuple(shapes[1][full]) for name, full in flax.tensors.items()},
        flax.config,
    )
    return LayerPair(torch, flax, list(found.pairs), list(found.torch_left), list(found.flax_left))


def _worth(torch: Layer, flax: Layer, shapes, *, misfits: bool) -> tuple[float, LayerPair | None]:
    if torch.kind == flax.kind:
        worth = SAME_KIND
    elif like(torch.kind, flax.kind):
        worth = LIKE_KIND
    else:
        return FORBIDDEN, None
    pair = _pair(torch, flax, shapes)
    fits = [t.fits for t in pair.tensors]
    if not (fits and all(fits)) and ("other" in (torch.kind, flax.kind) or not misfits):
        return FORBIDDEN, None
    worth += FITTING if fits and all(fits) else MISFIT
    worth += LEFT * (len(pair.torch_left) + len(pair.flax_left))
    return worth + difflib.SequenceMatcher(None, torch.path, flax.path).ratio() / 10, pair


def _align(torch: Sequence[Layer], flax: Sequence[Layer], shapes, *, misfits: bool) -> list[LayerPair]:
    rows, columns = len(torch), len(flax)
    worth = [[_worth(t, f, shapes, misfits=misfits) for f in flax] for t in torch]
    best = np.zeros((rows + 1, columns + 1))
    best[:, 0], best[0, :] = ALONE * np.arange(rows + 1), ALONE * np.arange(columns + 1)
    for i in range(rows):
        for j in range(columns):
            best[i + 1, j + 1] = max(best[i, j] + worth[i][j][0], best[i, j + 1] + ALONE, best[i + 1, j] + ALONE)
    pairs: list[LayerPair] = []
    i, j = rows, columns
    while i and j:
        pair = worth[i - 1][j - 1][1]
        if pair is not None and best[i, j] == best[i - 1, j - 1] + worth[i - 1][j - 1][0]:
            pairs.append(pair)
            i, j = i - 1, j - 1
        elif best[i, j] == best[i - 1, j] + ALONE:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def like(first: str, second: str) -> bool:
    """Whether layers of these kinds may be the same layer; what is of no known kind may be anything."""
    return first == second or "other" in (first, second) or any({first, second} <= both for both in LIKE)


def _owners(layers: Sequence[Layer]) -> dict[str, Layer]:
    return {full: layer for layer in layers for full in layer.tensors.values()}


def _may_be_same(t: str, f: str, torch_owner: Mapping[str, Layer], flax_owner: Mapping[str, Layer]) -> bool:
    """Whether two tensors of layers that are no pair may be the same: of like kinds, and not a scale and a shift."""
    names = t.rpartition(".")[2], f.rpartition("/")[2]
    is_shift = [kinds.SHIFT.fullmatch(name) is not None for name in names]
    is_scale = [kinds.SCALE.fullmatch(name) or kinds.WEIGHT.fullmatch(name) for name in names]
    crossed = (is_shift[0] and is_scale[1]) or (is_scale[0] and is_shift[1])
    return not crossed and like(torch_owner[t].kind, flax_owner[f].kind)


def _pair_loose(pairing: Pairing, shapes) -> None:
    torch, flax = pairing.left()
    torch_owner = _owners([*(p.torch for p in pairing.layers), *pairing.torch_alone])
    flax_owner = _owners([*(p.flax for p in pairing.layers), *pairing.flax_alone])
    for by_shape in (False, True):
        for t in list(torch):
            names = [f for f in flax if f.startswith("params/") or not by_shape]
            names = [f for f in names if _may_be_same(t, f, torch_owner, flax_owner)]
            found = rules.pair_tensors(
                "other",
                {t.rpartition(".")[2]: shapes[0][t]},
                {f: shapes[1][f] for f in names if by_shape or f.rpartition("/")[2] == t.rpartition(".")[2]},
            )
            fitting = [pair for pair in found.pairs if pair.fits]
            if fitting:
                pairing.loose.append((t, fitting[0].flax_name, fitting[0]))
                torch.remove(t)
                flax.remove(fitting[0].flax_name)


def pairing_of(torch: Recording, flax: Recording, layer_map: Mapping[str, str] | None = None) -> Pairing:
    """Which layer is which, in the order of execution.

    Raises:
      ValueError: a name in layer_map that is no layer.
    """
    shapes = tuple({name: tuple(a.shape) for name, a in recording.tensors.items()} for recording in (torch, flax))
    return pair_layers(in_order(torch), in_order(flax), (shapes[0], shapes[1]), layer_map)


def in_order(recording: Recording) -> list[Layer]:
    """The layers in the order of their first call; then those that were not called, of which only the tensors count."""
    called = list(dict.fromkeys(call.path for call in recording.calls))
    layers = [recording.layers[path] for path in called]
    rest = [layer for path, layer in recording.layers.items() if path not in called]
    for layer in rest:
        layer.is_called = False  # takes part with its tensors only
    return layers + rest
