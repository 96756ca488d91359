"""Elements of HTML: what is no markup is escaped, whoever writes it."""

from __future__ import annotations

from collections.abc import Container

from parity.report.findings import escaped

VOID = frozenset({"br", "input", "meta"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element.

    Args:
      name: of the element.
      *children: `Markup` goes in as it is, other text escaped, None not at all.
      **attributes: escaped; `class_` is class, `aria_label` aria-label; True has no value, False and None are left out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            named = key.rstrip("_").replace("_", "-")
            words.append(named if value is True else f'{named}="{escaped(str(value))}"')
    return Markup(f"<{' '.join(words)}>" + ("" if name in VOID else f"{joined(*children)}</{name}>"))


def joined(*children: str | None) -> Markup:
    """One after the other, as in `tag`."""
    return Markup("".join(c if isinstance(c, Markup) else escaped(c) for c in children if c is not None))


def mark(verdict: str) -> Markup:
    """The symbol of a verdict, beside the word."""
    name = verdict.replace(" ", "-")
    return tag("svg", tag("use", href=f"#m-{name}"), class_=f"m {name}", aria_hidden="true")


SYMBOLS = Markup(
    '<svg class="symbols" aria-hidden="true">'
    '<symbol id="m-ok" viewBox="0 0 20 20"><circle cx="10" cy="10" r="6"/></symbol>'
    '<symbol id="m-rounding" viewBox="0 0 20 20"><path d="M4 4h12v12H4z"/></symbol>'
    '<symbol id="m-cut-otherwise" viewBox="0 0 20 20"><path d="M2 6h16v8H2z"/></symbol>'
    '<symbol id="m-inherits" viewBox="0 0 20 20"><path d="M10 2l8 15H2z"/></symbol>'
    '<symbol id="m-differs" viewBox="0 0 20 20"><path d="M10 2l8 8-8 8-8-8z"/></symbol>'
    '<symbol id="m-differs-first" viewBox="0 0 20 20"><path d="M10 0l10 10-10 10L0 10z"/>'
    '<path class="core" d="M10 6l4 4-4 4-4-4z"/></symbol>'
    '<symbol id="m-alone" viewBox="0 0 20 20"><circle cx="10" cy="10" r="6" fill="none" stroke-width="3"/></symbol>'
    "</svg>"
)
"""Told apart by their shape, not by colour alone; drawn once and used by name."""

MEANINGS = {
    "ok": "ok: within the bound",
    "differs first": "differs first: here the two part",
    "differs": "differs by itself",
    "rounding": "rounding: no more than what is carried along",
    "cut otherwise": "cut otherwise: the same function all the same",
    "inherits": "inherits: differs only by what is handed to it",
}


def legend(verdicts: Container[str], *more: Markup) -> Markup:
    """The symbol of each verdict with its meaning, and what a chart has besides."""
    items = [tag("li", mark(verdict), f" {text}") for verdict, text in MEANINGS.items() if verdict in verdicts]
    return tag("ul", *items, *more, class_="legend")
