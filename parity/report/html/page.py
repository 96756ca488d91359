"""A report as one HTML page: read without network and without script, light or dark as the reader's system is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any

from parity.records.recording import PHASES
from parity.report.cards import MOST_NAMED, answer
from parity.report.findings import NETWORK, apart, both_names, number
from parity.report.html.causes import causes
from parity.report.html.charts import LEAST_POINTS, Point, error_chart, line_chart, worst_of_each
from parity.report.html.elements import SYMBOLS, Markup, joined, legend, mark, tag
from parity.report.html.layers import differing, every
from parity.report.html.modules import modules

if TYPE_CHECKING:
    from parity.report.report import Report

STYLE = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
SCRIPT = (resources.files(__package__) / "page.js").read_text(encoding="utf-8")
TOLD_ABOVE = frozenset({"mode", "dtype", "torch_module", "flax_module", "torch", "jax", "flax", "numpy", "inputs"})
"""Of the details: they stand at the top of the page."""
SIDES = {"torch": "PyTorch", "flax": "Flax"}
CURVES = {"losses": ("Losses", False), "distances": ("Distance over the steps", True)}
"""Of the details: drawn, where they are curves. Key -> (title, whether its axis is logarithmic)."""


def page(report: Report, when: datetime | None = None) -> str:
    """The whole page.

    Args:
      report: all that it holds is escaped.
      when: the date that it bears; None: now.
    """
    state, word = _state(report)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"Parity: {word}"),
        Markup(f"<style>{STYLE}</style>"),
    ]
    header = tag(
        "header",
        tag("h1", mark({"good": "ok", "bad": "differs"}.get(state, "inherits")), f" {answer(report)}"),
        tag("p", report.summary, class_="summary") if len(report.diagnoses) <= MOST_NAMED else None,
        _facts(report, when or datetime.now(UTC)),
        class_=state,
    )
    parts = [causes(report), differing(report), _notes(report), _errors(report), _curves(report)]
    parts += [modules(report), every(report), _details(report)]
    main = tag("main", *(joined(part, Markup("\n")) for part in parts if part is not None))
    body = tag("body", SYMBOLS, header, Markup("\n"), main, Markup(f"<script>{SCRIPT}</script>"))
    return f"<!doctype html>\n{tag('html', tag('head', *head), Markup(chr(10)), body, lang='en')}\n"


def _state(report: Report) -> tuple[str, str]:
    """A class of the style, and the word."""
    if report.ok:
        return "good", "the two agree"
    if report.stopped:
        return "stopped", "not compared to the end"
    return "bad", "the two differ"


def _facts(report: Report, when: datetime) -> Markup:
    """What was compared, how, with which versions and when."""
    of = {key: str(value) for key, value in report.details.items() if isinstance(value, str)}
    sides = []
    for side, module, versions in (("PyTorch", "torch_module", ("torch",)), ("Flax", "flax_module", ("flax", "jax"))):
        words = [of[module]] if module in of else []
        words += [", ".join(f"{name} {of[name]}" for name in versions if name in of)]
        sides.append((side, "; ".join(filter(None, words))))
    facts = [
        *sides,
        ("Inputs", _inputs(report.details.get("inputs"))),
        ("Mode", of.get("mode", "")),
        ("Computed in", of.get("dtype", "")),
        ("Written", when.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    items = [tag("div", tag("dt", name), tag("dd", text)) for name, text in facts if text]
    return tag("dl", *items, class_="facts")


def _inputs(given: Any) -> str:
    """The shapes of the inputs; Flax's where these are others."""
    if not isinstance(given, Mapping):
        return ""
    sides = [", ".join(" x ".join(map(str, shape)) or "a number" for shape in shapes) for shapes in given.values()]
    if len(set(sides)) == 1:
        return sides[0]
    return "; ".join(f"{text} in {SIDES.get(side, side)}" for side, text in zip(given, sides, strict=True) if text)


def _notes(report: Report) -> Markup | None:
    items = [tag("li", note) for note in report.notes]
    return tag("section", tag("h2", "Notes"), tag("ul", *items), aria_label="Notes") if items else None


def _errors(report: Report) -> Markup | None:
    """A chart for each phase that has points enough; unfolded is that of the first difference."""
    first = report.first_divergence
    charts = {}
    for phase in PHASES:
        points = [_point(report, row) for row in report.layers if row.phase == phase]
        if len(points) >= LEAST_POINTS:
            charts[phase] = points
    if not charts:
        return None
    unfolded = first.phase if first is not None and first.phase in charts else next(iter(charts))
    bound = tag("li", tag("span", class_="line"), " bound: what rounding explains")
    alone = tag("li", mark("alone"), " the layer alone, fed the other side's input")
    besides = [alone, bound] if any(row.local_error is not None for row in report.layers) else [bound]
    title = "Errors over the layers"
    parts = [tag("h2", title), legend({p.mark for points in charts.values() for p in points}, *besides)]
    for phase, points in charts.items():
        drawn = worst_of_each(points)
        said = f"Errors of {phase} over the layers, with their bounds; the table has the values"
        each = tag("p", f"{len(points)} quantities; of neighbours the worst is drawn.", class_="soft")
        body = [tag("summary", phase), each if len(drawn) < len(points) else None, error_chart(drawn, said)]
        parts.append(tag("details", *body, class_="phase", open=phase == unfolded))
    return tag("section", *parts, id="errors", aria_label=title)


def _point(report: Report, row: Any) -> Point:
    verdict = report.verdict(row)
    alone = "" if row.local_error is None else f", alone {apart(row, row.local_error)}"
    where = both_names(row.torch_layer, row.flax_layer)
    text = f"{where}, {row.quantity}: error {apart(row, row.error)}{alone}, bound {number(row.bound)}, {verdict}"
    return Point(row.torch_layer or row.flax_layer or NETWORK, text, row.error, row.bound, row.local_error, verdict)


def _curves(report: Report) -> Markup | None:
    parts = []
    for key, curves in _drawn(report).items():
        title, logarithmic = CURVES[key]
        chart = line_chart(curves, f"{title}, a curve a side", logarithmic=logarithmic)
        parts.append(tag("section", tag("h2", title), chart, aria_label=title))
    return joined(*parts) if parts else None


def _drawn(report: Report) -> dict[str, dict[str, list[float]]]:
    """The details that are curves of points enough."""
    found = {}
    for key in CURVES:
        given = report.details.get(key)
        if isinstance(given, Mapping) and given and all(map(_is_curve, given.values())):
            curves = {str(name): [float(v) for v in curve] for name, curve in given.items()}
            if max(map(len, curves.values())) >= LEAST_POINTS:
                found[key] = curves
    return found


def _is_curve(value: Any) -> bool:
    if not (hasattr(value, "__len__") and hasattr(value, "__iter__")) or isinstance(value, (str, bytes, Mapping)):
        return False
    try:
        return len([float(v) for v in value]) > 0
    except (TypeError, ValueError):
        return False


def _details(report: Report) -> Markup | None:
    left = report.to_dict()["details"]
    fields = {key: value for key, value in left.items() if key not in TOLD_ABOVE and key not in _drawn(report)}
    rows = [
        tag("tr", tag("th", key, scope="row"), tag("td", tag("code", _text(value)))) for key, value in fields.items()
    ]
    return tag("section", tag("h2", "Details"), tag("table", *rows), aria_label="Details") if rows else None


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 100:
        return f"{len(value)} values"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
