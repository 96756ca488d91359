"""Which layers of two modules are which, found by running both on inputs that are given or guessed."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.evidence.jax import FlaxRuns
from parity.evidence.torch import TorchRuns
from parity.pairing.exchange import Choices, partners_of, told, told_by_order, with_partners
from parity.pairing.flattening import reorder_behind_flattens
from parity.pairing.guesses import given_guesses, guesses
from parity.pairing.layers import pair, unpaired
from parity.pairing.pairs import Pairing
from parity.pairing.recut import cut
from parity.records.inputs import Calls
from parity.records.recording import Layer, Recording
from parity.records.structure import Flattened, Guess, Structure
from parity.sides import jax as flax_side
from parity.sides.jax import flattens
from parity.sides.jax import layers as flax_layers
from parity.sides.torch import layers as torch_layers

if TYPE_CHECKING:
    import torch
    from flax import linen, nnx

LOG = logging.getLogger(__name__)
MOST_ATTEMPTS = 200


def _in_silence(function: Callable) -> Callable:
    """What a module warns of on inputs that were made up is not the caller's concern."""

    @functools.wraps(function)
    def silent(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return silent


@_in_silence
def settle(
    module: torch.nn.Module | None,
    torch_: Structure,
    flax_module: linen.Module | nnx.Module,
    called: Calls,
    layer_map: Mapping[str, str] | None,
) -> tuple[Pairing, Structure]:
    """The pairing, and Flax's structure, see `settled`."""
    return settled(module, torch_, flax_module, called, layer_map)[:2]


@_in_silence
def settled(
    module: torch.nn.Module | None,
    torch_: Structure,
    flax_module: linen.Module | nnx.Module,
    called: Calls,
    layer_map: Mapping[str, str] | None,
) -> tuple[Pairing, Structure, Guess | None]:
    """The pairing on the first inputs that both modules take and on which all shapes fit; else the closest.

    The inputs too; None where the module's definition alone tells its layers. Where layers are cut otherwise on the
    other side, both modules are run with random weights to see how.
    """
    side = flax_side.side_of(flax_module, called.flax_call)
    runner = None if module is None else torch_layers.Runner(module, torch_)
    best: tuple[int, Pairing, Structure, Guess] | None = None
    error: Exception | None = None
    original = list(torch_.layers)
    for guess in itertools.islice(_candidates(runner, torch_, flax_module, called), MOST_ATTEMPTS):
        try:
            flax = flax_layers.of_module(side, guess)
        except Exception as refused:  # whatever a stranger's module raises
            error = error or refused
            continue
        run = None if runner is None else runner.run(guess)
        torch_.layers, torch_.feeders = _in_order(original, run), None if run is None else run.feeders
        found = _paired(torch_, flax, layer_map)
        count = unpaired(found) or len(found.recuts)
        unchanged = best is not None and best[2].shapes == flax.shapes
        if best is None or count < best[0]:
            best = count, found, flax, guess
        if count == 0 or unchanged:
            break
    if best is None:
        defined = flax_layers.of_definition(side, flax_module)
        if defined is not None:
            _suppose_flattened(torch_)
            found = _paired(torch_, defined, layer_map)
            found.told = told_by_order(found)
            return found, defined, None
        suggested = "PyTorch's first layer suggests" if called.torch is None else "are given"
        raise ValueError(
            f"flax_module takes none of the inputs that {suggested}; allowed: inputs=[...], numpy arrays in PyTorch's "
            f"layout that it does take, or flax_inputs, or flax_call. It says: {type(error).__name__}: {error}"
        ) from error
    count, found, flax, guess = best
    trial = None if module is None else _Trial(module, flax_module, guess, torch_, called.flax_call)
    distance = trial if count else None
    run = None if runner is None else runner.run(guess)
    torch_.layers, torch_.feeders = _in_order(original, run), None if run is None else run.feeders
    if runner is not None and run is not None:
        torch_.flattened = runner.flattened(guess, run)
        if not torch_layers.may_be_flattened(run.calls, {x.path: x.kind for x in torch_.layers}, guess):
            found = _paired(torch_, flax, layer_map, distance) if distance else found
            return _exchanged(found, torch_, flax, trial, layer_map), flax, guess
    flax.flattened = flattens.flattened(side, flax, guess)
    if run is None and not flax.flattened:
        _suppose_flattened(torch_)
    return _exchanged(_paired(torch_, flax, layer_map, distance), torch_, flax, trial, layer_map), flax, guess


def _exchanged(
    found: Pairing, torch_: Structure, flax: Structure, trial: _Trial | None, layer_map: Mapping[str, str] | None
) -> Pairing:
    """With other partners of layers that look alike where nothing else says which is which: as the numbers show it."""
    orders = [
        [x.path for x in cut.structure(side, cut.of_side(found.recuts, name)).layers]
        for name, side in (("torch", torch_), ("flax", flax))
    ]
    if trial is None:
        found.told = told_by_order(found)
    if trial is None or unpaired(found) or torch_.unseen or flax.unseen:
        return found
    fixed = frozenset(layer_map or ())
    if not Choices(found, orders[0], orders[1], fixed).any(partners_of(found)) or trial.runs is None:
        return found
    trial.runs.fixed = fixed
    search = trial.runs.search(trial.recording, found)
    chosen = search.found()
    if chosen is None and not np.isfinite(search.first.far):
        return found  # one of them did not run
    made = found if chosen is None else with_partners(found, chosen.partners)
    made.told = told(search, chosen)
    return made


class _Trial:
    """How far apart both modules are with random weights, carried as a pairing says."""

    def __init__(
        self, module: torch.nn.Module, flax_module: Any, guess: Guess, torch_: Structure, flax_call: Callable | None
    ) -> None:
        self.module, self.flax_module, self.guess, self.torch_ = module, flax_module, guess, torch_
        self.flax_call = flax_call

    def __call__(self, found: Pairing) -> float:
        return self.runs.distance(lambda: self.recording, found) if self.runs is not None else float("inf")

    @functools.cached_property
    def inputs(self) -> Guess:
        """Random ones, such as no symmetry leaves alike; integers that every table of an embedding has."""
        rng = np.random.default_rng(20150211)
        tables = [
            self.torch_.shapes[full][0]
            for layer in self.torch_.layers
            if layer.kind == "embedding"
            for full in layer.tensors.values()
        ]
        torch, flax = [], []
        given = self.guess.torch.arrays(), self.guess.flax.arrays()
        for a, b in zip(*given, strict=False):
            moved = a.ndim > 1 and b is not a
            if len(given[0]) != len(given[1]) or (moved and b.shape != np.moveaxis(a, 1, -1).shape):
                return self.guess  # in a layout of the user's own
            if a.dtype.kind == "f":
                a = rng.normal(size=a.shape).astype(a.dtype)
            elif a.dtype.kind in "iu" and not a.any():
                a = rng.integers(0, min(tables, default=1), a.shape).astype(a.dtype)
            torch.append(a)
            flax.append(np.moveaxis(a, 1, -1) if moved else a)
        return Guess(self.guess.torch.filled(torch), self.guess.flax.filled(flax))

    @functools.cached_property
    def recording(self) -> Recording:
        """PyTorch's run with random weights."""
        return TorchRuns(self.module, self.inputs.torch, train=False, loss=None).random()

    @functools.cached_property
    def runs(self) -> FlaxRuns | None:
        """Flax's runs on the same inputs; None if it does not take them."""
        try:
            return FlaxRuns(self.flax_module, self.inputs.flax, train=False, loss=None, flax_call=self.flax_call)
        except Exception as error:  # whatever a stranger's module raises
            LOG.info("Flax's module was not tried: %s: %s", type(error).__name__, error)
            return None


@_in_silence
def settle_torch(
    module: torch.nn.Module,
    torch_: Structure,
    flax: Structure,
    called: Calls,
    layer_map: Mapping[str, str] | None,
) -> Pairing:
    """The pairing with variables whose module is not known."""
    runner = torch_layers.Runner(module, torch_)
    torch_call = called.torch
    every = guesses(torch_.layers, torch_.shapes) if torch_call is None else given_guesses(torch_call, called.flax)
    ran = next(((guess, run) for guess in every if (run := runner.run(guess)) is not None), None)
    if ran is None:
        _suppose_flattened(torch_)
    else:
        guess, run = ran
        torch_.layers, torch_.feeders = _in_order(torch_.layers, run), run.feeders
        torch_.flattened = runner.flattened(guess, run)
    found = _paired(torch_, flax, layer_map)
    found.told = told_by_order(found)
    return found


def _candidates(
    runner: torch_layers.Runner | None,
    torch_: Structure,
    flax_module: Any,
    called: Calls,
) -> Iterable[Guess]:
    if called.torch is not None:
        return given_guesses(called.torch, called.flax)
    groups = getattr(flax_module, "feature_group_count", 1)
    every = list(guesses(torch_.layers, torch_.shapes, groups if isinstance(groups, int) else 1))
    if runner is None:
        return every
    return itertools.chain(itertools.islice((g for g in every if runner.run(g) is not None), 3), every)


def _in_order(layers: list[Layer], run: torch_layers.Run | None) -> list[Layer]:
    """The layers that were called first, in that order; the others as they were."""
    if run is None:
        return layers
    place = {path: i for i, path in enumerate(run.order)}
    return sorted(layers, key=lambda layer: place.get(layer.path, len(place)))


def _suppose_flattened(structure: Structure) -> None:
    """Without a run: a matrix that takes a multiple of what the convolution before it gives stands behind a flatten."""
    channels = None
    for layer in structure.layers:
        weight = max((structure.shapes[full] for full in layer.tensors.values()), key=len, default=())
        if len(weight) >= 3 and layer.is_called:
            channels = weight[1] if layer.kind == "conv_transpose" else weight[0]
        elif len(weight) == 2:
            if channels and weight[1] > channels and weight[1] % channels == 0:
                structure.flattened[layer.path] = Flattened(channels, weight[1] // channels, True)
            channels = None


def _paired(
    torch_: Structure, flax: Structure, layer_map: Mapping[str, str] | None, distance: _Trial | None = None
) -> Pairing:
    found = pair(torch_, flax, layer_map, distance)
    reorder_behind_flattens(found, torch_, flax)
    return found
