"""`parity.check`, step by step: what is run, what is compared, what is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import torch
from flax import nnx
from numpy.typing import NDArray

from parity.comparison.bounds import BACKWARD_BOUND, FORWARD_BOUND, MOST_CARRIED, MOST_NOISE
from parity.comparison.differences import STEP_BOUND, Difference, alone, differences, step_differences
from parity.comparison.forcing import Forcing, OwnInputs
from parity.comparison.rounding import Noise, nudged, rounding
from parity.diagnosis import places
from parity.diagnosis.finding import PHASE_ORDER, Located, in_order
from parity.diagnosis.loss import loss_findings
from parity.diagnosis.parameters.conversion import conversion_findings
from parity.diagnosis.product.rounded import precision_findings
from parity.evidence.optimizers import rule_findings
from parity.pairing.layers import Pairing, pair
from parity.pairing.translation import Translation, apply_layout, flat_layout_inputs
from parity.records.distance import error_of
from parity.records.recording import NETWORK, Recording
from parity.records.structure import of_layers, of_recording
from parity.report import Report, verdict
from parity.report.verdict import layer_rows, which
from parity.sides import jax as flax_side
from parity.sides import torch as torch_side
from parity.sides.jax.train import flax_steps
from parity.sides.torch.train import torch_steps


class Comparison:
    """One comparison, step by step."""

    def __init__(self, torch_module, flax_module, inputs, train, flax_inputs, flax_call, layer_map, loss) -> None:
        self.torch_module, self.flax_module = torch_module, flax_module
        self.inputs, self.train_mode = [np.asarray(a) for a in inputs], train
        self.torch_loss: Callable | None = None if loss is None else loss[0]
        self.jax_loss: Callable | None = None if loss is None else loss[1]
        self.torch = self._torch_run(float64=True)
        self.flax_inputs = flat_layout_inputs(self.inputs, self.torch)
        if flax_inputs is not None:
            given = [np.asarray(a) for a in flax_inputs]
            # The same but for float32's rounding counts as the same: in float64 it would show everywhere.
            same = [
                len(given) == len(self.flax_inputs) and _nearly(a, b)
                for a, b in zip(given, self.flax_inputs, strict=False)
            ]
            self.flax_inputs = [b if s else a for a, b, s in zip(given, self.flax_inputs, same, strict=False)] or given
        self.notes: list[str] = []
        self.not_run: list[str] = []
        self.located: list[Located] = []
        self.programs: dict = {}
        self.side = flax_side.side_of(flax_module, flax_call)
        self.flax_layers, shapes = flax_side.structure(self.side, self.flax_inputs, train=train)
        self.initial = shapes
        self.pairing: Pairing = pair(of_recording(self.torch), of_layers(self.flax_layers, shapes), layer_map)
        self.translation = Translation(self.torch, self.pairing)
        self.free: list[Difference] = []
        self.local: list[Difference] = []
        self.rows32: dict[tuple, tuple[float, float]] = {}
        self.noise: Noise | None = None
        self.dropout_off = False

    def _torch_run(self, *, float64: bool, inputs: Sequence[NDArray] | None = None, nudge: float = 0.0) -> Recording:
        return torch_side.record(
            self.torch_module,
            self.inputs if inputs is None else inputs,
            train=self.train_mode,
            float64=float64,
            loss=self.torch_loss,
            nudge=nudge,
        )

    def _flax_run(
        self, *, float64: bool = True, force: Any = None, gradients: bool = True, nudge: float = 0.0, **kwargs: Any
    ) -> Recording:
        return flax_side.record(
            self.side,
            self.flax_layers,
            nudged(self.variables, nudge) if nudge else self.variables,
            kwargs.pop("inputs", self.flax_inputs),
            train=self.train_mode,
            float64=float64,
            loss=self.jax_loss,
            projections=self._projections,
            force=force,
            gradients=gradients,
            programs=self.programs,
            **kwargs,
        )

    def _projections(self, outputs: Sequence[Any]) -> list[NDArray]:
        """The default loss's weights in the layout of Flax's outputs."""
        weights = torch_side.projections(self.torch.outputs)
        moved = [apply_layout(self.translation.chosen.get(("result", i), ("same",)), w) for i, w in enumerate(weights)]
        fallback = torch_side.projections(outputs)
        return [
            moved[i] if i < len(moved) and moved[i].shape == v.shape else fallback[i] for i, v in enumerate(outputs)
        ]

    def carry(self, variables: Any) -> None:
        """Fills in Flax's variables: PyTorch's, or the user's own, which are examined."""
        expected = self._complete(self.pairing.to_flax(self.torch.tensors))
        given = None if variables is None else self._given(variables)
        self.variables = expected if given is None else self._usable(given, expected)
        # Layer by layer, without gradients: in which order what is flattened arrives, and the network's output.
        try:
            self.translation.settle(self._flax_run(force=Forcing(self.translation), gradients=False))
        except Exception as error:
            # Layers of other shapes: what each side does on its own will show the first of them.
            self.notes.append(f"Flax cannot run layer by layer: {type(error).__name__}")
        if any(which[-1] == "output" and layout[0] == "flatten" for which, layout in self.translation.chosen.items()):
            # A norm behind a flatten hands the order on.
            self.translation.settle(self._flax_run(force=Forcing(self.translation), gradients=False))
        flattened = dict(self.translation.flattens())
        for path, shape in flattened.items():
            self.pairing.with_flatten(path, shape)
        expected = self._complete(self.pairing.to_flax(self.torch.tensors))
        self.variables = expected if given is None else self._usable(given, expected)
        if given is not None:
            self.located += conversion_findings(self.translation, expected, given, self.torch, train=self.train_mode)

    def _complete(self, carried: dict[str, Any]) -> dict[str, Any]:
        """All that Flax's module wants: what PyTorch has not is 0, a scale or variance 1."""
        for name, v in self.initial.items():
            if name not in carried:
                last = name.rpartition("/")[2]
                is_one = places.role_of(last, not name.startswith("params/")) in ("scale", "var") and len(v.shape) < 2
                carried[name] = np.ones(v.shape) if is_one else np.zeros(v.shape)
        return carried

    def _given(self, variables: Any) -> dict[str, Any]:
        flat = flax_side.nnx_state(variables) if isinstance(variables, nnx.State) else flax_side.flat(variables)
        # Off whatever device they are on: the float64 run is the CPU's.
        return {
            name: v if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else np.asarray(v)
            for name, v in flat.items()
        }

    def _usable(self, given: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
        """The user's variables; what is missing or has no fitting shape is replaced, so that the run can go on."""
        usable = {n: v for n, v in given.items() if n not in expected or np.shape(v) == np.shape(expected[n])}
        return {**expected, **usable}

    def run(self) -> None:
        """Each side on its own; if they differ, layer by layer, and what is behind it."""
        free = self._flax_run_whole()
        self.dropout_off = self.torch.dropout_off or free.dropout_off
        called = {call.path for call in free.calls}
        unseen = [path for path, layer in self.flax_layers.items() if layer.is_called and path not in called]
        if unseen and free.failure is None:
            self.notes.append(f"inside a jit, remat or scan, which can't be looked into: {', '.join(unseen)}")
        self.free = differences(self.translation, free, train=self.train_mode)
        if isinstance(self.side, flax_side.NnxSide):  # it holds its shapes, and would run with others unasked
            self.free += [
                Difference("forward", (pair.torch.path, 0), pair.flax.path, "output", float("inf"))
                for pair in self.pairing.layers
                if not all(t.fits for t in pair.tensors)
            ]
        if not free.gradients and self.torch.gradients and free.failure is None:
            self.free.append(Difference("backward", NETWORK, "", "gradient", float("inf")))
        self.free += self._loss_difference(free)
        first = self._first()
        if first is not None and np.isnan(first.error):
            return  # there was nothing to compare there, and what is behind it shows no mistake
        if free.failure is None:
            self._run_float32(free)
        left = any(p.torch_left or p.flax_left for p in self.pairing.layers)
        left = left or any(alone(self.pairing, self.torch, free))
        if not self._failing(self.free) and not self.located and not left:
            return
        try:
            forced = self._flax_run(force=Forcing(self.translation))
        except Exception as error:
            self._could_not_run("layer by layer, Flax", error)
            return
        self.local = differences(self.translation, forced, train=self.train_mode)
        # Larger ones no rounding explains, and where nothing local differs, rounding is what is carried along.
        doubtful = [d for d in self.local if self.bound(d) < d.error]
        if not doubtful or any(d.error <= MOST_NOISE for d in doubtful):
            self.noise = Noise(
                self._torch_run, self._flax_run, self.torch, free, self.translation, self.inputs, self.flax_inputs
            )
        bounds = {d: self.bound(d, local=True) for d in self.local}
        if any(d.error > bounds[d] for d in self.local) or left or self.located:
            found = places.Diagnosis(
                self.translation, forced, free, self.local, bounds, train=self.train_mode, flax_inputs=forced.inputs
            ).run()
            explained = {(f.layer, f.finding.code) for f in self.located}
            charged = {f.layer for f in self.located}
            # Where the user's own conversion is at fault, the layer need not be accused as well.
            self.located += [
                f
                for f in found
                if (f.layer, f.finding.code) not in explained
                and not (f.finding.code == "unexplained" and f.layer in charged)
            ]
        if self.torch_loss is not None:
            self.located += loss_findings(self.translation, forced, FORWARD_BOUND)

    def _flax_run_whole(self) -> Recording:
        """The free run with gradients; without, as far as it goes, where other shapes stop it."""
        try:
            return self._flax_run()
        except Exception as error:
            # What could not be compared must not pass for equal: see `run`.
            self.notes.append(f"Flax's run with gradients failed: {type(error).__name__}: {str(error).splitlines()[0]}")
            return self._flax_run(gradients=False, compiled=False)

    def _loss_difference(self, free: Recording) -> list[Difference]:
        if self.torch_loss is None or self.torch.loss is None or free.loss is None or free.failure is not None:
            return []
        scale = max(abs(self.torch.loss), 1e-30)
        return [Difference("loss", NETWORK, "", "value", abs(self.torch.loss - free.loss) / scale)]

    def _run_float32(self, free: Recording) -> None:
        """The same in the dtype that the modules have: for the report, and for products in lower precision."""
        try:
            torch32, flax32 = self._torch_run(float64=False), self._flax_run(float64=False)
        except Exception as error:
            self._could_not_run("in their own dtype, the modules", error)
            return
        mine = Translation(torch32, self.pairing)
        mine.chosen = self.translation.chosen
        sides = rounding(torch32, self.torch, {}), rounding(flax32, free, self.translation.torch_path)
        self.rows32 = {
            which(d): (d.error, sum(side.get((d.phase, d.key), 0.0) for side in sides))
            for d in differences(mine, flax32, train=self.train_mode)
        }
        exact = self._flax_run(force=OwnInputs(flax32), gradients=False)
        self.located += precision_findings(
            self.translation, self.torch_module, torch32, flax32, exact, train=self.train_mode
        )

    def bound(self, d: Difference, *, local: bool = False) -> float:
        """What rounding explains of a difference."""
        if d.phase == "optimizer":
            return STEP_BOUND
        bound = BACKWARD_BOUND if d.phase == "backward" else FORWARD_BOUND
        if self.noise is None:
            return bound
        measured = 30 * self.noise.of(d)
        return max(bound, min(measured, MOST_NOISE if local else MOST_CARRIED))

    def _could_not_run(self, what: str, error: Exception) -> None:
        """What could not be compared is said, and is not ok."""
        text = str(error).strip().splitlines() or [""]
        self.not_run.append(f"{what} could not run: {type(error).__name__}: {text[0]}")

    def _first(self) -> Difference | None:
        """The first difference that no rounding explains."""
        order = {phase: i for i, phase in enumerate(PHASE_ORDER)}
        return min(self._failing(self.free), key=lambda d: order[d.phase], default=None)

    def _failing(self, found: Iterable[Difference]) -> list[Difference]:
        return [d for d in found if not d.error <= self.bound(d)]

    def train(self, steps: int, optimizers: tuple[Callable, Any]) -> None:
        """The two optimisers' rules by themselves; and, if all agreed so far, steps of training in lockstep."""
        located, notes = rule_findings(self.pairing, self.torch, optimizers)
        self.located += located
        self.notes += notes
        if self._failing(self.free):
            return
        factory, transform = optimizers
        torch_states = torch_steps(
            self.torch_module, self.inputs, factory, steps, train=self.train_mode, loss=self.torch_loss
        )
        flax_states = flax_steps(
            self.side,
            self.variables,
            self.flax_inputs,
            transform,
            steps,
            train=self.train_mode,
            loss=self.jax_loss,
            projections=self._projections,
        )
        self.free += step_differences(self.pairing, self.torch, torch_states, flax_states)

    def report(self) -> Report:
        """What was found."""
        if self.dropout_off:
            self.notes.append("dropout was switched off on both sides, as it is random in training")
        located = in_order(self.located)
        failing, first = self._failing(self.free), self._first()
        local_ok = self.local and not located and not any(d.error > self.bound(d, local=True) for d in self.local)
        if local_ok and all(np.isfinite(d.error) and d.error < 1e-3 for d in failing):
            first, failing = None, []  # every layer agrees to rounding: what is left is rounding carried along
        # A product of low precision may hide behind the noise that it makes itself.
        rough = {f.key for f in located if f.finding.code == "matmul-precision"}
        forward = [d for d in self.free if d.phase == "forward" and d.key in rough and d.error > 0]
        if forward and (first is None or first.phase != "forward"):
            first = max(forward[:2], key=lambda d: d.error)
        rows = layer_rows(self.pairing, self.free, self.local, self.bound, self.rows32)
        return verdict.report(
            first,
            located,
            rows,
            self.notes,
            not_run=self.not_run,
            torch=self.torch,
            bound=self.bound,
            details=self._details(),
        )

    def _details(self) -> dict[str, Any]:
        return {
            "mode": "train" if self.train_mode else "eval",
            "dtype": "float64, and float32 beside it",
            "torch": torch.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "torch_module": type(self.torch_module).__name__,
            "flax_module": type(self.flax_module).__name__,
        }


def _nearly(a: NDArray, b: NDArray) -> bool:
    return a.dtype.kind == b.dtype.kind == "f" and error_of(a, b) <= 1e-6
