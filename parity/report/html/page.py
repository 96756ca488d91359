"""A report as one HTML page: no script, nothing from the network, light or dark as the reader's system is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parity.records.recording import PHASES
from parity.report.findings import NETWORK, both_names, escaped, number
from parity.report.html.charts import Point, error_chart, line_chart

if TYPE_CHECKING:
    from parity.report.findings import LayerRow
    from parity.report.report import Report


# Text and marks have a contrast of at least 4.5 to 1 (WCAG 2.1, AA) on either background.
STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --front: #1c1e21; --soft: #5a6069; --line: #d5d9de; --box: #f4f5f7;
  --good: #146c36; --bad: #b3261e; --warn: #855300; --s0: #0b62a8; --s1: #b8500a; --s2: #146c36; --s3: #8a3a9c; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --front: #e8eaed; --soft: #a3aab3; --line: #3a3f46;
  --box: #1f2226; --good: #74d694; --bad: #ff8f85; --warn: #f2c063; --s0: #7cc0ff; --s1: #ffac6b; --s2: #74d694;
  --s3: #dba2ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back); color: var(--front);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
td.name { min-width: 7.5rem; }
code, td.name { font-family: ui-monospace, monospace; font-size: .92em; overflow-wrap: anywhere; }
.verdict { border-left: .4rem solid var(--bad); background: var(--box); padding: .8rem 1rem; margin: 1rem 0;
  border-radius: .25rem; }
.verdict.good { border-color: var(--good); }
.verdict strong { color: var(--bad); } .verdict.good strong { color: var(--good); }
ol.diagnoses { padding: 0; list-style: none; }
ol.diagnoses li { background: var(--box); border-radius: .25rem; padding: .7rem 1rem; margin: .6rem 0; }
ol.diagnoses .code { color: var(--bad); font-weight: 700; }
.soft, caption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0 .5rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.mark { white-space: nowrap; }
tr.differs .mark, tr.differs-first .mark { color: var(--bad); font-weight: 600; }
tr.inherits .mark { color: var(--warn); }
tr.differs-first { background: var(--box); } tr.differs-first td { font-weight: 600; }
tbody + tbody tr:first-child > * { border-top: 2px solid var(--soft); }
label { user-select: none; } #only:checked ~ .scroll tr.ok { display: none; }
.chart { overflow-x: auto; } svg { width: 100%; min-width: 40rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg path, svg circle { fill: none; stroke-width: 2; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .bound { stroke: var(--front); stroke-width: 2; }
svg .ok > * { fill: var(--good); } svg .inherits > * { fill: var(--warn); }
svg .differs > *, svg .differs-first > * { fill: var(--bad); } svg .differs-first > path { stroke: var(--front); }
svg g > .alone { fill: none; stroke: var(--soft); stroke-width: 1.5; }
""" + "".join(f"svg .s{i} {{ stroke: var(--s{i}); }} svg .dot{i} {{ fill: var(--s{i}); }}\n" for i in range(4))

LEGEND = (
    "Logarithmic. Line: the bound, what rounding explains. Dot: agrees. Diamond: differs, the large one first. "
    "Triangle: differs only by what is handed to it. Hollow circle: the layer alone, fed the other side's input."
)


def page(report: Report) -> str:
    """The whole page; everything from the report is escaped."""
    title = "Parity: the two sides agree" if report.ok else "Parity: the two sides differ"
    parts = [
        f"<h1>{title}</h1>",
        _verdict(report),
        _diagnoses(report),
        _notes(report),
        _errors(report),
        _curves(report),
    ]
    parts += [_table(report), _details(report)]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _verdict(report: Report) -> str:
    summary = escaped(report.summary)
    first, colon, rest = summary.partition(":")
    return f'<p class="verdict{" good" if report.ok else ""}"><strong>{first}</strong>{colon}{rest}</p>'


def _diagnoses(report: Report) -> str:
    items = [
        f'<li><span class="code">{escaped(d.code)}</span> at <code>{escaped(d.where)}</code><br>'
        f"{escaped(d.evidence)}</li>"
        for d in report.diagnoses
    ]
    return f'<h2>What was recognised</h2><ol class="diagnoses">{"".join(items)}</ol>' if items else ""


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escaped(note)}</li>" for note in report.notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _errors(report: Report) -> str:
    parts = []
    for phase in PHASES:
        rows = [row for row in report.layers if row.phase == phase]
        points = []
        for row in rows:
            where, mark = both_names(row.torch_layer, row.flax_layer), report.verdict(row)
            alone = "" if row.local_error is None else f", alone {number(row.local_error)}"
            text = f"{where}, {row.quantity}: error {number(row.error)}{alone}, bound {number(row.bound)}, {mark}"
            points.append(
                Point(row.torch_layer or row.flax_layer or NETWORK, text, row.error, row.bound, row.local_error, mark)
            )
        if points:
            chart = error_chart(
                points, f"Errors of {phase} over the layers, with their bounds; the table has the values"
            )
            parts.append(f"<h2>Errors: {phase}</h2>{chart}")
    return f'<p class="soft">{LEGEND}</p>{"".join(parts)}' if parts else ""


def _curves(report: Report) -> str:
    parts = []
    for key, title, logarithmic in (
        ("losses", "Losses", False),
        ("distances", "Distance over the steps", True),
    ):
        curves = report.details.get(key)
        if isinstance(curves, Mapping) and all(_is_curve(curve) for curve in curves.values()) and curves:
            named = {str(name): [float(v) for v in curve] for name, curve in curves.items()}
            parts.append(f"<h2>{title}</h2>{line_chart(named, f'{title}, a curve a side', logarithmic=logarithmic)}")
    return "".join(parts)


def _is_curve(value: Any) -> bool:
    if not (hasattr(value, "__len__") and hasattr(value, "__iter__")) or isinstance(value, (str, bytes, Mapping)):
        return False
    try:
        return len([float(v) for v in value]) > 0
    except (TypeError, ValueError):
        return False


def _table(report: Report) -> str:
    if not report.layers:
        return ""
    names, numbers = (
        ("phase", "PyTorch", "Flax", "kind", "quantity"),
        ("error", "bound", "alone", "float32", "rounding"),
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    head += "".join(f'<th scope="col" class="number">{name}</th>' for name in numbers) + '<th scope="col">result</th>'
    bodies, previous = [], None
    for row in report.layers:
        if row.phase != previous:
            bodies.append("")
        bodies[-1], previous = bodies[-1] + _row(report, row), row.phase
    caption = (
        "Errors in float64, relative to the largest true value; alone: the layer fed the other side's input; float32: "
        "the difference there; rounding: what float32 costs both sides together."
    )
    table = "".join(f"<tbody>{body}</tbody>" for body in bodies)
    toggle = '<input type="checkbox" id="only"> <label for="only">only what differs</label>'
    return (
        f"<h2>Every quantity</h2>{toggle}"
        '<div class="scroll" tabindex="0" role="region" aria-label="Every quantity"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>{table}</table></div>"
    )


def _row(report: Report, row: LayerRow) -> str:
    verdict = report.verdict(row)
    numbers = (row.error, row.bound, row.local_error, row.error32, row.rounding32)
    names = (row.torch_layer, row.flax_layer) if row.torch_layer or row.flax_layer else (NETWORK, NETWORK)
    cells = [f"<td>{row.phase}</td>", *(f'<td class="name">{escaped(name)}</td>' for name in names)]
    cells += [f"<td>{escaped(row.kind)}</td>"]
    cells += [f"<td>{escaped(row.quantity)}</td>"]
    cells += [f'<td class="number">{number(value)}</td>' for value in numbers]
    return f'<tr class="{verdict.replace(" ", "-")}">{"".join(cells)}<td class="mark">{verdict}</td></tr>'


def _details(report: Report) -> str:
    drawn = {key for key in ("losses", "distances") if isinstance(report.details.get(key), Mapping)}
    fields = {key: value for key, value in report.to_dict()["details"].items() if key not in drawn}
    rows = "".join(
        f'<tr><th scope="row">{escaped(key)}</th><td><code>{escaped(_text(value))}</code></td></tr>'
        for key, value in fields.items()
    )
    return f"<h2>Details</h2><table>{rows}</table>" if rows else ""


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 100:
        return f"{len(value)} values"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
