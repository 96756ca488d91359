"""`parity.check_initialisation`: do new networks of both sides begin with weights of the same distributions?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bn_common.checks import check_int
from bn_common.installed import BOTH, need
from parity.diagnosis.initialisation import chance, family
from parity.diagnosis.initialisation.draws import Draws
from parity.diagnosis.initialisation.family import Outcome, Tensor
from parity.pairing.pairs import Pairing
from parity.pairing.recut import cut
from parity.records import kinds
from parity.records.inputs import Inputs, calls
from parity.records.recording import PHASES
from parity.report import Diagnosis, Divergence, LayerRow, Report
from parity.report.findings import together

if TYPE_CHECKING:
    import torch
    from flax import linen, nnx

PHASE = PHASES[0]
LEAST_NETWORKS = 8
"""Of which a number that is drawn is the same in all by chance 2^-161 times, in float32."""
MOST_NOTES = 6
"""Tensors whose numbers are told."""


def check_initialisation(
    torch_factory: Callable[[], torch.nn.Module],
    flax_module_or_factory: linen.Module | Callable[..., linen.Module | nnx.Module],
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    flax_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    flax_call: Callable[..., Any] | None = None,
    layer_map: Mapping[str, str] | None = None,
    seeds: int = 32,
) -> Report:
    """Compare what two networks begin with: of every tensor, whether both frameworks draw it from one distribution.

    `parity.check` gives both sides the same weights, and says nothing of it. By themselves PyTorch and Flax do not
    begin alike: a linear layer's weights are uniform with variance 1/(3 fan_in) in PyTorch, a truncated normal with
    1/fan_in in Flax; its bias is uniform in PyTorch, 0 in Flax; an embedding has variance 1 in PyTorch, 1/features in
    Flax. Here as many networks are made on either side as `seeds` says, and each tensor's numbers are compared over
    all of them: what never changes (zeros, ones) exactly, what is drawn by the tests of
    `diagnosis/initialisation/chance.py`, which suppose no distribution, but that a tensor's numbers are drawn
    independently. Two networks that begin alike are called different with a probability below 1e-6, for all tensors
    together. What the numbers are too few to show is in the notes.

    Args:
      torch_factory: a function without arguments that makes the module, or its class.
      flax_module_or_factory: a linen module, which is initialised with each seed; or what makes a module: it is given
        `nnx.Rngs(seed)` if it takes `rngs`, or one argument.
      *inputs: as of `parity.check`: numpy arrays in PyTorch's layout, which tell which layer is which.
      keywords: further ones by name.
      flax_inputs: what Flax is called with instead, in its layout.
      flax_call: see `parity.check`.
      layer_map: see `parity.check`.
      seeds: how many networks a side, 8 or more; PyTorch's generators are seeded with 0, 1, 2, ..., and are as they
        were when this returns.

    Returns:
      The report. A row's `error` is how improbable it is that chance alone makes such numbers, in powers of ten (7:
      1e-7; infinite where what never changes differs), and its `bound` what is allowed. Its diagnoses are
      `initialisation`, with both distributions in words, fans counted in Flax's layout; `initial-variance`; and
      `no-partner` of what only one side has. `details["tensors"]` has the numbers of every tensor.

    Raises:
      ModuleNotFoundError: a framework is not installed.
      TypeError: an argument of another kind; a module of PyTorch's in its factory's place.
      ValueError: no input, seeds below 8, a factory that makes the same weights every time.
    """
    need("parity.check_initialisation", *BOTH)
    check_int("seeds", seeds, LEAST_NETWORKS)
    called = calls(inputs, keywords, flax_inputs, flax_call)
    from parity.evidence.guessed import settled
    from parity.sides.jax import fresh as flax_fresh
    from parity.sides.torch import fresh as torch_fresh
    from parity.sides.torch import layers as torch_layers

    module = torch_fresh.new_module(torch_factory, 0)
    flax_module = flax_fresh.new_module(flax_module_or_factory, 0)
    torch_ = torch_layers.of_module(module)
    pairing, _, guess = settled(module, torch_, flax_module, called, layer_map)
    draw = flax_fresh.drawer(flax_module_or_factory, guess.flax if guess else Inputs(), flax_call)
    torch, flax = Draws(seeds), Draws(seeds)
    names = {f for _, f, t in pairing.tensors() if t.fits}
    for seed in range(seeds):
        tensors = torch_fresh.tensors_of(torch_fresh.new_module(torch_factory, seed))
        moved = pairing.moved(cut.apart(tensors, pairing.of_torch()))
        torch.add({name: a for name, a in moved.items() if name in names})
        flax.add({name: a for name, a in cut.apart(draw(seed), pairing.of_flax()).items() if name in names})
    for name, side in (("torch_factory", torch), ("flax_module_or_factory", flax)):
        _check_draws(name, side)
    return _report(pairing, torch, flax, seeds)


def _check_draws(name: str, draws: Draws) -> None:
    """Where nothing is drawn, and not everything is one number, the factory has a seed of its own."""
    every = [draws.drawn(tensor) for tensor in draws.first]
    if not any(d.is_random for d in every) and any(len(np.unique(d.first)) > 1 for d in every):
        allowed = "one that draws anew each time, without a seed of its own"
        raise ValueError(f"{name} makes the same weights {draws.networks} times; allowed: {allowed}")


def _report(pairing: Pairing, torch: Draws, flax: Draws, seeds: int) -> Report:
    layers, tensors = {}, []
    for torch_name, flax_name, _ in pairing.tensors():
        if flax_name not in torch.first or flax_name not in flax.first:
            continue
        pair = next((p for p in pairing.layers if torch_name in p.torch.tensors.values()), None)
        local, kind = torch_name.rpartition(".")[2], pair.kind if pair else kinds.OTHER
        shape, kernel = flax.first[flax_name].shape, None
        if pair is not None:
            shapes = [flax.first[full].shape for full in pair.flax.tensors.values() if full in flax.first]
            kernel = max(shapes, key=len, default=None)
            if pair.is_out_in:
                shape, kernel = shape[::-1], kernel[::-1] if kernel else None
        is_variance = kind == "batch_norm" and kinds.VAR.fullmatch(local) is not None
        fans, drawn = family.fans(kind, shape, kernel), (torch.drawn(flax_name), flax.drawn(flax_name))
        tensors.append(Tensor(torch_name, fans, *drawn, is_variance, flax_name in pairing.rounded()))
        path = flax_name.partition("/")[2].rpartition("/")[0]
        layers[torch_name] = (torch_name.rpartition(".")[0], pair.flax.path if pair else path, kind)
    found = family.outcomes(tensors)
    rows, diagnoses = [], _without_partner(pairing)
    for outcome in found:
        path, flax_path, kind = layers[outcome.tensor.name]
        local = outcome.tensor.name.rpartition(".")[2]
        rows.append(LayerRow(PHASE, path, flax_path, kind, local, outcome.error, outcome.bound))
        if outcome.finding is not None:
            diagnoses.append(Diagnosis(outcome.finding.code, path, outcome.finding.evidence, flax_path))
    first = next((row for row in rows if not row.ok), None)
    details = {
        "mode": PHASE,
        "networks": seeds,
        "false alarm": chance.FALSE_ALARM,
        "tensors": [_details(outcome) for outcome in found],
    }
    return Report(
        None
        if first is None
        else Divergence(PHASE, *layers[_name(first)][:2], first.error, first.bound, first.quantity),
        together(diagnoses),
        rows,
        [*pairing.told, *pairing.notes(), *_told(found), *family.unseen(tensors, seeds)],
        details,
    )


def _name(row: LayerRow) -> str:
    return f"{row.torch_layer}.{row.quantity}" if row.torch_layer else row.quantity


def _told(found: Sequence[Outcome]) -> list[str]:
    """The numbers of what differs."""
    differing = [outcome for outcome in found if outcome.finding is not None]
    more = len(differing) - MOST_NOTES
    rest = [f"the numbers of {more} more are in details['tensors']"] if more > 0 else []
    return [*map(family.told, differing[:MOST_NOTES]), *rest]


def _details(outcome: Outcome) -> dict[str, Any]:
    tensor = outcome.tensor
    return {"name": tensor.name, "PyTorch": family.numbers(tensor.torch), "Flax": family.numbers(tensor.flax)}


def _without_partner(pairing: Pairing) -> list[Diagnosis]:
    """What only one side has, or has in another shape: nothing of it is compared."""
    found = []
    for names, has, lacks in zip(pairing.left(), ("PyTorch", "Flax"), ("Flax", "PyTorch"), strict=True):
        for name in names:
            path = name.rpartition(".")[0] if has == "PyTorch" else name.partition("/")[2].rpartition("/")[0]
            text = f"{has}'s {name} has no partner in {lacks}: what it begins with is not compared"
            found.append(Diagnosis("no-partner", *((path, text) if has == "PyTorch" else ("", text, path))))
    for torch_name, flax_name, t in pairing.tensors():
        if not t.fits:
            text = f"PyTorch's {torch_name} and Flax's {flax_name} have shapes that do not fit: not compared"
            found.append(Diagnosis("no-partner", torch_name.rpartition(".")[0], text))
    return found
