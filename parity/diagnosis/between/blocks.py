"""Channels that stand in blocks: what was joined in another order, or shuffled; and a block that alone differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between import activations
from parity.diagnosis.between.activations import error_of
from parity.diagnosis.between.chains import Chain, Source, Target
from parity.diagnosis.finding import Finding

Array = NDArray[Any]
Describe = Callable[[Sequence[Source], Array, float], Chain | None]

MOST_BLOCKS = 4
FEWEST_SHUFFLED = 6
"""Of fewer channels, any order may be that of a shuffle."""


def findings(sources: Sequence[Source], torch: Target, flax: Target, describe: Describe) -> list[Finding]:
    """Whether the two sides have the same channels in another order of blocks.

    Args:
      sources: what the blocks can have been made of.
      torch: PyTorch's side, channels last.
      flax: Flax's.
      describe: (sources, block, tolerance) -> what makes this block of a source, or None.
    """
    if torch.value.shape != flax.value.shape or torch.value.ndim < 2:
        return []
    return _joined(sources, torch, flax, describe) or _shuffled(sources, torch, flax)


def _joined(sources: Sequence[Source], torch: Target, flax: Target, describe: Describe) -> list[Finding]:
    """Blocks of which all but one at most are known to be a source's channels: else any order would be one."""
    order = _order(torch, flax)
    if order is None:
        return []
    # Where PyTorch's channels stop to follow each other in Flax.
    starts = [0, *(np.flatnonzero(np.diff(order) != 1) + 1), len(order)]
    blocks = [(int(order[a]), int(order[b - 1]) + 1) for a, b in itertools.pairwise(starts)]
    if not 1 < len(blocks) <= MOST_BLOCKS:
        return []
    chains = {block: describe(sources, torch.value[..., slice(*block)], torch.tolerance) for block in blocks}
    if sum(chain is None for chain in chains.values()) > 1:
        return []
    texts = {block: f"{chain or 'something else'} ({block[1] - block[0]} channels)" for block, chain in chains.items()}
    first, second = (", ".join(texts[block] for block in order) for order in (sorted(blocks), blocks))
    return [Finding("concat-order", f"PyTorch joins {first}; Flax {second}")]


def _order(torch: Target, flax: Target) -> Array | None:
    """Which of PyTorch's channels each of Flax's is; None where they are not the same channels."""
    t, f = (side.value.reshape(-1, side.value.shape[-1]) for side in (torch, flax))
    mark = np.random.default_rng(0).normal(size=len(t))
    places, wanted = np.argsort(mark @ t, kind="stable"), np.argsort(mark @ f, kind="stable")
    order = np.empty(len(wanted), int)
    order[wanted] = places
    return order if error_of(f, t[:, order]) <= torch.limit else None


def _shuffled(sources: Sequence[Source], torch: Target, flax: Target) -> list[Finding]:
    """Channels written group by group and read across the groups, on one side, or by another number of groups."""
    fits = [list(_shuffles(sources, side)) for side in (torch, flax)]
    for (name, function, groups), (other, same, more) in itertools.product(*fits):
        if (name, function) == (other, same) and groups != more:
            texts = [f"shuffles the channels of {name} by {n} groups" if n > 1 else "leaves them as they are"
                     for n in (groups, more)]  # fmt: skip
            return [Finding("concat-order", f"PyTorch {texts[0]}, Flax {texts[1]}")]
    order, channels = _order(torch, flax), torch.value.shape[-1]
    # Of rows of numbers it is rather a flatten of C, H, W for H, W, C, which stands in the same order.
    if order is None or channels < FEWEST_SHUFFLED or torch.value.ndim < 3:
        return []
    for one, two in itertools.product(_divisors(channels), repeat=2):
        if one != two and np.array_equal(order, np.argsort(_across(channels, one))[_across(channels, two)]):
            text = f"by {one} groups in PyTorch, by {two} in Flax (1: as they are)"
            return [Finding("concat-order", f"both have the same channels, in an order as of a shuffle {text}")]
    return []


def _divisors(channels: int) -> list[int]:
    return [n for n in range(1, channels) if channels % n == 0]


def _across(channels: int, groups: int) -> Array:
    """Which channel stands at each place once [g, c/g] is turned to [c/g, g]."""
    return np.arange(channels).reshape(groups, -1).T.ravel()


def _shuffles(sources: Sequence[Source], target: Target) -> Iterator[tuple[str, str, int]]:
    """(source, activation, groups) of what gives the target."""
    v, channels = target.value, target.value.shape[-1]
    for source in sources:
        if source.value.shape == v.shape:
            for groups in _divisors(channels):
                view = v[..., np.argsort(_across(channels, groups))]
                for name in activations.known(source.value, view, target.limit)[:1]:
                    yield source.name, name, groups


def differing(sources: Sequence[Source], torch: Target, flax: Target) -> Iterator[tuple[Target, Target]]:
    """Both sides' first or last channels, as many as a source has, where all others agree: a part that was joined."""
    t, f = torch.value, flax.value
    if t.shape != f.shape or t.ndim < 2:
        return
    off = np.abs(t - f).max(axis=tuple(range(t.ndim - 1)), initial=0.0) > max(torch.limit, flax.limit)
    channels = t.shape[-1]
    for width in dict.fromkeys(source.value.shape[-1] for source in sources if source.value.ndim > 1):
        for part in (slice(0, width), slice(channels - width, channels)) if width < channels else ():
            if off.sum() == off[part].sum():
                yield torch._replace(value=t[..., part]), flax._replace(value=f[..., part])
