"""The modules as a tree that is unfolded, each with its worst error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parity.report.cards import cards
from parity.report.findings import NETWORK, apart, number
from parity.report.folded import differing, parts_of, worst_of
from parity.report.html.elements import Markup, joined, mark, tag
from parity.report.rows import VERDICTS

if TYPE_CHECKING:
    from parity.report.findings import LayerRow
    from parity.report.report import Report

DEEPEST = 24
"""Modules within each other that are unfolded one by one; what lies deeper keeps the rest of its name."""


@dataclass
class Module:
    """A module, or what one has of its own.

    Attributes:
      name: within its parent.
      path: PyTorch's dotted name, or Flax's where PyTorch has none.
      rows: of its own quantities.
      modules: within it, by name.
    """

    name: str
    path: str
    rows: list[LayerRow] = field(default_factory=list)
    modules: dict[str, Module] = field(default_factory=dict)

    def all_rows(self) -> list[LayerRow]:
        """Its own, and those of all within it."""
        return [*self.rows, *(row for module in self.modules.values() for row in module.all_rows())]

    def count(self) -> int:
        """Layers in it."""
        return bool(self.rows) + sum(module.count() for module in self.modules.values())


def tree(report: Report) -> Module:
    """The root, of which modules with nothing but one other are joined with it."""
    root = Module("", "")
    for row in report.layers:
        parts, dot = parts_of(row)
        parts = [*parts[: DEEPEST - 1], dot.join(parts[DEEPEST - 1 :])] if len(parts) > DEEPEST else parts
        module = root
        for i, part in enumerate(parts):
            path = dot.join(parts[: i + 1])
            module = module.modules.setdefault(part, Module(part, path))
        module.rows.append(row)
    return Module("", "", root.rows, {name: _short(module) for name, module in root.modules.items()})


def _short(module: Module) -> Module:
    """A chain of modules that have but one each is one module with a longer name."""
    modules = [_short(child) for child in module.modules.values()]
    if len(modules) == 1 and not module.rows:
        (child,) = modules
        joint = child.path[len(module.path) : len(child.path) - len(child.name)]
        return Module(f"{module.name}{joint}{child.name}", child.path, child.rows, child.modules)
    return Module(module.name, module.path, module.rows, {child.name: child for child in modules})


def modules(report: Report) -> Markup | None:
    """The tree; what holds the first difference is unfolded, or all down to the report's depth."""
    if not report.layers:
        return None
    charged: dict[str, list[tuple[int, str]]] = {}
    for i, card in enumerate(cards(report)):
        for place in card.places:
            charged.setdefault(place.before or place.torch_layer or NETWORK, []).append((i + 1, card.code))
    items = [_item(report, module, charged, 1) for module in tree(report).modules.values()]
    title = "Modules"
    text = "Each with its worst error, beside the bound that it exceeds or comes closest to."
    search = tag(
        "p",
        tag("label", "Filter ", tag("input", type="search", id="filter", autocomplete="off", spellcheck="false")),
        tag("button", "Unfold all", type="button", id="unfold"),
        tag("button", "Fold all", type="button", id="fold"),
        tag("output", id="found", for_="filter"),
        class_="search",
        hidden=True,
    )
    parts = [tag("h2", title), tag("p", text, class_="soft"), search, tag("ul", *items, class_="tree")]
    return tag("section", *parts, id="modules", aria_label=title)


def _item(report: Report, module: Module, charged: dict[str, list[tuple[int, str]]], depth: int) -> Markup:
    """A module as an item; it is the so-manieth of those within each other."""
    rows = module.all_rows()
    verdicts = {report.verdict(row) for row in rows}
    verdict = max(verdicts, key=VERDICTS.index)
    worst, differ = worst_of(report, rows), differing(report, rows)
    count = module.count()
    first = module.rows[0] if module.rows else None
    layers = f"{differ} of {count} layers differ" if differ else f"{count} layers"
    about = layers if first is None or module.modules else first.kind
    other = first is not None and first.flax_layer not in ("", first.torch_layer)
    charges = charged.get(module.path, [])
    codes = [joined(" ", tag("a", code, href=f"#cause-{i}", class_="code")) for i, code in charges]
    summary = tag(
        "summary",
        mark(verdict),
        tag("span", module.name, class_="name"),
        tag("span", first.flax_layer, class_="flax") if first is not None and other else None,
        tag("span", about, class_="soft"),
        tag("span", tag("b", f"{verdict}, {apart(worst, worst.error)}"), f" of {number(worst.bound)}", class_="worst"),
    )
    own = tag("ul", *(_quantity(report, row) for row in module.rows), class_="quantities") if module.rows else None
    inner = [_item(report, child, charged, depth + 1) for child in module.modules.values()]
    named = tag("p", "Named here:", *codes, class_="named") if codes else None
    within = tag("ul", *inner) if inner else None
    is_open = "differs first" in verdicts if report.depth is None else depth < report.depth
    is_open = is_open and (bool(inner) or bool(codes))
    # What the filter looks at: names, kind and results.
    both = [] if first is None else [first.torch_layer, first.flax_layer]
    said = " ".join([module.path, *both, about, *sorted(verdicts), *(code for _, code in charges)])
    folded = tag("details", summary, named, own, within, open=is_open)
    return tag("li", folded, class_=verdict.replace(" ", "-"), data_name=said.lower())


def _quantity(report: Report, row: LayerRow) -> Markup:
    verdict = report.verdict(row)
    numbers = [
        tag("b", number(row.error) if row.shapes is None else row.shapes.text),
        tag("span", f"bound {number(row.bound)}"),
    ]
    numbers += [] if row.local_error is None else [tag("span", f"alone {apart(row, row.local_error)}")]
    return tag("li", mark(verdict), f" {row.phase} {row.quantity}: {verdict}", *(joined(" ", n) for n in numbers))
