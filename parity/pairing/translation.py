"""In which arrangement each activation of a run goes from PyTorch to Flax."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.pairing.arrangements import LAST, SAME, SWAP, Arrangement, Slot, fitting, result, usual
from parity.pairing.layouts import goes_last
from parity.pairing.outputs import Outputs, partners, told
from parity.pairing.pairs import Pairing
from parity.pairing.recut import cut
from parity.records import kinds
from parity.records.distance import error_of
from parity.records.inputs import Inputs
from parity.records.recording import Call, Recording


class Translation:
    """Decides once, from shapes and where these leave a choice from numbers, how each array goes across."""

    def __init__(self, torch: Recording, pairing: Pairing) -> None:
        self.torch, self.pairing = torch, pairing
        self.pair_of = {pair.torch.path: pair for pair in pairing.layers}
        self.torch_path = {pair.flax.path: pair.torch.path for pair in pairing.layers}
        self.calls = {call.key: call for call in torch.calls}
        self.position = {call.key: i for i, call in enumerate(torch.calls)}
        self.chosen: dict[Slot, Arrangement] = {}
        self.settled: list[tuple[int, int]] = []  # outputs of the network, as `results` has them

    def torch_call(self, flax_key: tuple[str, int]) -> Call | None:
        """PyTorch's call that belongs to this call of Flax, as Flax's module makes it or as its layers are cut."""
        key = self.pairing.key_in_torch(flax_key)
        return None if key is None else self.calls.get(key)

    def input(self, call: Call, i: int, arrived: Any = None) -> NDArray:
        """The i-th input of PyTorch's call in Flax's layout; `arrived` is Flax's, for its shape."""
        kind = self.pair_of[call.path].kind
        flattened = self._before_flatten(call, kind)
        return self._arranged(Slot(call.key, "input", i), call.inputs[i], kind, arrived, flattened)

    def output(self, call: Call, like: Any = None) -> NDArray:
        """The output of PyTorch's call in Flax's layout."""
        kind = self.pair_of[call.path].kind
        return self._arranged(Slot(call.key, "output"), call.output, kind, like)

    def result(self, i: int, like: Any = None) -> NDArray:
        """The i-th output of PyTorch's network in Flax's layout."""
        return self._arranged(result(i), self.torch.outputs[i], kinds.OTHER, like, self._channels_before())

    def results(self, flax: Outputs) -> list[tuple[int, int]]:
        """(PyTorch's place, Flax's) of the network's outputs that belong together."""
        return partners(self.torch.named_outputs, flax)

    def moved_outputs(self, flax: Outputs) -> Iterator[str]:
        """A sentence on each output of the network that has its axes in another order."""
        ways, ours = {SWAP: "the first two axes exchanged", LAST: "axis 1 last"}, self.torch.named_outputs
        for i, j in self.results(flax):
            way = ways.get(self.chosen.get(result(i), SAME))
            if way is not None:
                shapes = f"{list(ours[i][1].shape)} in PyTorch, {list(flax[j][1].shape)} in Flax"
                yield f"{told(ours, i)} is {shapes}: the same with {way}"

    def gradient(self, slot: Slot, gradient: NDArray | None) -> NDArray | None:
        """A gradient, arranged as what it belongs to."""
        return None if gradient is None else self.way(slot).of_gradient(gradient)

    def way(self, slot: Slot) -> Arrangement:
        """How what stands there goes across; as it is, where that has not been asked yet."""
        return self.chosen.get(slot, SAME)

    def _arranged(
        self, slot: Slot, a: NDArray, kind: str, like: Any, flattened: Sequence[tuple[int, ...]] = ()
    ) -> NDArray:
        if slot not in self.chosen:
            shape = usual(kind, a).of(a).shape if like is None else np.shape(like)
            self.chosen[slot] = fitting(kind, a, shape, flattened, inside=not slot.is_result)[0]
        return self.chosen[slot].of(a)

    def settle(self, forced: Recording) -> None:
        """Where shapes leave a choice of arrangements, chooses by what arrived in single-layer mode."""
        for mine in forced.calls:
            call = self.torch_call(mine.key)
            if call is None:
                continue
            kind, first = self.pair_of[call.path].kind, None
            flattened = self._before_flatten(call, kind)
            for i, (a, arrived) in enumerate(zip(call.inputs, mine.arrived, strict=False)):
                possible = fitting(kind, a, arrived.shape, flattened, inside=True)
                # Where the kind says it, numbers that happen to agree must not: it may be the mistake.
                by_kind = kind in kinds.CHANNELS_SECOND and a.ndim > 2
                chosen = possible[0] if by_kind else _closest(possible, a, arrived)
                self.chosen[Slot(call.key, "input", i)] = chosen
                first = first or chosen
            flat = () if kind == "linear" else flattened
            possible = fitting(kind, call.output, mine.output.shape, flat, inside=True)
            self.chosen[Slot(call.key, "output")] = first if first in possible else possible[0]
        self.settled = self.results(forced.named_outputs)
        for i, j in self.settled:
            a, output = self.torch.outputs[i], forced.outputs[j]
            possible = fitting(kinds.OTHER, a, output.shape, self._channels_before())
            self.chosen[result(i)] = _closest(possible, a, output)

    def _before_flatten(self, call: Call, kind: str) -> list[tuple[int, ...]]:
        """What can have been flattened to this layer's input: (C, H, W) of as many numbers."""
        if kind not in kinds.FLAT or not call.inputs or call.inputs[0].ndim != 2:
            return []
        return self._shapes(self.torch.calls[: self.position[call.key]], call.inputs[0].shape[-1])

    def may_be_flattened(self) -> bool:
        """Whether a layer may read what was flattened."""
        return any(self._before_flatten(c, self._kind(c)) for c in self.torch.calls if c.path in self.pair_of)

    def _channels_before(self) -> list[tuple[int, ...]]:
        size = self.torch.outputs[0].shape[-1] if self.torch.outputs and self.torch.outputs[0].ndim else 0
        return self._shapes(self.torch.calls, size)

    def _shapes(self, before: Sequence[Call], size: int) -> list[tuple[int, ...]]:
        images = [c.output for c in before if c.output.ndim > 2 and self._kind(c) in kinds.CHANNELS_SECOND]
        images = images or [a for a in self.torch.inputs if a.dtype.kind == "f" and a.ndim > 2]
        image = images[-1] if images else None
        if image is None or size % image.shape[1] or size == image.shape[1]:
            return []
        channels, pixels = image.shape[1], size // image.shape[1]
        if image.ndim == 3:
            return [(channels, pixels)]
        if image.ndim == 4:
            heights = [h for h in range(1, pixels + 1) if pixels % h == 0]
            aspect = image.shape[2] / image.shape[3]
            heights.sort(key=lambda h: abs(np.log(h * h / pixels / aspect)))
            return [(channels, h, pixels // h) for h in heights[:6]]
        edge = round(pixels ** (1 / (image.ndim - 2)))
        return [(channels, *[edge] * (image.ndim - 2))] if edge ** (image.ndim - 2) == pixels else []

    def _kind(self, call: Call) -> str:
        return self.pair_of[call.path].kind if call.path in self.pair_of else kinds.OTHER

    def flattens(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(PyTorch's path, (C, *spatial)) of every linear layer whose inputs stand in another order in Flax."""
        for slot, arrangement in self.chosen.items():
            if arrangement.name == "flatten" and not slot.is_result:
                yield slot.key[0], arrangement.sizes

    def hands_on_flattens(self) -> bool:
        """Whether a layer behind a flatten, as a norm does, hands the order on to the next."""
        outputs = (a for slot, a in self.chosen.items() if slot.part == "output" and not slot.is_result)
        return any(a.name == "flatten" for a in outputs)

    def swapped(self) -> list[int]:
        """Flax's outputs whose first two axes are exchanged."""
        return [j for i, j in self.settled if self.chosen.get(result(i)) == SWAP]


def _closest(possible: list[Arrangement], a: NDArray, like: NDArray) -> Arrangement:
    """The arrangement in which the numbers agree best; the usual one unless another is clearly closer."""
    if len(possible) == 1 or possible[0].of(a).shape != like.shape:
        return possible[0]
    # By correlation, of either sign: another activation or a factor may have changed the values, not which of them
    # are large and which small (or, where it falls, small and large).
    distances = [1 - abs(_correlation(arrangement.of(a), like)) for arrangement in possible]
    best = int(np.argmin(distances))
    return possible[best] if distances[best] < 0.7 * distances[0] else possible[0]


def _correlation(a: NDArray, b: NDArray) -> float:
    a, b = (np.where(np.isfinite(v), v, 0).ravel() for v in (a, b))
    if np.iscomplexobj(a) or np.iscomplexobj(b):  # of real numbers, zeros beside them would shift the mean
        a, b = (np.concatenate([v.real, v.imag]) for v in (a, b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def flat_layout_inputs(inputs: Inputs, torch: Recording | None = None) -> Inputs:
    """The network's inputs in Flax's layout: floating arrays of rank 3 and more channels last, see `goes_last`.

    With PyTorch's recording, those that go straight into a layer that has its channels last in PyTorch too (linear,
    layer norm, attention) stay as they are.
    """
    readers = [] if torch is None else [c for c in torch.calls if torch.layers[c.path].kind in kinds.CHANNELS_LAST]

    def stays(a: NDArray) -> bool:
        return any(x.shape == a.shape and error_of(x, a) <= 1e-6 for call in readers for x in call.inputs)

    return inputs.mapped(lambda a: np.moveaxis(a, 1, -1) if goes_last(a) and not stays(a) else a)


def translated(torch: Recording, flax: Recording, pairing: Pairing) -> Translation:
    """Decides from both runs how each array goes across, and what stands behind a flatten."""
    translation = Translation(cut.recording(torch, pairing.of_torch()), pairing)
    translation.settle(cut.recording(flax, pairing.of_flax()))
    for path, shape in dict(translation.flattens()).items():
        pairing.with_flatten(path, shape)
    return translation
