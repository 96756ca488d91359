"""A norm before a branch and its sum on one side, and behind the sum on the other: pre-norm against post-norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.family import SIDES
from parity.diagnosis.finding import Finding, Located
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.recording import NETWORK, Recording

Array = NDArray[Any]
Key = tuple[str, int]


class _Moved(NamedTuple):
    """A norm that one side has before a branch, and the other behind its sum.

    Attributes:
      norm, first, last: PyTorch's keys of the norm and of the branch's first and last layer.
      before: the side with the norm before the branch.
      pairs: what this makes of a place: (the value on that side, the value on the other).
    """

    norm: Key
    first: Key
    last: Key
    before: int
    pairs: list[tuple[Array, Array]]


class NormPosition:
    """Makes one finding of each such norm, in the place of what follows from it.

    With x the sum that has come so far, n the norm and f the branch between its first and its last layer:

        before: x + f(n(x))         behind: n(x + f(x))

    Both sides are given the same outputs of all layers, so that each of these sums is seen in the numbers.
    """

    def __init__(self, translation: Translation, forced: Recording, tolerance: Callable[[Key, str], float]) -> None:
        self.translation, self.tolerance = translation, tolerance
        pairs = translation.pair_of
        calls = [call for call in translation.torch.calls if call.path in pairs]
        mine = {call.key: call for call in forced.calls}
        self.outputs = {call.key: translation.output(call) for call in calls}
        self.inputs: list[dict[Key, Array]] = [{}, {}]
        torch_key: dict[Key, Key] = {}
        for call in calls:
            flax = mine.get((pairs[call.path].flax.path, call.index))
            if call.inputs and flax is not None and flax.arrived and call.inputs[0].dtype.kind == "f":
                torch_key[flax.key] = call.key
                self.inputs[0][call.key] = translation.input(call, 0)
                self.inputs[1][call.key] = flax.arrived[0]
        self.orders = [
            [call.key for call in calls if call.key in self.inputs[0]],
            [torch_key[call.key] for call in forced.calls if call.key in torch_key],
        ]
        self.results = [
            (translation.result(i, output), output)
            for i, output in enumerate(forced.outputs[: len(translation.torch.outputs)])
        ]

    def findings(self, found: list[Located]) -> list[Located]:
        """What was found, with the norms that stand elsewhere in the place of what follows from that."""
        moved = list(self._moved({f.key for f in found if f.finding.code == "unexplained"}))
        if not moved:
            return found
        found = [f for f in found if not (f.finding.code == "unexplained" and self._follows(f.key, moved))]
        order = [call.key for call in self.translation.torch.calls]
        for one in moved:
            names = SIDES[one.before], SIDES[1 - one.before]
            branch = one.first[0] if one.first == one.last else f"{one.first[0]} to {one.last[0]}"
            text = (
                f"{names[0]} normalises by {one.norm[0]} what goes into {branch} (pre-norm), {names[1]} the sum behind "
                "it (post-norm)"
            )
            flax_layer = self.translation.pair_of[one.norm[0]].flax.path
            place = order.index(one.norm) - 0.5
            found.append(Located("forward", place, one.norm[0], flax_layer, Finding("norm-position", text), one.norm))
        return found

    def _moved(self, unexplained: set[Key]) -> Iterator[_Moved]:
        for norm in self.orders[0]:
            kind = self.translation.pair_of[norm[0]].kind
            if kind in kinds.NORMS and kind != "batch_norm" and norm in unexplained:
                yield from (one for before in (0, 1) if (one := self._position(norm, before)) is not None)

    def _position(self, norm: Key, before: int) -> _Moved | None:
        """The norm, if that side has it before a branch, and the other behind the branch's sum."""
        one, other = self.inputs[before], self.inputs[1 - before]
        order, second = self.orders[before], self.orders[1 - before]
        n, place = self.outputs[norm], second.index(norm)
        first = next((key for key in order[order.index(norm) + 1 :] if self._same(one[key], n, key)), None)
        if first is None or place == 0 or second.index(first) >= place:
            return None
        last = second[place - 1]
        start, f = other[first], self.outputs[last]
        if start.shape != f.shape or not self._same(other[norm], start + f, norm) or self._same(start, n, norm):
            return None
        pairs = [(n, start), (one[norm], start + f), (one[norm] + f, n)] if one[norm].shape == f.shape else []
        return _Moved(norm, first, last, before, pairs)

    def _same(self, a: Array, b: Array, key: Key) -> bool:
        if a.shape != b.shape:
            return False
        largest = float(np.abs(b).max(initial=0.0))
        return bool(np.abs(a - b).max(initial=0.0) <= self.tolerance(key, "input") * largest)

    def _follows(self, key: Key, moved: Sequence[_Moved]) -> bool:
        """Whether what arrives there on both sides is what one of these norms makes of it."""
        places = self.results if key == NETWORK else [(self.inputs[0][key], self.inputs[1][key])] if (
            key in self.inputs[0]) else []  # fmt: skip
        return any(
            self._same(place[one.before], a, key) and self._same(place[1 - one.before], b, key)
            for place in places
            for one in moved
            for a, b in one.pairs
        )
