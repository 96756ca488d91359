"""What PyTorch's module is run for. Never imports jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from parity.comparison.rounding import STEP, noise_of, nudged
from parity.evidence.about import details
from parity.pairing.layers import pairing_of
from parity.pairing.translation import flat_layout_inputs, translated
from parity.records.answers import ProbeError
from parity.records.distance import error_of
from parity.records.evidence import Evidence, Noise
from parity.records.inputs import Inputs
from parity.records.recording import Recording
from parity.sides import torch as torch_side
from parity.sides.weight_files import expected_of, read_weights

MOST_FLATTENS = 3


class TorchRuns:
    """The runs of one module on one set of inputs.

    Args:
      module: any module; it stays as it is.
      inputs: in PyTorch's layout; a sequence is one of arguments.
      train: train or eval mode.
      loss: of the output; None: the default one.
    """

    def __init__(self, module: Any, inputs: Inputs | Sequence[Any], *, train: bool, loss: Callable | None) -> None:
        self.module, self.train, self.loss = module, train, loss
        self.own = module  # in its own dtype
        self.inputs = Inputs.of(inputs)

    def run(self, *, float64: bool = True, step: float = 0.0) -> Recording:
        """A run on its own; inputs and parameters nudged by `step`."""
        inputs = self.inputs.filled(nudged(self.inputs.arrays(), step)) if step else self.inputs
        module = self.module if float64 else self.own
        return torch_side.record(module, inputs, train=self.train, float64=float64, loss=self.loss, nudge=step)

    def evidence(self) -> Evidence:
        """The run on its own, as far as it went."""
        about = torch_side.versions() | details(self.module, self.train, self.loss)
        about["parameters"] = str(torch_side.own_dtype(self.own)).removeprefix("torch.")
        return Evidence(self.run(), details=about)

    def tables(self, partnered: Collection[str]) -> dict[str, NDArray]:
        """Tensors that are no parameters, by name, but for those that have a partner."""
        return {name: a for name, a in torch_side.tables(self.own).items() if name not in partnered}

    def use(self, tables: Mapping[str, NDArray]) -> None:
        """Go on, in float64, with these in their places."""
        self.module = torch_side.with_tables(self.own, tables) if tables else self.module

    def random(self) -> Recording:
        """The run on its own with random weights: what it gives is chance, unless the other side is the same."""
        module = torch_side.randomised(self.module)
        return torch_side.record(module, self.inputs, train=self.train, float64=True, loss=None)

    def inputs_for_flax(self, free: Recording, given: Inputs | None) -> Inputs:
        """The inputs in Flax's layout; or those given in it, but for float32's rounding, which float64 would show."""
        usual = flat_layout_inputs(self.inputs, free)
        if given is None:
            return usual
        usual_arrays = usual.arrays()

        def exact(i: int, a: NDArray) -> NDArray:
            """By place first: what goes by keywords may stand elsewhere."""
            return next((b for b in (*usual_arrays[i : i + 1], *usual_arrays) if _nearly(a, b)), a)

        return given.filled([exact(i, a) for i, a in enumerate(given.arrays())])

    def check_optimizer(self, factory: Callable) -> None:
        """ValueError for an optimiser whose steps can't be made."""
        torch_side.check_optimizer(self.module, factory)

    def add_optimizer(self, evidence: Evidence, factory: Callable) -> None:
        """What the optimiser answers by itself."""
        free = evidence.free
        frozen = {n for n, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        trained = free.gradients.keys() - frozen
        shapes = {name: tuple(a.shape) for name, a in free.tensors.items() if name in trained}
        try:
            evidence.answers = torch_side.answers(factory, shapes)
        except ProbeError as error:
            evidence.notes.append(f"the optimisers' rules were not compared by themselves: {error}")

    def add_steps(self, evidence: Evidence, factory: Callable, steps: int) -> None:
        """The parameters before the first step of training and after each."""
        evidence.states = torch_side.torch_steps(
            self.module, self.inputs, factory, steps, train=self.train, loss=self.loss
        )

    def noise(self, free: Recording) -> Noise:
        """How much of the free run is rounding."""
        return noise_of(free, self.run(step=STEP), self.run(step=-STEP)) if free.failure is None else {}

    def add_own_dtype(self, evidence: Evidence) -> None:
        """The run in the module's own dtype, and float64 beside it layer by layer."""
        evidence.own = self.run(float64=False)
        evidence.exact, notes = torch_side.products(self.own, evidence.own, train=self.train)
        evidence.notes += dict.fromkeys(notes)

    def take(self, weights: str | Path | None, other: Evidence | None, layer_map: Mapping[str, str] | None) -> None:
        """Go on with copies that have these weights: of a file, or of a dump of either side."""
        if other is None and weights is None:
            return
        self.module, self.own = (torch_side.lifted(self.own, float64=float64) for float64 in (True, False))
        if other is not None and other.free.framework == "flax":
            self._carry(other.free, layer_map)
            return
        expected = expected_of(self.module)
        given = read_weights(Path(str(weights)), expected=expected) if other is None else other.free.tensors
        for module in (self.module, self.own):
            torch_side.load_state(module, given, str(weights) if other is None else "of the dump")

    def _carry(self, other: Recording, layer_map: Mapping[str, str] | None) -> None:
        """Give the module the weights of Flax's dump.

        What stands behind a flatten shows in which order its inputs come once the layers before it have their weights;
        so it takes a run more than there are flattens one behind the other.
        """
        known: dict[str, tuple[int, ...]] | None = None
        for _ in range(MOST_FLATTENS + 1):
            mine = self.run()
            pairing = pairing_of(mine, other, layer_map, train=self.train)
            flattens = dict(translated(mine, other, pairing).flattens())
            for module in (self.module, self.own):
                torch_side.put(module, pairing.to_torch(other.tensors))
            if flattens == known:
                return
            known = flattens


def _nearly(a: NDArray, b: NDArray) -> bool:
    return a.dtype.kind == b.dtype.kind == "f" and error_of(a, b) <= 1e-6
