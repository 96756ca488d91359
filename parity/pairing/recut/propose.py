"""Which cuts there may be between two networks that have no partners as they are: the likely ones first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parity.pairing.alignment import Alignment
from parity.pairing.recut import fold, linear, recurrent, stack
from parity.pairing.recut.attention import opened_in_flax, opened_in_torch
from parity.pairing.recut.cut import Recut, of_side, structure
from parity.records.recording import Layer
from parity.records.structure import Structure

SEVERAL = re.compile(r"qkv|in_proj|c_attn|query_key_value|to_kv|kv|gate_up|w12", re.IGNORECASE)
"""Names of linear layers that are several in one."""


class Sides(NamedTuple):
    """Both structures, as they are cut so far."""

    torch: Structure
    flax: Structure

    def cut(self, recuts: Sequence[Recut]) -> Sides:
        """Cut further."""
        return Sides(structure(self.torch, of_side(recuts, "torch")), structure(self.flax, of_side(recuts, "flax")))


def candidates(torch: Structure, flax: Structure, *, train: bool = False) -> Iterator[list[Recut]]:
    """Cuts that may make partners of layers that have none; in training no norm is folded."""
    sides = Sides(torch, flax)
    if not train:
        yield from _folds(torch, flax)
    base = _opened(sides)
    sides = sides.cut(base)
    for cells in [*recurrent.alternatives(*sides)] or [[]]:
        for stacks in _stacks(sides.cut(cells)):
            for splits in _splits(sides.cut([*cells, *stacks])):
                if base or cells or stacks or splits:
                    yield [*base, *cells, *stacks, *splits]


def _folds(torch: Structure, flax: Structure) -> Iterator[list[Recut]]:
    yield from fold.alternatives(torch, flax, "torch")
    yield from fold.alternatives(flax, torch, "flax")


def folded_in_prediction(torch: Structure, flax: Structure) -> list[str]:
    """Sentences on the batch norms that may be folded on the other side, of two networks in training."""
    return [*dict.fromkeys(f"it may be {recut.text}" for found in _folds(torch, flax) for recut in found)]


def _opened(sides: Sides) -> list[Recut]:
    """Attention that is one layer on one side only."""
    attentions = [[x for x in side.layers if x.kind == "attention"] for side in sides]
    if len(attentions[0]) == len(attentions[1]):
        return []
    in_torch = [opened_in_torch(layer, sides.torch) for layer in attentions[0]]
    return [*(recut for recut in in_torch if recut is not None), *map(opened_in_flax, attentions[1])]


def _stacks(sides: Sides) -> Iterator[list[Recut]]:
    """Layers that are kept in one; first as if there were none."""
    yield []
    yield from stack.alternatives(sides.flax, sides.torch, "flax")
    yield from stack.alternatives(sides.torch, sides.flax, "torch")


def _splits(sides: Sides) -> Iterator[list[Recut]]:
    """Linear layers that are several on the other side."""
    fits = Alignment(sides.torch, sides.flax, {})
    choices = []
    both: list[tuple[linear.Framework, Structure, Structure]] = [
        ("torch", sides.torch, sides.flax),
        ("flax", sides.flax, sides.torch),
    ]
    for framework, mine, other in both:
        for family in _surplus(mine, other, fits, is_torch=framework == "torch"):
            found = list(_alternatives(family, mine, other, framework))
            if found:
                choices.append(found)
    for chosen in itertools.product(*choices):
        yield [recut for family in chosen for recut in family]


def _surplus(mine: Structure, other: Structure, fits: Alignment, *, is_torch: bool) -> Iterator[list[Layer]]:
    """Families of layers of which there are more on this side than could be their partners."""
    looks = fits.looks[0 if is_torch else 1]
    called = [x for x in mine.layers if x.is_called]
    for look in dict.fromkeys(looks[x.path] for x in called):
        own = [x for x in called if looks[x.path] == look]
        first = own[0]
        there = [y for y in other.layers if fits.fit(*((first, y) if is_torch else (y, first))) is not None]
        if len(own) <= len(there):
            continue
        families: dict[str, list[Layer]] = {}
        for x in own:
            families.setdefault(re.sub(r"\d+", "#", x.path), []).append(x)
        named = [family for name, family in families.items() if SEVERAL.search(name)]
        if not there:
            yield from families.values()
        elif named:
            yield from named
        else:
            yield from (family for family in families.values() if len(family) == len(own) - len(there))


def _alternatives(
    family: Sequence[Layer], mine: Structure, other: Structure, framework: linear.Framework
) -> Iterator[list[Recut]]:
    sizes = linear.sizes_of(family[0], mine, framework)
    if sizes is None:
        return
    theirs = "flax" if framework == "torch" else "torch"
    layers = [x for x in other.layers if x.is_called and linear.sizes_of(x, other, theirs) is not None]
    for runs in _runs(list(linear.windows(layers, other, theirs, sizes)), len(family)):
        runs = [linear.by_role(run) for run in runs]
        given = [linear.sizes_of(layer, other, theirs) for layer in runs[0]]
        outputs = [s.outputs for s in given if s is not None]
        for order in linear.orders(outputs, linear.heads_of(runs[0], other)):
            yield [
                linear.split(
                    whole,
                    mine,
                    framework,
                    [(layer.path, n) for layer, n in zip(run, outputs, strict=True)],
                    order,
                )
                for whole, run in zip(family, runs, strict=True)
            ]


def _runs(windows: Sequence[list[Layer]], count: int) -> Iterator[list[list[Layer]]]:
    """So many windows as there are layers to be cut: those whose names say what they are, else every first, ..."""
    named = _apart([run for run in windows if linear.said_by_names(run)])
    if len(named) == count:
        yield named
        return
    for first in range(min(len(windows), 4)):
        found = _apart(windows[first:])
        if len(found) >= count and len({len(run) for run in found[:count]}) == 1:
            yield found[:count]


def _apart(windows: Sequence[list[Layer]]) -> list[list[Layer]]:
    """Those that have no layer in common with one before."""
    found: list[list[Layer]] = []
    for run in windows:
        if not {x.path for x in run} & {x.path for other in found for x in other}:
            found.append(run)
    return found
