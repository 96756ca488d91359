"""Layers whose weights are in each other's place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from parity.diagnosis.finding import Finding, Located
from parity.pairing.pairs import LayerPair, Pairing
from parity.records.structure import natural

MOST_TOLD = 4


def exchanged(found: Sequence[Located], moved: Mapping[str, str], pairing: Pairing) -> list[Located]:
    """The findings, those of layers that hold each other's weights in one for each family of layers.

    Args:
      found: a finding for each layer.
      moved: PyTorch's layer -> the one whose weights its partner holds.
      pairing: of all layers.
    """
    round_about = {path for path in moved if _comes_back(path, moved)}
    families: dict[str, list[LayerPair]] = {}
    for pair in pairing.layers:
        families.setdefault(_family(pair.torch.path, moved, round_about), []).append(pair)
    told: list[Located] = []
    for f in found:
        family = families[_family(f.layer, moved, round_about)] if f.layer in round_about else []
        first = next((pair for pair in family if pair.torch.path in round_about), None)
        if first is None:
            told.append(f)
        elif first.torch.path == f.layer:
            told.append(f._replace(finding=Finding("weight-order", _words(family, moved))))
    return told


def _comes_back(path: str, moved: Mapping[str, str]) -> bool:
    """Whether whose weights are where, from layer to layer, leads back to this one."""
    at = moved[path]
    for _ in moved:
        if at == path:
            return True
        if at not in moved:
            return False
        at = moved[at]
    return False


def _family(path: str, moved: Mapping[str, str], round_about: set[str]) -> str:
    """What is counted alike; of names without numbers, those that have changed places."""
    if path in round_about and _numbered(path) != _numbered(moved[path]):
        chain, at = [path], moved[path]
        while at != path:
            chain.append(at)
            at = moved[at]
        return min(chain)
    return _numbered(path)


def _numbered(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _words(family: Sequence[LayerPair], moved: Mapping[str, str]) -> str:
    flax = {pair.torch.path: pair.flax.path for pair in family}
    places = [path for path in flax if path in moved]
    held = [f"{flax[path]} holds PyTorch's {moved[path]}" for path in places[:MOST_TOLD]]
    more = f" and {len(places) - MOST_TOLD} more" if len(places) > MOST_TOLD else ""
    return f"Flax's {', '.join(held)}{more}{_order(flax, moved)}"


def _order(flax: Mapping[str, str], moved: Mapping[str, str]) -> str:
    """Which order it is, where it has a name."""
    mine = sorted(flax, key=natural)
    now = [moved.get(path, path) for path in mine]
    if len(mine) > 2 and now == mine[::-1]:
        return ": the layers in reversed order"
    as_text = sorted(flax.values())
    at = {flax[path]: path for path in flax}
    if [moved.get(at[path], at[path]) for path in as_text] == mine:
        return ": the layers in the order of their names as text, 10 before 2"
    return ""
