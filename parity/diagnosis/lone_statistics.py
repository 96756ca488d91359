"""Statistics that training changes on one side, and that have no partner on the other: nobody has compared them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from parity.comparison.bounds import FORWARD_BOUND
from parity.comparison.differences import alone
from parity.diagnosis.finding import Located
from parity.diagnosis.lone_layers import no_partner
from parity.pairing.pairs import Pairing
from parity.records.distance import error_of
from parity.records.recording import Layer, Recording

LEFT_BEHIND = "intermediates", "Intermediate", "cache", "Cache"
"""Flax's collections of what a call leaves for its caller or for the next call: results, no statistics."""


def lone_statistics(pairing: Pairing, torch: Recording, flax: Recording) -> list[Located]:
    """A finding on what only one side keeps in training, of layers that have a partner or none.

    What both keep, and is the same before and after, needs none: it may stand in any place. Layers without a partner
    that are called are told by themselves, see `lone_layers`.
    """
    if not (torch.has_ended and flax.has_ended):
        return []
    told = {full for side in alone(pairing, torch, flax) for layer in side for full in layer.tensors.values()}
    paired = {name for t, f, _ in pairing.tensors() for name in (t, f)} | pairing.wholes()
    ours, theirs = (list(_changed(side, told | paired)) for side in (torch, flax))
    for name in [*ours]:
        same = next((other for other in theirs if _is_same(torch, name, flax, other)), None)
        if same is not None:
            ours.remove(name)
            theirs.remove(same)
    if not ours and not theirs:
        return []
    first, second = _layers(torch, ours), _layers(flax, theirs)
    torch_path, flax_path = (layers[0].path if layers else "" for layers in (first, second))
    order = [call.path for call in torch.calls]
    position = order.index(torch_path) if torch_path in order else len(order)
    key = (torch_path, 0)
    return [Located("statistics", position, torch_path, flax_path, no_partner(first, second), key)]


def not_kept(pairing: Pairing, flax: Recording) -> list[str]:
    """A note on Flax's statistics without a partner, in prediction, which changes none."""
    called = {call.path for call in flax.calls}
    known = {f for _, f, _ in pairing.tensors()} | pairing.wholes()
    known |= {full for x in pairing.flax_alone if x.path in called for full in x.tensors.values()}  # told by themselves
    left = [name for name in flax.new_statistics if name.startswith("batch_stats/") and name not in known]
    layers = _layers(flax, left)
    return [f"{no_partner([], layers).evidence}: what training makes of it was not compared"] if layers else []


def _changed(run: Recording, known: Collection[str]) -> Iterable[str]:
    """Full names of what is no parameter, and another number behind the run than before."""
    for name, after in run.new_statistics.items():
        before = run.tensors.get(name)
        left = run.framework == "flax" and name.split("/")[0] in LEFT_BEHIND
        if name in known or left or before is None or not before.dtype.kind == after.dtype.kind == "f":
            continue
        if not np.array_equal(before, after, equal_nan=True):
            yield name


def _is_same(torch: Recording, name: str, flax: Recording, other: str) -> bool:
    runs = (torch.tensors[name], flax.tensors[other]), (torch.new_statistics[name], flax.new_statistics[other])
    return all(a.shape == b.shape and error_of(b, a) <= FORWARD_BOUND for a, b in runs)


def _layers(run: Recording, names: Iterable[str]) -> list[Layer]:
    """The layers that keep them, with these tensors alone."""
    found: dict[str, Layer] = {}
    for full in names:
        path, _, local = full.partition("/")[2].rpartition("/") if run.framework == "flax" else full.rpartition(".")
        known = run.layers.get(path)
        class_name = known.class_name if known is not None else ""
        found.setdefault(path, Layer(path, "other", class_name or "network", {})).tensors[local] = full
    return list(found.values())
