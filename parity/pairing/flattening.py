"""Layers that stand behind a flatten, which either side may do in another order."""

from __future__ import annotations

from collections.abc import Mapping

from parity.pairing import rules
from parity.pairing.pairs import LayerPair, Pairing
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.structure import Flattened, Structure


def reorder_behind_flattens(pairing: Pairing, torch: Structure, flax: Structure) -> None:
    """Reorder the inputs of the layers that read the same numbers in another order on the other side."""
    for pair in pairing.layers:
        _reorder(pair, torch, flax, pairing.shapes[0])


def _reorder(pair: LayerPair, torch: Structure, flax: Structure, shapes: Mapping[str, Shape]) -> None:
    """Reorder the inputs of a layer that reads the same numbers in another order on the other side."""
    if pair.kind not in kinds.FLAT:
        return
    shape = flatten_shape(torch.flattened.get(pair.torch.path), flax.flattened.get(pair.flax.path))
    if shape is None:
        return
    size = shape[0] * shape[1]

    def reads_all(tensor: rules.TensorPair) -> bool:
        moved = shapes[pair.torch.tensors[tensor.torch_name]]
        inputs = 0 if pair.torch.config.get(kinds.IN_OUT) else 1
        is_matrix = len(moved) == 2 and moved[inputs] == size and pair.kind == "linear"
        return tensor.fits and (is_matrix or (pair.kind != "linear" and moved == (size,)))

    out_in = pair.is_out_in
    pair.tensors = [rules.with_flatten(t, shape, out_in=out_in) if reads_all(t) else t for t in pair.tensors]


def flatten_shape(torch: Flattened | None, flax: Flattened | None) -> tuple[int, int] | None:
    """What `rules.with_flatten` needs: PyTorch's order of what is flattened, or None if both have the same.

    Where one side does not say, it is taken to flatten its own layout: channels first in PyTorch, last in Flax.
    """
    known = torch or flax
    if known is None or (torch is not None and flax is not None and torch[:2] != flax[:2]):
        return None
    torch_first = True if torch is None else torch.channels_first
    flax_first = False if flax is None else flax.channels_first
    if torch_first == flax_first:
        return None
    return (known.channels, known.positions) if torch_first else (known.positions, known.channels)
