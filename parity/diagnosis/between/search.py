"""The search for the chains that make a side's result."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between import activations, pools
from parity.diagnosis.between.activations import ACROSS_CHANNELS, ELEMENTWISE, FEWEST, FUNCTIONS, NAMES, error_of
from parity.diagnosis.between.chains import Chain, Match, Source, Target, alive, match, views
from parity.diagnosis.between.pools import Pool

Array = NDArray[Any]

# Of how many sources, the most recent and the network's input, all pairs and all triples are tried.
PAIRED, TRIPLED, PAIRED_WITH_POOL = 12, 7, 4
PARTS = ("the first half of ", "the second half of ", "the even channels of ", "the odd channels of ")


def search(sources: Sequence[Source], target: Target) -> list[Chain]:
    """All chains of the simplest kind that make the target, the preferred first.

    One source before a sum of two, a sum of two before one of three; functions without a parameter before those with
    one; no factor and no dropout before these. Where several chains agree on the numbers (ReLU and ReLU6 of values
    below 6) all are given.

    Args:
      sources: the most recent first.
      target: what the chain must give.

    Returns:
      Chains; [] if none is known that fits.
    """
    with np.errstate(all="ignore"):
        for hits in _stages(sources, target):
            if hits:
                return hits
    return []


def _stages(sources: Sequence[Source], target: Target) -> Iterator[list[Chain]]:
    near = _near(sources, PAIRED)
    pairs = list(itertools.combinations(range(len(near)), 2))
    # Without a pool a hypothesis costs next to nothing; with one, as much as there are geometries.
    for level in ("exact", "solved", "loose"):
        for source in sources:
            yield _fits(source.name, source.value, target, level, with_pool=False)
        if level == "exact":
            for place, source in enumerate(sources):
                if place < PAIRED_WITH_POOL or source.value.size != target.value.size:
                    yield _fits(source.name, source.value, target, level)
    for i, j in pairs:
        yield _pair(near[i], near[j], target, "exact", with_pool=False)
    for source in near:
        yield [hit for one, other in _halves(source, target) for hit in _gate(one, other, target)]
    for level in ("solved", "loose", "rare"):
        for source in sources[:PAIRED_WITH_POOL]:
            yield _fits(source.name, source.value, target, level)
    for level in ("exact", "loose", "solved"):
        for i, j in pairs:
            yield _pair(near[i], near[j], target, level, with_pool=j < PAIRED_WITH_POOL)
    for i, j in pairs:
        yield _concatenation(near[i], near[j], target) or _concatenation(near[j], near[i], target)
    for triple in itertools.combinations(_near(sources, TRIPLED), 3):
        if len({source.value.shape for source in triple}) == 1:
            name, value = " + ".join(source.name for source in triple), sum(source.value for source in triple)
            yield _fits(name, np.asarray(value), target, "exact", with_pool=False)


def _near(sources: Sequence[Source], count: int) -> list[Source]:
    return [*sources[: count - 1], *sources[count - 1 :][-1:]]


def _fits(name: str, u: Array, target: Target, level: str, with_pool: bool = True) -> list[Chain]:
    """Chains that start from u; `level` says how far they are looked for."""
    if u.ndim < 2 or u.size == 0 or target.value.ndim < 2 or len(u) != len(target.value):
        return []
    hits: list[tuple[Chain, float]] = []
    for layout, view in views(target.value, u.shape, rare=level == "rare"):
        chain = Chain(name, layout=layout)
        if level == "solved":
            found = activations.solved(u, view, target.limit, target.tolerance)
            hits += [(chain._replace(activation=one.name), 0.0) for one in found]
        elif level == "loose":
            hits += _loose(chain, u, view, target)
        else:
            hits += [(chain._replace(activation=one), 0.0) for one in activations.known(u, view, target.limit)]
    if not hits and with_pool:
        hits = pooled(name, u, target, level)
    return _most_plausible(hits)


def _most_plausible(hits: list[tuple[Chain, float]]) -> list[Chain]:
    """Of fits with dropout, those where as much is dropped as the factor says; none if there is a fit without."""
    if not hits:
        return []
    least = min(doubt for _, doubt in hits)
    return [chain for chain, doubt in hits if doubt <= least + 0.02]


def _loose(chain: Chain, u: Array, view: Array, target: Target) -> list[tuple[Chain, float]]:
    rows = activations.probe_rows(u)
    channels = u.shape[-1]
    few = activations.stack(u.reshape(-1, channels)[rows])
    possible = alive(few, view.reshape(-1, channels)[rows], target, loose=True)
    hits = []
    for name in itertools.compress(NAMES, possible):
        found = match(FUNCTIONS[name](u), view, target)
        if found and not (found.dropout and _is_kink(u, view)):
            hits.append((chain._replace(activation=name, gain=found.gain, dropout=found.dropout), found.doubt))
    return hits


def _is_kink(u: Array, v: Array) -> bool:
    """Whether v is 0 exactly where u is below (or above) a number: dropout knows nothing of u."""
    zero = v == 0
    return bool(u[zero].max() <= u[~zero].min() or u[zero].min() >= u[~zero].max())


def _pair(a: Source, b: Source, target: Target, level: str, *, with_pool: bool) -> list[Chain]:
    """f(a + b), f(a) + b, a + f(b), f(a) * b and a * f(b)."""
    hits: list[Chain] = []
    if a.value.shape == b.value.shape:
        hits += _fits(f"{a.name} + {b.name}", a.value + b.value, target, level, with_pool)
    for one, other in ((a, b), (b, a)):
        hits += _branch(one, other, target, level)
        hits += _gate(one, other, target) if level == "exact" else []
    return hits


def _branch(one: Source, other: Source, target: Target, level: str) -> list[Chain]:
    """The activation (and dropout) of one branch, added to the other."""
    if not one.value.shape == other.value.shape == target.value.shape:
        return []
    rest = target._replace(value=target.value - other.value)
    return _fits(f"{other.name} + f({one.name})", one.value, rest, level, with_pool=False)


def _gate(gate: Source, other: Source, target: Target) -> list[Chain]:
    """The activation of one branch, times the other: a gated unit, or channels weighted (squeeze and excitation)."""
    v, x, g = target.value, other.value, gate.value
    if x.shape != v.shape or g.shape[-1] != v.shape[-1] or len(g) != len(v) or g.ndim < 2:
        return []
    if g.ndim == 2 < v.ndim:
        g = g.reshape(len(g), *[1] * (v.ndim - 2), g.shape[-1])
    if g.ndim != v.ndim or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
        return []
    large = np.flatnonzero(np.abs(x) > 0.1 * np.abs(x).max(initial=0.0))
    large = large[:: max(1, large.size // 512)]
    if large.size < FEWEST:
        return []
    ratio, argument = v.ravel()[large] / x.ravel()[large], np.broadcast_to(g, v.shape).ravel()[large]
    limit = 20 * activations.limit_of(ratio, target.tolerance)
    names = activations.known(argument[:, None], ratio[:, None], limit)
    fitting = [
        name for name in names if name not in ACROSS_CHANNELS and error_of(v, x * FUNCTIONS[name](g)) <= target.limit
    ]
    if gate.value.shape == v.shape:
        return [Chain(other.name, activation=name, gate=gate.name) for name in fitting]
    return [Chain(f"{other.name} * f({gate.name})", activation=name) for name in fitting]


def _halves(source: Source, target: Target) -> Iterator[tuple[Source, Source]]:
    """The halves of a source's channels, and every second of them, either way round: of a gated unit."""
    u = source.value
    if u.ndim < 2 or u.shape[:-1] != target.value.shape[:-1] or u.shape[-1] != 2 * target.value.shape[-1]:
        return
    half = u.shape[-1] // 2
    for texts, parts in ((PARTS[:2], (u[..., :half], u[..., half:])), (PARTS[2:], (u[..., ::2], u[..., 1::2]))):
        one, other = (Source(f"{t}{source.name}", part) for t, part in zip(texts, parts, strict=True))
        yield one, other
        yield other, one


def part_of(name: str) -> str:
    """Of which source this is a part; "": it is none."""
    return next((name.removeprefix(part) for part in PARTS if name.startswith(part)), "")


def _concatenation(a: Source, b: Source, target: Target) -> list[Chain]:
    if a.value.ndim < 2 or a.value.shape[:-1] != b.value.shape[:-1]:
        return []
    if target.value.size // max(1, len(a.value)) % (a.value.shape[-1] + b.value.shape[-1]):
        return []
    both = np.concatenate([a.value, b.value], axis=-1)
    name = f"{a.name} and {b.name} side by side"
    return _fits(name, both, target, "exact", with_pool=both.ndim != target.value.ndim)


def _outputs(u: Array, v: Array) -> list[tuple[int, ...]]:
    """The spatial shapes that a pool of u may have if it is to become v."""
    dims, channels = u.ndim - 2, u.shape[-1]
    if dims not in (1, 2, 3) or v.size % (len(u) * channels):
        return []
    if v.ndim == u.ndim and v.shape[-1] == channels:
        return [v.shape[1:-1]]
    places = v.size // (len(u) * channels)
    if dims == 1:
        return [(places,)]
    if dims == 2:
        both = [(a, places // a) for a in range(1, places + 1) if places % a == 0]
        return [pair for pair in both if pair[0] <= u.shape[1] and pair[1] <= u.shape[2]]
    side = round(places ** (1 / 3))
    return [(side,) * 3] if side**3 == places else []


def pooled(name: str, u: Array, target: Target, level: str) -> list[tuple[Chain, float]]:
    """Chains with a pool of u that make the target, each with its doubt (see `Match`).

    Args:
      name: what u is called.
      u: [N, *spatial, C].
      target: what the chain must give.
      level: "exact", "solved" (functions with a parameter), "loose" (a factor, dropout) or "rare" (uneven pools).

    Returns:
      The preferred first.
    """
    hits: list[tuple[Chain, float]] = []
    sizes, channels = u.shape[1:-1], u.shape[-1]
    shapes = _outputs(u, target.value)
    few = Few.of(u) if shapes else None
    for outputs in shapes:
        candidates = views(target.value, (len(u), *outputs, channels))
        geometries = (pools.uneven_geometries if level == "rare" else pools.geometries)(sizes, outputs)
        if not candidates or not geometries or few is None:
            continue
        some = [pool for axes in geometries for pool in pools.variants(axes, sizes)]
        some += pools.positions(sizes) if math.prod(outputs) == 1 else []
        hits += _pool_hits(Pools.of(some, few), Chain(name), u, few, candidates, target, level) if some else []
    return hits


class Few(NamedTuple):
    """One example and a few of its channels, to try hypotheses on."""

    example: int
    channels: Array
    values: Array
    activated: Array  # by each function of `ELEMENTWISE`

    @classmethod
    def of(cls, u: Array) -> Few:
        """The example with the largest value, its channels of the largest and the smallest."""
        flat = u.reshape(len(u), -1, u.shape[-1])
        example = int(flat.max(axis=(1, 2)).argmax())
        count = 1 if flat.shape[1] > 1024 else 2
        peaks, lows = np.argsort(flat[example].max(axis=0)), np.argsort(flat[example].min(axis=0))
        channels = np.unique(np.r_[peaks[-count:], lows[:count]])
        values = u[example : example + 1][..., channels]
        return cls(example, channels, values, activations.stack(values, ELEMENTWISE))

    def cut(self, view: Array) -> Array:
        """The same part of another tensor."""
        return view[self.example : self.example + 1][..., self.channels]


class Pools(NamedTuple):
    """Pools that lead to one shape: a function behind them is tried on all at once, which is ten times as fast."""

    pools: list[Pool]
    after: Array  # [len(pools), ...]: what each makes of the few

    @classmethod
    def of(cls, some: list[Pool], few: Few) -> Pools:
        """Each of these pools of the few."""
        return cls(some, np.stack([pools.apply(few.values, pool) for pool in some]))


def _pool_hits(
    some: Pools, chain: Chain, u: Array, few: Few, candidates: list[tuple[str, Array]], target: Target, level: str
) -> list[tuple[Chain, float]]:
    """The activations before and after these pools that make the target."""
    if level == "solved":
        return _pool_solved(some, chain, u, few, candidates, target)
    loose = level == "loose"
    behind = [_alive_behind(some, few.cut(view), target, loose=loose) for _, view in candidates]
    hits: list[tuple[Chain, float]] = []
    for place, pool in enumerate(some.pools):
        before = pools.apply(few.activated, pool)
        for (layout, view), after in zip(candidates, behind, strict=True):
            found: dict[str, tuple[Match, list[str]]] = {}
            tried = {
                "activation first": alive(before, few.cut(view), target, loose=loose),
                "pool first": after[:, place],
            }
            for order, names in tried.items():
                for name in itertools.compress(ELEMENTWISE, names):
                    w = run(u, name, pool, order)
                    if loose:
                        one = match(w, view, target)
                    else:
                        one = Match(1.0, 0.0, 0.0) if error_of(view, w) <= target.limit else None
                    if one:
                        found.setdefault(name, (one, []))[1].append(order)
            for name, (one, orders) in found.items():
                order = "" if len(orders) == 2 else orders[0]
                fit = chain._replace(pool=pool, activation=name, order=order, layout=layout)
                hits.append((fit._replace(gain=one.gain, dropout=one.dropout), one.doubt))
    return hits


def _alive_behind(some: Pools, view: Array, target: Target, *, loose: bool) -> NDArray[np.bool_]:
    """Which functions behind which pools may make this part of the target, [len(ELEMENTWISE), len(pools)]."""
    with np.errstate(all="ignore"):
        return np.stack([alive(FUNCTIONS[name](some.after), view, target, loose=loose) for name in ELEMENTWISE])


def run(u: Array, activation: str, pool: Pool, order: str) -> Array:
    """Activation and pool of u, in that order."""
    function = FUNCTIONS[activation]
    return function(pools.apply(u, pool)) if order == "pool first" else pools.apply(function(u), pool)


def _pool_solved(
    some: Pools, chain: Chain, u: Array, few: Few, candidates: list[tuple[str, Array]], target: Target
) -> list[tuple[Chain, float]]:
    """Functions with a parameter behind a pool (or before a maximum, which is the same), or before an average."""
    behind = [activations.possible(some.after, few.cut(view), target.limit) for _, view in candidates]
    ends = activations.ends(few.values)
    hits: list[tuple[Chain, float]] = []
    for place, pool in enumerate(some.pools):
        then = functools.partial(pools.apply, pool=pool)
        ends_before = then(ends)
        for (layout, view), after in zip(candidates, behind, strict=True):
            fit = chain._replace(pool=pool, layout=layout)
            order = "pool first" if pool.kind == "average" else ""
            found = activations.solved(then(u), view, target.limit, target.tolerance) if after[place] else []
            if not found and activations.solvable(ends_before, few.cut(view), target.limit):
                order = "activation first"
                found = activations.solved(few.values, few.cut(view), target.limit, target.tolerance, then)
                found = [f for f in found if error_of(view, then(f.function(u))) <= target.limit]
            hits += [(fit._replace(activation=f.name, order=order), 0.0) for f in found]
    return hits
