"""JSON from a file that may be damaged: what Python's own reader lets through is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

# Deeper than anything written here, and far from where Python's recursion ends.
DEEPEST = 100


def loads(content: bytes | str) -> Any:
    """The value; a name twice in one object, NaN, infinity, and nests deeper than DEEPEST are refused.

    Raises:
      ValueError: what is wrong, in one line.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite
        )  # an integer of too many digits is refused by Python
        _check_depth(value, 0)
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:80]!r} is in it twice")
            seen.add(name)
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond what a float holds")
    return value


def _check_depth(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, depth + 1)
