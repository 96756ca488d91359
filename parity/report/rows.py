"""Which rows of a report are shown where not all are asked for, and how many are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.report.report import Report

CONTEXT = 3
"""Rows before the first difference, and behind it."""
MOST_ROWS = 16
"""Of those that differ, where not all rows are asked for."""


def chosen(report: Report, rows: str) -> list[int]:
    """Places of the rows that are shown."""
    verdicts = [report.verdict(row) for row in report.layers]
    if rows == "all":
        return list(range(len(verdicts)))
    differing = [i for i, verdict in enumerate(verdicts) if verdict.startswith("differs")]
    differing = differing or [i for i, verdict in enumerate(verdicts) if verdict != "ok"]
    if report.ok or not differing:
        return []
    first = next((i for i, verdict in enumerate(verdicts) if verdict == "differs first"), differing[0])
    around = range(max(0, first - CONTEXT), min(len(verdicts), first + CONTEXT + 1))
    return sorted({*around, *differing[:MOST_ROWS], first})


def left_out(report: Report, places: Sequence[int]) -> str:
    """How many rows are not shown, by their verdicts."""
    left = Counter(report.verdict(row) for i, row in enumerate(report.layers) if i not in {*places})
    words = {"ok": "{} ok", "inherits": "{} that inherit", "differs": "{} that differ"}
    return ", ".join(words[verdict].format(left[verdict]) for verdict in words if left[verdict])
