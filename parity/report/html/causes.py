"""A card for each cause: where it is, both numbers, what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parity.comparison.shapes import Shapes
from parity.report.cards import Card, both_numbers, cards
from parity.report.findings import NETWORK, shown
from parity.report.html.elements import Markup, tag

if TYPE_CHECKING:
    from parity.comparison.values import Values
    from parity.report.report import Report

MOST_PLACES = 6
"""Of one cause; the others are unfolded on request."""


def causes(report: Report) -> Markup | None:
    """All cards; the code of a mistake is unfolded where it is named first."""
    told = cards(report)
    if not told:
        return None
    seen: set[str] = set()
    items = []
    for i, card in enumerate(told):
        items.append(_card(card, i + 1, unfolded=card.code not in seen))
        seen.add(card.code)
    title = "The cause" if len(told) == 1 else f"{len(told)} causes"
    return tag("section", tag("h2", title), *items, id="causes", aria_label=title)


def _card(card: Card, number: int, *, unfolded: bool) -> Markup:
    heading = tag("h3", tag("span", card.code, class_="code"), f" {card.where}")
    classes = tag("p", card.classes, class_="soft") if card.classes else None
    known = None
    if card.convention:
        known = tag("p", tag("span", "known convention", class_="pill"), f" {card.convention}", class_="known")
    further = [
        tag("p", f"{title}: {text}", class_="soft")
        for title, text in (("Tried", card.tried), ("Next", card.further))
        if text
    ]
    parts = [heading, tag("p", card.evidence, class_="evidence"), known, _places(card), classes, _values(card.values)]
    parts += [*further, _fix(card, unfolded=unfolded), _link(card)]
    return tag("article", *parts, class_="card convention" if card.convention else "card", id=f"cause-{number}")


def _places(card: Card) -> Markup | None:
    """All places as one list; a single one stands in the heading."""
    if len(card.places) < 2:
        return None
    items = [tag("li", place.text.removeprefix("at ")) for place in card.places]
    first, others = items[:MOST_PLACES], items[MOST_PLACES:]
    folded = None
    if others:
        folded = tag("details", tag("summary", f"{len(others)} more"), tag("ul", *others, class_="places"))
    return tag("div", tag("ul", *first, class_="places"), folded)


def _values(v: Values | None) -> Markup | None:
    """Both numbers beside each other, and where each framework has them; or the shapes."""
    if v is None:
        return None
    what = f"{v.quantity} of {v.torch_layer or NETWORK}"
    head = tag("tr", *(tag("th", text, scope="col") for text in ("where they are farthest apart", "PyTorch", "Flax")))
    if v.torch is None or v.flax is None:
        shapes = v.shapes or Shapes(v.torch_shape, v.flax_shape)
        told = [f"{[*shapes.torch]}", f"{[*shapes.flax]}"]
        told[1] += f" (in PyTorch's order {[*shapes.flax_in_torch]})" if shapes.flax_in_torch else ""
        rows = [tag("tr", tag("th", f"shape of the {what}", scope="row"), *(tag("td", text) for text in told))]
    else:
        numbers = [tag("td", tag("strong", text)) for text in both_numbers(v)]
        rows = [tag("tr", tag("th", what, scope="row"), *numbers)]
        there = "made of several arrays" if v.torch_index is None else str(list(v.torch_index))
        places = [tag("td", there), tag("td", str(list(v.flax_index)))]
        rows.append(tag("tr", tag("th", "at index", scope="row"), *places))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="values")


def _fix(card: Card, *, unfolded: bool) -> Markup | None:
    if card.fix is None:
        return None
    sides = []
    for side, (wrong, right) in (("PyTorch", card.fix.torch), ("Flax", card.fix.flax)):
        lines = [
            tag("dt", "write"),
            tag("dd", tag("code", right), class_="right"),
            tag("dt", "not"),
            tag("dd", tag("code", wrong), class_="wrong"),
        ]
        sides.append(tag("div", tag("h4", side), tag("dl", *lines), class_="side"))
    title = tag("summary", "Write this", tag("span", f" {card.advice}", class_="soft"))
    return tag("details", title, tag("div", *sides, class_="sides"), class_="fix", open=unfolded)


def _link(card: Card) -> Markup | None:
    if not card.link:
        return None
    text = f"{card.code} in the gallery of mistakes"
    return tag("p", tag("a", text, href=shown(card.link)), class_="more")
