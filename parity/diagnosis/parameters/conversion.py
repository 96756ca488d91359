"""What is wrong with the user's own variables: each layer's against PyTorch's carried over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.diagnosis.finding import Finding, Located
from parity.diagnosis.parameters import cells
from parity.diagnosis.parameters import family as parameters
from parity.diagnosis.parameters.exchanged import exchanged
from parity.pairing.pairs import LayerPair, Pairing
from parity.pairing.translation import Translation
from parity.records.recording import Recording


def of_layout(finding: Finding, kind: str) -> Finding:
    """A convolution's kernel with inputs and outputs exchanged is one of the wrong layouts, not a transposed matrix."""
    wrong = finding.code == "kernel-transposed" and kind in ("conv", "conv_transpose")
    return replace(finding, code="kernel-layout") if wrong else finding


def _attention(expected: Mapping[str, NDArray], given: Mapping[str, NDArray]) -> list[Finding]:
    """The conversion of an attention layer: each projection is a matrix, [E, heads * depth] or, of "out", back."""
    found: list[Finding] = []
    for name, truth in expected.items():
        part, _, local = name.rpartition("/")
        mine = given.get(name)
        if mine is None or mine.size != truth.size:
            found.append(Finding("unexplained", f"{name} is missing, or of another size"))
        elif local == "kernel":
            shape = (-1, truth.shape[-1]) if part.startswith("out") else (len(truth), -1)
            a, b = truth.reshape(shape), mine.reshape(shape)
            got = parameters.findings("linear", {"kernel": a}, {"kernel": b}, raw={"kernel": a.T})
            found += [replace(f, evidence=f"{part}: {f.evidence}") for f in got]
        else:
            found += parameters.findings("linear", {"bias": truth.ravel()}, {"bias": mine.ravel()})
    return found


def conversion_findings(
    translation: Translation,
    expected: Mapping[str, NDArray],
    given: Mapping[str, Any],
    torch: Recording,
    halves: Mapping[str, Mapping[str, NDArray]],
    *,
    train: bool,
) -> list[Located]:
    """What is wrong with the user's own variables: each layer's against PyTorch's carried over.

    Args:
      translation: between the two sides.
      expected: PyTorch's tensors, carried over, by Flax's names.
      given: the user's.
      torch: PyTorch's run.
      halves: see `Pairing.halves`.
      train: train or eval mode.
    """
    found: list[Located] = []
    moved: dict[str, str] = {}
    pairing: Pairing = translation.pairing
    order = _places(pairing, torch)
    flattened = dict(translation.flattens())
    for pair in pairing.layers:
        names = {t.flax_name: pair.flax.tensors[t.flax_name] for t in pair.tensors}
        mine = {local: np.asarray(given[full], np.float64) for local, full in names.items() if full in given}
        truth = {local: np.asarray(expected[full], np.float64) for local, full in names.items() if full in expected}
        raw = {t.flax_name: torch.tensors[pair.torch.tensors[t.torch_name]] for t in pair.tensors if t.part is None}
        if all(n in mine and mine[n].shape == a.shape and _same(mine[n], a) for n, a in truth.items()):
            continue
        got = (
            cells.findings(
                truth, mine, pair.flax.config["gates"], {n: halves[full] for n, full in names.items() if full in halves}
            )
            if "gates" in pair.flax.config
            else _attention(truth, mine)
            if pair.kind == "attention"
            else [
                of_layout(f, pair.kind)
                for f in parameters.findings(pair.kind, truth, mine, spatial=flattened.get(pair.torch.path), raw=raw)
            ]
        )
        if any(f.code == "unexplained" for f in got) and (other := _whose(mine, pair, pairing, expected)):
            got = [Finding("unexplained", f"Flax's {pair.flax.path} holds the weights of PyTorch's {other}")]
            moved[pair.torch.path] = other
        position = order[pair.torch.path]
        for f in got:
            # In training the moving variance is not looked at, only moved on.
            phase = "statistics" if f.code == "initial-variance" and train else "forward"
            found.append(Located(phase, position - 0.25, pair.torch.path, pair.flax.path, f, (pair.torch.path, 0)))
    for torch_name, flax_name, _ in pairing.loose:
        wanted, held = np.asarray(expected[flax_name]), given.get(flax_name)
        if held is None or np.shape(held) != wanted.shape or not _same(np.asarray(held), wanted):
            layer = torch_name.rpartition(".")[0]
            finding = Finding("unexplained", f"{flax_name} does not hold PyTorch's {torch_name}")
            found.append(Located("forward", order.get(layer, 0), layer, flax_name, finding, (layer, 0)))
    return exchanged(found, moved, pairing)


def _places(pairing: Pairing, torch: Recording) -> dict[str, float]:
    """Where PyTorch's layers are called first; a part of one that is cut, before what is called next."""
    order: dict[str, float] = {call.path: i for i, call in reversed(list(enumerate(torch.calls)))}
    behind: float = len(torch.calls)
    for pair in reversed(pairing.layers):
        behind = order.setdefault(pair.torch.path, behind - 0.5)
    return order


def _whose(mine: Mapping[str, NDArray], pair: LayerPair, pairing: Pairing, expected: Mapping[str, NDArray]) -> str:
    """PyTorch's layer whose weights these are, where they are another layer's; "" if they are nobody's."""
    for other in pairing.layers:
        held = {t.flax_name: expected.get(other.flax.tensors[t.flax_name]) for t in other.tensors}
        alike = held.keys() == mine.keys() and all(
            a is not None and a.shape == mine[n].shape and _same(mine[n], a) for n, a in held.items()
        )
        if alike and other is not pair:
            return other.torch.path
    return ""


def _same(a: NDArray, b: NDArray) -> bool:
    """Equal to float32's rounding."""
    return bool(np.abs(a - b).max(initial=0) <= 1e-6 * np.abs(b).max(initial=0))
