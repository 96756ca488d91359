"""A batch norm that the other side has folded into the layer before it, which is the same in prediction.

y = (w * x + b - mean) * s + beta, with s = gamma / sqrt(var + eps) for each output, is one layer with
weight w * s and bias (b - mean) * s + beta. It is computed in float64, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from parity.pairing.recut.cut import Piece, Recut
from parity.records import kinds
from parity.records.recording import Layer
from parity.records.structure import Structure

TAKES_ONE = ("conv", "conv_transpose", "linear")
"""Kinds of layers into which a norm is folded."""
MOST_TOLD = 4
ROLES = {"gamma": kinds.SCALE, "beta": kinds.SHIFT, "mean": kinds.MEAN, "var": kinds.VAR}


def alternatives(mine: Structure, other: Structure, framework: Literal["torch", "flax"]) -> Iterator[list[Recut]]:
    """All norms that a layer feeds folded into it, where the other side has as many fewer; else nothing."""
    found = [recut for norm in mine.layers if (recut := _folded(norm, mine, framework)) is not None]
    counts = [sum(x.kind == "batch_norm" for x in side.layers) for side in (mine, other)]
    if found and counts[0] - len(found) == counts[1]:
        norms = ", ".join(f"{recut.replaced[-1]} into {recut.replaced[0]}" for recut in found[:MOST_TOLD])
        more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        text = f"folded into the layer before on the other side, which is the same in prediction only: {norms}{more}"
        yield [replace(recut, text=text) for recut in found]


def _folded(norm: Layer, structure: Structure, framework: Literal["torch", "flax"]) -> Recut | None:
    """The norm and the layer whose output it takes as one; None where there is no such layer."""
    layers = {x.path: x for x in structure.layers}
    before = layers.get((structure.feeders or {}).get(norm.path, ""))
    epsilon = norm.config.get("eps", norm.config.get("epsilon"))
    if norm.kind != "batch_norm" or before is None or before.kind not in TAKES_ONE or not isinstance(epsilon, float):
        return None
    weights = [full for full in before.tensors.values() if len(structure.shapes[full]) > 1]
    biases = [full for full in before.tensors.values() if len(structure.shapes[full]) == 1]
    roles = {
        role: full for local, full in norm.tensors.items() for role, name in ROLES.items() if name.fullmatch(local)
    }
    if len(weights) != 1 or len(biases) > 1 or len(roles) != len(norm.tensors) or not {"mean", "var"} <= roles.keys():
        return None
    shape, (features,) = structure.shapes[weights[0]], structure.shapes[roles["var"]]
    axis = _outputs(before, framework, len(shape))
    if shape[axis] != features:
        return None
    parts = tuple(
        f"{full}, {norm.path} folded in" for full in (weights[0], biases[0] if biases else f"{weights[0]} bias")
    )
    names = dict(zip(("weight", "bias") if framework == "torch" else ("kernel", "bias"), parts, strict=True))
    made = Layer(f"{before.path} with {norm.path}", before.kind, before.class_name, names, config=before.config)
    fulls = [*weights, *biases, *roles.values()]
    keys = ["w", *(["b"] if biases else []), *roles]

    def apart(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        known = {key: np.asarray(a, np.float64) for key, a in zip(keys, arrays, strict=True)}
        scale = known.get("gamma", 1.0) / np.sqrt(known["var"] + epsilon)
        along = np.expand_dims(scale, [i for i in range(len(shape)) if i != axis % len(shape)])
        bias = (known.get("b", 0.0) - known["mean"]) * scale + known.get("beta", 0.0)
        dtype = np.asarray(arrays[0]).dtype
        return [(known["w"] * along).astype(dtype), bias.astype(dtype)]

    def together(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """One of the many that it may have been: a norm that does nothing but add the bias."""
        weight, bias = arrays
        of = {"w": weight, "b": bias, "gamma": np.ones_like(bias), "beta": np.zeros_like(bias)}
        of |= {"mean": np.zeros_like(bias), "var": np.full_like(bias, 1 - epsilon)}
        if "b" not in keys:
            of |= {"beta": bias} if "beta" in keys else {"mean": -bias}
        return [of[key] for key in keys]

    piece = Piece({full: structure.shapes[full] for full in fulls}, parts, apart, together, folds=True)
    return Recut(framework, (before.path, norm.path), (made,), (piece,), is_certain=True, is_joined=True)


def _outputs(layer: Layer, framework: str, rank: int) -> int:
    """The axis of a weight along which the outputs are."""
    if framework == "torch":
        return 1 if layer.kind == "conv_transpose" or layer.config.get(kinds.IN_OUT) else 0
    if layer.kind == "conv_transpose":
        return rank - 2 if layer.config.get("transpose_kernel") else rank - 1
    return 0 if layer.config.get(kinds.OUT_IN) else rank - 1
