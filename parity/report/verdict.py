"""From differences and findings to a report: what is first, what is named, what the table shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from parity.comparison.bounds import FORWARD_BOUND
from parity.comparison.differences import Difference
from parity.comparison.values import Values, values_at
from parity.diagnosis.finding import Located
from parity.diagnosis.fixes import Fix
from parity.diagnosis.mistakes import COULD_NOT_RUN, NOT_COMPARED, UNEXPLAINED, is_one_sided
from parity.diagnosis.own_fixes import in_linen, own_fix
from parity.pairing.pairs import Pairing
from parity.pairing.translation import Translation
from parity.records.constructors import CONSTRUCTOR, said
from parity.records.evidence import Evidence
from parity.records.kinds import CHANNELS_SECOND
from parity.records.recording import NETWORK, PHASES, Recording
from parity.report.findings import NETWORK as NETWORK_NAME
from parity.report.findings import Diagnosis, Divergence, LayerRow, Place, both_names, together
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


class Numbers(NamedTuple):
    """Where the two numbers that show a finding are looked for.

    Attributes:
      translation: how PyTorch's arrays go across.
      runs: (what differs there, Flax's run), the one that shows it best first.
      train: as the runs were made.
    """

    translation: Translation
    runs: Sequence[tuple[Sequence[Difference], Recording]]
    train: bool

    def of(self, f: Located) -> Values | None:
        """The two that are farthest apart, in what the finding is about; None where there are none."""
        for run, d in self._differences(f):
            if (values := values_at(self.translation, run, d, train=self.train)) is not None:
                return values
        return None

    def told(self, f: Located) -> str:
        """What differs there, and by how much; "" where no number does."""
        for _, d in self._differences(f):
            apart = f"differs by {d.error:.1e}" if d.shapes is None else f"has {d.shapes.text}"
            return f"the {d.quantity} of {both_names(d.key[0], d.flax_layer)} {apart}"
        return ""

    def _differences(self, f: Located) -> Iterator[tuple[Recording, Difference]]:
        """What differs where a finding is, the likeliest to show it first."""
        wanted = "input" if f.is_between and f.key != NETWORK else "output"
        for found, run in self.runs:
            here = [d for d in found if d.key == f.key]
            here.sort(key=lambda d: (d.phase != f.phase, d.quantity != wanted, PHASES.index(d.phase)))
            yield from ((run, d) for d in here)


def report(
    first: Difference | None,
    located: Sequence[Located],
    rows: list[LayerRow],
    notes: Sequence[str],
    *,
    stops: Sequence[Stop] = (),
    torch: Recording,
    bound: Callable[[Difference], float],
    numbers: Numbers | None = None,
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
      numbers: where the two numbers that show a finding are looked for; None: nowhere.
      details: see `Report`.

    Returns:
      The report; what differs and was not recognised is "unexplained".
    """
    known = [f for f in located if f.finding.code != UNEXPLAINED]
    others = [f for f in located if f.finding.code == UNEXPLAINED][0 if known else 1 :]
    told_of = {(f.finding.code, f.layer, f.flax_layer, f.finding.evidence): f for f in reversed(known)}
    chosen = [_diagnosis(f, torch) for f in known or located[:1]]
    if not known and located and numbers is not None and (what := numbers.told(located[0])):
        chosen = [replace(d, evidence=f"{what}: {d.evidence}") for d in chosen]
    divergence = _divergence(first, located, torch, bound)
    stop = next((s for s in stops if first is None or PHASES.index(s.phase) < PHASES.index(first.phase)), None)
    stopped = stop is not None and not located
    if stop is not None and stopped:
        divergence = Divergence(stop.phase, stop.torch_layer, stop.flax_layer, math.nan, FORWARD_BOUND, "run")
    elif divergence is not None and math.isnan(divergence.error):
        text = _why_not_compared(divergence, torch)
        chosen = [Diagnosis(NOT_COMPARED, divergence.torch_layer, text, divergence.flax_layer)]
    elif divergence is not None and not chosen:
        apart = f"differs by {divergence.error:.1e}" if divergence.shapes is None else f"has {divergence.shapes.text}"
        text = f"{divergence.quantity} {apart}; no known mistake makes such numbers"
        place = (divergence.place,) if divergence.before else ()
        chosen = [Diagnosis(UNEXPLAINED, divergence.torch_layer, text, divergence.flax_layer, places=place)]
    # Where a known mistake has been found, it is what stops a run that others of its shapes would not.
    told = [] if known else stops
    chosen += [Diagnosis(COULD_NOT_RUN, s.torch_layer, s.text, s.flax_layer) for s in told]
    besides = [s.text for s in stops if s not in told]
    besides += [f"besides, at {f.layer or 'the network'}: {f.finding.evidence}" for f in others[:MOST_BESIDES]]
    if len(others) > MOST_BESIDES:
        besides.append(f"besides, at {len(others) - MOST_BESIDES} more places what differs is not explained")
    diagnoses = together(chosen)
    firsts = [next(c.evidence for c in chosen if (c.code, c.at[0]) == (d.code, d.at[0])) for d in diagnoses]
    for i, d in enumerate(diagnoses):
        # Of the same mistake in several layers, those of the first.
        shown = told_of.get((d.code, d.layer, d.flax_layer, firsts[i]))
        if d.code == UNEXPLAINED and located and not known:
            shown = located[0]
        if shown is not None and numbers is not None:
            diagnoses[i] = replace(
                d, values=numbers.of(shown), fix=_own_fix(shown, numbers.translation, numbers.runs[-1][1])
            )
    return Report(divergence, diagnoses, rows, [*notes, *besides, *_not_compared(rows)], details)


def _own_fix(f: Located, translation: Translation, flax: Recording) -> Fix | None:
    """The lines of what is charged, made of its own numbers; None where these do not say it."""
    if f.finding.fix is not None:
        names = [layer.flax.config.get(CONSTRUCTOR, "") for layer in translation.pairing.layers]
        return in_linen(f.finding.fix) if any(name.startswith("linen.") for name in names) else f.finding.fix
    pair, call = translation.pair_of.get(f.layer), translation.torch.call(f.key)
    if f.is_between or pair is None:
        return None
    sizes = call.inputs[0].shape[2:] if call is not None and call.inputs and pair.kind in CHANNELS_SECOND else ()
    both = said(pair.torch, sizes), said(pair.flax, sizes)
    cut = f.finding.cut
    if cut is None and f.finding.like is None:
        return None if _is_cut(translation, flax, f.key) else own_fix(f.finding.code, *both)
    if f.finding.pads is None or cut is None:
        return None
    # What the other is to be like is what is left of its padding.
    left = [tuple((a, b) for a, b, _ in side) for side in f.finding.pads.without(*(c.ends for c in cut))]
    there = [s and s._replace(terms={**s.terms, "padding": pads}) for s, pads in zip(both, left, strict=True)]
    return own_fix(f.finding.code, there[0], there[1], cut=tuple(any(map(any, c.ends)) for c in cut))


def _is_cut(translation: Translation, flax: Recording, key: tuple[str, int]) -> bool:
    """Whether a side leaves something out behind a layer: it gives another shape, and the next is given the same.

    Its own arguments alone then do not say what it does.
    """
    calls = [call for call in translation.torch.calls if call.path in translation.pair_of]
    keys = [call.key for call in calls]
    if key not in keys[:-1]:
        return False
    here, behind = calls[keys.index(key) :][:2]
    mine, next_there = (flax.call((translation.pair_of[c.path].flax.path, c.index)) for c in (here, behind))
    if mine is None or next_there is None or not behind.inputs or not next_there.inputs:
        return False
    given, there = behind.inputs[0].shape, next_there.inputs[0].shape
    same = sorted(given) == sorted(there) and len(given) == here.output.ndim
    return same and sorted(here.output.shape) != sorted(mine.output.shape)


def _diagnosis(f: Located, torch: Recording) -> Diagnosis:
    finding = f.finding
    place = (_place(f, torch),)
    return Diagnosis(finding.code, f.layer, finding.evidence, f.flax_layer, places=place, cause=finding.cause)


def _place(f: Located, torch: Recording) -> Place:
    """Where a finding is, and what PyTorch calls that."""
    if not f.is_between:
        layer = torch.layers.get(f.layer)
        return Place(f.layer, f.flax_layer, layer.class_name if layer is not None and layer.is_called else "")
    names = next((g.class_names for g in torch.glue if g.path == f.layer), ("",))
    return Place(f.layer, f.flax_layer, names[0].rpartition(".")[2], NETWORK_NAME if f.key == NETWORK else f.key[0])


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
    place = Place(first.key[0], first.flax_layer)
    if first.quantity == "input" or first.key == NETWORK:
        # What lies before a layer may be a module of its own, and is charged then.
        here = [f for f in located if f.key == first.key and f.phase == first.phase == "forward"]
        if here:
            place = _place(here[0], torch)
        elif first.key == NETWORK and torch.calls and first.phase == "forward":
            place = Place(torch.calls[-1].path, before=NETWORK_NAME)
        elif first.quantity == "input":
            place = place._replace(before=place.torch_layer)
    if first.phase == "loss":
        place = Place("")
    number = first.error, bound(first), first.quantity
    where = place.before, place.class_name
    return Divergence(first.phase, place.torch_layer, place.flax_layer, *number, *where, first.shapes)


def _of_finding(f: Located) -> Divergence:
    """Of a finding that no number of the run shows."""
    kept = f.phase == "statistics"
    phase = "backward" if is_one_sided(f.finding.code) and not kept else f.phase
    what = {"backward": "a parameter of one side only", "statistics": "a statistic of one side only"}
    quantity = what.get(phase, "output")
    return Divergence(phase, f.layer, f.flax_layer, float("inf"), FORWARD_BOUND, quantity)


def layer_rows(
    pairing: Pairing,
    free: Iterable[Difference],
    local: Iterable[Difference],
    bound: Callable[[Difference], float],
    rows32: Mapping[tuple, tuple[float, float]] | None = None,
    explained: Mapping[tuple, str] | None = None,
) -> list[LayerRow]:
    """The rows of the table, by phase: each side on its own; beside it alone and (`rows32`) in float32.

    `explained` says of which why it is no mistake.
    """
    kinds = {pair.torch.path: pair.kind for pair in pairing.layers}
    alone = {which(d): d.error for d in local}
    rows = []
    for d in sorted(free, key=lambda d: PHASES.index(d.phase)):
        error32, rounding32 = (rows32 or {}).get(which(d), (None, None))
        kind, local_error = kinds.get(d.key[0], ""), alone.get(which(d))
        place = d.phase, d.key[0], d.flax_layer, kind, d.quantity
        rows.append(
            LayerRow(
                *place,
                d.error,
                bound(d),
                error32,
                rounding32,
                local_error,
                d.shapes,
                (explained or {}).get(which(d), ""),
            )
        )
    return rows


def which(d: Difference) -> tuple:
    """What is compared there, whatever the run."""
    return d.phase, d.key, d.quantity


def details_of(torch: Evidence, flax: Evidence) -> dict[str, Any]:
    """What a report says of how both sides were run."""
    a, b = torch.details, flax.details
    return {
        "mode": a["mode"],
        "dtype": "float64" if torch.own is None else "float64, and float32 beside it",
        "torch_module": a["class"],
        "flax_module": b["class"],
        "loss values": {"PyTorch": torch.free.loss, "Flax": flax.free.loss},
        "inputs": {s.framework: [[*x.shape] for x in s.inputs] for s in (torch.free, flax.free)},
        **{name: v for name, v in (*a.items(), *b.items()) if name in ("torch", "jax", "flax", "numpy")},
    }
