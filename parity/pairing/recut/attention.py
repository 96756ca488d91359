"""Attention that is one layer on one side, and four linear layers on the other."""

from __future__ import annotations

import numpy as np

from parity.pairing.recut.cut import Piece, Recut
from parity.pairing.recut.linear import cut_rows
from parity.records.recording import Layer
from parity.records.structure import Structure

PARTS = "query", "key", "value"


def opened_in_flax(layer: Layer) -> Recut:
    """Flax's attention as the layers that it is made of: their calls are seen."""
    own: dict[str, dict[str, str]] = {}
    for local, full in layer.tensors.items():
        part, _, name = local.partition("/")
        own.setdefault(part, {})[name] = full
    called = [part for part in own if part not in (*PARTS, "out")]
    order = [*PARTS, *called, "out"]
    made = tuple(
        Layer(
            f"{layer.path}/{part}" if layer.path else part,
            "linear" if "kernel" in tensors else "layer_norm",
            "DenseGeneral" if "kernel" in tensors else "LayerNorm",
            tensors,
        )
        for part, tensors in sorted(own.items(), key=lambda item: order.index(item[0]))
    )
    return Recut("flax", (layer.path,), made, is_certain=True, is_seen=True)


def opened_in_torch(layer: Layer, structure: Structure) -> Recut | None:
    """PyTorch's attention as four linear layers, none of which is ever called; None if it holds more than these."""
    shapes = {local: structure.shapes[full] for local, full in layer.tensors.items()}
    known = {
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
        *(f"{p[0]}_proj_weight" for p in PARTS),
    }
    if not shapes.keys() <= known or "out_proj.weight" not in shapes:
        return None
    paths = [f"{layer.path}[{part}]" for part in PARTS]
    tensors: list[dict[str, str]] = [{} for _ in PARTS]
    pieces: list[Piece] = []
    for local, name in ("in_proj_weight", "weight"), ("in_proj_bias", "bias"):
        if local in shapes:
            parts = tuple(f"{path}.{name}" for path in paths)
            rows = np.split(np.arange(shapes[local][0]), 3)
            pieces.append(cut_rows(layer.tensors[local], shapes[local], parts, rows, 0))
            for own, part in zip(tensors, parts, strict=True):
                own[name] = part
    for own, part in zip(tensors, PARTS, strict=True):
        if f"{part[0]}_proj_weight" in shapes:
            own["weight"] = layer.tensors[f"{part[0]}_proj_weight"]
    out = {name: layer.tensors[f"out_proj.{name}"] for name in ("weight", "bias") if f"out_proj.{name}" in shapes}
    out_path = f"{layer.path}.out_proj" if layer.path else "out_proj"
    made = [*zip(paths, tensors, strict=True), (out_path, out)]
    layers = tuple(Layer(path, "linear", "Linear", own) for path, own in made)
    text = f"query, key and value are cut from {layer.path or 'in_proj'}"
    return Recut("torch", (layer.path,), layers, tuple(pieces), text=text, is_certain=True)
