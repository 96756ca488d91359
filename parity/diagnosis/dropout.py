"""Dropout that is active in prediction: known by its calls, for a run's numbers are those without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from parity.diagnosis.finding import Finding, Located
from parity.pairing.translation import Translation
from parity.records.recording import NETWORK, Recording

Places = Counter[tuple[float, int]]
"""(rate, before which of PyTorch's calls) of dropouts that are active in prediction."""


def dropout_findings(translation: Translation, flax: Recording) -> list[Located]:
    """What one side only has active in prediction, each place in one finding."""
    torch, other = _places(translation, flax)
    return [
        _located(
            translation,
            place,
            Finding(
                "dropout-active",
                f"{side} applies dropout of rate {rate:.3g} in prediction, {lacks} none of that rate there",
            ),
        )
        for side, lacks, alone in (("PyTorch", "Flax", torch - other), ("Flax", "PyTorch", other - torch))
        for rate, place in alone
    ]


def common_dropout(translation: Translation, flax: Recording) -> Iterator[str]:
    """A note of the dropout that both sides have active in prediction."""
    torch, other = _places(translation, flax)
    if rates := sorted({f"{rate:.3g}" for rate, _ in torch & other}):
        told = ", ".join(rates)
        yield f"dropout of rate {told} is active in prediction on both sides; it was switched off, as it is random"


def dropout_in_training(torch: Recording, flax: Recording) -> Iterator[str]:
    """Notes of the dropout that was switched off in training: that it was, and where its rates are not the same."""
    if torch.dropout_off or flax.dropout_off:
        yield "dropout was switched off on both sides, as it is random in training"
    rates = [side.dropout_rates for side in (torch, flax)]
    told = [", ".join(sorted({f"{rate:.3g}" for rate in each or ()})) or "none" for each in rates]
    if None not in rates and told[0] != told[1]:
        yield f"the rates of dropout differ, which was not compared: {told[0]} in PyTorch, {told[1]} in Flax"


def _places(translation: Translation, flax: Recording) -> tuple[Places, Places]:
    torch = Counter((round(rate, 9), place) for rate, place in translation.torch.dropouts)
    return torch, Counter((round(rate, 9), _in_torch(translation, flax, place)) for rate, place in flax.dropouts)


def _in_torch(translation: Translation, flax: Recording, position: int) -> int:
    """Before which of PyTorch's calls it is: the first behind it that has a partner."""
    for call in flax.calls[position:]:
        key = translation.torch_path.get(call.path, ""), call.index
        if key in translation.position:
            return translation.position[key]
    return len(translation.torch.calls)


def _located(translation: Translation, position: int, finding: Finding) -> Located:
    """At PyTorch's own module of dropout, if one is there, else at the next layer; behind the last, at that."""
    torch = translation.torch
    call = torch.calls[min(position, len(torch.calls) - 1)] if torch.calls else None
    modules = [g for g in torch.glue if g.position == position and "Drop" in " ".join(g.class_names)]
    pair = translation.pair_of.get(call.path) if call else None
    layer = modules[0].path if modules else call.path if call else ""
    key = call.key if call and position < len(torch.calls) else NETWORK
    return Located("forward", position - 0.5, layer, pair.flax.path if pair else "", finding, key, True)
