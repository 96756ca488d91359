"""From differences and findings to a report: what is first, what is named, what the table shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from parity.comparison.bounds import FORWARD_BOUND
from parity.comparison.differences import Difference
from parity.diagnosis.finding import Located
from parity.diagnosis.mistakes import COULD_NOT_RUN, NOT_COMPARED, UNEXPLAINED, is_one_sided
from parity.pairing.pairs import Pairing
from parity.records.recording import NETWORK, PHASES, Recording
from parity.report.findings import Diagnosis, Divergence, LayerRow, together
from parity.report.report import Report

MOST_BESIDES = 8
"""Places told one by one beside the first, where what differs is not explained."""


class Stop(NamedTuple):
    """A run that could not be made, or not to its end.

    Attributes:
      run: which, in words.
      phase: "forward" | "backward".
      torch_layer, flax_layer: where; "" outside of all layers.
      error: what was raised, in words.
    """

    run: str
    phase: str
    torch_layer: str
    flax_layer: str
    error: str

    @property
    def text(self) -> str:
        """In a sentence."""
        where = self.torch_layer or self.flax_layer
        where = f" in {where}" if where else " in the backward pass" if self.phase == "backward" else ""
        return f"{self.run} could not run: {self.error}{where}"


def report(
    first: Difference | None,
    located: Sequence[Located],
    rows: list[LayerRow],
    notes: Sequence[str],
    *,
    stops: Sequence[Stop] = (),
    torch: Recording,
    bound: Callable[[Difference], float],
    details: dict[str, Any],
) -> Report:
    """The report of a comparison.

    Args:
      first: the first difference that no rounding explains, or None.
      located: the findings, in order; known mistakes are named, others only where there is no known one.
      rows: of the table, see `layer_rows`.
      notes: what else is to be said.
      stops: what of the comparison could not be run.
      torch: PyTorch's run.
      bound: what rounding explains of a difference.
      details: see `Report`.

    Returns:
      The report; what differs and was not recognised is "unexplained".
    """
    known = [f for f in located if f.finding.code != UNEXPLAINED]
    others = [f for f in located if f.finding.code == UNEXPLAINED][0 if known else 1 :]
    chosen = [Diagnosis(f.finding.code, f.layer, f.finding.evidence, f.flax_layer) for f in known or located[:1]]
    divergence = _divergence(first, located, torch, bound)
    stop = next((s for s in stops if first is None or PHASES.index(s.phase) < PHASES.index(first.phase)), None)
    stopped = stop is not None and not located
    if stop is not None and stopped:
        divergence = Divergence(stop.phase, stop.torch_layer, stop.flax_layer, math.nan, FORWARD_BOUND, "run")
    elif divergence is not None and math.isnan(divergence.error):
        text = _why_not_compared(divergence, torch)
        chosen = [Diagnosis(NOT_COMPARED, divergence.torch_layer, text, divergence.flax_layer)]
    elif divergence is not None and not chosen:
        text = f"{divergence.quantity} differs by {divergence.error:.1e}; no known mistake makes such numbers"
        chosen = [Diagnosis(UNEXPLAINED, divergence.torch_layer, text, divergence.flax_layer)]
    # Where a known mistake has been found, it is what stops a run that others of its shapes would not.
    told = [] if known else stops
    chosen += [Diagnosis(COULD_NOT_RUN, s.torch_layer, s.text, s.flax_layer) for s in told]
    besides = [s.text for s in stops if s not in told]
    besides += [f"besides, at {f.layer or 'the network'}: {f.finding.evidence}" for f in others[:MOST_BESIDES]]
    if len(others) > MOST_BESIDES:
        besides.append(f"besides, at {len(others) - MOST_BESIDES} more places what differs is not explained")
    return Report(divergence, together(chosen), rows, [*notes, *besides, *_not_compared(rows)], details)


def _why_not_compared(divergence: Divergence, torch: Recording) -> str:
    if divergence.phase == "backward" and divergence.quantity == "gradient":
        return "nothing was compared backward: the gradient of the loss by every parameter is 0"
    if not any(y.dtype.kind in "fc" for y in torch.outputs):
        return "nothing was compared: the network gives no floating-point numbers"
    where = divergence.torch_layer or "the network"
    return f"not finite at {where}: its {divergence.quantity} is NaN or infinite, so nothing was compared there"


def _not_compared(rows: Sequence[LayerRow]) -> list[str]:
    """A note of what holds NaN or nothing finite on both sides."""
    places = [f"{row.torch_layer or 'the network'} ({row.quantity})" for row in rows if math.isnan(row.error)]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return [f"not compared, as it is not finite: {', '.join(places[:3])}{more}"] if places else []


def _divergence(
    first: Difference | None, located: Sequence[Located], torch: Recording, bound: Callable[[Difference], float]
) -> Divergence | None:
    """Where the two part: at the first difference, or where none is left but a finding, at that."""
    if first is None:
        return _of_finding(located[0]) if located else None
    layer, flax_layer = first.key[0], first.flax_layer
    if first.quantity == "input" or first.key == NETWORK:
        # What lies before a layer may be a module of its own, and is charged then.
        here = [f for f in located if f.key == first.key and f.phase == first.phase == "forward"]
        if here:
            layer, flax_layer = here[0].layer, here[0].flax_layer
        elif first.key == NETWORK and torch.calls and first.phase == "forward":
            layer = torch.calls[-1].path
    if first.phase == "loss":
        layer = flax_layer = ""
    return Divergence(first.phase, layer, flax_layer, first.error, bound(first), first.quantity)


def _of_finding(f: Located) -> Divergence:
    """Of a finding that no number of the run shows."""
    phase = "backward" if is_one_sided(f.finding.code) else f.phase
    quantity = "a parameter of one side only" if phase == "backward" else "output"
    return Divergence(phase, f.layer, f.flax_layer, float("inf"), FORWARD_BOUND, quantity)


def layer_rows(
    pairing: Pairing,
    free: Iterable[Difference],
    local: Iterable[Difference],
    bound: Callable[[Difference], float],
    rows32: Mapping[tuple, tuple[float, float]] | None = None,
) -> list[LayerRow]:
    """The rows of the table, by phase: each side on its own; beside it alone and (`rows32`) in float32."""
    kinds = {pair.torch.path: pair.kind for pair in pairing.layers}
    alone = {which(d): d.error for d in local}
    rows = []
    for d in sorted(free, key=lambda d: PHASES.index(d.phase)):
        error32, rounding32 = (rows32 or {}).get(which(d), (None, None))
        kind, local_error = kinds.get(d.key[0], ""), alone.get(which(d))
        place = d.phase, d.key[0], d.flax_layer, kind, d.quantity
        rows.append(LayerRow(*place, d.error, bound(d), error32, rounding32, local_error))
    return rows


def which(d: Difference) -> tuple:
    """What is compared there, whatever the run."""
    return d.phase, d.key, d.quantity
