"""The search for the chains that make a side's result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.identify import activations
from parity.identify.activations import ACROSS_CHANNELS, FEWEST, FUNCTIONS, NAMES, error_of
from parity.identify.chain_pools import pooled
from parity.identify.chains import Chain, Source, Target, alive, match, views

Array = NDArray[Any]

# Of how many sources, the most recent and the network's input, all pairs and all triples are tried.
PAIRED, TRIPLED, PAIRED_WITH_POOL = 12, 7, 4


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
    return [Chain(f"{other.name} * f({gate.name})", activation=name) for name in fitting]


def _concatenation(a: Source, b: Source, target: Target) -> list[Chain]:
    if a.value.ndim < 2 or a.value.shape[:-1] != b.value.shape[:-1]:
        return []
    if target.value.size // max(1, len(a.value)) % (a.value.shape[-1] + b.value.shape[-1]):
        return []
    both = np.concatenate([a.value, b.value], axis=-1)
    name = f"{a.name} and {b.name} side by side"
    return _fits(name, both, target, "exact", with_pool=both.ndim != target.value.ndim)
