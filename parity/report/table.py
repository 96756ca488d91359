"""A report as text in the terminal: the answer, the cards, a table, the notes, the result."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from parity.report.cards import Card, answer, cards
from parity.report.findings import CUT_OTHERWISE, NETWORK, ROUNDING, apart, both_names, number, shown
from parity.report.folded import Fold, folded
from parity.report.rows import chosen, left_out

if TYPE_CHECKING:
    from parity.report.findings import LayerRow
    from parity.report.report import Report

ROWS = "differing", "all"
NARROWEST = 80
"""Columns of a terminal that hold the table."""
ROOMY = 100
"""Columns of one in which two blanks stand between two columns of the table."""
MOST_PLACES = 6
"""Of one cause, likewise."""
STYLES = {
    "ok": "",
    ROUNDING: "",
    CUT_OTHERWISE: "",
    "inherits": "yellow",
    "differs": "red",
    "differs first": "bold red",
}


def parts(report: Report, width: int, lines: box.Box, rows: str = "differing") -> Iterator[Table | Text]:
    """The answer, a card for each cause, the table, the notes and the result."""
    if not report.ok:
        yield Text(answer(report), style="bold")
        yield Text()
    for card in cards(report):
        yield from _card(card, rows)
    shown_rows = [] if report.depth is not None else chosen(report, rows)
    if report.depth is not None and report.layers:
        modules = folded(report, report.depth)
        yield from _folded_lines(modules) if width < NARROWEST else [_folded(modules, width, lines)]
        yield Text()
    if shown_rows:
        if width < NARROWEST:
            yield from _lines(report, shown_rows)
        else:
            yield _table(report, shown_rows, width, lines)
        left = left_out(report, shown_rows)
        yield Text(f'not shown: {left} (rows="all", --rows all)' if left else "", style="dim")
        if left:
            yield Text()
    for note in report.notes:
        yield Text(f"note: {shown(note)}", style="dim")
    yield Text(report.summary, style="bold green" if report.ok else "bold red")


def _card(card: Card, rows: str) -> Iterator[Text]:
    """A cause, its sentence in one line, and what is known of it in lines below."""
    most = len(card.places) if rows == "all" else MOST_PLACES
    names = [place.text for place in card.places[:most]]
    if not any(place.before for place in card.places):
        where = "at " + ", ".join(name.removeprefix("at ") for name in names)
    else:
        where = "; ".join(names)
    where += f" and {len(card.places) - most} more" if len(card.places) > most else ""
    yield Text.assemble((card.code, "bold red"), f" {where}: {card.evidence}")
    below = [("layers", card.classes), ("numbers", card.numbers), ("known", card.convention)]
    below += [("tried", card.tried), ("next", card.further)]
    if card.fix is not None:
        below.append(("write", f"{card.advice}:"))
        for side, (wrong, right) in (("PyTorch", card.fix.torch), ("Flax", card.fix.flax)):
            below += [(f"{side}:", right), ("  not", wrong)]
    for title, text in [*below, ("see", card.link)]:
        if text:
            yield Text(f"  {title:<8} {text}")
    yield Text()


def _lines(report: Report, chosen: Sequence[int]) -> Iterator[Text]:
    """A line for each quantity, where there is no room for a table."""
    for row in (report.layers[i] for i in chosen):
        verdict, where = report.verdict(row), both_names(row.torch_layer, row.flax_layer)
        errors = f"error {number(row.error)}, bound {number(row.bound)}" if row.shapes is None else row.shapes.text
        errors += f": {verdict}"
        yield Text(f"{row.phase} {where} {shown(row.quantity)}: {errors}", style=STYLES[verdict])


def _names(row: LayerRow) -> tuple[str, str, str]:
    """The layer on both sides, and the quantity."""
    names = (row.torch_layer, row.flax_layer) if row.torch_layer or row.flax_layer else (NETWORK, NETWORK)
    return shown(names[0]), shown(names[1]), shown(row.quantity)


def _table(report: Report, chosen: Sequence[int], width: int, lines: box.Box) -> Table:
    """A row for each quantity; the columns of which there is less need are left out where there is no room."""
    rows = [report.layers[i] for i in chosen]
    verdicts, named = [report.verdict(row) for row in rows], [_names(row) for row in rows]
    optional = {
        "alone": [row.local_error for row in rows],
        "float32": [row.error32 for row in rows],
        "rounding": [row.rounding32 for row in rows],
    }
    columns = [values for values in optional.items() if any(v is not None for v in values[1])]
    need = [max(len(title), *map(len, names)) for title, names in zip(TITLES, zip(*named, strict=True), strict=True)]
    need[2] = min(need[2], MOST_QUANTITY)
    pad = int(width >= ROOMY)
    gap = 1 + pad  # the box has a blank between two columns
    room = width - max(len(row.phase) for row in rows) - need[2] - 2 * 7 - max(map(len, verdicts)) - 6 * gap
    columns = columns[: max(0, (room - min(need[0] + need[1], LEAST_NAMES)) // (7 + gap + 1))]
    need[:2] = _shared(need[0], need[1], room - (7 + gap + 1) * len(columns))
    table = Table(box=lines, pad_edge=False, show_edge=False, padding=(0, pad, 0, 0))
    for title, least in zip(("phase", *TITLES), (5, *need), strict=True):
        table.add_column(title, overflow="fold", min_width=least)
    for title in ("error", "bound", *(title for title, _ in columns)):
        table.add_column(title, justify="right", no_wrap=True, min_width=7)
    table.add_column("", no_wrap=True, min_width=max(map(len, verdicts)))
    for i, row in enumerate(rows):
        if i and chosen[i] != chosen[i - 1] + 1:
            table.add_row(GAP)
        names = [_short(name, most) for name, most in zip(named[i], need, strict=True)]
        cells = [row.phase, *names, apart(row, row.error), number(row.bound)]
        cells += [apart(row, values[i]) for _, values in columns]
        last = i + 1 == len(rows) or rows[i + 1].phase != row.phase
        table.add_row(*map(Text, (*cells, verdicts[i])), style=STYLES[verdicts[i]], end_section=last)
    return table


def _folded_lines(modules: Sequence[Fold]) -> Iterator[Text]:
    """A line for each module, where there is no room for a table."""
    for module in modules:
        layers = f" {module.differ} of {module.layers} layers differ;" if module.layers else ""
        worst = module.worst
        errors = f"worst error {apart(worst, worst.error)}, bound {number(worst.bound)}: {module.verdict}"
        yield Text(f"{shown(module.name)}:{layers} {errors}", style=STYLES[module.verdict])


def _folded(modules: Sequence[Fold], width: int, lines: box.Box) -> Table:
    """A row for each module; where its worst error is, as far as there is room."""
    table = Table(box=lines, pad_edge=False, show_edge=False, padding=(0, int(width >= ROOMY), 0, 0))
    where = [shown(m.where) for m in modules]
    room = width - 2 * 6 - 2 * 7 - max(len(m.verdict) for m in modules) - 6 * (1 + int(width >= ROOMY))
    need = _shared(max(len(shown(m.name)) for m in modules), max(map(len, where)), room)
    for title, least in zip(("module", "worst in"), need, strict=True):
        table.add_column(title, overflow="fold", min_width=least)
    for title in ("layers", "differ", "worst", "bound"):
        table.add_column(title, justify="right", no_wrap=True, min_width=6 if title in ("layers", "differ") else 7)
    table.add_column("", no_wrap=True)
    for m, place in zip(modules, where, strict=True):
        names = _short(shown(m.name), need[0]), _short(place, need[1])
        counts = (f"{m.layers}", f"{m.differ}") if m.layers else ("", "")
        cells = (*names, *counts, apart(m.worst, m.worst.error), number(m.worst.bound), m.verdict)
        table.add_row(*map(Text, cells), style=STYLES[m.verdict])
    return table


TITLES = "PyTorch", "Flax", "quantity"
GAP = ".."
MOST_QUANTITY, LEAST_NAMES = 20, 44
"""Letters: of a quantity, and of both names together where there are further columns."""


def _shared(first: int, second: int, room: int) -> tuple[int, int]:
    """The room for two names, each as long as it is, or half of what there is, or what the other leaves."""
    if first + second <= room:
        return first, second
    half = room // 2
    return (
        (first, room - first) if first <= half else (room - second, second) if second <= half else (half, room - half)
    )


def _short(name: str, most: int) -> str:
    """Shortened: first its longest parts, so that numbers stay, else in the middle. JSON and HTML have it whole."""
    if len(name) <= most:
        return name
    dots = "…" if takes("…") else ".."
    parts = re.split(r"([./])", name)
    for longest in range(max(map(len, parts)), 2 + len(dots), -1):
        fits = "".join(p if len(p) <= longest else p[: longest - len(dots)] + dots for p in parts)
        if len(fits) <= most:
            return fits
    left = most - len(dots)
    return name[: left // 3] + dots + name[len(name) - (left - left // 3) :]


def takes(character: str) -> bool:
    """Whether standard output can write the character."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
