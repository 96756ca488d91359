"""Which layers that look alike are partners, where neither names nor the order of calls need say it: the numbers do.

Both networks are run with the same random weights. Where they part, either a layer of Flax's was given what another
layer of PyTorch's was given, or layers that are given the same (branches) stand for each other in the wrong order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parity.pairing import names
from parity.pairing.agreement import AGREES, CLEARLY, distance
from parity.pairing.alignment import OPTIONS
from parity.pairing.pairs import LayerPair, Pairing
from parity.records.distance import error_of
from parity.records.recording import Call, Recording

Partners = Mapping[str, str]
"""PyTorch's path -> Flax's."""

Order = tuple[int, ...]
"""Of the members of a group: whose partner each gets."""

SAME = 1e-4
"""Of the largest value: random numbers that are so near each other are the same."""
MOST_RUNS, PATIENCE = 200, 60
"""How many assignments are tried, and how many after the last that came further."""
MOST_TOLD = 4


def with_partners(pairing: Pairing, partners: Partners) -> Pairing:
    """The same layers, those that look alike paired otherwise."""
    flax = {pair.flax.path: pair.flax for pair in pairing.layers}
    found = pairing.copy()
    found.layers = [replace(pair, flax=flax[partners[pair.torch.path]]) for pair in found.layers]
    return found


def partners_of(pairing: Pairing) -> dict[str, str]:
    """The partners of a pairing."""
    return {pair.torch.path: pair.flax.path for pair in pairing.layers}


class Choices:
    """Which layers may change partners: they look alike on both sides, and nothing says which is which.

    What is called in one order on both sides and counted so is said. Numbers that stand for themselves (blocks.0) may
    count another way on one side; a name (key, conv1) that both sides have is its layer's name, whatever is called
    first.

    Args:
      pairing: as names, feeders and order have it.
      torch: PyTorch's paths, in the order of calls.
      flax: Flax's, likewise.
      fixed: PyTorch's paths that stay with their partners, as the user's map has them.
    """

    def __init__(self, pairing: Pairing, torch: Sequence[str], flax: Sequence[str], fixed: Container[str] = ()) -> None:
        self.at = {path: i for i, path in enumerate(torch)}, {path: i for i, path in enumerate(flax)}
        looks: dict[object, list[LayerPair]] = {}
        for pair in pairing.layers:
            is_whole = not pair.torch_left and not pair.flax_left and all(t.fits for t in pair.tensors)
            if is_whole and pair.torch.path not in fixed:
                looks.setdefault(_look(pair, pairing), []).append(pair)
        self.classes = [self._in_order(pairs) for pairs in looks.values() if len(pairs) > 1]
        self.class_of = {t: ts for ts, _ in self.classes for t in ts}
        self.said: dict[tuple[str, str], tuple[float, float]] = {}
        for ts, fs in self.classes:
            words, all_ = names.alike(ts, fs, numbers=False), names.alike(ts, fs)
            for i, j in itertools.product(range(len(ts)), range(len(fs))):
                self.said[ts[i], fs[j]] = words[i][j], all_[i][j]

    def _in_order(self, pairs: Sequence[LayerPair]) -> tuple[list[str], list[str]]:
        paths = [pair.torch.path for pair in pairs], [pair.flax.path for pair in pairs]
        torch, flax = (sorted(mine, key=lambda p: at.get(p, len(at))) for mine, at in zip(paths, self.at, strict=True))
        return torch, flax

    def any(self, partners: Partners) -> bool:
        """Whether any two may change partners."""
        return any(self.may(a, b, partners) for ts, _ in self.classes for a, b in itertools.combinations(ts, 2))

    def may(self, a: str, b: str, partners: Partners) -> bool:
        """Whether these two may change partners."""
        if b not in self.class_of.get(a, ()):
            return False
        f, g = partners[a], partners[b]
        now, then = (self.said[a, f], self.said[b, g]), (self.said[a, g], self.said[b, f])
        words, counted = (sum(x[i] for x in then) - sum(x[i] for x in now) for i in (0, 1))
        if words < 0:
            return False
        if counted >= 0:
            return True
        named = names.words_of(a) == names.words_of(f) and names.words_of(b) == names.words_of(g)
        return self._crossed(a, b, f, g) and not (named and names.uncounted(a) != names.uncounted(b))

    def _crossed(self, a: str, b: str, f: str, g: str) -> bool:
        """Whether the sides call these in another order."""
        torch, flax = self.at
        return not {a, b} - torch.keys() and not {f, g} - flax.keys() and (torch[a] < torch[b]) != (flax[f] < flax[g])


def _look(pair: LayerPair, pairing: Pairing) -> object:
    """What layers that may stand for each other have in common."""
    sides = zip((pair.torch, pair.flax), pairing.shapes, strict=True)
    return tuple(
        (
            layer.kind,
            tuple((local, tuple(shapes[full])) for local, full in layer.tensors.items()),
            tuple((name, layer.config[name]) for name in OPTIONS if name in layer.config),
        )
        for layer, shapes in sides
    )


class State(NamedTuple):
    """One assignment, tried.

    Attributes:
      partners: it.
      far: how far apart the outputs are.
      agree: how many of Flax's calls agree with their partners before the first that does not.
      parted: that call; None if all agree.
      flax: Flax's paths, in the order of calls.
    """

    partners: dict[str, str]
    far: float
    agree: int
    parted: Call | None
    flax: list[str]


class Search:
    """Looks for the assignment with which both networks agree.

    Args:
      pairing: as names, feeders and order have it.
      torch: PyTorch's run.
      run: Flax's with the weights of this run, carried as a pairing says.
      fixed: see `Choices`.
    """

    def __init__(
        self, pairing: Pairing, torch: Recording, run: Callable[[Pairing], Recording], fixed: Container[str] = ()
    ) -> None:
        self.pairing, self.torch, self._run, self.fixed = pairing, torch, run, fixed
        self.calls = {call.key: call for call in torch.calls}
        self.order = list(dict.fromkeys(call.path for call in torch.calls))
        self.runs = 0

    @cached_property
    def first(self) -> State:
        """As names, feeders and order have it."""
        return self._tried(partners_of(self.pairing))

    @cached_property
    def choices(self) -> Choices:
        """What may be exchanged."""
        return Choices(self.pairing, self.order, self.first.flax, self.fixed)

    def may_help(self) -> bool:
        """Whether, as they are paired now, an exchange may be why both part."""
        return self._swap(self.first) is not None or any(self.branches(self.first))

    def found(self) -> State | None:
        """The assignment with which both agree, or with which they are clearly closer; None if there is none."""
        best, pattern = self._followed(self.first), None
        while best.far > AGREES and (better := self._better(best, pattern)) is not None:
            best, pattern = better
        return best if best.far <= max(AGREES, CLEARLY * min(self.first.far, 1.0)) else None

    def _better(self, state: State, pattern: Order | None) -> tuple[State, Order] | None:
        """One with which more calls agree, and how branches were exchanged for it."""
        most = min(self.runs + PATIENCE, MOST_RUNS)
        for changed, how in self._changes(state, pattern):
            if self.runs > most:
                return None
            tried = self._followed(self._tried(changed))
            if tried.far <= AGREES or tried.agree > state.agree:
                return tried, how
        return None

    def branches(self, state: State) -> Iterator[list[str]]:
        """PyTorch's layers that are given the same, look alike, and of which nothing says which is which."""
        for ts, _ in self.choices.classes:
            groups: list[list[str]] = []
            for t in ts:
                group = next((g for g in groups if self._given_the_same(g[0], t)), None)
                if group is None:
                    groups.append([t])
                else:
                    group.append(t)
            for group in groups:
                free = [t for t in group if any(self.choices.may(t, u, state.partners) for u in group if u != t)]
                if free:
                    yield free

    def _given_the_same(self, a: str, b: str) -> bool:
        first, second = self.calls.get((a, 0)), self.calls.get((b, 0))
        if first is None or second is None:
            return first is second  # bare parameters
        return self._same(first, second)

    def _tried(self, partners: dict[str, str]) -> State:
        self.runs += 1
        return self._read(self._run(with_partners(self.pairing, partners)), partners)

    def _read(self, flax: Recording, partners: dict[str, str]) -> State:
        far = distance(self.torch, flax)
        back = {f: t for t, f in partners.items()}
        order = list(dict.fromkeys(call.path for call in flax.calls))
        for i, call in enumerate(flax.calls):
            mine = self.calls.get((back.get(call.path, ""), call.index))
            if mine is not None and not self._same(mine, call):
                return State(partners, far, i, call, order)
        return State(partners, far, len(flax.calls) + (far <= AGREES), None, order)

    @staticmethod
    def _same(a: Call, b: Call) -> bool:
        """Whether both were given the same numbers, whatever the order of the axes."""
        both = [(x, y) for x, y in zip(a.inputs, b.inputs, strict=False) if x.dtype.kind == y.dtype.kind == "f"]
        return all(error_of(np.sort(y, axis=None), np.sort(x, axis=None)) <= SAME for x, y in both)

    def _followed(self, state: State) -> State:
        """Layer by layer, each with the partner that was given what it was given."""
        while state.far > AGREES and self.runs <= MOST_RUNS:
            pair = self._swap(state)
            if pair is None:
                break
            for with_blocks in True, False:
                tried = self._tried(self._exchanged(state.partners, *pair, with_blocks=with_blocks))
                if tried.agree > state.agree or tried.far <= AGREES:
                    break
            else:
                break
            state = tried
        return state

    def _swap(self, state: State) -> tuple[str, str] | None:
        """The partner of the first call that differs, and the layer that was given what it was given."""
        call = state.parted
        if call is None:
            return None
        mine = next(t for t, f in state.partners.items() if f == call.path)
        done = set(state.flax[: state.flax.index(call.path)])
        for other in self.choices.class_of.get(mine, ()):
            given = self.calls.get((other, call.index))
            is_free = other != mine and state.partners[other] not in done
            if (
                is_free
                and given is not None
                and self._same(given, call)
                and self.choices.may(mine, other, state.partners)
            ):
                return mine, other
        return None

    def _exchanged(self, partners: Partners, a: str, b: str, *, with_blocks: bool) -> dict[str, str]:
        """These two exchanged; and, where one number tells their blocks apart, what else is in these."""
        found = {**partners, a: partners[b], b: partners[a]}
        first, second = a.split("."), b.split(".")
        differ = [i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y]
        if not with_blocks or len(first) != len(second) or len(differ) != 1:
            return found
        one, other = first[: differ[0] + 1], second[: differ[0] + 1]
        for t in partners:
            segments = t.split(".")
            twin = ".".join([*other, *segments[len(one) :]])
            if segments[: len(one)] == one and t != a and self.choices.may(t, twin, partners):
                found |= {t: partners[twin], twin: partners[t]}
        return found

    def _changes(self, state: State, pattern: Order | None) -> Iterator[tuple[dict[str, str], Order]]:
        """Branches exchanged, the nearest before the first call that differs first; then two groups of them at once."""
        at = {f: i for i, f in enumerate(state.flax)}
        end = at[state.parted.path] if state.parted is not None else len(at)

        def place(group: Sequence[str]) -> int:
            return min(at.get(state.partners[t], -1) for t in group)

        groups = sorted((g for g in self.branches(state) if place(g) < end), key=place, reverse=True)
        every = [list(self._orders(group, state.partners, pattern)) for group in groups]
        for orders in every:
            yield from (({**state.partners, **changed}, how) for changed, how in orders)
        for first, second in itertools.combinations(every, 2):
            for (a, how), (b, _) in itertools.product(first, second):
                yield {**state.partners, **a, **b}, how

    def _orders(
        self, group: Sequence[str], partners: Partners, pattern: Order | None
    ) -> Iterator[tuple[dict[str, str], Order]]:
        """The other orders of a group's partners: the one that was right elsewhere, reversed, then all others."""
        usual = tuple(range(len(group)))
        likely = [p for p in (pattern, usual[::-1]) if p is not None and len(p) == len(usual)]
        orders = itertools.chain(likely, itertools.islice(itertools.permutations(usual), PATIENCE))
        for order in dict.fromkeys(orders):
            moved = [i for i in usual if order[i] != i]
            if moved and all(
                self.choices.may(group[i], group[j], partners) for i, j in itertools.combinations(moved, 2)
            ):
                yield {group[i]: partners[group[order[i]]] for i in moved}, order


def told(search: Search, found: State | None) -> list[str]:
    """In words: what is paired by what it computes, or what nothing says and the numbers do not show."""
    first = search.first
    if found is None:
        open_ = list(search.branches(first))
        if not open_:
            return []
        return [
            f"with random weights the outputs differ by {first.far:.1g}, and only the order of calls says which is "
            f"which of {_groups(open_, first.partners)}; layer_map tells"
        ]
    moved = [f"{t} is {f}" for t, f in found.partners.items() if first.partners[t] != f]
    if not moved:
        return []
    so = "agree" if found.far <= AGREES else f"differ by {found.far:.1g}"
    return [
        f"paired by what they compute, and not by names and the order of calls: {', '.join(moved[:MOST_TOLD])}"
        f"{_more(moved)}: else the outputs differ by {first.far:.1g} with random weights, and so they {so}"
    ]


def told_by_order(pairing: Pairing) -> list[str]:
    """In words: which layers nothing but their order pairs, where no numbers of both modules were looked at."""
    if not pairing.by_order:
        return []
    groups = _groups(pairing.by_order, partners_of(pairing))
    return [f"only their order says which is which of {groups}; both modules, which are then run, or layer_map tell"]


def _groups(groups: Sequence[Sequence[str]], partners: Partners) -> str:
    """PyTorch's layers of each group, and their partners."""
    told = (f"{', '.join(g)} to {', '.join(partners[t] for t in g)}" for g in groups[:MOST_TOLD])
    return "; ".join(told) + _more(groups)


def _more(every: Sequence[object]) -> str:
    return f" and {len(every) - MOST_TOLD} more" if len(every) > MOST_TOLD else ""
