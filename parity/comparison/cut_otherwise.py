"""Where two sides are cut otherwise inside, though they are the same function: which differences that explains."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from parity.comparison.bounds import FORWARD_BOUND
from parity.comparison.differences import Difference, alone
from parity.pairing.pairs import Pairing
from parity.pairing.translation import Translation
from parity.records.distance import error_of
from parity.records.recording import NETWORK, Recording

INNER = {"input", "output", "input gradient", "output gradient"}
"""What lies inside of the network, where the two sides may be cut otherwise."""
FUNCTION = {"forward", "loss", "backward"}
"""The phases that say whether two networks are one function, with its gradients."""
LEAST_FELT = 1e-9
"""Of the largest gradient: a place with a smaller one leaves no trace in the output."""


def lies_inside(d: Difference) -> bool:
    """Whether it is of what goes into a layer or comes out of it, or of its gradient."""
    return d.key != NETWORK and d.quantity in INNER


def inside(
    failing: Sequence[Difference], free: Sequence[Difference], pairing: Pairing, torch: Recording, flax: Recording
) -> list[Difference]:
    """Of what differs that which lies inside, if the two are the same function with the same gradients; else [].

    Outputs, gradients by the inputs and by every parameter agree, and nothing is without a partner: as where one side
    pads by hand and the other by an argument, or a norm applies its activation itself. Statistics and steps may differ
    beside it.
    """
    found = [d for d in failing if lies_inside(d)]
    same = (
        any(d.key == NETWORK and d.quantity == "output" for d in free)
        and torch.gradients
        and flax.gradients
        and not any(p.torch_left or p.flax_left for p in pairing.layers)
        and not any(alone(pairing, torch, flax))
        and all(t.fits for pair in pairing.layers for t in pair.tensors)
        and not any(np.isnan(d.error) or (d.phase in FUNCTION and d not in found) for d in failing)
        and all(_is_felt(torch, d.key) for d in found)
    )
    return found if same else []


def _is_felt(torch: Recording, key: tuple[str, int]) -> bool:
    """Whether the loss depends on this call: where its gradient vanishes, outputs that agree say nothing of it."""
    sizes = {
        call.key: float(np.abs(call.output_gradient).max(initial=0.0))
        for call in torch.calls
        if call.output_gradient is not None
    }
    return sizes.get(key, 0.0) > LEAST_FELT * max(sizes.values(), default=0.0)


def shaped_otherwise(local: Iterable[Difference]) -> frozenset[tuple[str, int]]:
    """The calls with inputs or outputs of another shape in single-layer mode."""
    return frozenset(d.key for d in local if _is_of_another_shape(d))


def same_behind(
    before: Iterable[Difference],
    again: Sequence[Difference],
    agrees: Callable[[Difference], bool],
    reduced: Container[tuple[str, int]] = (),
) -> frozenset[tuple[str, int]]:
    """The calls with another shape behind which all is the same: what is compared next agrees, and did not before.

    Args:
      before: the differences in single-layer mode.
      again: the same with Flax's own arrays wherever shapes differ, in the order of execution.
      agrees: whether a difference is none.
      reduced: calls of which it is known without looking behind them.
    """
    agreed = {(d.key, d.quantity) for d in before if agrees(d)}
    found = set()
    forward = [d for d in again if d.phase == "forward"]
    for place, d in enumerate(forward):
        if _is_of_another_shape(d):
            following = next((e for e in forward[place + 1 :] if (e.key, e.quantity) not in agreed), None)
            if d.key in reduced or (following is not None and agrees(following)):
                found.add(d.key)
    return frozenset(found)


def reduced(translation: Translation, flax: Recording) -> frozenset[tuple[str, int]]:
    """PyTorch's calls whose output one side adds up, averages or takes the maximum of, and the other does so behind it.

    As an `EmbeddingBag` against an embedding and a sum.
    """
    theirs = {call.key: call.output for call in flax.calls}
    found = set()
    for call in translation.torch.calls:
        pair = translation.pair_of.get(call.path)
        mine = theirs.get((pair.flax.path, call.index)) if pair else None
        if mine is not None and (_reduces(mine, call.output) or _reduces(call.output, mine)):
            found.add(call.key)
    return frozenset(found)


def _reduces(whole: NDArray, part: NDArray) -> bool:
    """Whether `part` [N, ..., C] is `whole` without one axis, neither that of the examples nor the channels."""
    if whole.ndim != part.ndim + 1 or {whole.dtype.kind, part.dtype.kind} != {"f"}:
        return False
    made = (reduce(whole, axis=axis) for axis in range(1, whole.ndim - 1) for reduce in (np.sum, np.mean, np.max))
    return any(a.shape == part.shape and error_of(a, part) <= FORWARD_BOUND for a in made)


def _is_of_another_shape(d: Difference) -> bool:
    return d.phase == "forward" and lies_inside(d) and d.error == np.inf
