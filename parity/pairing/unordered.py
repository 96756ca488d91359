"""Partners where Flax's order is unknown, as JAX has sorted the variables by name: among those that fit, by names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from parity.pairing.alignment import Alignment, Partners, is_norm
from parity.pairing.names import similarity
from parity.records.recording import Layer
from parity.records.structure import natural

CLEARLY = 0.05
"""How much more alike the names of partners are than those of another choice: less is chance, and a lost order."""


class ByNames(Alignment):
    """The layers that fit each other in all their tensors, by their names."""

    def run(self) -> Partners:
        """First what has a matrix or a kernel, then norms, which go with the layers around them.

        Raises:
          ValueError: layers that only an order could tell apart.
        """
        for is_called in True, False:
            for norms in False, True:
                taken = set(self.found.values())
                t = [x for x in self.torch.layers if x.path not in self.found and x.is_called == is_called]
                f = [x for x in self.flax.layers if x.path not in taken and x.is_called == is_called]
                self._by_names(
                    [x for x in t if is_norm(x, self.torch) == norms], [x for x in f if is_norm(x, self.flax) == norms]
                )
        return self.found

    def _is_counted(self, ts: tuple[Layer, Layer], fs: tuple[Layer, Layer]) -> bool:
        """Of other families the names have been clear; norms go with the layers that feed them."""
        feeders = [self.found.get(self.feeders[0].get(t.path, "")) for t in ts]
        goes_with = None not in feeders and feeders[0] != feeders[1]
        return _family(fs[0].path) != _family(fs[1].path) or goes_with or super()._is_counted(ts, fs)

    def complete(self, t: Layer, f: Layer) -> bool:
        """Whether every tensor has its place on the other side."""
        return self.fit(t, f) == 0

    def _by_names(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> None:
        """Partners where Flax's order is unknown: among those that fit, by names."""
        left = list(ts)
        while left:
            fitting = [f for f in fs if self.complete(left[0], f)]
            group = [t for t in left if any(self.complete(t, f) for f in fitting)]
            left = [t for t in left if t not in group] if fitting else left[1:]
            if fitting:
                self.found |= self._assigned_by_names(group, [f for f in fs if any(self.complete(t, f) for t in group)])

    def _assigned_by_names(self, ts: Sequence[Layer], fs: Sequence[Layer]) -> Partners:
        from scipy.optimize import linear_sum_assignment

        feeders = self.feeders[0]
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
        alike += np.array([[-1.0 + self.complete(t, f) for f in fs] for t in ts]) * 100
        place = np.array([[-abs(i / len(ts) - j / len(fs)) for j in range(len(fs))] for i in range(len(ts))])
        rows, columns = linear_sum_assignment(-(alike + 1e-3 * place))
        chosen = {i: j for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if self.complete(ts[i], fs[j])}
        for i, j in chosen.items():
            for k, m in chosen.items():
                same = _family(fs[j].path) == _family(fs[m].path)
                if i < k and not same and alike[i, j] + alike[k, m] - alike[i, m] - alike[k, j] <= CLEARLY:
                    raise ValueError(
                        f"the variables {fs[j].path} and {fs[m].path} are in alphabetical order, and either fits "
                        f"{ts[i].path} and {ts[k].path}; allowed: flax_module=..., which knows the order, or "
                        "layer_map=..."
                    )
        self._in_order_of_numbers(chosen, fs, [i for i in chosen if siblings[i] is None])
        return {ts[i].path: fs[j].path for i, j in chosen.items()}

    def _blocks(self, t: Layer) -> list[str]:
        """Flax's blocks of the layers before and after a norm, as far as their partners are known."""
        if not is_norm(t, self.torch) or not t.is_called:
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


def _family(path: str) -> str:
    return re.sub(r"\d+", "#", path)
