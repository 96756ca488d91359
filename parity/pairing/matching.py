"""Which tensor goes where between two structures, whatever the order in which either side has its layers.

Layers with a matrix or a kernel are aligned by order and shapes. Norms, which look alike all through a network, go
with the layer that feeds them; those that nothing feeds directly keep their order among each other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from parity.pairing import layers, rules
from parity.pairing.layers import LayerPair, Pairing
from parity.records import kinds
from parity.records.kinds import Shape
from parity.records.recording import Layer
from parity.records.structure import Flattened, Structure, natural

# Words that mean the same in names of layers.
WORDS = {"bn": "norm", "batchnorm": "norm", "layernorm": "norm", "ln": "norm", "groupnorm": "norm", "dense": "linear"}
WORDS |= {"fc": "linear", "embed": "embedding", "emb": "embedding", "q": "query", "k": "key", "v": "value"}

Partners = dict[str, str]
"""PyTorch's path -> Flax's."""


def match(torch: Structure, flax: Structure, layer_map: Mapping[str, str] | None = None) -> Pairing:
    """Pair the layers and tensors of two structures.

    Raises:
      ValueError: a name in layer_map that is no layer; layers that only an order could tell apart, and there is none.
    """
    shapes = torch.shapes, flax.shapes
    found = layers.pair_layers(torch.layers, flax.layers, shapes, partners(torch, flax, layer_map))
    _complete(found, torch, flax)
    for pair in found.layers:
        _reorder_behind_flatten(pair, torch, flax)
    return found


def partners(torch: Structure, flax: Structure, known: Mapping[str, str] | None = None) -> Partners:
    """The layers that fit each other in all their tensors.

    Args:
      torch: PyTorch's layers, in order.
      flax: Flax's; where their order means nothing, their names decide.
      known: partners that are given.

    Raises:
      ValueError: layers that only an order could tell apart, and there is none.
    """
    return _Matching(torch, flax, dict(known or {})).run()


class _Matching:
    def __init__(self, torch: Structure, flax: Structure, found: Partners) -> None:
        self.torch, self.flax, self.found = torch, flax, found
        self.cache: dict[tuple, bool] = {}
        # The order of execution is the same on both sides; that of definition may be another.
        self.executed = torch.feeders is not None and flax.feeders is not None

    def run(self) -> Partners:
        for is_called in True, False:
            for is_norm in False, True:
                if is_norm:
                    self._norms_behind(is_called)
                t, f = self._free(is_called, is_norm)
                if self.flax.ordered:
                    if not self.executed:
                        self.found |= self._counted(t, f)
                        t, f = self._free(is_called, is_norm)
                    self.found |= self._aligned(t, f)
                    self.found |= self._elsewhere(*self._free(is_called, is_norm))
                else:
                    self._by_names(t, f)
        return self.found

    def _free(self, is_called: bool, is_norm: bool) -> tuple[list[Layer], list[Layer]]:
        taken = set(self.found.values())
        t = [x for x in self.torch.layers if x.path not in self.found and x.is_called == is_called]
        f = [x for x in self.flax.layers if x.path not in taken and x.is_called == is_called]
        return [x for x in t if _is_norm(x, self.torch) == is_norm], [x for x in f if _is_norm(x, self.flax) == is_norm]

    def fits(self, t: Layer, f: Layer) -> bool:
        """Whether they can be partners: like kinds, and every tensor has its place."""
        a, b = _shapes(t, self.torch), _shapes(f, self.flax)
        options = f.config.get("transpose_kernel")
        key = (t.kind, f.kind, options, tuple(a.items()), tuple(b.items()))
        if key not in self.cache:
            self.cache[key] = _fits(t, f, self.torch, self.flax)
        return self.cache[key]

    def _aligned(self, t: Sequence[Layer], f: Sequence[Layer]) -> Partners:
        """The longest common subsequence of what fits; among equals the one of the most similar names."""
        rows, columns = len(t), len(f)
        worth = np.array([[self._worth(x, y) for y in f] for x in t]).reshape(rows, columns)
        best = np.zeros((rows + 1, columns + 1))
        for i in range(rows):
            for j in range(columns):
                best[i + 1, j + 1] = max(best[i, j] + worth[i, j], best[i, j + 1], best[i + 1, j])
        found: Partners = {}
        i, j = rows, columns
        while i and j:
            if worth[i - 1, j - 1] > 0 and best[i, j] == best[i - 1, j - 1] + worth[i - 1, j - 1]:
                found[t[i - 1].path] = f[j - 1].path
                i, j = i - 1, j - 1
            elif best[i, j] == best[i - 1, j]:
                i -= 1
            else:
                j -= 1
        return found

    def _worth(self, t: Layer, f: Layer) -> float:
        if not self.fits(t, f):
            return 0.0
        return (1.0 if t.kind == f.kind or "other" in (t.kind, f.kind) else 0.5) + 1e-3 * similarity(t.path, f.path)

    def _elsewhere(self, t: Sequence[Layer], f: Sequence[Layer]) -> Partners:
        """What fits but comes in another order: as many as there are, in their own order; else by names."""
        found = self._counted(t, f)
        every = [
            (similarity(x.path, y.path), -i, -j) for i, x in enumerate(t) for j, y in enumerate(f) if self.fits(x, y)
        ]
        for _, i, j in sorted(every, reverse=True):
            if t[-i].path not in found and f[-j].path not in found.values():
                found[t[-i].path] = f[-j].path
        return found

    def _counted(self, t: Sequence[Layer], f: Sequence[Layer]) -> Partners:
        """Layers that fit the same ones, if there are as many on both sides: the first to the first, and so on."""
        found: Partners = {}
        for x in t:
            fitting = [y for y in f if self.fits(x, y)]
            group = [z for z in t if fitting and self.fits(z, fitting[0])]
            if x in group and len(group) == len(fitting):
                path = fitting[group.index(x)].path
                if path not in found.values():
                    found[x.path] = path
        return found

    def _norms_behind(self, is_called: bool) -> None:
        """Norms that take the output of partners are partners."""
        t_free, f_free = self._free(is_called, is_norm=True)
        t_feeders, f_feeders = _feeders(self.torch), _feeders(self.flax)
        supposed = self.torch.feeders is None and self.flax.feeders is None
        fed = {f_feeders[f.path]: f for f in f_free if f.path in f_feeders}
        for t in t_free:
            f = fed.get(self.found.get(t_feeders.get(t.path, ""), ""))
            if f is None or f.path in self.found.values() or not self.fits(t, f):
                continue
            if not supposed or "batch_norm" in (t.kind, f.kind):
                self.found[t.path] = f.path

    def _by_names(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> None:
        """Partners where Flax's order is unknown: among those that fit, by names."""
        left = list(ts)
        while left:
            fitting = [f for f in fs if self.fits(left[0], f)]
            group = [t for t in left if any(self.fits(t, f) for f in fitting)]
            left = [t for t in left if t not in group] if fitting else left[1:]
            if fitting:
                self.found |= self._assigned(group, [f for f in fs if any(self.fits(t, f) for t in group)])

    def _assigned(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> Partners:
        from scipy.optimize import linear_sum_assignment

        feeders = _feeders(self.torch)
        siblings = [self.found.get(feeders.get(t.path, "")) for t in ts]
        known = [natural(sibling) for sibling in siblings if sibling is not None]
        # Of one family, such as Conv_0, Conv_1, the numbers are the order, unless the layers before them are not in it.
        if len({_family(f.path) for f in fs}) == 1 and len(ts) == len(fs) and known == sorted(known):
            return {t.path: f.path for t, f in zip(ts, fs, strict=True)}
        blocks = [self._blocks(t) for t in ts]
        alike = np.array(
            [
                [
                    similarity(t.path, f.path)
                    + sum(block == f.path.rpartition("/")[0] for block in around)
                    + (0.0 if sibling is None else _beside(sibling, f.path))
                    for f in fs
                ]
                for t, sibling, around in zip(ts, siblings, blocks, strict=True)
            ]
        )
        alike += np.array([[-1.0 + self.fits(t, f) for f in fs] for t in ts]) * 100
        place = np.array([[-abs(i / len(ts) - j / len(fs)) for j in range(len(fs))] for i in range(len(ts))])
        rows, columns = linear_sum_assignment(-(alike + 1e-3 * place))
        chosen = {i: j for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if self.fits(ts[i], fs[j])}
        for i, j in chosen.items():
            for k, m in chosen.items():
                same = _family(fs[j].path) == _family(fs[m].path)
                if i < k and not same and alike[i, j] + alike[k, m] - alike[i, m] - alike[k, j] <= 1e-6:
                    raise ValueError(
                        f"the variables {fs[j].path} and {fs[m].path} are in alphabetical order, and either fits "
                        f"{ts[i].path} and {ts[k].path}; allowed: flax_module=..., which knows the order, or "
                        "layer_map=..."
                    )
        self._in_order_of_numbers(chosen, fs, [i for i in chosen if siblings[i] is None])
        return {ts[i].path: fs[j].path for i, j in chosen.items()}

    def _blocks(self, t: Layer) -> list[str]:
        """Flax's blocks of the layers before and after a norm, as far as their partners are known."""
        if not _is_norm(t, self.torch) or not t.is_called:
            return []
        i = self.torch.layers.index(t)
        around = self.torch.layers[:i][::-1], self.torch.layers[i + 1 :]
        nearest = [next((self.found[x.path] for x in side if x.path in self.found), None) for side in around]
        return [path.rpartition("/")[0] for path in nearest if path is not None]

    @staticmethod
    def _in_order_of_numbers(chosen: dict[int, int], fs: Sequence[Layer], free: Sequence[int]) -> None:
        """Among layers of one family the numbers decide, and not whether they count from 0 or from 1."""
        families: dict[str, list[int]] = {}
        for i in sorted(free):
            families.setdefault(_family(fs[chosen[i]].path), []).append(i)
        for members in families.values():
            chosen.update(zip(members, sorted(chosen[i] for i in members), strict=True))


def _beside(sibling: str, path: str) -> float:
    """Whether a norm's name is that of the layer before it: in the same block, and called alike. Counts most."""
    parent, _, own = sibling.rpartition("/")
    other, _, name = path.rpartition("/")
    return 10.0 * (2.0 * (parent == other) + similarity(own, name))


def _feeders(structure: Structure) -> dict[str, str]:
    """Path of a norm -> of the layer it takes its input from: as a run has shown, else the one before it."""
    if structure.feeders is not None:
        return structure.feeders
    if not structure.ordered:
        return {}
    called = [layer for layer in structure.layers if layer.is_called]
    return {b.path: a.path for a, b in itertools.pairwise(called) if not _is_norm(a, structure)}


def _is_norm(layer: Layer, structure: Structure) -> bool:
    """A norm, by its kind or because all that it has is a value or two per channel."""
    return layer.kind in kinds.NORMS or (
        layer.kind == "other" and all(len(shape) == 1 for shape in _shapes(layer, structure).values())
    )


def _family(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def similarity(torch_path: str, flax_path: str) -> float:
    """How much two names of layers have in common, 0 to 1: mostly in words and numbers, then in letters."""
    a, b = _words(torch_path), _words(flax_path)
    by_words = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return 0.8 * by_words + 0.2 * SequenceMatcher(None, "/".join(a), "/".join(b), autojunk=False).ratio()


def _words(path: str) -> list[str]:
    path = re.sub(r"(Batch|Layer|Group)Norm", "Norm", path)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", path)
    return [WORDS.get(word.lower(), word.lower()) for word in words]


def _shapes(layer: Layer, structure: Structure) -> dict[str, Shape]:
    return {local: structure.shapes[full] for local, full in layer.tensors.items()}


def _pair(t: Layer, f: Layer, torch: Structure, flax: Structure) -> LayerPair:
    kind = t.kind if t.kind != "other" else f.kind
    found = rules.pair_tensors(kind, _shapes(t, torch), _shapes(f, flax), f.config)
    return LayerPair(t, f, list(found.pairs), list(found.torch_left), list(found.flax_left))


def _fits(t: Layer, f: Layer, torch: Structure, flax: Structure) -> bool:
    if not layers.like(t.kind, f.kind):
        return False
    pair = _pair(t, f, torch, flax)
    complete = not pair.torch_left and not pair.flax_left
    return complete and bool(pair.tensors) and all(tensor.fits for tensor in pair.tensors)


def _complete(found: Pairing, torch: Structure, flax: Structure) -> None:
    """Pair what is alone and stands in one place on both sides, though its shapes differ."""
    loose = {t for t, _, _ in found.loose}
    for t in list(found.torch_alone):
        if loose & set(t.tensors.values()):
            continue
        f = next((f for f in found.flax_alone if _in_one_place(t, f, found, torch, flax)), None)
        if f is not None:
            found.layers.append(_pair(t, f, torch, flax))
            found.torch_alone.remove(t)
            found.flax_alone.remove(f)


def _in_one_place(t: Layer, f: Layer, found: Pairing, torch: Structure, flax: Structure) -> bool:
    if not layers.like(t.kind, f.kind) or _ranks(t, torch) != _ranks(f, flax):
        return False
    partner = {pair.torch.path: pair.flax.path for pair in found.layers}
    before = [partner[x.path] for x in torch.layers[: torch.layers.index(t)] if x.path in partner]
    place = [x.path for x in flax.layers[: flax.layers.index(f)] if x.path in partner.values()]
    return set(before) == set(place)


def _ranks(layer: Layer, structure: Structure) -> list[int]:
    return sorted(len(structure.shapes[full]) for full in layer.tensors.values())


def _reorder_behind_flatten(pair: LayerPair, torch: Structure, flax: Structure) -> None:
    """Reorder the inputs of a layer that reads the same numbers in another order on the other side."""
    if pair.kind not in ("linear", *kinds.NORMS):
        return
    shape = flatten_shape(torch.flattened.get(pair.torch.path), flax.flattened.get(pair.flax.path))
    if shape is None:
        return
    size = shape[0] * shape[1]

    def reads_all(tensor: rules.TensorPair) -> bool:
        moved = torch.shapes[pair.torch.tensors[tensor.torch_name]]
        is_matrix = len(moved) == 2 and moved[1] == size and pair.kind == "linear"
        return tensor.fits and (is_matrix or (pair.kind != "linear" and moved == (size,)))

    pair.tensors = [rules.with_flatten(t, shape) if reads_all(t) else t for t in pair.tensors]


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
