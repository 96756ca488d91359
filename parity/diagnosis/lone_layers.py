"""Layers and outputs that one side only has, in one finding each; norms of which one side only has scale and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parity.comparison.differences import alone
from parity.diagnosis.between import family as between
from parity.diagnosis.between.chains import Source
from parity.diagnosis.finding import Finding, Located
from parity.diagnosis.mistakes import UNEXPLAINED
from parity.pairing.arrangements import usual
from parity.pairing.outputs import told
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.recording import NETWORK, Call, Layer, Recording

MOST_ADDED = 1e-6
"""Of what is added by a table, in which either side may have float32 inside."""
MOST_ERROR = 1e-9
"""Of what is handed on as it is."""


def with_lone_layers(
    found: Sequence[Located], translation: Translation, forced: Recording, free: Recording
) -> list[Located]:
    """The findings, and what is to be said of layers without a partner, which explain what arrives behind them.

    Args:
      found: what has been found so far.
      translation: between the two sides.
      forced: Flax's run in single-layer mode.
      free: Flax's own run.
    """
    found = [*found, *_lone_outputs(translation, forced)]
    norms = _norms(translation, forced)
    torch, flax = alone(translation.pairing, translation.torch, free)
    torch += _missed(found, translation, forced, free)
    torch = [x for x in torch if (x.path, "") not in {(f.layer, f.flax_layer) for f in norms}]
    flax = [x for x in flax if x.path not in {f.flax_layer for f in norms}]
    if not torch and not flax:
        return [*found, *norms]
    behind = _behind(translation, free, {x.path for x in torch}, {x.path for x in flax})
    # What lies between two layers has half a position.
    kept = [f for f in found if f.key not in behind or f.position % 1 == 0]
    order = [call.path for call in translation.torch.calls]
    position = min((order.index(x.path) for x in torch if x.path in order), default=0)
    finding = no_partner(torch, flax)
    if torch:
        return [*kept, *norms, Located("forward", position, torch[0].path, "", finding, (torch[0].path, 0))]
    return [*kept, *norms, Located("forward", position, "", flax[0].path, finding)]


def no_partner(torch: Sequence[Layer], flax: Sequence[Layer]) -> Finding:
    """These layers, with their tensors, are on one side only."""
    texts = [
        f"{name}'s {', '.join(map(_described, layers))} {_has(layers)} no partner in {other}"
        for name, other, layers in (("PyTorch", "Flax", torch), ("Flax", "PyTorch", flax))
        if layers
    ]
    return Finding("no-partner", "; ".join(texts))


def _missed(found: Sequence[Located], translation: Translation, forced: Recording, free: Recording) -> list[Layer]:
    """Layers of tables that were taken to be in Flax's code, where another number is added, or none, behind them."""
    pairing = translation.pairing
    unexplained = {f.key for f in found if f.finding.code == UNEXPLAINED and f.position % 1}
    constants = [x for x in pairing.torch_alone if x.tensors and set(x.tensors.values()) <= {*pairing.constants}]
    return [
        x
        for x in constants
        if any(_is_added(translation, forced, key) for key in _behind(translation, free, {x.path}, set()) & unexplained)
    ]


def _is_added(translation: Translation, forced: Recording, key: tuple[str, int]) -> bool:
    """Whether what arrives there differs by the same in all examples, as a table does that is added."""
    call = translation.calls.get(key)
    mine = None if call is None else forced.call((translation.pair_of[call.path].flax.path, call.index))
    if call is None or mine is None or not call.inputs or not mine.arrived:
        return False
    truth, arrived = translation.input(call, 0, mine.arrived[0]), mine.arrived[0]
    if truth.shape != arrived.shape or truth.ndim < 2 or len(truth) < 2:
        return False
    apart = truth - arrived
    return error_of(apart, np.broadcast_to(apart[:1], apart.shape)) <= MOST_ADDED


def _lone_outputs(translation: Translation, forced: Recording) -> list[Located]:
    """Outputs of the network without a partner, in one finding."""
    ours, theirs = translation.torch.named_outputs, forced.named_outputs
    if not forced.has_ended or not translation.torch.has_ended:
        return []
    pairs = translation.results(theirs)
    texts = [
        f"{name}'s {', '.join(told(outputs, i) for i in left)} {_has(left)} no partner in {other}"
        for name, other, outputs, taken in (
            ("PyTorch", "Flax", ours, {i for i, _ in pairs}),
            ("Flax", "PyTorch", theirs, {j for _, j in pairs}),
        )
        if (left := [i for i in range(len(outputs)) if i not in taken])
    ]
    place = len(translation.torch.calls)
    return [Located("forward", place, "", "", Finding("no-partner", "; ".join(texts)), NETWORK)] if texts else []


def _has(several: Sequence[Any]) -> str:
    return "has" if len(several) == 1 else "have"


def _described(layer: Layer) -> str:
    return f"{layer.path or layer.class_name} ({', '.join(layer.tensors)})"


def _norms(translation: Translation, forced: Recording) -> list[Located]:
    """Norms whose scale and bias one side only has: there the other side's has no tensors, and is no layer."""
    torch, pairing = translation.torch, translation.pairing
    order = [call.path for call in torch.calls]
    found = []
    for layer in pairing.torch_alone:
        if layer.kind in kinds.NORMS and layer.is_called and set(layer.tensors) - layer.statistics:
            position = order.index(layer.path)
            # Without a scale and a bias a batch norm still has its statistics, and is a layer.
            if layer.kind == "batch_norm" or _is_handed_on(translation, forced, position):
                continue
            text = f"PyTorch's {layer.path} has {', '.join(layer.tensors)}, Flax has no such layer with parameters"
            finding = Finding("affine-missing", text)
            found.append(Located("backward", position, layer.path, "", finding, (layer.path, 0)))
    bare = [g for g in torch.glue if "Norm" in " ".join(g.class_names)]
    for layer in pairing.flax_alone:
        if layer.kind in kinds.NORMS and layer.is_called and set(layer.tensors) - layer.statistics and bare:
            g = bare.pop(0)
            text = f"Flax's {layer.path} has {', '.join(layer.tensors)}, PyTorch's {g.path} has no parameters"
            key = (order[g.position], 0) if g.position < len(order) else NETWORK
            found.append(Located("backward", g.position, g.path, layer.path, Finding("affine-missing", text), key))
    return found


def _is_handed_on(translation: Translation, forced: Recording, position: int) -> bool:
    """Whether Flax hands on what PyTorch gives this norm, through an activation or a pool, as if there were none."""
    calls = translation.torch.calls
    norm, call = calls[position], next((c for c in calls[position + 1 :] if c.path in translation.pair_of), None)
    if call is None:
        arrived = next(iter(forced.outputs), None)
    else:
        mine = forced.call((translation.pair_of[call.path].flax.path, call.index))
        arrived = mine.arrived[0] if mine is not None and mine.arrived else None
    if arrived is None or not norm.inputs:
        return False
    x, kind = norm.inputs[0], translation.torch.layers[norm.path].kind
    source = Source(norm.path, usual(kind, x).of(x))
    return between.describe([source], arrived, MOST_ERROR) is not None


def _behind(translation: Translation, free: Recording, torch: set[str], flax: set[str]) -> set[tuple[str, int]]:
    """PyTorch's keys of the first calls with a partner behind these layers; `NETWORK` where only the end is."""

    def next_key(calls: Sequence[Call]) -> tuple[str, int]:
        keys = (
            call.key if call.path in translation.pair_of else (translation.torch_path.get(call.path, ""), call.index)
            for call in calls
            if call.path in translation.pair_of or call.path in translation.torch_path
        )
        return next(keys, NETWORK)

    found = {
        next_key(translation.torch.calls[i + 1 :]) for i, c in enumerate(translation.torch.calls) if c.path in torch
    }
    return found | {next_key(free.calls[i + 1 :]) for i, c in enumerate(free.calls) if c.path in flax}
