"""Chains with a pool: every geometry that leads to the target's shape, every activation before and behind it."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.identify import activations, pools
from parity.identify.activations import ELEMENTWISE, FUNCTIONS, error_of
from parity.identify.chains import Chain, Match, Target, alive, match, views
from parity.identify.pools import Pool

Array = NDArray[Any]


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
        for pool in some:
            hits += _pool_hits(Chain(name, pool=pool), u, few, candidates, target, level)
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


def _pool_hits(
    chain: Chain, u: Array, few: Few, candidates: list[tuple[str, Array]], target: Target, level: str
) -> list[tuple[Chain, float]]:
    """The activations before and after this pool that make the target."""
    pool = chain.pool
    assert pool is not None
    after = pools.apply(few.values, pool)
    if level == "solved":
        return _pool_solved(chain, u, few, after, candidates, target)
    tried = {"activation first": pools.apply(few.activated, pool), "pool first": activations.stack(after, ELEMENTWISE)}
    hits: list[tuple[Chain, float]] = []
    for layout, view in candidates:
        found: dict[str, tuple[Match, list[str]]] = {}
        for order, made in tried.items():
            for name in itertools.compress(ELEMENTWISE, alive(made, few.cut(view), target, loose=level == "loose")):
                w = run(u, name, pool, order)
                if level == "loose":
                    one = match(w, view, target)
                else:
                    one = Match(1.0, 0.0, 0.0) if error_of(view, w) <= target.limit else None
                if one:
                    found.setdefault(name, (one, []))[1].append(order)
        for name, (one, orders) in found.items():
            order = "" if len(orders) == 2 else orders[0]
            fit = chain._replace(activation=name, order=order, layout=layout, gain=one.gain, dropout=one.dropout)
            hits.append((fit, one.doubt))
    return hits


def run(u: Array, activation: str, pool: Pool, order: str) -> Array:
    """Activation and pool of u, in that order."""
    function = FUNCTIONS[activation]
    return function(pools.apply(u, pool)) if order == "pool first" else pools.apply(function(u), pool)


def _pool_solved(
    chain: Chain, u: Array, few: Few, after: Array, candidates: list[tuple[str, Array]], target: Target
) -> list[tuple[Chain, float]]:
    """Functions with a parameter behind the pool (or before a maximum, which is the same), or before an average."""
    pool = chain.pool
    assert pool is not None
    order = "pool first" if pool.kind == "average" else ""
    hits: list[tuple[Chain, float]] = []
    for layout, view in candidates:
        one_by_one: list[activations.Solved] = []
        if activations.possible(after, few.cut(view), target.limit):
            one_by_one = activations.solved(pools.apply(u, pool), view, target.limit, target.tolerance)
        hits += [(chain._replace(activation=f.name, order=order, layout=layout), 0.0) for f in one_by_one]
        if not one_by_one:
            then = functools.partial(pools.apply, pool=pool)
            found = activations.solved(few.values, few.cut(view), target.limit, target.tolerance, then)
            found = [f for f in found if error_of(view, then(f.function(u))) <= target.limit]
            hits += [(chain._replace(activation=f.name, order="activation first", layout=layout), 0.0) for f in found]
    return hits
