"""Which layers of two networks are partners: one assignment of all that is known of them.

Layers that could stand for each other, by kind and shapes, are a class; in it every pair has a worth, of what their
names say, of whether the layers that feed them are partners, and last of where they stand in the order of calls; the
assignment of the largest sum is taken. So names count more than the order, in which the two sides may call their
branches otherwise, and the order decides where names say nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.pairing import names, rules
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.recording import Layer
from parity.records.structure import Structure

Partners = dict[str, str]
"""PyTorch's path -> Flax's."""

# What a pair is worth in the alignment by order, and what a layer without a partner costs.
SAME_KIND, LIKE_KIND, LEFT, ALONE = 10.0, 4.0, -1.0, -3.0
# What is worth how much in the assignment within a class; a word of a name is worth 1. The order, all in all, less.
BY_KIND, BY_FEEDER, BY_ORDER = 2.0, 3.0, 0.5
# Names that are all the same on both sides outweigh who feeds whom, which a mistake may change.
BY_NAME = 3 * BY_FEEDER
FORBIDDEN = -1e9


class Alignment:
    """The partners of two networks.

    Attributes:
      found: PyTorch's path -> Flax's.
    """

    def __init__(
        self,
        torch: Structure,
        flax: Structure,
        known: Mapping[str, str],
    ) -> None:
        self.torch, self.flax, self.known, self.found = torch, flax, known, dict(known)
        self.feeders = feeders_of(torch), feeders_of(flax)
        self.looks = (
            {x.path: _look_of(x, torch) for x in torch.layers},
            {x.path: _look_of(x, flax) for x in flax.layers},
        )
        self.fits: dict[tuple[_Look, _Look], int | None] = {}

    def run(self) -> Partners:
        """All that fits: first what has a matrix or a kernel, then norms, which look alike all through a network."""
        for is_called in True, False:
            taken = set(self.found.values())
            ts = [x for x in self.torch.layers if x.path not in self.found and x.is_called == is_called]
            fs = [x for x in self.flax.layers if x.path not in taken and x.is_called == is_called]
            positions = self._positions(ts, fs)
            for norms in False, True:
                self._assign([t for t in ts if is_norm(t, self.torch) == norms], fs, positions)
            # Once more, as by now it is known whose partner feeds whom.
            self._assign(ts, fs, positions)
        return self.found

    def fit(self, t: Layer, f: Layer) -> int | None:
        """How many tensors are left over, if all others have a partner of their shape; None: they can't be partners."""
        key = self.looks[0][t.path], self.looks[1][f.path]
        if key not in self.fits:
            self.fits[key] = _fit(*key)
        return self.fits[key]

    def _positions(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> tuple[dict[str, float], dict[str, float]]:
        """Where the layers of either side stand in Flax's order: path -> place.

        PyTorch's by the alignment of largest worth that keeps both orders; those without a partner in it stand between
        their neighbours.
        """
        worth = np.full((len(ts), len(fs)), -np.inf)
        for i, t in enumerate(ts):
            for j, f in enumerate(fs):
                left = self.fit(t, f)
                if left is not None:
                    worth[i, j] = (SAME_KIND if t.kind == f.kind else LIKE_KIND) + LEFT * left
                    worth[i, j] += names.similarity(t.path, f.path) / 10
        places = dict(in_order(worth)) or {0: 0}
        rows, every = sorted(places), np.arange(len(ts), dtype=float)
        # Before the first and behind the last that are matched, the order goes on as it is.
        beyond = np.minimum(every - rows[0], 0) + np.maximum(every - rows[-1], 0)
        every = np.interp(every, rows, [places[i] for i in rows]) + beyond
        return {t.path: float(p) for t, p in zip(ts, every, strict=True)}, {f.path: float(j) for j, f in enumerate(fs)}

    def _assign(self, ts: Sequence[Layer], fs: Sequence[Layer], positions: tuple[dict, dict]) -> None:
        """Partners among these; a layer that has one already may change it for another of these."""
        mine = {t.path for t in ts}
        taken = {f for t, f in self.found.items() if t not in mine}
        for a, b in self._classes(ts, [f for f in fs if f.path not in taken]):
            chosen = self._assigned(a, b, positions)
            for t in a:
                self.found.pop(t.path, None)
            self.found |= chosen

    def _classes(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> list[tuple[list[Layer], list[Layer]]]:
        """The layers that could stand for each other, class by class."""
        groups: list[tuple[set[_Look], set[_Look]]] = []
        for look in dict.fromkeys(self.looks[0][t.path] for t in ts):
            t = next(t for t in ts if self.looks[0][t.path] == look)
            like_it = {self.looks[1][f.path] for f in fs if self.fit(t, f) is not None}
            touched = [group for group in groups if group[1] & like_it]
            groups = [group for group in groups if group not in touched]
            groups.append(({look}.union(*(g[0] for g in touched)), like_it.union(*(g[1] for g in touched))))
        return [
            ([t for t in ts if self.looks[0][t.path] in a], [f for f in fs if self.looks[1][f.path] in b])
            for a, b in groups
            if b
        ]

    def _assigned(self, ts: Sequence[Layer], fs: Sequence[Layer], positions: tuple[dict, dict]) -> Partners:
        from scipy.optimize import linear_sum_assignment

        worth = self._said(ts, fs) - BY_ORDER * _apart(ts, fs, positions)
        rows, columns = linear_sum_assignment(np.maximum(worth, FORBIDDEN), maximize=True)
        return {
            ts[i].path: fs[j].path
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            if worth[i, j] > FORBIDDEN
        }

    def by_order(self) -> list[list[str]]:
        """PyTorch's layers of which only the order says whose partner is whose, each group of them."""
        groups: list[list[str]] = []
        for is_called in True, False:
            ts = [x for x in self.torch.layers if x.path not in self.known and x.is_called == is_called]
            fs = [x for x in self.flax.layers if x.path not in self.known.values() and x.is_called == is_called]
            for mine, theirs in self._classes(ts, fs):
                groups += _joined(self._open(mine, theirs))
        return groups

    def _open(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> Iterator[tuple[str, str]]:
        """Pairs of PyTorch's layers that could as well have each other's partners."""
        at = {f.path: j for j, f in enumerate(fs)}
        partner = {i: at[self.found[t.path]] for i, t in enumerate(ts) if self.found.get(t.path) in at}
        if len(partner) < 2:
            return
        said = self._said(ts, fs)
        for (i, k), (j, m) in itertools.combinations(partner.items(), 2):
            change = said[i, m] + said[j, k] - said[i, k] - said[j, m]
            if change >= 0 and not self._is_counted((ts[i], ts[j]), (fs[k], fs[m])):
                yield ts[i].path, ts[j].path

    def _is_counted(self, ts: tuple[Layer, Layer], fs: tuple[Layer, Layer]) -> bool:
        """Whether names that differ in their numbers alone count both sides' layers in one order."""
        torch, flax = (names.comes_first(a.path, b.path) for a, b in (ts, fs))
        return torch is not None and torch == flax

    def _said(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> NDArray:
        """[torch][flax]: what all but the order says for each pair."""
        paths = [t.path for t in ts], [f.path for f in fs]
        said = np.array(names.alike(*paths)) + np.array([[self._worth(t, f) for f in fs] for t in ts])
        return said + BY_NAME * names.equal(*paths)

    def _worth(self, t: Layer, f: Layer) -> float:
        left = self.fit(t, f)
        if left is None:
            return -np.inf
        worth = BY_KIND * (t.kind == f.kind) + LEFT * left
        feeders = self.found.get(self.feeders[0].get(t.path, "")), self.feeders[1].get(f.path)
        if None not in feeders:
            worth += BY_FEEDER if feeders[0] == feeders[1] else -BY_FEEDER
        return worth


def _joined(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups that pairs make, each as its members come."""
    groups: list[dict[str, None]] = []
    for pair in pairs:
        touched = [group for group in groups if group.keys() & {*pair}]
        groups = [group for group in groups if group not in touched]
        groups.append(dict.fromkeys([*itertools.chain(*touched), *pair]))
    return [[*group] for group in groups]


def _apart(ts: Sequence[Layer], fs: Sequence[Layer], positions: tuple[dict, dict]) -> NDArray:
    """[torch][flax], 0 to 1: how far apart they stand, squared, so that what is equal else keeps its order."""
    if len(ts) == len(fs):
        a = b = np.arange(len(ts), dtype=float)
    else:
        a, b = np.array([positions[0][t.path] for t in ts]), np.array([positions[1][f.path] for f in fs])
    apart = np.square(a[:, None] - b[None])
    return apart / max(float(apart.max(initial=0.0)), 1.0)


OPTIONS = kinds.IN_OUT, kinds.OUT_IN, "transpose_kernel"
"""What a layer's config says of its tensors that their shapes do not."""

_Look = tuple[str, Any, tuple[tuple[str, Shape], ...]]
"""Kind, what the shapes do not say, and the shapes of a layer: layers of one look fit the same partners."""


def _look_of(layer: Layer, structure: Structure) -> _Look:
    options = tuple((name, layer.config[name]) for name in OPTIONS if name in layer.config)
    return layer.kind, options, tuple(shapes_of(layer, structure).items())


def _fit(torch: _Look, flax: _Look) -> int | None:
    (torch_kind, torch_options, torch_shapes), (flax_kind, flax_options, flax_shapes) = torch, flax
    if not kinds.like(torch_kind, flax_kind):
        return None
    options = dict((*torch_options, *flax_options))
    paired = rules.pair_tensors(kinds.common(torch_kind, flax_kind), dict(torch_shapes), dict(flax_shapes), options)
    fits = bool(paired.pairs) and all(pair.fits for pair in paired.pairs)
    return len(paired.torch_left) + len(paired.flax_left) if fits else None


def in_order(worth: NDArray) -> list[tuple[int, int]]:
    """The pairs (row, column) of the alignment of largest worth that keeps both orders (Needleman and Wunsch 1970)."""
    rows, columns = worth.shape
    best = np.zeros((rows + 1, columns + 1))
    best[:, 0], best[0, :] = ALONE * np.arange(rows + 1), ALONE * np.arange(columns + 1)
    for i in range(rows):
        for j in range(columns):
            best[i + 1, j + 1] = max(best[i, j] + worth[i, j], best[i, j + 1] + ALONE, best[i + 1, j] + ALONE)
    pairs: list[tuple[int, int]] = []
    i, j = rows, columns
    while i and j:
        if np.isfinite(worth[i - 1, j - 1]) and best[i, j] == best[i - 1, j - 1] + worth[i - 1, j - 1]:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
        elif best[i, j] == best[i - 1, j] + ALONE:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def feeders_of(structure: Structure) -> Mapping[str, str]:
    """Path of a layer -> of the one whose output it takes: as a run has shown; else, of a norm, the one before it."""
    if structure.feeders is not None:
        return structure.feeders
    if not structure.ordered:
        return {}
    called = [layer for layer in structure.layers if layer.is_called]
    pairs = itertools.pairwise(called)
    return {b.path: a.path for a, b in pairs if b.kind == "batch_norm" and not is_norm(a, structure)}


def is_norm(layer: Layer, structure: Structure) -> bool:
    """A norm, by its kind or because all that it has is a value or two per channel."""
    return layer.kind in kinds.NORMS or (
        layer.kind == kinds.OTHER and all(len(shape) == 1 for shape in shapes_of(layer, structure).values())
    )


def shapes_of(layer: Layer, structure: Structure) -> dict[str, Shape]:
    """The shapes of a layer's tensors by their local names."""
    return {local: tuple(structure.shapes[full]) for local, full in layer.tensors.items()}
