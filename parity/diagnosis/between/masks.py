"""Which keys a query may see: every usual mask, and those that the network's inputs say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.between.chains import Source

Array = NDArray[Any]

EVERY = "every position"


class Mask(NamedTuple):
    """What a query sees.

    Attributes:
      text: in words.
      keep: [N or 1, Q or 1, K] of bool.
    """

    text: str
    keep: Array


def candidates(inputs: Sequence[Source], count: int, queries: int, keys: int) -> list[Mask]:
    """Every mask of [N, Q, K], the usual first; no two alike.

    A query that sees nothing takes the plain average, as where what is hidden gets a large negative number.

    Args:
      inputs: of the network, that may say which positions are padding: [N, K] of any numbers, lengths [N], or masks
        that broadcast to [N, Q, K] (axes of size 1 do not matter).
      count: N.
      queries: Q.
      keys: K.
    """
    found: list[Mask] = []
    plain = list(_triangles(queries, keys))
    hidden = [mask for source in inputs for mask in padding(source, count, queries, keys)]
    both = [Mask(f"{a.text} of {b.text}", a.keep & b.keep) for a in plain[1:] for b in hidden]
    for mask in [*plain, *hidden, *both]:
        if not any((mask.keep == other.keep).all() for other in found):
            found.append(mask)
    return found


def _triangles(queries: int, keys: int) -> Iterator[Mask]:
    """All of them; causal, with the diagonal at either corner; one off; the other way round; a window of the last."""
    ahead = np.arange(keys)[None] - np.arange(queries)[:, None]
    yield Mask(EVERY, np.ones((1, queries, keys), bool))
    corners = {0: ""} if queries == keys else {0: " from the first", keys - queries: " from the last"}
    for corner, name in corners.items():
        yield Mask(f"its own position and those before{name} (causal)", (ahead <= corner)[None])
    for corner, name in corners.items():
        yield Mask(f"one position ahead of its own, too{name} (causal, one off)", (ahead <= corner + 1)[None])
        yield Mask(f"only positions before its own{name} (causal, one off)", (ahead < corner)[None])
        yield Mask(f"its own position and those behind{name}", (ahead >= corner)[None])
        yield Mask(f"only positions behind its own{name} (causal, inverted)", (ahead > corner)[None])
        for window in range(1, min(queries, keys, 17)):
            keep = (ahead <= corner) & (ahead > corner - window)
            yield Mask(f"the last {window} position{'s' * (window > 1)}{name}", keep[None])


def padding(source: Source, count: int, queries: int, keys: int) -> Iterator[Mask]:
    """What one input of the network says: positions to see, or to hide."""
    a = np.asarray(source.value)
    if a.ndim == 1 and len(a) == count and a.dtype.kind in "iu" and 0 < a.max(initial=0) <= keys:
        keep = np.arange(keys)[None, None] < a[:, None, None]
        yield Mask(f"the first positions, as many as {source.name} says", keep)
        yield Mask(f"the positions behind the first, as many as {source.name} says", ~keep)
        return
    shape = tuple(n for n in a.shape if n != 1)
    for wanted, full in (((count, keys), (count, 1, keys)), ((queries, keys), (1, queries, keys)),
                         ((count, queries, keys), (count, queries, keys))):  # fmt: skip
        if shape == tuple(n for n in wanted if n != 1):
            a = a.reshape(full)
            break
    else:
        return
    values = np.unique(a)
    if a.dtype.kind == "b" or set(values) <= {0, 1}:
        chosen = [(f"where {source.name} is 1", a != 0), (f"where {source.name} is 0", a == 0)]
    elif a.dtype.kind in "iu":
        chosen = []
        for value in dict.fromkeys([0, 1, int(a.reshape(-1)[-1]), *a.reshape(-1, keys)[:, -1].tolist()]):
            chosen += [
                (f"where {source.name} is not {value}", a != value),
                (f"where {source.name} is {value}", a == value),
            ]
    else:
        return
    for text, keep in chosen:
        if keep.any() and not keep.all():
            yield Mask(f"positions {text}", keep)
