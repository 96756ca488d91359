"""Which rows of a report are shown where not all are asked for, and how many are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from parity.report.findings import CUT_OTHERWISE, ROUNDING

if TYPE_CHECKING:
    from parity.report.report import Report

CONTEXT = 3
"""Rows before the first difference, and behind it."""
MOST_ROWS = 16
"""Of those that differ, where not all rows are asked for."""
VERDICTS = "ok", ROUNDING, CUT_OTHERWISE, "inherits", "differs", "differs first"
"""From good to bad."""


def weight(verdict: str, error: float, bound: float) -> tuple[int, float]:
    """How bad a row is: by its verdict, then by how many times its bound the error is; what is no number is worst."""
    times = math.inf if math.isnan(error) else error / bound if bound > 0 else math.inf if error > 0 else 0.0
    return VERDICTS.index(verdict), times


def chosen(report: Report, rows: str) -> list[int]:
    """Places of the rows that are shown."""
    verdicts = [report.verdict(row) for row in report.layers]
    if rows == "all":
        return list(range(len(verdicts)))
    differing = [i for i, verdict in enumerate(verdicts) if verdict.startswith("differs")]
    differing = differing or [i for i, verdict in enumerate(verdicts) if verdict == "inherits"]
    if report.ok:
        return []
    if not differing:
        # What was compared last before a run stopped.
        behind = [i for i, row in enumerate(report.layers) if row.phase == "forward"]
        return behind[-CONTEXT:] if report.stopped else []
    first = next((i for i, verdict in enumerate(verdicts) if verdict == "differs first"), differing[0])
    around = range(max(0, first - CONTEXT), min(len(verdicts), first + CONTEXT + 1))
    return sorted({*around, *differing[:MOST_ROWS], first})


def left_out(report: Report, places: Sequence[int]) -> str:
    """How many rows are not shown, by their verdicts."""
    there = {*places}
    left = Counter(report.verdict(row) for i, row in enumerate(report.layers) if i not in there)
    words = {
        "ok": "{} ok",
        ROUNDING: "{} of rounding",
        CUT_OTHERWISE: "{} cut otherwise",
        "inherits": "{} that inherit",
        "differs": "{} that differ",
    }
    return ", ".join(words[verdict].format(left[verdict]) for verdict in words if left[verdict])
