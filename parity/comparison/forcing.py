"""Single-layer mode: what a layer is given in the place of what arrives there."""

from __future__ import annotations

from collections.abc import Collection

from parity.pairing.arrangements import Slot, result
from parity.pairing.pairs import Pairing
from parity.pairing.translation import Translation
from parity.records.recording import Recording


class Forcing:
    """Single-layer mode: every layer of Flax gets PyTorch's input, and what follows PyTorch's output.

    Args:
      translation: which layer, tensor and axis is which.
      passing: PyTorch's calls whose inputs and outputs stay Flax's own where they have another shape.
    """

    def __init__(self, translation: Translation, passing: Collection[tuple[str, int]] = ()) -> None:
        self.translation, self.passing = translation, passing

    def input(self, key, i, arrived):
        """See `records.side.Force`."""
        call = self.translation.torch_call(key)
        if call is None or i >= len(call.inputs) or call.inputs[i].dtype.kind != "f":
            return None
        value = self.translation.input(call, i, arrived)
        if call.key in self.passing and value.shape != arrived.shape:
            return None
        gradients = call.input_gradients
        return value, self.translation.gradient(
            Slot(call.key, "input", i), gradients[i] if i < len(gradients) else None
        )

    def output(self, key, output):
        """See `records.side.Force`."""
        call = self.translation.torch_call(key)
        if call is None:
            return None
        value = self.translation.output(call, output)
        if call.key in self.passing and value.shape != output.shape:
            return None
        return value, self.translation.gradient(Slot(call.key, "output"), call.output_gradient)

    def result(self, i, outputs):
        """See `records.side.Force`."""
        torch = self.translation.torch
        place = next((t for t, f in self.translation.results(outputs) if f == i), None)
        if place is None:
            return None
        value = self.translation.result(place, outputs[i][1])
        gradient = torch.output_gradients[place] if place < len(torch.output_gradients) else None
        return value, self.translation.gradient(result(place), gradient)


def forcing(torch: Recording, pairing: Pairing) -> Forcing:
    """Single-layer mode on the arrays of a dump."""
    return Forcing(Translation(torch, pairing))


class OwnInputs:
    """Gives every layer the input that it had in another run of the same side (see `records.side.Force`)."""

    def __init__(self, run: Recording) -> None:
        self.calls = {call.key: call for call in run.calls}

    def input(self, key, i, arrived):
        """The input of that run."""
        call = self.calls.get(key)
        return None if call is None or i >= len(call.inputs) else (call.inputs[i], None)

    def output(self, key, output):
        """Left alone."""

    def result(self, i, outputs):
        """Left alone."""
