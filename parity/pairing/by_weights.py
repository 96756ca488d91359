"""Which layers that only their order pairs are partners, where both sides have run with the same weights already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parity.pairing.exchange import partners_of, with_partners
from parity.pairing.pairs import LayerPair, Pairing
from parity.pairing.recut import cut
from parity.records.distance import error_of
from parity.records.recording import Recording

SAME = 1e-6
"""Of the largest weight: float32, in which they may have been carried, rounds by less."""


def paired_by_weights(found: Pairing, torch: Recording, flax: Recording) -> Pairing:
    """The pairing, the groups that only the order pairs by equal tensors; names and feeders stay above numbers.

    A group is left as it is where its layers do not all have one partner of equal weights each, as where the two sides
    have others, or several layers the same.
    """
    tensors = cut.apart(torch.tensors, found.of_torch()), cut.apart(flax.tensors, found.of_flax())
    pair_of = {pair.torch.path: pair for pair in found.layers}
    partners, moved = partners_of(found), []
    for group in found.by_order:
        pairs = [pair_of[path] for path in group if path in pair_of]
        same = [[other.flax.path for other in pairs if _are_equal(pair, other, *tensors)] for pair in pairs]
        chosen = [paths[0] for paths in same if len(paths) == 1]
        if len({*chosen}) == len(group) and chosen != [partners[path] for path in group]:
            partners |= dict(zip(group, chosen, strict=True))
            moved.append(group)
    if not moved:
        return found
    made = with_partners(found, partners)
    texts = (f"{', '.join(group)} are {', '.join(partners[path] for path in group)}" for group in moved)
    made.told = [*found.told, f"paired by their weights, and not by the order of calls: {'; '.join(texts)}"]
    return replace(made, by_order=[group for group in found.by_order if group not in moved])


def _are_equal(pair: LayerPair, other: LayerPair, torch: dict, flax: dict) -> bool:
    """Whether PyTorch's layer of the first has the weights of Flax's layer of the second."""

    def are(both: Sequence[str]) -> bool:
        return both[0] in torch and both[1] in flax

    names = [(pair.torch.tensors[t.torch_name], other.flax.tensors.get(t.flax_name, "")) for t in pair.tensors]
    if not names or pair.torch_left or other.flax_left or not all(map(are, names)):
        return False
    both = [(t.to_flax(torch[a]), flax[b]) for t, (a, b) in zip(pair.tensors, names, strict=True) if t.fits]
    return len(both) == len(names) and all(a.shape == b.shape and error_of(b, a) <= SAME for a, b in both)
