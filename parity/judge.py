"""From two dumps to a report; needs no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.bounds import BACKWARD_BOUND, FORWARD_BOUND, MOST_CARRIED, MOST_NOISE
from parity.comparison.differences import Difference, alone, differences
from parity.diagnosis.finding import Located, in_order
from parity.pairing.layers import Pairing, pairing_of
from parity.pairing.translation import Translation, translated
from parity.records.dump_file import Dump
from parity.records.recording import NETWORK, PHASES
from parity.report import Report, verdict
from parity.report.verdict import layer_rows


class DumpComparison:
    """Two dumps side by side."""

    def __init__(self, torch: Dump, flax: Dump, layer_map: Mapping[str, str] | None) -> None:
        self.torch, self.flax = torch, flax
        self.train = torch.details["mode"] == "train"
        self.notes: list[str] = []
        fed = flax.forced if flax.details.get("fed_by") == torch.sha256 else None
        self.reference = flax.free if fed is None else fed
        self.pairing: Pairing = pairing_of(torch.free, flax.free, layer_map)
        self.translation: Translation = translated(torch.free, self.reference, self.pairing)
        self.free = differences(self.translation, flax.free, train=self.train) + self._loss_difference()
        if fed is None:
            self.local = [d for d in self.free if self._is_local(d)]
        else:
            self.local = differences(self.translation, fed, train=self.train)
        self.located = self._located()

    def _loss_difference(self) -> list[Difference]:
        a, b = self.torch.free.loss, self.flax.free.loss
        if a is None or b is None or self.flax.free.failure is not None:
            return []
        return [Difference("loss", NETWORK, "", "value", abs(a - b) / max(abs(a), 1e-30))]

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

    def bound(self, d: Difference, *, local: bool = False) -> float:
        """What rounding explains of a difference."""
        bound = BACKWARD_BOUND if d.phase == "backward" else FORWARD_BOUND
        phase = "backward" if d.phase == "loss" else d.phase
        keys = (self.torch, d.key), (self.flax, (d.flax_layer, d.key[1]))
        noise = [made.noise.get((phase, key), max(made.noise.values(), default=0.0)) for made, key in keys]
        measured = 30 * max(noise)
        return max(bound, min(measured, MOST_NOISE if local else MOST_CARRIED))

    def _located(self) -> list[Located]:
        expected = self.pairing.to_flax(self.torch.free.tensors)
        given = self.flax.free.tensors
        other = [n for n, a in expected.items() if n in given and not _same(given[n], a)]
        if other:
            self.notes.append(
                f"{len(other)} of {len(expected)} tensors differ before the run, {other[0]} first: "
                "dump --weights takes the weights of the other dump"
            )
        inputs = [made.details["inputs"] for made in (self.torch, self.flax)]
        if None not in inputs and inputs[0] != inputs[1]:
            self.notes.append("the two dumps were given different inputs")
        bounds = {d: self.bound(d, local=True) for d in self.local}
        left = any(p.torch_left or p.flax_left for p in self.pairing.layers)
        left = left or any(alone(self.pairing, self.torch.free, self.flax.free))
        wrong = left or any(not d.error <= bounds[d] for d in self.local)
        failing = self._failing()
        if not wrong and not other and not failing:
            return []
        if failing and np.isnan(failing[0].error):  # what is behind it shows no mistake
            return []
        try:
            from parity.diagnosis import loss as losses
            from parity.diagnosis import places
            from parity.diagnosis.parameters.conversion import conversion_findings
        except ImportError as error:
            self.notes.append(f"which mistake it is can't be said here: {error}")
            return []
        found: list[Located] = []
        if other:
            found += conversion_findings(self.translation, expected, given, self.torch.free, train=self.train)
        if wrong:
            given_inputs = self.reference.inputs
            run = places.Diagnosis(
                self.translation,
                self.reference,
                self.flax.free,
                self.local,
                bounds,
                train=self.train,
                flax_inputs=given_inputs,
            ).run()
            charged = {f.layer for f in found}
            # Where its weights are at fault, the layer need not be accused as well.
            found += [f for f in run if f.layer not in charged or f.finding.code != "unexplained"]
        fed = self.reference is not self.flax.free
        if self.torch.details["loss"] != "default" and (fed or not self._failing(("forward",))):
            found += losses.loss_findings(self.translation, self.reference, FORWARD_BOUND)
        return in_order(found)

    def _failing(self, phases: Sequence[str] = PHASES) -> list[Difference]:
        found = [d for d in self.free if d.phase in phases and not d.error <= self.bound(d)]
        return sorted(found, key=lambda d: PHASES.index(d.phase))

    def report(self) -> Report:
        """What was found."""
        failing, located = self._failing(), self.located
        fed = self.reference is not self.flax.free
        if fed and not located and not any(d.error > self.bound(d, local=True) for d in self.local):
            # Every layer agrees to rounding: what is left is rounding carried along.
            failing = [d for d in failing if not d.error < 1e-3]
        rows = layer_rows(self.pairing, self.free, self.local, self.bound)
        first, torch = next(iter(failing), None), self.torch.free
        return verdict.report(first, located, rows, self.notes, torch=torch, bound=self.bound, details=self._details())

    def _details(self) -> dict[str, Any]:
        a, b = self.torch.details, self.flax.details
        return {
            "mode": a["mode"],
            "dtype": "float64",
            "torch_module": a["class"],
            "flax_module": b["class"],
            "loss values": {"PyTorch": self.torch.free.loss, "Flax": self.flax.free.loss},
            **{name: v for name, v in (*a.items(), *b.items()) if name in ("torch", "jax", "flax")},
        }


def _same(a: NDArray, b: NDArray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= 1e-6 * np.abs(b).max(initial=0))
