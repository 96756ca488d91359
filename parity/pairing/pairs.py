"""What belongs together on both sides, layers and their tensors, and what is left over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from parity.pairing import rules
from parity.pairing.recut import cut
from parity.pairing.recut.cut import Recut
from parity.pairing.rules import TensorPair
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.recording import Layer


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
        return kinds.common(self.torch.kind, self.flax.kind)

    @property
    def is_out_in(self) -> bool:
        """Whether it is a linear layer whose matrix is [out, in] in Flax, too."""
        return bool(self.flax.config.get(kinds.OUT_IN))


@dataclass
class Pairing:
    """All layers that have a partner, in PyTorch's order, and what has none.

    Attributes:
      layers: the pairs.
      torch_alone, flax_alone: layers without a partner.
      loose: (PyTorch's full name, Flax's full name, pair) of tensors whose layers are no pair.
      constants: PyTorch's full names of tables that it does not train and that have no partner: Flax's code has them.
      recuts: how the layers of either side were cut to be those of the other; all else is of the layers as cut.
      is_guessed: that these are the cuts, no numbers have shown.
      told: of layers that are not paired by their names and order, or that these do not tell apart, in sentences.
      by_order: groups of PyTorch's layers of which neither names nor what feeds them say whose partner is whose.
      hint: how the layers may be cut, where there are no numbers to show it, and they are not.
      shapes: of PyTorch's tensors and of Flax's, as cut.
    """

    layers: list[LayerPair]
    torch_alone: list[Layer] = field(default_factory=list)
    flax_alone: list[Layer] = field(default_factory=list)
    loose: list[tuple[str, str, TensorPair]] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    recuts: list[Recut] = field(default_factory=list)
    is_guessed: bool = False
    told: list[str] = field(default_factory=list)
    by_order: list[list[str]] = field(default_factory=list)
    hint: str = ""
    shapes: tuple[Mapping[str, Shape], Mapping[str, Shape]] = ({}, {})

    def of_torch(self) -> list[Recut]:
        """How PyTorch's layers were cut."""
        return cut.of_side(self.recuts, "torch")

    def of_flax(self) -> list[Recut]:
        """How Flax's layers were cut."""
        return cut.of_side(self.recuts, "flax")

    def loses(self) -> list[str]:
        """What the way back to PyTorch does not bring back."""
        return [recut.loses for recut in self.of_torch() if recut.loses]

    def rounded(self) -> set[str]:
        """Flax's tensors that are sums of PyTorch's: in float32 these are rounded."""
        sums = {
            part
            for recut in self.of_torch()
            for p in recut.pieces
            if p.gradient is not None or p.folds
            for part in p.parts
        }
        parts = {f for t, f, _ in self.tensors() if t in sums}
        pieces = [piece for recut in self.of_flax() for piece in recut.pieces]
        return parts.union(name for piece in pieces if parts & set(piece.parts) for name in piece.wholes)

    def halves(self, tensors: Mapping[str, NDArray]) -> dict[str, dict[str, NDArray]]:
        """Flax's names -> {what may have been forgotten of PyTorch's tensors, which are not cut: as it is then}."""
        partner = {t: f for t, f, _ in self.tensors()}
        found: dict[str, dict[str, NDArray]] = {}
        for piece in (piece for recut in self.of_torch() for piece in recut.pieces):
            if piece.halves is not None and all(name in tensors for name in piece.wholes):
                for forgotten, parts in piece.halves([tensors[name] for name in piece.wholes]).items():
                    for part, a in zip(piece.parts, parts, strict=True):
                        found.setdefault(partner[part], {})[forgotten] = a
        return found

    def wholes(self) -> set[str]:
        """Full names of the tensors, on either side, that are carried in parts."""
        return {name for recut in self.recuts for piece in recut.pieces for name in piece.wholes}

    def seen_in_flax(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Flax's layers as a run must see them: opened where their parts are the other side's layers."""
        found = dict(layers)
        for recut in self.of_flax():
            found = cut.replaced(found, recut) if recut.is_seen else found
        return found

    def key_in_torch(self, flax_key: tuple[str, int]) -> tuple[str, int] | None:
        """PyTorch's call that belongs to this one of Flax's, as Flax's module makes it."""
        for recut in self.of_flax():
            if flax_key[0] in recut.replaced and recut.key is not None:
                flax_key = recut.key(flax_key)
        path = next((p.torch.path for p in self.layers if p.flax.path == flax_key[0]), None)
        return None if path is None else (path, flax_key[1])

    def copy(self) -> Pairing:
        """The same, to be changed by itself."""
        return replace(self, layers=[replace(p, tensors=list(p.tensors)) for p in self.layers])

    def notes(self) -> list[str]:
        """What was cut, a line for each kind of cut."""
        texts = dict.fromkeys(recut.text for recut in self.recuts if recut.text)
        return [f"{text}{', as it is guessed' if self.is_guessed else ''}" for text in texts]

    def assumed(self) -> list[str]:
        """What no shape tells: what Flax's code has, and in which order a linear layer reads a convolution's patch."""
        frozen = [
            f"{name} is not trained in PyTorch (requires_grad=False) and has no partner: taken to be in Flax's code"
            for name in self.constants
        ]
        mixed = [p for p in self.layers if {p.torch.kind, p.flax.kind} == {"linear", "conv"}]
        return frozen + [
            f"{p.torch.path} ({p.flax.path}) is a linear layer on one side, a convolution on the other: "
            "the linear layer is taken to read a patch as height, width, channels"
            for p in mixed
            if any(t.fits and math.prod(self._window(p, t)) > 1 for t in p.tensors)
        ]

    def _window(self, pair: LayerPair, tensor: TensorPair) -> Shape:
        """The spatial axes of a convolution's kernel; of a vector none."""
        if pair.torch.kind == "conv":
            return self.shapes[0][pair.torch.tensors[tensor.torch_name]][2:]
        return self.shapes[1][pair.flax.tensors[tensor.flax_name]][:-2]

    def tensors(self) -> list[tuple[str, str, TensorPair]]:
        """(PyTorch's full name, Flax's full name, pair) of every tensor that both sides have."""
        found = [
            (pair.torch.tensors[t.torch_name], pair.flax.tensors[t.flax_name], t)
            for pair in self.layers
            for t in pair.tensors
        ]
        return found + self.loose

    def to_flax(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """PyTorch's tensors or moments by Flax's full names, in Flax's layout."""
        moved = self.moved(cut.apart(tensors, self.of_torch()))
        return {name: np.array(a, order="C") for name, a in cut.together(moved, self.of_flax()).items()}

    def moved(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """PyTorch's tensors by Flax's full names, in Flax's layout; on both sides as cut."""
        # Not by np.ascontiguousarray, which makes an array of one number of a number.
        return {f: np.array(pair.to_flax(tensors[t]), order="C") for t, f, pair in self.tensors() if t in tensors}

    def to_torch(self, variables: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Flax's arrays by PyTorch's full names, in PyTorch's layout; a tensor that lacks a part is left out."""
        renamed = [pair._replace(torch_name=t, flax_name=f) for t, f, pair in self.tensors()]
        moved = rules.to_torch_arrays(renamed, cut.apart(variables, self.of_flax()))
        return {n: np.array(a, order="C") for n, a in cut.together(moved, self.of_torch()).items()}

    def left(self) -> tuple[list[str], list[str]]:
        """Full names of the tensors without a partner, on either side."""
        used_torch, used_flax = {t for t, _, _ in self.loose}, {f for _, f, _ in self.loose}
        torch = [pair.torch.tensors[n] for pair in self.layers for n in pair.torch_left]
        flax = [pair.flax.tensors[n] for pair in self.layers for n in pair.flax_left]
        # Constants may stand in the other side's code; Flax's variables must be given.
        others = (layer for layer in self.torch_alone if not layer.is_constant)
        torch += [full for layer in others for full in layer.tensors.values() if full not in self.constants]
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
                    else rules.with_flatten(t, shape, out_in=pair.is_out_in)
                    if _is_matrix(pair, t)
                    else t
                    for t in pair.tensors
                ]


def _is_matrix(pair: LayerPair, tensor: TensorPair) -> bool:
    return kinds.WEIGHT.fullmatch(tensor.torch_name) is not None and pair.kind == "linear"
