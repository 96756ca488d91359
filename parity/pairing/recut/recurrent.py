"""Recurrent cells: PyTorch keeps the gates of a layer in one matrix and has two biases, Flax has a layer for each gate.

Both are cut into the same: a cell for each layer and direction, with weight_ih [inputs, gates * features],
weight_hh [features, gates * features] and bias [gates * features], the gates in PyTorch's order, which is i, f, g, o of
an LSTM and r, z, n of a GRU; and of a GRU bias_hn [features], which is added within the product with r.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.pairing.recut.cut import Piece, Recut
from parity.records import kinds
from parity.records.recording import Layer
from parity.records.structure import Structure

GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n"), 1: ("",)}
"""By their number: of an LSTM, of a GRU, of a plain cell, in PyTorch's order."""
TORCH_NAME = re.compile(r"(?P<what>weight|bias)_(?P<of>ih|hh)(?P<cell>(_l\d+)?(_reverse)?)")
MOST_ORDERS = 24


def alternatives(torch: Structure, flax: Structure) -> Iterator[list[Recut]]:
    """The cells of both sides, cut alike: in the order of their calls first; nothing where there are none."""
    in_torch = [recut for layer in torch.layers if (recut := of_torch(layer, torch)) is not None]
    in_flax = list(of_flax(flax))
    mine = [layer for recut in in_torch for layer in recut.layers]
    theirs = [layer for recut in in_flax for layer in recut.layers]
    if not mine or len(mine) != len(theirs):
        return
    for order in itertools.islice(itertools.permutations(theirs), MOST_ORDERS):
        partners = {t.path: f.path for t, f in zip(mine, order, strict=True)}
        certain = len(mine) == 1
        yield [
            *(_known(recut, partners, certain) for recut in in_torch),
            *(_known(recut, {}, certain) for recut in in_flax),
        ]


def _known(recut: Recut, partners: dict[str, str], certain: bool) -> Recut:
    paths = {layer.path for layer in recut.layers}
    mine = {t: f for t, f in partners.items() if t in paths}
    return Recut(
        recut.framework, recut.replaced, recut.layers, recut.pieces, mine, recut.text, certain, loses=recut.loses
    )


def of_torch(layer: Layer, structure: Structure) -> Recut | None:
    """PyTorch's LSTM, GRU or RNN, or a cell of them; None if it is none, or has projections."""
    matches = {local: TORCH_NAME.fullmatch(local) for local in layer.tensors}
    if not matches or not all(matches.values()):
        return None
    cells = list(dict.fromkeys(match["cell"] for match in matches.values() if match))
    made, pieces = [], []
    for cell in cells:
        path = f"{layer.path}[{cell.removeprefix('_')}]" if cell else f"{layer.path}[cell]"
        shapes = {n: structure.shapes[layer.tensors[f"{n}{cell}"]] for n in ("weight_ih", "weight_hh")}
        features = shapes["weight_hh"][1]
        gates = GATES.get(shapes["weight_hh"][0] // features)
        if gates is None or shapes["weight_hh"][0] % features:
            return None
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = f"{path}.{name}"
            pieces.append(_transposed(layer.tensors[f"{name}{cell}"], shape, tensors[name]))
        if f"bias_ih{cell}" in layer.tensors:
            fulls = [layer.tensors[f"{name}{cell}"] for name in ("bias_ih", "bias_hh")]
            names = ["bias", *(["bias_hn"] if len(gates) == 3 else [])]
            tensors |= {name: f"{path}.{name}" for name in names}
            pieces.append(_summed(fulls, tuple(tensors[name] for name in names), len(gates), features))
        made.append(Layer(path, kinds.OTHER, layer.class_name, tensors, config={"gates": gates}))
    biased = any("bias" in x.tensors for x in made)
    gru = any("bias_hn" in x.tensors for x in made)
    hidden = " but for that of the gate n, which stays what it is" if gru else ""
    loses = f"{layer.path}: Flax has one bias where PyTorch has two; bias_ih takes it, and bias_hh is 0{hidden}"
    text = f"the cells of {layer.path}, gate by gate"
    hidden_too = hidden.replace("that", "bias_hh")
    text += f"; bias in Flax is bias_ih + bias_hh{hidden_too}, and makes half their step" if biased else ""
    return Recut("torch", (layer.path,), tuple(made), tuple(pieces), text=text, loses=loses if biased else "")


def _transposed(full: str, shape: tuple[int, ...], part: str) -> Piece:
    return Piece({full: shape}, (part,), lambda arrays: [arrays[0].T], lambda arrays: [arrays[0].T])


def _summed(fulls: Sequence[str], parts: tuple[str, ...], gates: int, features: int) -> Piece:
    """Two biases of which only the sum counts; but for a GRU's last gate."""
    kept = (gates - 1) * features if gates == 3 else gates * features

    def apart(arrays: Sequence[NDArray]) -> list[NDArray]:
        a, b = arrays
        return [np.concatenate([a[:kept] + b[:kept], a[kept:]]), b[kept:]][: len(parts)]

    def together(arrays: Sequence[NDArray]) -> list[NDArray]:
        bias = arrays[0]
        return [bias, np.concatenate([np.zeros_like(bias[:kept]), *arrays[1:]])]

    def gradient(arrays: Sequence[NDArray]) -> list[NDArray]:
        a, b = arrays
        return [a, b[kept:]][: len(parts)]

    def halves(arrays: Sequence[NDArray]) -> dict[str, list[NDArray]]:
        a, b = arrays
        zeros = [np.zeros_like(a), np.zeros_like(b)]
        return {"bias_ih": apart([zeros[0], b]), "bias_hh": apart([a, zeros[1]])}

    shape = (gates * features,)
    return Piece(dict.fromkeys(fulls, shape), parts, apart, together, gradient, halves)


def of_flax(structure: Structure) -> Iterator[Recut]:
    """Flax's cells, by the names of the layers that they are made of."""
    own: dict[str, dict[str, Layer]] = {}
    for layer in structure.layers:
        parent, _, name = layer.path.rpartition("/")
        own.setdefault(parent, {})[name.rstrip("_")] = layer  # NNX has if_, as "if" is a word of the language
    for parent, layers in own.items():
        sides = _sides(layers, structure)
        if sides is not None:
            yield _cell(parent, layers, *sides, structure)


def _sides(layers: dict[str, Layer], structure: Structure) -> tuple[list[str], list[str], tuple[str, ...]] | None:
    """The names of the layers of the inputs and of the state, in the gates' order; and the gates."""
    for gates in GATES.values():
        sides = [f"i{gate}" for gate in gates], [f"h{gate}" for gate in gates]
        if {*sides[0], *sides[1]} == layers.keys():
            return *sides, gates
    if layers.keys() == {"dense_i", "dense_h"} and "kernel" in layers["dense_h"].tensors:
        inputs, outputs = structure.shapes[layers["dense_h"].tensors["kernel"]]
        found = GATES.get(outputs // inputs) if outputs % inputs == 0 else None
        return None if found is None else (["dense_i"], ["dense_h"], found)
    return None


def _cell(
    parent: str,
    layers: dict[str, Layer],
    inputs: list[str],
    state: list[str],
    gates: tuple[str, ...],
    structure: Structure,
) -> Recut:
    tensors: dict[str, str] = {}
    pieces = []

    def join(name: str, fulls: list[str]) -> None:
        tensors[name] = f"params/{parent}/{name}"
        pieces.append(_joined(fulls, [structure.shapes[full] for full in fulls], tensors[name]))

    for name, side in (("weight_ih", inputs), ("weight_hh", state)):
        join(name, [layers[x].tensors["kernel"] for x in side])
    for side in inputs, state:
        biases = [layers[x].tensors["bias"] for x in side if "bias" in layers[x].tensors]
        if len(biases) == len(side):
            join("bias", biases)
        elif biases:
            join("bias_hn", biases)
    if len(gates) == 3 and "bias" in tensors and "bias_hn" not in tensors:
        tensors["bias_hn"] = f"params/{parent}/bias_hn"
        pieces.append(_always_zero(tensors["bias_hn"], structure.shapes[layers[state[-1]].tensors["kernel"]][0]))
    made = Layer(parent, kinds.OTHER, "cell", tensors, config={"gates": gates})
    return Recut("flax", tuple(layer.path for layer in layers.values()), (made,), tuple(pieces))


def _always_zero(part: str, features: int) -> Piece:
    """A bias that the cell has not, as NNX's GRU none within the product with r: it is 0, and takes nothing else."""
    return Piece({}, (part,), lambda _: [np.zeros(features)], lambda _: [])


def _joined(fulls: list[str], shapes: list[tuple[int, ...]], part: str) -> Piece:
    """Gates side by side."""
    cuts = np.cumsum([shape[-1] for shape in shapes])[:-1]
    return Piece(
        dict(zip(fulls, shapes, strict=True)),
        (part,),
        lambda arrays: [np.concatenate(arrays, -1)],
        lambda arrays: np.split(arrays[0], cuts, -1),
    )
