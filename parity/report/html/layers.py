"""The table of quantities: what differs with its surroundings, and every row on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from parity.report.findings import NETWORK, apart, number
from parity.report.folded import folded
from parity.report.html.elements import Markup, legend, mark, tag
from parity.report.rows import chosen, left_out

if TYPE_CHECKING:
    from parity.report.findings import LayerRow
    from parity.report.report import Report

CAPTION = (
    "Errors in float64, relative to the largest true value; bound: what rounding explains; alone: the layer fed the "
    "other side's input; float32: the difference there; rounding: what float32 costs both sides together."
)
NAMES = "result", "layer", "kind", "phase", "quantity"
NUMBERS = "error", "bound", "alone", "float32", "rounding"


def differing(report: Report) -> Markup | None:
    """What differs, the first difference marked, with three rows before and behind it; or the modules of a depth."""
    if report.depth is not None and report.layers:
        return _folded(report, report.depth)
    places = chosen(report, "differing")
    if not places:
        return None
    left = left_out(report, places)
    title = "What differs" if any(not report.layers[i].ok for i in places) else "Compared before it stopped"
    rest = (
        tag("p", f"Not shown: {left}. ", tag("a", "Every quantity", href="#all"), ".", class_="soft") if left else None
    )
    shown_rows = _table(report, places, title)
    return tag(
        "section",
        tag("h2", title),
        legend({report.verdict(report.layers[i]) for i in places}),
        shown_rows,
        rest,
        id="differs",
        aria_label=title,
    )


def _folded(report: Report, depth: int) -> Markup:
    """A row for every module of that depth."""
    modules, title = folded(report, depth), f"Modules to depth {depth}"
    head = [tag("th", name, scope="col") for name in ("result", "module", "worst in")]
    head += [tag("th", name, scope="col", class_="number") for name in ("layers", "differ", "worst", "bound")]
    body = []
    for m in modules:
        counts = (f"{m.layers}", f"{m.differ}") if m.layers else ("", "")
        cells = [tag("td", mark(m.verdict), f" {m.verdict}", class_="mark"), tag("td", m.name, class_="name")]
        cells += [tag("td", m.where, class_="what")]
        cells += [
            tag("td", text, class_=f"number {name}")
            for name, text in zip(
                ("layers", "differ", "error", "bound"),
                (*counts, apart(m.worst, m.worst.error), number(m.worst.bound)),
                strict=True,
            )
        ]
        body.append(tag("tr", *cells, class_=m.verdict.replace(" ", "-")))
    caption = "Of each module: how many layers, how many of them differ, and the worst error with its bound."
    table = _scrolled(title, tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    parts = [tag("h2", title), legend({m.verdict for m in modules}), table]
    return tag("section", *parts, id="differs", aria_label=title)


def every(report: Report) -> Markup | None:
    """All rows, folded."""
    if not report.layers:
        return None
    title = "Every quantity"
    count = f"{len(report.layers)} {'row' if len(report.layers) == 1 else 'rows'}, in the order of execution"
    only = tag("p", tag("input", type="checkbox", id="only"), " ", tag("label", "only what is not ok", for_="only"))
    table = _table(report, range(len(report.layers)), title)
    body = tag("div", only if any(not row.ok for row in report.layers) else None, table, class_="every")
    summary = tag("summary", tag("h2", title), tag("span", f" {count}", class_="soft"))
    return tag("section", tag("details", summary, body), id="all", aria_label=title)


def _table(report: Report, places: Sequence[int], title: str) -> Markup:
    numbers = [NUMBERS[i] for i in _columns(report)]
    head = [tag("th", name, scope="col") for name in NAMES]
    head += [tag("th", name, scope="col", class_="number") for name in numbers]
    parts = [tag("caption", CAPTION), tag("thead", tag("tr", *head))]
    parts += [tag("tbody", *body) for body in _bodies(report, places)]
    return _scrolled(title, *parts)


def _scrolled(title: str, *parts: Markup) -> Markup:
    """A table that is wider than a phone is moved in its own place."""
    table = tag("table", *parts, class_="rows")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"{title}, table")


def _columns(report: Report) -> list[int]:
    """Those of which there is a number in any row."""
    filled = [[v is not None for v in _numbers(row)] for row in report.layers]
    return [i for i in range(len(NUMBERS)) if any(line[i] for line in filled)]


def _bodies(report: Report, places: Sequence[int]) -> Iterator[list[Markup]]:
    """Rows by phase; where some between two are not shown, a line says so."""
    columns, body = _columns(report), list[Markup]()
    for at, i in enumerate(places):
        row = report.layers[i]
        new = at > 0 and row.phase != report.layers[places[at - 1]].phase
        if new:
            yield body
            body = []
        if at > 0 and i != places[at - 1] + 1:
            skipped = i - places[at - 1] - 1
            text = f"{skipped} {'row' if skipped == 1 else 'rows'} between"
            body.append(tag("tr", tag("td", text, colspan=len(NAMES) + len(columns), class_="gap")))
        body.append(_row(report, row, columns))
    if body:
        yield body


def _row(report: Report, row: LayerRow, columns: Sequence[int]) -> Markup:
    verdict = report.verdict(row)
    values = _numbers(row)
    quantity = row.quantity if row.shapes is None else f"{row.quantity}, {row.shapes.text}"
    cells = [
        tag("td", mark(verdict), f" {verdict}", class_="mark"),
        tag("td", *names(row.torch_layer, row.flax_layer), class_="name"),
        *(tag("td", text, class_="what") for text in (row.kind, row.phase, quantity)),
        *(tag("td", apart(row, values[i]), class_=f"number {NUMBERS[i]}") for i in columns),
    ]
    return tag("tr", *cells, class_=verdict.replace(" ", "-"))


def names(torch_layer: str, flax_layer: str) -> list[Markup]:
    """PyTorch's name of a layer, and Flax's where it is another one."""
    both = [name for name in dict.fromkeys((torch_layer, flax_layer)) if name] or [NETWORK]
    return [tag("span", both[0]), *(tag("span", f" {name}", class_="flax") for name in both[1:])]


def _numbers(row: LayerRow) -> tuple[float | None, ...]:
    return row.error, row.bound, row.local_error, row.error32, row.rounding32
