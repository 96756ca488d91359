"""The two recordings side by side, in Flax's layout: every difference, each side on its own or in single-layer mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.comparison.kept import kept_difference
from parity.comparison.shapes import Shapes, shapes_of
from parity.pairing.arrangements import Arrangement, Slot, fitting, result
from parity.pairing.pairs import LayerPair, Pairing
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.recording import NETWORK, Call, Layer, Recording

# What float32's rounding of an input leaves.
SAME_INPUT = 1e-6


class Difference(NamedTuple):
    """One number that both sides have: how far apart.

    Attributes:
      phase: see `parity.records.recording.PHASES`.
      key: PyTorch's call (layer, index); `NETWORK` is the network itself.
      flax_layer: Flax's path.
      quantity: "input" | "output" | "output gradient" | "input gradient" | a parameter's or statistic's local name.
      error: see `error_of`; NaN: it could not be compared.
      shapes: of both, where it is infinite as these differ.
    """

    phase: str
    key: tuple[str, int]
    flax_layer: str
    quantity: str
    error: float
    shapes: Shapes | None = None


class Compared(NamedTuple):
    """One array that both sides have, in Flax's layout.

    Attributes:
      phase, key, flax_layer, quantity: see `Difference`.
      given: Flax's.
      truth: PyTorch's; None, as `given`, where there is none to be compared.
      floor: see `error_of`.
      source: PyTorch's in its own layout, of which `way` makes the truth; None where that is not known.
      way: from PyTorch's layout to Flax's.
    """

    phase: str
    key: tuple[str, int]
    flax_layer: str
    quantity: str
    given: NDArray | None = None
    truth: NDArray | None = None
    floor: float = 0.0
    source: NDArray | None = None
    way: Callable[[NDArray], NDArray] | None = None

    @property
    def difference(self) -> Difference:
        """How far apart; infinitely, where there is nothing to be compared."""
        error, shapes = float("inf"), None
        if self.given is not None and self.truth is not None:
            error = error_of(self.given, self.truth, self.floor)
            if self.given.shape != self.truth.shape:
                shapes = shapes_of(self.truth if self.source is None else self.source, self.given, self.way)
        return Difference(self.phase, self.key, self.flax_layer, self.quantity, error, shapes)


def differences(translation: Translation, flax: Recording, *, train: bool) -> list[Difference]:
    """Every difference of a run of Flax's from PyTorch's: forward in order, backward from behind, then statistics."""
    return [*_not_finite(translation), *(c.difference for c in compared(translation, flax, train=train))]


def compared(translation: Translation, flax: Recording, *, train: bool) -> Iterator[Compared]:
    """Every array that is compared there, in the same order."""
    torch = translation.torch
    calls = {call.key: call for call in flax.calls}
    keys = [
        (call, (pair.flax.path, call.index)) for call in torch.calls if (pair := translation.pair_of.get(call.path))
    ]
    for call, flax_key in keys:
        mine = calls.get(flax_key)
        if mine is None:
            # A layer that was never seen is inside a transformation of the user's own.
            if flax.has_ended and any(c.path == flax_key[0] for c in flax.calls):
                yield Compared("forward", call.key, flax_key[0], "output")
            continue
        looked_up = _is_looked_up_alike(translation, call, mine)
        for i, arrived in enumerate(mine.arrived[: len(call.inputs)]):
            if looked_up and {arrived.dtype.kind, call.inputs[i].dtype.kind} <= {*"iu"}:
                continue
            truth, way = translation.input(call, i, arrived), translation.way(Slot(call.key, "input", i))
            yield Compared("forward", call.key, flax_key[0], "input", arrived, truth, source=call.inputs[i], way=way.of)
        truth, way = translation.output(call, mine.output), translation.way(Slot(call.key, "output"))
        yield Compared("forward", call.key, flax_key[0], "output", mine.output, truth, source=call.output, way=way.of)
    if flax.has_ended and torch.has_ended:
        pairs = translation.results(flax.named_outputs)
        for _ in range(max(len(torch.outputs), len(flax.outputs)) - len(pairs)):
            yield Compared("forward", NETWORK, "", "output")
        for i, j in pairs:
            yield _output(translation, i, flax.outputs[j], flax)
    if flax.gradients and torch.gradients:
        yield from _backward(translation, flax, keys, calls)
    if train and flax.has_ended and torch.has_ended:
        for _, pair in translation.pair_of.items():
            for t in pair.tensors:
                if t.torch_name in pair.torch.statistics and pair.flax.tensors[t.flax_name] in flax.new_statistics:
                    source = torch.new_statistics[pair.torch.tensors[t.torch_name]]
                    given = flax.new_statistics[pair.flax.tensors[t.flax_name]]
                    place = "statistics", (pair.torch.path, 0), pair.flax.path, t.torch_name
                    yield Compared(*place, given, t.to_flax(source), source=source, way=t.to_flax)


def _is_looked_up_alike(translation: Translation, call: Call, mine: Call) -> bool:
    """Whether an embedding gives the same on both sides: then it is its own matter what integers it is given.

    One that finds the positions itself is given the tokens; what it looks up shows in what it gives.
    """
    if translation.pair_of[call.path].kind != "embedding":
        return False
    return error_of(mine.output, translation.output(call, mine.output)) <= SAME_INPUT


def _output(translation: Translation, i: int, output: NDArray, flax: Recording) -> Compared:
    """PyTorch's i-th output. An empty one beside others agrees by its shape."""
    truth, way = translation.result(i, output), translation.way(result(i))
    if truth.shape == output.shape and not output.size and any(y.size for y in flax.outputs):
        output = truth = np.zeros(1)
    source = translation.torch.outputs[i]
    return Compared("forward", NETWORK, "", "output", output, truth, source=source, way=way.of)


def input_gradients(torch: Recording, flax: Recording) -> Iterator[Difference]:
    """The gradients by the network's inputs, of those that are the same but for their layout."""
    for a, b, truth, given in zip(torch.inputs, flax.inputs, torch.input_gradients, flax.input_gradients, strict=False):
        if truth is None or given is None:
            continue
        same = (way for way in fitting(kinds.OTHER, a, b.shape) if error_of(b, way.of(a)) <= SAME_INPUT)
        if (way := next(same, None)) is not None:
            yield Difference("backward", NETWORK, "", "input gradient", error_of(given, way.of(truth)))


def alone(pairing: Pairing, torch: Recording, flax: Recording) -> tuple[list[Layer], list[Layer]]:
    """The layers of either side that have no partner on the other and are used: called, or with a gradient.

    Also those that have one, but are never called, as a module whose own parameters its code uses: with the tensors
    that the other side lacks. What is called is judged by what it gives.
    """
    left = tuple(map(set, pairing.left()))
    left[0].difference_update(_tied(left[0], [name for name, _, _ in pairing.tensors()], torch))

    def used(layer: Layer, run: Recording, names: set[str]) -> bool:
        mine = [full for full in layer.tensors.values() if full in names]
        called = any(call.path == layer.path for call in run.calls)
        return any(called or np.any(run.gradients.get(full, np.zeros(()))) for full in mine)

    def rest(layer: Layer, names: Sequence[str]) -> Layer:
        return replace(layer, tensors={name: layer.tensors[name] for name in names})

    silent = [p for p in pairing.layers if not p.torch.is_called and not p.flax.is_called]
    ours = [*pairing.torch_alone, *(rest(p.torch, p.torch_left) for p in silent)]
    theirs = [*pairing.flax_alone, *(rest(p.flax, p.flax_left) for p in silent)]
    return (
        [layer for layer in ours if used(layer, torch, left[0])],
        [layer for layer in theirs if used(layer, flax, left[1])],
    )


def drop_second_names(pairing: Pairing, torch: Recording) -> None:
    """Of what is left in PyTorch's layers what is a second name of a tensor that has a partner: it needs none.

    As the weight of a head that is the embedding's, beside a bias that Flax's head has alone. What has no gradient may
    be equal by chance, as biases of 0 are, and stays.
    """
    carried = [name for name, _, _ in pairing.tensors()]
    for pair in pairing.layers:
        names = [pair.torch.tensors[local] for local in pair.torch_left]
        second = _tied([name for name in names if np.any(torch.gradients.get(name, np.zeros(())))], carried, torch)
        pair.torch_left = [local for local in pair.torch_left if pair.torch.tensors[local] not in second]


def _tied(left: Iterable[str], carried: Sequence[str], torch: Recording) -> set[str]:
    """Those of PyTorch's tensors that are a second name of one that has a partner, as of an embedding tied to the head.

    Under either name it holds the same numbers, and has the same gradient: that through both its layers.
    """
    return {name for name in left if any(is_one_tensor(torch, name, other) for other in carried)}


def is_one_tensor(run: Recording, name: str, other: str) -> bool:
    """Whether these are two names of one tensor."""

    def same(a: NDArray | None, b: NDArray | None) -> bool:
        return a is not None and b is not None and np.array_equal(a, b)

    return same(run.tensors.get(name), run.tensors.get(other)) and same(
        run.gradients.get(name), run.gradients.get(other)
    )


def stopped(translation: Translation, flax: Recording) -> list[str]:
    """PyTorch's names of the parameters that it does not train (requires_grad=False), and Flax gives no gradient."""
    layers = translation.torch.layers.values()
    frozen = {layer.tensors[n] for layer in layers for n in layer.config.get(kinds.FROZEN, ()) if n in layer.tensors}
    return [
        t
        for t, f, _ in translation.pairing.tensors()
        if t in frozen and f in flax.gradients and not np.any(flax.gradients[f])
    ]


def untrained_buffers(translation: Translation, flax: Recording) -> list[str]:
    """PyTorch's names of the buffers that are a parameter in Flax with a gradient, by which Flax's may be trained."""
    torch, loose = translation.torch, translation.pairing.loose
    return [t for t, f, _ in loose if torch.gradients and t not in torch.gradients and np.any(flax.gradients.get(f, 0))]


def _not_finite(translation: Translation) -> Iterator[Difference]:
    """PyTorch's weights that hold NaN or infinity: what they are multiplied with cannot be compared."""
    flax_path = {pair.torch.path: pair.flax.path for pair in translation.pairing.layers}
    for name, _, _ in translation.pairing.tensors():
        a = translation.torch.tensors.get(name, np.zeros(()))
        # A buffer may hold an infinity on purpose, as a mask does.
        is_parameter = name in translation.torch.gradients
        if not (np.isfinite(a) if is_parameter else ~np.isnan(a)).all():
            path, _, local = name.rpartition(".")
            yield Difference("forward", (path, 0), flax_path.get(path, ""), local, float("nan"))


def _backward(translation: Translation, flax: Recording, keys, calls) -> Iterator[Compared]:
    torch = translation.torch
    # A gradient that is 0 by cancellation is compared with what cancelled: no more than 1e-6 of the largest there is.
    activations = [g for c in torch.calls for g in (*c.input_gradients, c.output_gradient) if g is not None]
    floor = 1e-6 * max((float(np.abs(g).max(initial=0)) for g in activations), default=0.0)
    largest = 1e-6 * max((float(np.abs(g).max(initial=0)) for g in torch.gradients.values()), default=0.0)
    still = {*stopped(translation, flax)}
    for i, j in translation.results(flax.named_outputs):
        gradient = flax.output_gradients[j] if j < len(flax.output_gradients) else None
        truth = torch.output_gradients[i] if i < len(torch.output_gradients) else None
        source, truth = truth, translation.gradient(result(i), truth)
        if gradient is not None and truth is not None and (gradient.size or truth.shape != gradient.shape):
            way = translation.way(result(i)).of
            yield Compared("loss", NETWORK, "", "gradient", gradient, truth, source=source, way=way)
    for call, flax_key in reversed(keys):
        mine, pair = calls.get(flax_key), translation.pair_of[call.path]
        if mine is None or mine.output_gradient is None or call.output_gradient is None:
            continue
        learned = {pair.torch.tensors[t.torch_name] for t in pair.tensors} & torch.gradients.keys()
        if learned and learned <= still and not np.any(mine.output_gradient):
            continue  # nothing there is trained, and on the other side nothing arrives: it stops in front of it
        place, arranged = ("backward", call.key, flax_key[0]), translation.way(Slot(call.key, "output"))
        dy = arranged.of_gradient(call.output_gradient)
        yield _gradient(place, "output gradient", mine.output_gradient, call.output_gradient, arranged, floor)
        if call.index == max(c.index for c, k in keys if c.path == call.path):
            yield from _parameters(translation, flax, pair, call, dy, largest, still)
        for i, gradient in enumerate(mine.input_gradients[: len(call.input_gradients)]):
            source, arranged = call.input_gradients[i], translation.way(Slot(call.key, "input", i))
            if gradient is not None and source is not None:
                yield _gradient(place, "input gradient", gradient, source, arranged, floor)
    compared = {call.path for call, flax_key in keys if flax_key in calls}
    for torch_name, flax_name, t in translation.pairing.tensors():
        owner = next((p for p in translation.pair_of.values() if torch_name in p.torch.tensors.values()), None)
        if (
            (owner is None or owner.torch.path not in compared)
            and torch_name not in still
            and torch_name in torch.gradients
            and flax_name in flax.gradients
        ):
            source, path = torch.gradients[torch_name], flax_name.partition("/")[2].rpartition("/")[0]
            tensor = "backward", (torch_name.rpartition(".")[0], 0), path, f"{t.torch_name} gradient"
            yield Compared(*tensor, flax.gradients[flax_name], t.to_flax(source), largest, source, t.to_flax)


def _gradient(
    place: tuple[str, tuple[str, int], str],
    quantity: str,
    given: NDArray,
    source: NDArray,
    arranged: Arrangement,
    floor: float,
) -> Compared:
    """By what stands in a place inside; where that is once for all examples here and for each there, of all."""

    def way(g: NDArray) -> NDArray:
        return arranged.summed(arranged.of_gradient(g))

    return Compared(*place, quantity, arranged.summed(given), way(source), floor, source, way)


def _parameters(
    translation, flax, pair: LayerPair, call: Call, dy: NDArray, largest: float, still: Collection[str]
) -> Iterator[Compared]:
    torch = translation.torch
    for t in pair.tensors:
        torch_name, flax_name = pair.torch.tensors[t.torch_name], pair.flax.tensors[t.flax_name]
        if torch_name not in torch.gradients or flax_name not in flax.gradients or torch_name in still:
            continue
        source = torch.gradients[torch_name]
        # A bias before a batch norm is a gauge: what its gradient sums up cancels to 0.
        is_bias = kinds.SHIFT.fullmatch(t.flax_name.rpartition("/")[2]) is not None
        summed = float(np.abs(dy).sum(tuple(range(dy.ndim - 1))).max(initial=0)) if is_bias else 0.0
        place, floor = ("backward", call.key, pair.flax.path, f"{t.torch_name} gradient"), max(largest, summed)
        yield Compared(*place, flax.gradients[flax_name], t.to_flax(source), floor, source, t.to_flax)


Projections = Callable[[Sequence[Any]], list[NDArray]]
Tensors = Mapping[str, NDArray]


# Of the way that a parameter has gone: a step of float64 rounds at 1e-15, and training carries that along.
STEP_BOUND = 1e-8


def step_differences(
    pairing: Pairing, recording: Recording, torch_states: Sequence[Mapping], flax_states: Sequence[Mapping]
) -> list[Difference]:
    """How far parameters and kept statistics are apart after each step, relative to the way that they have gone.

    A bias before a batch norm is left out: its gradient is rounding alone, which Adam turns into steps. The moving mean
    that follows it is freed of them, see `kept_difference`.
    """
    found = []
    flax_path = {pair.torch.path: pair.flax.path for pair in pairing.layers}
    largest = max((np.abs(g).max(initial=0) for g in recording.gradients.values()), default=0.0)

    def is_gauge(name: str) -> bool:
        # Exactly 0 is the gradient of what the loss does not depend on: that may only decay.
        return bool(0 < np.abs(recording.gradients.get(name, np.zeros(1))).max(initial=0) < 1e-11 * largest)

    both = {
        (torch_name, flax_name): ([t.to_flax(a[torch_name]) for a in torch_states], [a[flax_name] for a in flax_states])
        for torch_name, flax_name, t in pairing.tensors()
        if torch_states and flax_states and torch_name in torch_states[0] and flax_name in flax_states[0]
    }
    gauges = [a for (name, _), a in both.items() if is_gauge(name)]
    for number in range(1, min(len(torch_states), len(flax_states))):
        trained = [truths for (name, _), (truths, _) in both.items() if name in recording.gradients]
        floor = 1e-6 * max((np.abs(a[number] - a[0]).max(initial=0) for a in trained), default=0.0)
        for (name, _), (truths, givens) in both.items():
            if is_gauge(name) or truths[number].shape != givens[number].shape:
                continue
            way, least, given = truths[number] - truths[0], floor, givens[number] - truths[0]
            if name not in recording.gradients:
                # A mean may be 0 by cancellation: it is held against the size of what its norm has kept.
                path = name.rpartition(".")[0]
                kept = (a[number] for (other, _), (a, _) in both.items() if other.rpartition(".")[0] == path)
                least = max(floor, 1e-6 * max(float(np.abs(a).max(initial=0)) for a in kept))
                upto = [(ours[: number + 1], theirs[: number + 1]) for ours, theirs in gauges]
                given = way + kept_difference(truths[: number + 1], givens[: number + 1], upto)
            path, _, local = name.rpartition(".")
            quantity, error = f"{local} after step {number}", error_of(given, way, least)
            found.append(Difference("optimizer", (path, 0), flax_path.get(path, ""), quantity, error))
    return found


def unlike(pairing: Pairing, torch: Mapping[str, NDArray], flax: Mapping[str, NDArray]) -> list[str]:
    """Flax's names of the tensors that are others than PyTorch's, by more than float32's rounding."""

    def is_same(a: NDArray, b: NDArray) -> bool:
        return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= 1e-6 * np.abs(b).max(initial=0))

    both = [(t, f, pair) for t, f, pair in pairing.tensors() if pair.fits and t in torch and f in flax]
    return [f for t, f, pair in both if not is_same(flax[f], pair.to_flax(torch[t]))]
