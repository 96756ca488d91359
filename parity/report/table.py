"""A report as a table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from parity.report.findings import NETWORK, both_names, number

if TYPE_CHECKING:
    from parity.report.report import Report


def parts(report: Report, width: int, lines: box.Box) -> Iterator[Table | Text]:
    """The table, what was recognised, the notes and the result."""
    if width < NARROWEST:
        yield from _lines(report)
    elif report.layers:
        yield _table(report, width, lines)
    if report.layers:
        yield Text()
    for diagnosis in report.diagnoses:
        yield Text.assemble((diagnosis.code, "bold red"), f" at {diagnosis.where}: {diagnosis.evidence}")
    for note in report.notes:
        yield Text(f"note: {note}", style="dim")
    yield Text(report.summary, style="bold green" if report.ok else "bold red")


NARROWEST = 76
"""Columns of a terminal that hold the table."""
STYLES = {"ok": "", "inherits": "yellow", "differs": "red", "differs first": "bold red"}


def _lines(report: Report) -> Iterator[Text]:
    """A line for each quantity, where there is no room for a table."""
    for row in report.layers:
        verdict, where = report.verdict(row), both_names(row.torch_layer, row.flax_layer)
        errors = f"error {number(row.error)}, bound {number(row.bound)}: {verdict}"
        yield Text(f"{row.phase} {where} {row.quantity}: {errors}", style=STYLES[verdict])


def _table(report: Report, width: int, lines: box.Box) -> Table:
    """A row for each quantity; the columns of which there is less need are left out where there is no room."""
    table = Table(box=lines, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("phase", "PyTorch", "Flax", "quantity"):
        table.add_column(title, overflow="fold", min_width=8)
    rows = report.layers
    optional = {
        "alone": [row.local_error for row in rows],
        "float32": [row.error32 for row in rows],
        "rounding": [row.rounding32 for row in rows],
    }
    room = (width - 86) // 10 + 1  # beside names of 12 letters
    columns = [values for values in optional.items() if any(v is not None for v in values[1])][: max(room, 0)]
    for title in ("error", "bound", *(title for title, _ in columns)):
        table.add_column(title, justify="right", no_wrap=True, min_width=7)
    table.add_column("", no_wrap=True, min_width=13)
    for i, row in enumerate(rows):
        verdict = report.verdict(row)
        names = (row.torch_layer, row.flax_layer) if row.torch_layer or row.flax_layer else (NETWORK, NETWORK)
        cells = [row.phase, *names, row.quantity, number(row.error), number(row.bound)]
        cells += [number(values[i]) for _, values in columns]
        last = i + 1 == len(rows) or rows[i + 1].phase != row.phase
        table.add_row(*map(Text, (*cells, verdict)), style=STYLES[verdict], end_section=last)
    return table


def takes(character: str) -> bool:
    """Whether standard output can write the character."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
