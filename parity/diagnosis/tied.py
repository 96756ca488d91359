"""One tensor of several of PyTorch's layers, of which Flax has copies: they agree until the first step of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parity.comparison.differences import is_one_tensor
from parity.diagnosis.finding import Finding, Located
from parity.pairing.translation import Translation
from parity.records.distance import error_of
from parity.records.recording import Recording

TOLERANCE = 1e-6
"""Of the gradient: that the copies' gradients add up to it."""


def shared(translation: Translation) -> list[list[str]]:
    """Full names in PyTorch of the tensors that have several, all of them with a partner of their own in Flax."""
    torch, groups = translation.torch, list[list[str]]()
    for name, _, _ in translation.pairing.tensors():
        if np.any(torch.gradients.get(name, np.zeros(()))):
            group = next((group for group in groups if is_one_tensor(torch, group[0], name)), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
    return [group for group in groups if len(group) > 1]


def findings(
    translation: Translation, forced: Recording, groups: Sequence[Sequence[str]]
) -> dict[tuple[str, ...], Located]:
    """The groups whose gradient is the sum of those of Flax's copies; each told at the last layer that has one."""
    torch, pairing, found = translation.torch, translation.pairing, dict[tuple[str, ...], Located]()
    gradients = pairing.to_torch(forced.gradients)
    partner = {name: flax.partition("/")[2] for name, flax, _ in pairing.tensors()}
    position = {path: i for (path, _), i in translation.position.items()}
    for group in groups:
        copies = [gradients[name] for name in group if name in gradients]
        true = torch.gradients[group[0]]
        fits = len(copies) == len(group) and all(copy.shape == true.shape for copy in copies)
        if not fits or error_of(np.sum(copies, axis=0), true) > TOLERANCE or error_of(copies[0], true) <= TOLERANCE:
            continue
        layers = sorted((name.rpartition(".")[0] for name in group), key=lambda path: position.get(path, -1))
        pair = translation.pair_of.get(layers[-1])
        text = (
            f"{' and '.join(group)} are one tensor in PyTorch, whose gradient is the sum over both uses; "
            f"Flax has {' and '.join(partner[name] for name in group)}, each with a part of it"
        )
        flax_layer = pair.flax.path if pair else ""
        finding = Finding("tied-weights", text)
        place = position.get(layers[-1], 0)
        found[tuple(group)] = Located("backward", place, layers[-1], flax_layer, finding, (layers[-1], 0))
    return found
