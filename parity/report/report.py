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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bn_common.checks import require
from bn_common.files import write_whole
from parity.comparison.values import Values
from parity.diagnosis.mistakes import COULD_NOT_RUN, NOT_COMPARED
from parity.records.dump_file import plain
from parity.report.cards import answer
from parity.report.findings import Diagnosis, Divergence, LayerRow, shown
from parity.report.folded import check_depth
from parity.report.html import page
from parity.report.table import ROWS, parts, takes


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
      depth: of modules within each other, to which the table is folded where it is shown; None: it is not.

    Raises:
      ValueError: depth is no integer >= 1.
    """

    first_divergence: Divergence | None = None
    diagnoses: list[Diagnosis] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    depth: int | None = None

    def __post_init__(self) -> None:
        check_depth("depth", self.depth)

    @property
    def ok(self) -> bool:
        """No divergence and no diagnosis."""
        return self.first_divergence is None and not self.diagnoses

    def agrees_at(self, phase: str, torch_layer: str, quantity: str) -> bool:
        """Whether that number was compared, and agrees."""
        wanted = phase, torch_layer, quantity
        here = [row for row in self.layers if (row.phase, row.torch_layer, row.quantity) == wanted]
        return bool(here) and all(row.ok for row in here)

    @property
    def stopped(self) -> bool:
        """Nothing that was compared is named, and it was not compared to the end: a side could not be run, say."""
        return bool(self.diagnoses) and all(d.code in (COULD_NOT_RUN, NOT_COMPARED) for d in self.diagnoses)

    def is_first(self, row: LayerRow) -> bool:
        """Whether this row is the first divergence."""
        first = self.first_divergence
        # Where a layer is called several times, the first of its rows that differs.
        return first is not None and first.is_at(row) and next(r for r in self.layers if first.is_at(r)) == row

    def verdict(self, row: LayerRow) -> str:
        """In words: "ok", "differs first", "differs" or, only because of the layers before, "inherits".

        Or "cut otherwise" or "rounding", which explain what is beyond its bound and no mistake.
        """
        if self.is_first(row):
            return "differs first"
        if row.explained and not row.ok:
            return row.explained
        return "ok" if row.ok else "inherits" if row.inherited else "differs"

    @property
    def summary(self) -> str:
        """The result in one line."""
        one_layer = len({layer for diagnosis in self.diagnoses for layer in diagnosis.layers}) < 2
        codes = shown(", ".join(dict.fromkeys(d.code if one_layer else _named(d) for d in self.diagnoses)))
        first = self.first_divergence
        if first is not None:
            where = first.place.text
            if math.isnan(first.error):
                return f"not compared from {first.phase} {where} on{f': {codes}' if codes else ''}"
            what = f" {shown(first.quantity)}" if first.quantity else ""
            return f"differs first in {first.phase} {where}:{what} {first.apart}{f': {codes}' if codes else ''}"
        if codes:
            return f"no layer differs by more than its bound, but: {codes}"
        pairs = {(row.torch_layer, row.flax_layer) for row in self.layers} - {("", "")}
        layers, rows = len(pairs), sum(row.ok for row in self.layers)
        quantities = "1 quantity agrees" if rows == 1 else f"{rows} quantities agree"
        return f"ok: {layers} {'layer' if layers == 1 else 'layers'}, {quantities}"

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values that are strict JSON.

        A float that JSON has no word for is the string "inf", "-inf" or "nan". Next to the fields stand "ok" (also in
        each row of "layers"), "summary", "answer", and in a diagnosis "places", each with the fields of `Place` and
        "text", "values" with those of `Values`, and where it is of several layers "layers", PyTorch's names of all.
        """
        rows = [dataclasses.asdict(row) | {"shapes": _shapes(row), "ok": row.ok} for row in self.layers]
        found = []
        for d in self.diagnoses:
            named: dict[str, Any] = {
                "code": d.code,
                "layer": d.layer,
                "evidence": d.evidence,
                "flax_layer": d.flax_layer,
            }
            named |= {"layers": d.layers} if d.more else {}
            places = [place._asdict() | {"text": place.text} for place in d.at]
            found.append(named | {"places": places, "values": _values(d.values)})
        # Not the depth: it says how this is shown, and not what was found.
        names = [f.name for f in dataclasses.fields(self) if f.name != "depth"]
        fields = {name: getattr(self, name) for name in names} | {"diagnoses": found}
        if (first := self.first_divergence) is not None:
            fields["first_divergence"] = dataclasses.asdict(first) | {"shapes": _shapes(first)}
        return plain({"ok": self.ok, "summary": self.summary, "answer": answer(self), **fields, "layers": rows})

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
        write_whole(Path(path), page(self).encode())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from parts(self, options.max_width, box.SIMPLE_HEAD)

    def __str__(self) -> str:
        return self.table()

    def table(self, *, rows: str = "differing", width: int | None = None, depth: int | None = None) -> str:
        """What `print` shows: the answer, a card for each cause, the table of what differs, the notes, the result.

        Args:
          rows: "differing", and three rows around the first of them; or "all".
          width: in letters; None: of the terminal, or 120 where there is none.
          depth: a row for every module of this depth (1: those of the network itself) in place of these, with its worst
            error and how many of its layers differ; None: the report's own.

        Raises:
          ValueError: rows is neither; depth is no integer >= 1.
        """
        require(rows in ROWS, "rows", repr(rows), " or ".join(map(repr, ROWS)))
        report = self if depth is None else dataclasses.replace(self, depth=depth)
        # As wide as the terminal, if there is one: a table that is wrapped by the terminal can't be read. Elsewhere
        # sentences stay in one line, for grep.
        terminal = sys.stdout is not None and sys.stdout.isatty()
        width = width or (shutil.get_terminal_size().columns if terminal else 120)
        # In an ASCII terminal the rules of the table would be an error.
        lines = box.SIMPLE_HEAD if takes("─") else box.ASCII_DOUBLE_HEAD
        text = io.StringIO()
        console = Console(file=text, width=width, color_system=None, legacy_windows=False, force_terminal=False)
        for part in parts(report, width, lines, rows):
            console.print(part, soft_wrap=isinstance(part, Text) and not terminal)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _values(values: Values | None) -> dict[str, Any] | None:
    return None if values is None else values._asdict() | {"shapes": _shapes(values)}


def _shapes(of: LayerRow | Divergence | Values) -> dict[str, Any] | None:
    """Both shapes where these differ, and the sentence that says so."""
    return None if of.shapes is None else {**of.shapes._asdict(), "text": of.shapes.text}


def _named(diagnosis: Diagnosis) -> str:
    """The code, and where."""
    more = len(diagnosis.more)
    besides = f" and {more} more layer{'s' if more > 1 else ''}" if more else ""
    return f"{diagnosis.code} at {diagnosis.layer}{besides}" if diagnosis.layer else diagnosis.code
