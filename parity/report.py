"""What a comparison found: a table in the terminal, JSON, and one self-contained HTML page.

Pure Python, numpy and rich: a report is made, read and printed where neither framework is installed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from bn_common.run_folder import write_whole

PHASES = "forward", "loss", "backward", "statistics", "optimizer"
"""In the order in which they are gone through; an error in one is carried into those behind it."""


@dataclass(frozen=True)
class Divergence:
    """The first place where the two sides differ by more than rounding.

    Attributes:
      phase: one of `PHASES`.
      torch_layer: PyTorch's dotted name.
      flax_layer: Flax's path, "a/b".
      error: how far apart, relative; infinite where the shapes differ or a value is not finite.
      bound: what rounding explains.
      quantity: which number of the layer, see `LayerRow`.
    """

    phase: str
    torch_layer: str
    flax_layer: str
    error: float
    bound: float
    quantity: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """A known porting mistake, recognised from the numbers.

    Attributes:
      code: which, see `docs/parity_mistakes.md`; or "unexplained".
      layer: PyTorch's name of the layer charged.
      evidence: one sentence with the numbers that show it.
      flax_layer: Flax's path of the layer charged, where there is one.
    """

    code: str
    layer: str
    evidence: str
    flax_layer: str = ""


@dataclass(frozen=True)
class LayerRow:
    """One number of one layer, on both sides.

    Attributes:
      phase: one of `PHASES`.
      torch_layer: PyTorch's dotted name.
      flax_layer: Flax's path, "a/b".
      kind: of layer, "conv", "batch_norm", ...
      quantity: "output", "input gradient", "weight gradient", "running_var", ...
      error: in float64, each side on its own, so that errors of the layers before are carried along.
      bound: what rounding explains.
      error32: the difference in float32; None where float32 was not run.
      rounding32: of both sides together, each against itself in float64; None where float32 was not run.
      local_error: in float64 with the other side's input, so that only the layer's own error shows; None where that
        was not run.
    """

    phase: str
    torch_layer: str
    flax_layer: str
    kind: str
    quantity: str
    error: float
    bound: float
    error32: float | None = None
    rounding32: float | None = None
    local_error: float | None = None

    @property
    def ok(self) -> bool:
        """Within the bound; NaN is not."""
        return self.error <= self.bound

    @property
    def inherited(self) -> bool:
        """Differs, but only by what the layers before (in backward: behind) hand it."""
        return not self.ok and self.local_error is not None and self.local_error <= self.bound


@dataclass
class Report:
    """What a comparison of two modules found.

    Attributes:
      first_divergence: None if everything agrees.
      diagnoses: the most likely first.
      layers: a row for each quantity of each layer, in execution order.
      notes: for the reader; they mean no difference.
      details: mode, versions, dtypes, seeds, loss values; plain values and arrays. Of these, the HTML page draws
        "losses": {name: a value a step} and "distances": {name: a value a step}.
    """

    first_divergence: Divergence | None = None
    diagnoses: list[Diagnosis] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No divergence and no diagnosis."""
        return self.first_divergence is None and not self.diagnoses

    def is_first(self, row: LayerRow) -> bool:
        """Whether this row is the first divergence."""
        first = self.first_divergence
        same = first is not None and (row.phase, row.torch_layer, row.flax_layer) == (
            first.phase,
            first.torch_layer,
            first.flax_layer,
        )
        return same and first is not None and first.quantity in ("", row.quantity) and not row.ok

    def verdict(self, row: LayerRow) -> str:
        """In words: "ok", "differs first", "differs" or, only because of the layers before, "inherits"."""
        if self.is_first(row):
            return "differs first"
        return "ok" if row.ok else "inherits" if row.inherited else "differs"

    @property
    def summary(self) -> str:
        """The result in one line."""
        one_layer = len({diagnosis.layer for diagnosis in self.diagnoses}) < 2
        named = (d.code if one_layer or not d.layer else f"{d.code} at {d.layer}" for d in self.diagnoses)
        codes = ", ".join(dict.fromkeys(named))
        first = self.first_divergence
        if first is not None:
            where = both_names(first.torch_layer, first.flax_layer)
            what = f" {first.quantity}" if first.quantity else ""
            return (
                f"differs first in {first.phase} at {where}:{what} error {number(first.error)}, "
                f"bound {number(first.bound)}{f': {codes}' if codes else ''}"
            )
        if codes:
            return f"no layer differs by more than its bound, but: {codes}"
        pairs = {(row.torch_layer, row.flax_layer) for row in self.layers} - {("", "")}
        layers, rows = len(pairs), len(self.layers)
        quantities = "1 quantity agrees" if rows == 1 else f"{rows} quantities agree"
        return f"ok: {layers} {'layer' if layers == 1 else 'layers'}, {quantities}"

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values that are strict JSON.

        A float that JSON has no word for is the string "inf", "-inf" or "nan". Next to the fields stand "ok" (also in
        each row of "layers") and "summary".
        """
        rows = [dataclasses.asdict(row) | {"ok": row.ok} for row in self.layers]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain({"ok": self.ok, "summary": self.summary, **fields, "layers": rows})

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` to a file, whole or not at all.

        Raises:
          OSError: the file can't be written.
        """
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that is read without network, whole or not at all.

        Raises:
          OSError: the file can't be written.
        """
        from parity.html import page

        write_whole(Path(path), page(self).encode())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _parts(self, options.max_width, box.SIMPLE_HEAD)

    def __str__(self) -> str:
        # As wide as the terminal, if there is one: a table that is wrapped by the terminal can't be read. Elsewhere
        # sentences stay in one line, for grep.
        terminal = sys.stdout is not None and sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else 120
        # In an ASCII terminal the rules of the table would be an error.
        lines = box.SIMPLE_HEAD if _takes("─") else box.ASCII_DOUBLE_HEAD
        text = io.StringIO()
        console = Console(file=text, width=width, color_system=None, legacy_windows=False, force_terminal=False)
        for part in _parts(self, width, lines):
            console.print(part, soft_wrap=isinstance(part, Text) and not terminal)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


NETWORK = "(network)"
"""In the place of a layer's name: the network itself, or a module that is a single layer."""


def both_names(torch_layer: str, flax_layer: str) -> str:
    """The layer as PyTorch calls it, and in brackets as Flax does where that is another name."""
    names = [name for name in dict.fromkeys((torch_layer, flax_layer)) if name]
    return f"{names[0]} ({names[1]})" if len(names) == 2 else names[0] if names else NETWORK


def number(value: float | None) -> str:
    """Two digits: 3.0e-03, 0, inf, nan; nothing for None."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _parts(report: Report, width: int, lines: box.Box) -> Iterator[Table | Text]:
    """The table, what was recognised, the notes and the result."""
    if width < NARROWEST:
        yield from _lines(report)
    elif report.layers:
        yield _table(report, width, lines)
    if report.layers:
        yield Text()
    for diagnosis in report.diagnoses:
        where = both_names(diagnosis.layer, diagnosis.flax_layer)
        yield Text.assemble((diagnosis.code, "bold red"), f" at {where}: {diagnosis.evidence}")
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


def plain(value: Any) -> Any:
    """As lists, dicts with names for keys, strings and numbers that JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _takes(character: str) -> bool:
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
