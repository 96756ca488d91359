"""The answer in one sentence, and a card for each cause: where, the numbers that show it, what to write instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from parity.comparison.shapes import Shapes
from parity.diagnosis.finding import told_apart
from parity.diagnosis.fixes import Fix
from parity.diagnosis.kind_fixes import BETWEEN, fix_of
from parity.diagnosis.mistakes import COULD_NOT_RUN, FIRST_OF, MISTAKES, NOT_COMPARED, UNEXPLAINED, codes_of
from parity.records.kinds import NORMS, PRODUCTS
from parity.report.findings import NETWORK, Diagnosis, Place, shown

if TYPE_CHECKING:
    from parity.comparison.values import Values
    from parity.report.report import Report

PROJECT = "blenet-parity"
PAGE = "docs/gallery.md"
MOST_NAMED = 3
"""Of the mistakes, in the sentence that answers; the cards have all."""
EXAMPLE = "for example"
"""Of lines that are the gallery's, and not the layer's own."""
OWN = "in one of the two"
"""Of the layer's own lines: either would be like the other."""
PREDICTS = "to predict: ok"
"""Of a convention that no prediction shows, where all else agrees."""


class Card(NamedTuple):
    """What is told of one cause.

    Attributes:
      code: of the mistake.
      where: in how many layers or places, the first named.
      places: all of them.
      classes: how many places of which class, "12 LayerNorm"; "" for a single one.
      evidence: the sentence.
      values: the two numbers that are farthest apart; None where there are none.
      numbers: the same in words; "" where there are none.
      fix: the code, where it is a known mistake.
      advice: what is to be done with it: an example, or the layer's own lines, of which one is to be changed.
      tried: of what is not explained: which mistakes were looked for; "" of a known one.
      further: what to do next about it; likewise.
      convention: what is to be said of a known convention; "" for a mistake.
      link: into the gallery of mistakes; "" where it is none of them.
    """

    code: str
    where: str
    places: tuple[Place, ...]
    classes: str
    evidence: str
    values: Values | None
    numbers: str
    fix: Fix | None
    advice: str
    tried: str
    further: str
    convention: str
    link: str


def cards(report: Report) -> list[Card]:
    """One for each diagnosis, in their order."""
    kinds = {row.torch_layer: row.kind for row in report.layers}
    return [
        Card(
            d.code,
            _where(d),
            d.at,
            _classes(d.at),
            shown(d.evidence),
            d.values,
            "" if d.values is None else numbers(d.values),
            d.fix or fix_of(d.code, BETWEEN if d.at[0].before else kinds.get(d.layer, "")),
            _advice(d),
            _tried(report, d, kinds.get(d.layer, "")),
            _further(d),
            _convention(report, d.code),
            link(d.code),
        )
        for d in report.diagnoses
    ]


def answer(report: Report) -> str:
    """What differs, where, and in how many layers, in one sentence; that all agrees, where it does."""
    if report.ok and report.details.get("mode") == "initialisation":
        return "The two begin alike: nothing differs by more than chance explains."
    if report.ok:
        return "The two agree: nothing differs by more than rounding explains."
    first = report.first_divergence
    if not report.diagnoses:
        return f"The two differ{'' if first is None else f' first {first.place.text}'}."
    known = [d for d in report.diagnoses if d.code in MISTAKES]
    if not known:
        d = report.diagnoses[0]
        if d.code in (COULD_NOT_RUN, NOT_COMPARED):
            return f"The two could not be compared to the end: {shown(d.evidence)}."
        return f"The two differ {_where(d)}, by no mistake that is known."
    mistakes = [d for d in known if not MISTAKES[d.code].convention]
    conventions = _named([d for d in known if d not in mistakes])
    if not mistakes and _only_conventions(report):
        return f"To predict: ok; in training the two differ by a convention of the frameworks, {conventions}."
    told = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    told = f"by {told}: {_named(mistakes)}" if mistakes else ""
    besides = f"by a convention of the frameworks: {conventions}" if conventions else ""
    return f"The two differ {'; and '.join(part for part in (told, besides) if part)}."


def _named(some: Sequence[Diagnosis]) -> str:
    """The first of them, each with its place, and how many more."""
    named = [f"{d.code} {_where(d)}" for d in some[:MOST_NAMED]]
    return "; ".join([*named, f"and {len(some) - MOST_NAMED} more"] if len(some) > MOST_NAMED else named)


def _where(d: Diagnosis) -> str:
    """Where first, and in how many layers or places; nothing where it is in no layer, as an optimiser's."""
    if len(d.at) > 1:
        return f"in {len(d.at)} {'places' if any(p.before for p in d.at) else 'layers'}, first {d.at[0].text}"
    if not d.at[0].torch_layer and not d.at[0].flax_layer:
        return f"at {NETWORK}" if d.code not in MISTAKES or MISTAKES[d.code].phase == "forward" else "in all layers"
    return f"in one {'place' if d.at[0].before else 'layer'}, {d.at[0].text}"


def _tried(report: Report, d: Diagnosis, kind: str) -> str:
    """Which mistakes were looked for in vain, where something is not explained."""
    if d.code != UNEXPLAINED:
        return ""
    first = report.first_divergence
    family = "norm" if kind in NORMS else "product" if kind in PRODUCTS else ""
    if d.at[0].before:
        family = "between"
    elif not family and first is not None and first.phase in FIRST_OF:
        family = first.phase
    return ", ".join(codes_of(family)) if family else "no mistake of such a layer is known"


def _further(d: Diagnosis) -> str:
    if d.code != UNEXPLAINED:
        return ""
    place = d.at[0]
    layer = place.torch_layer if place.before in ("", NETWORK) else place.before
    if not layer:
        return "parity.dump writes what either side computes; docs/limits.md says what is not recognised"
    part = "the two layers with what lies between them" if place.before else "this layer"
    given = shown(f"layer_map={{{layer!r}: ...}}")
    name = shown(layer)
    dump = "or write what both compute with parity.dump"
    return f"if {name} is another layer in Flax, give {given}; else check {part} as a pair of its own, {dump}"


def _advice(d: Diagnosis) -> str:
    if d.fix is None:
        return EXAMPLE if d.code in MISTAKES else ""
    return OWN if len(d.at) == 1 else f"{OWN}; {d.at[0].text}"


def _only_conventions(report: Report) -> bool:
    """Whether nothing else differs: a convention is in what training keeps and what comes of it, not in an output."""
    elsewhere = any(not row.ok and row.phase not in ("statistics", "optimizer") for row in report.layers)
    return not elsewhere and all(d.code in MISTAKES and MISTAKES[d.code].convention for d in report.diagnoses)


def _convention(report: Report, code: str) -> str:
    if code not in MISTAKES or not MISTAKES[code].convention:
        return ""
    return f"{MISTAKES[code].convention} ({PREDICTS})" if _only_conventions(report) else MISTAKES[code].convention


def _classes(places: Sequence[Place]) -> str:
    if len(places) == 1:
        return ""
    classes = Counter(shown(place.class_name or "layers") for place in places)
    return ", ".join(f"{n} {name}" for name, n in classes.items())


def numbers(v: Values) -> str:
    """In words: of which array, at which index, PyTorch's number and Flax's."""
    what = f"{v.quantity} of {v.torch_layer or NETWORK}"
    if v.torch is None or v.flax is None:
        return shown(f"{what}: {(v.shapes or Shapes(v.torch_shape, v.flax_shape)).text}")
    both = both_numbers(v)
    at = f"{list(v.flax_index)}" if v.torch_index in (None, v.flax_index) else f"{list(v.torch_index or ())}"
    other = "" if v.torch_index in (None, v.flax_index) else f" at {list(v.flax_index)}"
    return shown(f"{what} at {at}: {both[0]} in PyTorch, {both[1]} in Flax{other}")


def both_numbers(v: Values) -> tuple[str, str]:
    """PyTorch's number and Flax's, with as many digits as it takes to tell them apart."""
    if isinstance(v.torch, float) and isinstance(v.flax, float):
        return told_apart(v.torch, v.flax)
    return f"{v.torch}", f"{v.flax}"


def link(code: str) -> str:
    """Into the gallery of mistakes: on the web, if the project says where it is, else in its folder."""
    return f"{_site()}{PAGE}#{code}" if code in MISTAKES else ""


@cache
def _site() -> str:
    try:
        urls = metadata.metadata(PROJECT).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    named = dict(tuple(part.strip() for part in url.split(",", 1)) for url in urls if "," in url)
    for name in ("Source", "Repository", "Homepage"):
        if named.get(name, "").startswith("https://"):
            return f"{named[name].rstrip('/')}/blob/main/"
    return ""
