"""From the evidence of two sides to a report; needs no framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from parity.comparison.bounds import BACKWARD_BOUND, FORWARD_BOUND, MOST_CANCELLED, MOST_CARRIED, MOST_NOISE
from parity.comparison.cut_otherwise import FUNCTION, inside, lies_inside, reduced, same_behind, shaped_otherwise
from parity.comparison.differences import (
    STEP_BOUND,
    Difference,
    alone,
    differences,
    drop_second_names,
    input_gradients,
    step_differences,
    stopped,
    unlike,
    untrained_buffers,
)
from parity.comparison.rounding import explained, rounding
from parity.diagnosis import places
from parity.diagnosis.dropout import common_dropout, dropout_findings, dropout_in_training
from parity.diagnosis.finding import Located, in_order
from parity.diagnosis.lone_statistics import lone_statistics, not_kept
from parity.diagnosis.loss import loss_findings
from parity.diagnosis.mistakes import UNEXPLAINED
from parity.diagnosis.optimizer.family import findings as optimizer_findings
from parity.diagnosis.parameters.conversion import conversion_findings
from parity.diagnosis.product.rounded import precision_findings
from parity.pairing.pairs import Pairing
from parity.pairing.problems import below_zero
from parity.pairing.recut import cut
from parity.pairing.translation import Translation
from parity.records.answers import matched
from parity.records.evidence import Evidence
from parity.records.recording import NETWORK, PHASES, Failure, Recording
from parity.report import Report, notes, verdict
from parity.report.findings import CUT_OTHERWISE, ROUNDING
from parity.report.verdict import Numbers, Stop, layer_rows, which


class Judge(cut.Sides):
    """Two sides side by side.

    Both on their own come first. Whoever can still run them looks whether the judge asks for more (`asks_for_layers`,
    `asks_for_rounding`) and adds it to the evidence before the report.

    Args:
      torch: PyTorch's evidence.
      flax: Flax's.
      translation: which layer, tensor and axis is which.
      is_aside: the modules are aside already, where no maximum is decided by rounding, see `evidence/aside.py`.
    """

    def __init__(self, torch: Evidence, flax: Evidence, translation: Translation, *, is_aside: bool = False) -> None:
        self.is_aside = is_aside
        self.pairing: Pairing = translation.pairing
        drop_second_names(self.pairing, translation.torch)
        super().__init__(torch, flax, self.pairing.recuts)
        self.translation = translation
        self.train = torch.details["mode"] == "train"
        self.notes: list[str] = [*self.pairing.notes(), *self.pairing.told, *self.pairing.assumed()]
        self.free = [*self._unseen(), *differences(translation, self.flax.free, train=self.train)]
        self.free += [*self._unfit(), *self._loss(), *input_gradients(self.torch.free, self.flax.free)]
        self.notes += dropout_in_training(torch.free, flax.free)
        if still := stopped(translation, self.flax.free):
            self.notes.append(f"not trained in PyTorch (requires_grad=False), no gradient in Flax: {', '.join(still)}")
        if buffers := untrained_buffers(translation, self.flax.free):
            self.notes.append(f"a buffer in PyTorch, a parameter in Flax, which trains it: {', '.join(buffers)}")
        self.notes += translation.moved_outputs(flax.free.named_outputs)
        self.notes += [*common_dropout(translation, self.flax.free), *below_zero(torch.free, flax.free)]
        self.besides = dropout_findings(translation, self.flax.free)
        self.besides += lone_statistics(self.pairing, self.torch.free, self.flax.free)
        self.notes += [] if self.train else not_kept(self.pairing, self.flax.free)
        self.dtypes = tuple(of.details.get("parameters", "float32") for of in (torch, flax))
        runs = torch.free, flax.free
        self.notes += [*notes.of_half(self.dtypes), *notes.of_rounded_losses(runs)]
        self.loss_rounds_by = notes.loss_rounds_by(runs)

    # What is compared.

    def _unfit(self) -> Iterable[Difference]:
        """Layers whose tensors have other shapes: they were run with others. What did not come to run says nothing."""
        ended = self.torch.free.has_ended and self.flax.free.has_ended
        ours, theirs = ({call.path for call in side.calls} for side in (self.torch.free, self.flax.free))
        seen = {d.key for d in self.free if d.quantity == "output" and not d.error <= FORWARD_BOUND}
        for pair in self.pairing.layers:
            if not (ended or (pair.torch.path in ours and pair.flax.path in theirs)):
                continue
            if not all(t.fits for t in pair.tensors) and (pair.torch.path, 0) not in seen:
                yield Difference("forward", (pair.torch.path, 0), pair.flax.path, "output", float("inf"))

    def _unseen(self) -> Iterable[Difference]:
        """Outputs or gradients of which there are none that could be compared."""
        a, b = self.torch.free, self.flax.free
        if a.has_ended and b.has_ended and not any(y.dtype.kind in "fc" for y in (*a.outputs, *b.outputs)):
            yield Difference("forward", NETWORK, "", "output", float("nan"))
        parameters = [g for name, g in a.gradients.items() if a.tensors[name].size]
        if parameters and not any(np.any(g) for g in parameters):
            yield Difference("backward", NETWORK, "", "gradient", float("nan"))

    def _loss(self) -> Iterable[Difference]:
        a, b = self.torch.free, self.flax.free
        if a.loss is not None and b.loss is not None and a.has_ended and b.has_ended:
            yield Difference("loss", NETWORK, "", "value", abs(a.loss - b.loss) / max(abs(a.loss), 1e-30))

    @property
    def steps(self) -> list[Difference]:
        """How far the parameters are apart after each step of training."""
        if not self.torch.states or not self.flax.states:
            return []
        return step_differences(self.pairing, self.torch.free, self.torch.states, self.flax.states)

    @cached_property
    def local(self) -> list[Difference]:
        """Every layer's own differences: in single-layer mode, or else where both sides were given the same."""
        if self.flax.forced is not None:
            found = differences(self.translation, self.flax.forced, train=self.train)
            found += input_gradients(self.torch.free, self.flax.forced)
            return [d for d in found if not self._passes(d)]
        return [d for d in self.free if self._is_local(d)]

    def _is_local(self, d: Difference) -> bool:
        """Whether both sides were given the same there, so that the difference is the layer's own."""
        failing = [other for other in self.free if not other.error <= self.bound(other)]
        at = self.translation.position.get(d.key, len(self.translation.position))
        if d.phase == "forward" and d.quantity == "output" and d.key != NETWORK:
            return not any(f.key == d.key and f.quantity == "input" for f in failing)
        if d.phase == "forward":
            before = [f for f in failing if f.phase == "forward" and f.quantity == "output" and f.key != NETWORK]
            return not any(self.translation.position.get(f.key, -1) < at for f in before)
        if d.phase == "statistics":
            return not any(f.key == d.key and f.quantity == "input" for f in failing)
        if d.phase == "backward" and d.quantity != "output gradient":
            return not any(f.key == d.key and f.quantity in ("input", "output gradient") for f in failing)
        return not any(f.phase == "forward" for f in failing)

    @cached_property
    def own(self) -> dict[tuple, tuple[float, float]]:
        """In the modules' own dtypes: what is compared -> (difference, rounding of both sides together)."""
        torch, flax = self.torch.own, self.flax.own
        if torch is None or flax is None or torch.failure is not None or flax.failure is not None:
            return {}
        mine = Translation(torch, self.pairing)
        mine.chosen = self.translation.chosen
        rounded = rounding(torch, self.torch.free), rounding(flax, self.flax.free)
        found = {}
        for d in differences(mine, flax, train=self.train):
            keys = (d.phase, d.key), (d.phase, (d.flax_layer, d.key[1]))
            found[which(d)] = d.error, sum(side.get(key, 0.0) for side, key in zip(rounded, keys, strict=True))
        return found

    @cached_property
    def other_weights(self) -> list[str]:
        """Flax's names of the tensors that differ before the run."""
        return unlike(self.pairing, self.torch.free.tensors, self.flax.free.tensors)

    # What rounding explains.

    def bound(self, d: Difference, *, local: bool = False) -> float:
        """What rounding explains of a difference."""
        if d.phase == "optimizer":
            return max(STEP_BOUND, 30 * max(self.loss_rounds_by, self.flax.noise.get(("optimizer", NETWORK), 0.0)))
        bound = BACKWARD_BOUND if d.phase == "backward" else FORWARD_BOUND
        measured = self._measured(d)
        if d.phase in ("loss", "backward") and not local:
            measured = max(measured, 30 * self.loss_rounds_by)
        most = MOST_CANCELLED if self._may_cancel(d) else MOST_NOISE if local else MOST_CARRIED
        return max(bound, min(measured, most))

    def _may_cancel(self, d: Difference) -> bool:
        """Whether it is a gradient, aside of the kinks, in a network that is the same forward."""
        is_measured = bool(self.torch.noise or self.flax.noise)
        return self.is_aside and is_measured and d.phase == "backward" and self._is_same_forward

    @cached_property
    def _is_same_forward(self) -> bool:
        return all(d.error <= self.bound(d) or self._passes(d) for d in self.free if d.phase == "forward")

    def first_small(self) -> Difference | None:
        """What differs first, if it does so forward and by no more than what rounding may have become on its way."""
        first = next(iter(self._failing()), None)
        return first if first is not None and first.phase == "forward" and first.error <= MOST_CARRIED else None

    def _measured(self, d: Difference) -> float:
        phase = "backward" if d.phase == "loss" else d.phase
        return explained(phase, (self.torch.noise, d.key), (self.flax.noise, (d.flax_layer, d.key[1])))

    def decided_by_rounding(self) -> list[Difference]:
        """Gradients that rounding decides, where all agrees forward: of two equal maxima, of a number next to 0.

        There a side's own gradient jumps when it is nudged, by as much as the two sides differ.
        """
        return [d for d in self._jumps() if d.error <= self._measured(d)]

    def _jumps(self) -> list[Difference]:
        """Gradients that are farther apart than any rounding that is carried along, where forward all agrees."""
        failing = self._failing()
        forward = any(d.phase == "forward" for d in failing)
        return [] if forward else [d for d in failing if d.phase == "backward" and d.error > MOST_CARRIED]

    def _failing(self) -> list[Difference]:
        """What no rounding explains, in the order of the phases."""
        found = [d for d in [*self.free, *self.steps] if not d.error <= self.bound(d) and not self._passes(d)]
        return sorted(found, key=lambda d: PHASES.index(d.phase))

    # What more is to be run.

    def asks_for_own_dtype(self) -> bool:
        """Whether both ran, and the first difference is one that can be explained."""
        failing = self._failing()
        ran = self.torch.free.has_ended and self.flax.free.failure is None
        return ran and not (failing and np.isnan(failing[0].error))

    @property
    def agrees(self) -> bool:
        """Each side on its own gives the same so far."""
        failing = self._failing()
        return not self.stops and (not failing or self._is_cut_otherwise(failing))

    def _is_cut_otherwise(self, failing: Sequence[Difference]) -> bool:
        """Whether only what lies inside differs, as the two are cut otherwise there."""
        return bool(failing) and len(self._cut(failing)) == len(failing)

    def _cut(self, failing: Sequence[Difference]) -> list[Difference]:
        """Of what differs that which lies inside, where nothing else differs but statistics and steps."""
        return [] if self._weights else inside(failing, self.free, self.pairing, self.torch.free, self.flax.free)

    def _passes(self, d: Difference) -> bool:
        """Whether it lies where the two are cut otherwise, and what follows agrees."""
        return d.key in self.flax.passing and lies_inside(d)

    def shaped_otherwise(self) -> frozenset[tuple[str, int]]:
        """The calls with arrays of another shape in single-layer mode: the two may be cut otherwise there."""
        return frozenset() if self._cut(self._failing()) else shaped_otherwise(self.local)

    def same_behind(self, again: Recording) -> frozenset[tuple[str, int]]:
        """Of these calls those behind which all agrees, in the same run with Flax's own arrays at all of them."""
        seen = cut.recording(again, self.pairing.of_flax())
        made, within = differences(self.translation, seen, train=self.train), reduced(self.translation, seen)
        return same_behind(self.local, made, lambda d: d.error <= self.bound(d, local=True), within)

    def asks_for_layers(self) -> bool:
        """Whether there is something that the run in single-layer mode can explain."""
        failing = self._failing()
        if failing and np.isnan(failing[0].error):
            return False  # there was nothing to compare there, and what is behind it shows no mistake
        if self._is_cut_otherwise(failing):
            return False
        left = any(p.torch_left or p.flax_left for p in self.pairing.layers)
        left = left or any(alone(self.pairing, self.torch.free, self.flax.free))
        return bool(failing or left or self._weights or self._precision or self.flax.free.failure)

    def asks_for_rounding(self) -> bool:
        """Whether what the layers differ by may be rounding.

        Larger differences no rounding explains, and where nothing local differs, rounding is what is carried along; but
        it may decide which way a gradient goes.
        """
        if self.flax.forced is None:
            return False
        doubtful = [d for d in self.local if self.bound(d) < d.error]
        return not doubtful or any(d.error <= MOST_NOISE for d in doubtful) or bool(self._jumps())

    # Which mistakes it is.

    @cached_property
    def _weights(self) -> list[Located]:
        """Mistakes of the weights: of the user's own, or of a dump with others."""
        given = self.flax.given if self.flax.given is not None else self.flax.free.tensors
        if self.flax.given is None and not self.other_weights:
            return []
        expected = self.pairing.moved(self.torch.free.tensors)
        halves = self.pairing.halves(self.sides[0].given.free.tensors)
        return conversion_findings(self.translation, expected, given, self.torch.free, halves, train=self.train)

    @cached_property
    def _precision(self) -> list[Located]:
        """Products in less than the modules' own dtype."""
        if self.torch.own is None or self.flax.own is None:
            return []
        sides = (self.torch.own, self.torch.exact), (self.flax.own, self.flax.exact)
        return precision_findings(self.translation, *sides, self.dtypes)

    @cached_property
    def rules(self) -> list[Located]:
        """Mistakes of the optimisers, each by itself."""
        names = [(torch, flax) for torch, flax, _ in self.pairing.tensors()]
        found = optimizer_findings(matched(self.torch.answers, self.flax.answers, names))
        return [Located("optimizer", i, "", "", finding) for i, finding in enumerate(found)]

    def _located(self) -> list[Located]:
        found = [*self._weights, *self._precision, *self.besides]
        if not self.asks_for_layers():
            return in_order([*found, *self.rules])
        forced = self.flax.forced
        reference = self.flax.free if forced is None else forced
        local = [d for d in self.local if d.phase not in FUNCTION] if self._cut(self._failing()) else self.local
        bounds = {d: self.bound(d, local=True) for d in local}
        run = places.Diagnosis(
            self.translation,
            reference,
            self.flax.free,
            local,
            bounds,
            train=self.train,
            flax_inputs=reference.inputs,
        ).run()
        explained, charged = {(f.layer, f.finding.code) for f in found}, {f.layer for f in found}
        # Where its weights are at fault, the layer need not be accused as well.
        found += [
            f
            for f in run
            if (f.layer, f.finding.code) not in explained and not (f.finding.code == UNEXPLAINED and f.layer in charged)
        ]
        alike = forced is not None or not any(d.phase == "forward" for d in self._failing())
        if self.torch.details["loss"] != "default" and alike and not (reference.failure or self.torch.free.failure):
            found += loss_findings(self.translation, reference, FORWARD_BOUND)
        return in_order([*found, *self.rules])

    # What is told.

    @property
    def stops(self) -> list[Stop]:
        """The runs that could not be made, or not to their end; each exception of a side once."""
        runs = (
            ("PyTorch, on its own,", self.torch.free),
            ("Flax, on its own,", self.flax.free),
            ("Flax, layer by layer,", self.flax.forced),
            ("PyTorch, in its own dtype,", self.torch.own),
            ("Flax, in its own dtype,", self.flax.own),
        )
        found: dict[tuple[str, Failure], Stop] = {}
        for name, run in runs:
            if run is not None and run.failure is not None:
                found.setdefault((run.framework, run.failure), self._stop(name, run.framework, run.failure))
        return list(found.values())

    def _stop(self, name: str, framework: str, failure: Failure) -> Stop:
        flax = {pair.torch.path: pair.flax.path for pair in self.pairing.layers}
        torch = {pair.flax.path: pair.torch.path for pair in self.pairing.layers}
        if framework == "torch":
            return Stop(name, failure.phase, failure.layer, flax.get(failure.layer, ""), failure.error)
        return Stop(name, failure.phase, torch.get(failure.layer, ""), failure.layer, failure.error)

    def report(self) -> Report:
        """What was found."""
        failing = self._failing()
        inner = [] if self.stops else self._cut(failing)
        cut = len(inner) == len(failing) > 0 and not self.rules
        located = [*self._precision, *self.besides] if cut else self._located()
        local = self.local if self.flax.forced is not None or failing else []
        alike = self.flax.forced is not None and bool(local) and not located and self.flax.forced.failure is None
        alike = alike and not any(d.error > self.bound(d, local=True) for d in local)
        explained = {which(d): CUT_OTHERWISE for d in [*inner, *filter(self._passes, self.free)]}
        if alike and all(np.isfinite(d.error) and d.error < 1e-3 for d in failing):
            explained |= {which(d): ROUNDING for d in failing}
            failing = []  # every layer agrees to rounding: what is left is rounding carried along
        if self.flax.passing:
            where = ", ".join(dict.fromkeys(path for path, _ in sorted(self.flax.passing)))
            self.notes.append(f"cut otherwise at {where}: on PyTorch's input, what follows agrees")
        if inner:
            places = dict.fromkeys(d.key[0] or "the network" for d in inner)
            failing = [d for d in failing if d not in inner]
        elif not failing and not located and not self.stops:
            # As positions that are the same for all examples.
            places = {s.key[0]: None for s, way in self.translation.chosen.items() if way.rows}
        else:
            places = {}
        if places:
            self.notes.append(f"the same function, cut otherwise at {', '.join(places)}")
        first = next(iter(failing), None)
        # A product of low precision may hide behind the noise that it makes itself.
        rough = {f.key for f in located if f.finding.code == "matmul-precision"}
        forward = [d for d in self.free if d.phase == "forward" and d.key in rough and d.error > 0]
        if forward and (first is None or first.phase != "forward"):
            first = max(forward[:2], key=lambda d: d.error)
        return verdict.report(
            first,
            located,
            layer_rows(self.pairing, [*self.free, *self.steps], local, self.bound, self.own, explained),
            [*self.torch.notes, *self.flax.notes, *self.notes],
            stops=self.stops,
            torch=self.torch.free,
            bound=self.bound,
            numbers=self._numbers(),
            details=verdict.details_of(self.torch, self.flax),
        )

    def _numbers(self) -> Numbers:
        """Where the numbers that show a finding are looked for: each layer on PyTorch's input first."""
        forced, runs = self.flax.forced, [([d for d in self.free if self.bound(d) < d.error], self.flax.free)]
        if forced is not None:
            runs.insert(0, ([d for d in self.local if self.bound(d, local=True) < d.error], forced))
        return Numbers(self.translation, runs, self.train)
