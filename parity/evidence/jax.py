"""What Flax's module is run for. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.differences import SAME_INPUT
from parity.comparison.forcing import Forcing, OwnInputs
from parity.comparison.rounding import STEP, noise_of, nudged, nudged_variables
from parity.evidence.about import LOST, details
from parity.pairing.agreement import AGREES, distance
from parity.pairing.exchange import Search, told, with_partners
from parity.pairing.layers import pair, pair_begun
from parity.pairing.pairs import Pairing
from parity.pairing.recut import cut
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.answers import ProbeError
from parity.records.distance import error_of
from parity.records.evidence import Evidence, Noise
from parity.records.inputs import Inputs
from parity.records.recording import NETWORK, Recording
from parity.records.structure import of_layers, of_recording
from parity.sides import jax as flax_side
from parity.sides.weight_files import checked, expected_bytes, read_weights


class FlaxRuns:
    """The runs of one module on one set of inputs.

    Args:
      module: a linen module or an `nnx.Module`; it stays as it is.
      inputs: in Flax's layout; a sequence is one of arguments.
      train: train or eval mode.
      loss: of the output; None: the default one.
      flax_call: see `parity.check`.
      lifts: in float64 what the module says to compute in 16 bits is computed in float64, too.
      op_by_op: nothing is compiled, see `sides/jax/record.py`.
      may_stop: what the module raises stands in the recordings, as far as they go, and is not raised.
    """

    def __init__(
        self,
        module: Any,
        inputs: Inputs | Sequence[Any],
        *,
        train: bool,
        loss: Callable | None,
        flax_call: Callable | None = None,
        lifts: bool = False,
        op_by_op: bool = False,
        may_stop: bool = False,
    ) -> None:
        self.module, self.inputs, self.train, self.loss = module, Inputs.of(inputs), train, loss
        self.side = flax_side.side_of(module, flax_call)
        self.side.lifts, self.op_by_op = lifts, op_by_op
        self.layers, self.shapes, self.stop = flax_side.structure(
            self.side, self.inputs, train=train, may_stop=may_stop
        )
        self.variables: dict[str, Any] = {}
        self.carried: dict[str, Any] = {}
        self.filled: set[str] = set()  # parameters that neither PyTorch nor the user has
        self.given: Mapping[str, Any] | None = None
        self.swapped: list[int] = []
        self.rounded: set[str] = set()
        self.programs: dict = {}
        self.fixed: Container[str] = ()  # paired as the user's map says

    def run(
        self,
        variables: Mapping[str, Any] | None = None,
        *,
        float64: bool = True,
        force: Any = None,
        gradients: bool = True,
        step: float = 0.0,
    ) -> Recording:
        """A run on its own or in single-layer mode; inputs and parameters nudged by `step`."""
        given = nudged_variables(self.variables, step) if step else variables or self.variables
        inputs = self.inputs.filled(nudged(self.inputs.arrays(), step)) if step else self.inputs
        if not float64:
            own = {name: a.dtype for name, a in self.shapes.items()}
            given = {name: np.asarray(v).astype(own[name]) if name in own else v for name, v in given.items()}
            inputs = inputs.mapped(self._in_own_dtype)
        found = flax_side.record(
            self.side,
            self.layers,
            given,
            inputs,
            train=self.train,
            float64=float64,
            loss=self._loss(),
            force=force,
            gradients=gradients,
            programs=self.programs,
            op_by_op=self.op_by_op,
        )
        if self.stop is not None and self.stop.hides:
            found.failure = self.stop  # behind it there are no variables, which would be told instead
        return found

    @property
    def own_dtype(self) -> np.dtype:
        """The dtype of the module's parameters, by the first."""
        own = (a.dtype for name, a in self.shapes.items() if name.startswith("params/"))
        return np.dtype(next(own, np.float32))

    def _in_own_dtype(self, a: NDArray) -> NDArray:
        return a.astype(self.own_dtype) if a.dtype.kind == "f" else a

    def carry(
        self,
        torch: Recording,
        layer_map: Mapping[str, str] | None,
        variables: Any = None,
        trial: Callable[[], Recording] | None = None,
    ) -> Translation:
        """Take PyTorch's weights, or the user's own, which are examined; and say which layer, tensor and axis is which.

        What neither has is 0, a scale or variance 1.

        Args:
          torch: PyTorch's run.
          layer_map: see `parity.check`.
          variables: the user's own.
          trial: PyTorch's run with random weights, by which it is seen how layers are cut; by default `torch`.
        """
        self.fixed = frozenset(layer_map or ())
        distance_of = partial(self.distance, trial or (lambda: torch))
        mine = of_layers(self.layers, self.shapes)
        begun = self.stop is not None and self.stop.hides
        pairing = (pair_begun if begun else pair)(of_recording(torch), mine, layer_map, distance_of, train=self.train)
        self.given = None if variables is None else flax_side.flat_variables(variables)
        return self._settled(torch, pairing)

    def _settled(self, torch: Recording, pairing: Pairing) -> Translation:
        self.unsettled = pairing.copy()
        self.layers = pairing.seen_in_flax(self.layers)
        self.side.turns = frozenset(recut.turns for recut in pairing.of_flax()) - {0}
        translation = Translation(cut.recording(torch, pairing.of_torch()), pairing)
        self.rounded = pairing.rounded()
        self._use(pairing.to_flax(torch.tensors))
        # Layer by layer, without gradients: in which order what is flattened arrives, and the network's output.
        translation.settle(cut.recording(self.forced(translation, gradients=False), pairing.of_flax()))
        if translation.hands_on_flattens():
            translation.settle(cut.recording(self.forced(translation, gradients=False), pairing.of_flax()))
        if flattens := dict(translation.flattens()):
            for path, shape in flattens.items():
                pairing.with_flatten(path, shape)
            self._use(pairing.to_flax(torch.tensors))
        self.swapped = translation.swapped()
        return translation

    def exchanged(
        self, torch: Recording, flax: Recording, translation: Translation, trial: Callable[[], Recording]
    ) -> Translation | None:
        """Where both differ: the partners of layers that look alike with which both agree; None: nothing is to be said.

        Args:
          torch: PyTorch's run.
          flax: this module's.
          translation: which layer, tensor and axis is which, as names and the order of calls have it.
          trial: PyTorch's run with random weights.
        """
        pairing = translation.pairing
        look = Search(pairing, translation.torch, lambda _: cut.recording(flax, pairing.of_flax()), self.fixed)
        if not look.choices.any(look.first.partners) or (self.given is None and not look.may_help()):
            return None
        given, self.given = self.given, None
        variables, carried = dict(self.variables), self.carried
        search = self.search(trial(), pairing)
        found = search.found()
        self.given, self.variables, self.carried = given, variables, carried
        pairing.told += told(search, found)
        if found is None or found.partners == search.first.partners:
            return translation if pairing.told else None
        again = with_partners(self.unsettled, found.partners)
        again.told = pairing.told
        self.programs = {}  # these hold other statistics
        return self._settled(torch, again)

    def distance(self, trial: Callable[[], Recording], pairing: Pairing) -> float:
        """How far apart both networks are with PyTorch's weights carried so; `trial` is its run with these."""
        torch, layers, turns = trial(), self.layers, self.side.turns
        self._use(pairing.to_flax(torch.tensors))
        found = distance(torch, self.run(gradients=False))
        if found > AGREES and Translation(cut.recording(torch, pairing.of_torch()), pairing).may_be_flattened():
            self._settled(torch, pairing.copy())
            found = min(found, distance(torch, self.run(gradients=False)))
            self.layers, self.side.turns = layers, turns
        return found

    def search(self, torch: Recording, pairing: Pairing) -> Search:
        """For the partners of layers that look alike; `torch` is PyTorch's run with random weights."""
        self.layers = pairing.seen_in_flax(self.layers)
        self.side.turns = frozenset(recut.turns for recut in pairing.of_flax()) - {0}

        def run(tried: Pairing) -> Recording:
            self._use(tried.to_flax(torch.tensors))
            return cut.recording(self.run(gradients=False), tried.of_flax())

        return Search(pairing, cut.recording(torch, pairing.of_torch()), run, self.fixed)

    def _use(self, carried: Mapping[str, Any]) -> None:
        """The variables of the next runs: the user's, else PyTorch's; what fits neither is filled in."""
        for name, v in self.shapes.items():
            sources = (self.given or {}, carried)
            if name in self.rounded and error_of(np.asarray(sources[0].get(name, 0.0)), carried[name]) <= SAME_INPUT:
                sources = ({}, carried)  # what float32 has rounded, as float64 has it
            known = (a[name] for a in sources if name in a and np.shape(a[name]) == tuple(v.shape))
            self.variables[name] = next(known, None)
            if self.variables[name] is None:
                # What is no parameter and no norm's only the module knows; a 0 might switch off what it is for.
                known_here = {} if name.startswith("params/") or name in self._of_norms else self._initial
                self.variables[name] = known_here.get(name, _filler(name, v.shape))
        for name in self.side.tables:
            own = self._initial[name]
            mine = (self.given or {}).get(name)
            self.variables[name] = mine if mine is not None and np.shape(mine) == own.shape else own
        self.carried = {**self.variables, **{name: a for name, a in carried.items() if name in self.shapes}}
        self.filled = {
            name
            for name in self.shapes
            if name.startswith("params/") and all(name not in a for a in (self.given or {}, carried))
        }

    @property
    def _of_norms(self) -> set[str]:
        """The names of the batch norms' variables."""
        return {name for x in self.layers.values() if x.kind == "batch_norm" for name in x.tensors.values()}

    def _unknown(self) -> list[str]:
        """The names of the user's own variables that the module has not."""
        others = [name for name in self.given or {} if name not in self.shapes]
        # What is no floating point, as a counter, is not among the shapes.
        return [name for name in others if name not in self._initial]

    @cached_property
    def _initial(self) -> dict[str, NDArray]:
        """The variables as the module makes them."""
        with flax_side.environment(float64=False):
            try:
                made = self.side.initial(self.inputs, train=self.train)
            except Exception:  # whatever a stranger's module raises
                if self.stop is None:
                    raise
                made = self.side.made
            return {n: np.asarray(v) for n, v in made.items()}

    def take(self, weights: str | Path | None, other: Evidence | None) -> None:
        """The module's own variables; with those of a file or a dump of Flax's, if given."""
        self.variables = {**self._initial, **flax_side.own_variables(self.module)}
        if other is not None:
            self.variables |= checked(other.free.tensors, self.shapes, self.side.tables, str(weights))
        elif weights is not None:
            given = read_weights(Path(weights), expected=expected_bytes(a.shape for a in self.shapes.values()))
            self.variables |= checked(given, self.shapes, self.side.tables, str(weights))

    def evidence(self) -> Evidence:
        """The run on its own; op by op, and so all that follow, where the gradient is lost in what XLA makes of it."""
        free, notes = self.run(), list[str]()
        if not self.op_by_op and free.loses_gradient:
            self.op_by_op, self.programs, compiled = True, {}, self.programs
            again = self.run()
            if again.loses_gradient:
                self.op_by_op, self.programs = False, compiled
            else:
                free, notes = again, [LOST]
        # What JAX holds of them is kept, and not another copy besides.
        before = self.variables
        held = {name: free.tensors[name] for name, v in before.items() if np.asarray(v).dtype == np.float64}
        self.variables = before | held
        self.carried = {name: held.get(name, v) if v is before[name] else v for name, v in self.carried.items()}
        self._see_filled(free)
        about = flax_side.versions() | details(self.module, self.train, self.loss)
        about["parameters"] = self.own_dtype.name
        found = Evidence(free, given=self.given, details=about, notes=notes)
        own = {name: self._initial[name].dtype for name in self.side.tables if name.startswith("params/")}
        for name, dtype in own.items():
            if dtype.kind == "c" and name not in (self.given or {}):
                found.notes.append(f"{name} is {dtype}, which is not carried: it is the module's own")
        if unknown := self._unknown():
            found.notes.append(f"variables has names that Flax's module has not: {', '.join(unknown)}")
        called = {call.path for call in free.calls}
        unseen = [path for path, layer in self.layers.items() if layer.is_called and path not in called]
        if unseen and free.has_ended:
            found.notes.append(f"inside a jit, remat or scan, which can't be looked into: {', '.join(unseen)}")
        return found

    def _see_filled(self, free: Recording) -> None:
        """The gradients of what is filled in, of the product of two too: each is 0 as long as the other is."""
        hidden = [name for name in self.filled if name in free.gradients and not np.any(free.gradients[name])]
        if not hidden or free.failure is not None:
            return
        random = np.random.default_rng(0)
        noise = {name: random.normal(0, 0.1, self.shapes[name].shape) for name in sorted(self.filled)}
        seen = self.run({**self.variables, **noise})
        free.gradients |= {name: seen.gradients[name] for name in hidden if name in seen.gradients}

    def forced(
        self, translation: Translation, *, gradients: bool = True, passing: Collection[tuple[str, int]] = ()
    ) -> Recording:
        """The run in single-layer mode: every layer on PyTorch's input.

        On that, a layer behind another shape may take PyTorch's weights, though it would not on its own.
        """
        force = Forcing(translation, passing)
        runs = [self.run(force=force, gradients=gradients)]
        if not runs[0].has_ended:
            runs.append(self.run(self.carried, force=force, gradients=gradients))
        return max(runs, key=lambda run: (run.has_ended, len(run.calls)))

    @property
    def _parameters(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(a.shape) for name, a in self.shapes.items() if name.startswith("params/")}

    def check_optimizer(self, transform: Any) -> None:
        """ValueError for an optimiser whose steps can't be made."""
        flax_side.check_transform(transform, self._parameters)

    def add_optimizer(self, evidence: Evidence, transform: Any, translation: Translation | None = None) -> None:
        """What the optimiser answers by itself; element by element what PyTorch's is asked, if that is known."""
        serials = {}
        if translation is not None:
            theirs = translation.torch.tensors
            numbered = {name: np.arange(a.size).reshape(a.shape) for name, a in theirs.items()}
            serials = translation.pairing.to_flax(numbered)
        parameters = self._parameters
        try:
            with flax_side.environment(float64=True):
                evidence.answers = flax_side.answers(transform, parameters, serials)
        except ProbeError as error:
            evidence.notes.append(f"the optimisers' rules were not compared by themselves: {error}")
        if flax_side.is_float32_inside(transform, parameters):
            # A schedule of the integer step, say: float32 whatever the parameters are.
            evidence.noise["optimizer", NETWORK] = float(np.finfo(np.float32).eps)
            evidence.notes.append(
                "Flax's optimiser computes in float32 inside: what is smaller is not seen in its steps"
            )

    def add_steps(self, evidence: Evidence, transform: Any, steps: int) -> None:
        """The parameters before the first step of training and after each."""
        evidence.states = flax_side.flax_steps(
            self.side,
            self.variables,
            self.inputs,
            transform,
            steps,
            train=self.train,
            loss=self._loss(),
            op_by_op=self.op_by_op,
        )

    def _loss(self) -> Callable:
        return self.loss or partial(flax_side.default_loss, swapped=self.swapped)

    def constants(self, *, float64: bool) -> list[NDArray]:
        """The numbers that the module's code brings with it, see `sides/jax/constants.py`."""
        return flax_side.constants(self.side, self.variables, self.inputs, train=self.train, float64=float64)

    def noise(self, free: Recording) -> Noise:
        """How much of the free run is rounding."""
        return noise_of(free, self.run(step=STEP), self.run(step=-STEP)) if free.failure is None else {}

    def add_own_dtype(self, evidence: Evidence) -> None:
        """The run in the module's own dtype, and float64 beside it layer by layer."""
        evidence.own = self.run(float64=False)
        if evidence.own.failure is not None:
            evidence.own = None  # its exception holds arrays, too
            flax_side.forget(self.programs)
            evidence.own = self.run(float64=False)
            flax_side.forget(self.programs)
        own = evidence.own
        if own.has_ended:
            exact = self.run(force=OwnInputs(own), gradients=False)
            products = {path for path, layer in self.layers.items() if layer.kind in (*kinds.PRODUCTS, "other")}
            if exact.failure is not None:
                evidence.notes.append(f"the precision of Flax's products was not looked at: {exact.failure.error}")
            evidence.exact = {call.key: call.output for call in exact.calls if call.path in products}


def _filler(name: str, shape: tuple[int, ...]) -> NDArray:
    last = name.rpartition("/")[2]
    is_scale = kinds.SCALE.fullmatch(last) or kinds.WEIGHT.fullmatch(last)
    is_one = is_scale if name.startswith("params/") else kinds.VAR.fullmatch(last)
    return np.ones(shape) if is_one and len(shape) < 2 else np.zeros(shape)
