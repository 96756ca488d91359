"""What a value read from JSON may be, checked field by field: the first that is wrong is named, in one line."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Rule = Callable[[Any, str], None]
"""(value, where it stands) -> None, or ValueError "WHERE is VALUE; allowed: ..."."""

LARGEST = 2**53
"""Whole numbers are below it: what any reader of JSON holds exactly."""


def whole(least: int = 0) -> Rule:
    """A whole number, not smaller."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < LARGEST:
            wrong(value, where, f"a whole number >= {least}")

    return rule


def number(value: Any, where: str) -> None:
    """A number, or the name of one that JSON has none for."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**1024
    if not fine and value not in ("nan", "inf", "-inf"):
        wrong(value, where, 'a number, "nan", "inf" or "-inf"')


def text(value: Any, where: str) -> None:
    """Characters that can be written down: no half of a pair of surrogates."""
    try:
        fine = isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        fine = False
    if not fine:
        wrong(value, where, "text")


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        wrong(value, where, "true or false")


def plain(value: Any, where: str) -> None:
    """None, a truth value, a number, text, or lists of these."""
    if isinstance(value, list):
        list_of(plain)(value, where)
    elif isinstance(value, str):
        text(value, where)
    elif isinstance(value, Mapping):
        wrong(value, where, "a number, text, or a list of these")
    elif isinstance(value, int) and abs(value) >= LARGEST:
        wrong(value, where, f"whole numbers below {LARGEST}")


def one_of(*allowed: str) -> Rule:
    """One of these words."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in allowed:
            wrong(value, where, ", ".join(map(json.dumps, allowed)))

    return rule


def maybe(rule: Rule) -> Rule:
    """The same, or null."""

    def or_null(value: Any, where: str) -> None:
        if value is not None:
            rule(value, where)

    return or_null


def list_of(rule: Rule) -> Rule:
    """A list, of any length."""

    def every(value: Any, where: str) -> None:
        if not isinstance(value, list):
            wrong(value, where, "a list")
        for i, part in enumerate(value):
            rule(part, f"{where}[{i}]")

    return every


def row(*rules: Rule) -> Rule:
    """A list of that many, each by its own rule."""

    def each(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) != len(rules):
            wrong(value, where, f"a list of {len(rules)}")
        for i, (part, rule) in enumerate(zip(value, rules, strict=True)):
            rule(part, f"{where}[{i}]")

    return each


def map_of(rule: Rule) -> Rule:
    """An object of any names."""

    def every(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            wrong(value, where, "an object")
        for name, part in value.items():
            text(name, f"a name in {where or 'it'}")
            rule(part, below(where, name))

    return every


def fields(needed: Mapping[str, Rule], further: Mapping[str, Rule] | None = None) -> Rule:
    """An object of these names, the first of which must be there, the further may; and no others."""
    known = {**needed, **(further or {})}

    def each(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            wrong(value, where, "an object")
        for name in needed:
            if name not in value:
                raise ValueError(f"{below(where, name)} is missing; allowed: {', '.join(needed)} in it")
        for name, part in value.items():
            if name not in known:
                raise ValueError(f"{below(where, name)} is not known; allowed: {', '.join(known)}")
            known[name](part, below(where, name))

    return each


def below(where: str, name: str) -> str:
    """The place of that name within a place."""
    shown = name if name.isidentifier() and name.isascii() and len(name) <= 60 else json.dumps(name[:60])
    return f"{where}.{shown}" if where else shown


def wrong(value: Any, where: str, allowed: str) -> NoReturn:
    """ValueError with the place, what stands there in short, and what is allowed."""
    shown = ascii(value)[:60] if isinstance(value, str) else reprlib.repr(value)
    raise ValueError(f"{where or 'it'} is {shown}; allowed: {allowed}")
