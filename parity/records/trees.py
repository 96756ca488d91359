"""Any nesting of tuples, lists, dicts and dataclasses, whatever the framework; its leaves by their places."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Where a leaf is: keys of dicts, fields of dataclasses, places in tuples and lists."""


def mapped(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """The same nesting, of the same types, with function(path, leaf) in the place of every leaf.

    A leaf is whatever is no tuple, list, mapping or dataclass, or has a shape. A mapping's come in its own order.
    """
    if not is_nested(tree):
        return function(path, tree)
    if isinstance(tree, Mapping):
        items = {key: mapped(function, v, (*path, str(key))) for key, v in tree.items()}
        if type(tree) is dict:
            return items
        # ModelOutput and its kind are both, and made by names.
        return type(tree)(**items) if dataclasses.is_dataclass(tree) else type(tree)(items)  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        parts = [mapped(function, v, (*path, i)) for i, v in enumerate(tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    made = copy.copy(tree)
    for field in dataclasses.fields(tree):
        if hasattr(tree, field.name):
            v = mapped(function, getattr(tree, field.name), (*path, field.name))
            object.__setattr__(made, field.name, v)  # it may be frozen
    return made


def is_nested(value: Any) -> bool:
    """Whether it holds others."""
    is_dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return (isinstance(value, Mapping | tuple | list) or is_dataclass) and not hasattr(value, "shape")


def leaves(tree: Any) -> list[tuple[Path, Any]]:
    """Every leaf with its path."""
    found: list[tuple[Path, Any]] = []
    mapped(lambda path, v: found.append((path, v)), tree)
    return found


def name_of(path: Path) -> str:
    """In words, such as hidden_states.0; "" of a place alone, which is no name."""
    return ".".join(map(str, path)) if any(isinstance(part, str) for part in path) else ""


def first(tree: Any, is_array: Callable[[Any], bool]) -> tuple[Path, Any] | None:
    """What counts as a layer's output, where it gives more: the first of a tuple, of names the first in the alphabet.

    Returns:
      Its path and the array; None where there is no such array: a state, say, comes first.
    """
    if is_array(tree):
        return (), tree
    # Itself in the nest, and no deeper.
    parts = [(path, v) for path, v in leaves(tree) if len(path) == 1]
    if isinstance(tree, tuple | list):
        parts = [(path, v) for path, v in parts if path == (0,)]
    arrays = [(path, v) for path, v in parts if is_array(v)]
    return min(arrays, key=lambda part: str(part[0][0]), default=None)


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """The same nesting with another leaf there."""
    return mapped(lambda here, v: value if here == path else v, tree)
