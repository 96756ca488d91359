"""The rows of a report by modules, folded to a depth: of each its worst error, and how many of its layers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bn_common.checks import require
from parity.report.findings import NETWORK
from parity.report.rows import weight

if TYPE_CHECKING:
    from parity.report.findings import LayerRow
    from parity.report.report import Report


class Fold(NamedTuple):
    """A module, with all that lies in it.

    Attributes:
      name: PyTorch's dotted name, or Flax's path where PyTorch has none; `NETWORK` of the network's own rows.
      layers: how many it has; 0 of the network's own rows.
      differ: how many of these differ by themselves, and not only by what the layers before hand them.
      worst: the row that is farthest beyond its bound, or comes closest to it.
      verdict: of that.
    """

    name: str
    layers: int
    differ: int
    worst: LayerRow
    verdict: str

    @property
    def where(self) -> str:
        """Which number its worst error is of, and of which layer in it."""
        parts, dot = parts_of(self.worst)
        inner = dot.join(parts).removeprefix(self.name).removeprefix(dot)
        return f"{self.worst.phase} {self.worst.quantity}{f' of {inner}' if inner else ''}"


def check_depth(name: str, depth: int | None) -> None:
    """ValueError for what is no depth."""
    fine = depth is None or (isinstance(depth, int) and not isinstance(depth, bool) and depth >= 1)
    require(fine, name, repr(depth), "an integer >= 1, or None")


def folded(report: Report, depth: int) -> list[Fold]:
    """All modules of that depth, and the layers that lie less deep, in the order in which they first appear."""
    modules: dict[str, list[LayerRow]] = {}
    for row in report.layers:
        parts, dot = parts_of(row)
        modules.setdefault(dot.join(parts[:depth]), []).append(row)
    return [_fold(report, name, rows) for name, rows in modules.items()]


def _fold(report: Report, name: str, rows: list[LayerRow]) -> Fold:
    worst = worst_of(report, rows)
    layers = {(row.torch_layer, row.flax_layer) for row in rows} - {("", "")}
    return Fold(name, len(layers), differing(report, rows), worst, report.verdict(worst))


def differing(report: Report, rows: list[LayerRow]) -> int:
    """How many layers have a row that differs, and does not only inherit."""
    differ = {(row.torch_layer, row.flax_layer) for row in rows if report.verdict(row).startswith("differs")}
    return len(differ - {("", "")})


def worst_of(report: Report, rows: list[LayerRow]) -> LayerRow:
    """By its verdict first, then by how many times its bound the error is."""
    verdicts = [report.verdict(row) for row in rows]
    return max(zip(verdicts, rows, strict=True), key=lambda both: weight(both[0], both[1].error, both[1].bound))[1]


def parts_of(row: LayerRow) -> tuple[list[str], str]:
    """The names of the modules that a layer lies in, and its own; and what stands between them."""
    name, dot = (row.torch_layer, ".") if row.torch_layer else (row.flax_layer, "/")
    return (name.split(dot) if name else [NETWORK]), dot
