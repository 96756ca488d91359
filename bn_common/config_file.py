"""The configuration as a TOML file: what `--config` reads, and what a run folder keeps for it."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bn_common.checks import require
from bn_common.config import AFTERWARDS, GROUPS, Config, General

# A file says what a run is, not how a process begins it.
FIELDS = {
    name: kind
    for name, kind in get_type_hints(Config).items()
    if name not in {field.name for field in dataclasses.fields(General)} | AFTERWARDS
}
# A run that is begun with the file is one of its own, and each process has its own number.
NOT_KEPT = frozenset({"out", "process_id"}) | AFTERWARDS
ALLOWED = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def read_toml(path: Path) -> dict[str, Any]:
    """Options by the names of Config's fields; whether their values fit each other is not known yet.

    Raises:
      ValueError: the file can't be read, is no TOML, or has a field that Config has not, or of another kind.
    """
    allowed = "a TOML file with options by name, as in lr = 0.1"
    try:
        with open(path.expanduser(), "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"--config is {path}: {error.strerror}; allowed: {allowed}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested too deeply
        raise ValueError(f"--config is {path}: {error}; allowed: {allowed}") from None
    for name, value in given.items():
        require(name in FIELDS, f"{name} in {path}", repr(value), f"the fields {', '.join(FIELDS)}")
    return {name: checked(f"{name} in {path}", value, FIELDS[name]) for name, value in given.items()}


def checked(what: str, value: object, kind: Any) -> object:
    """The value as Config has it, of that type: a Literal, or one of ALLOWED's, or None beside it.

    Raises:
      ValueError: it is of another.
    """
    if get_origin(kind) is Literal:
        require(value in get_args(kind), what, repr(value), ", ".join(get_args(kind)))
        return value
    (kind,) = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    written = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    fits = type(value) in written and value != ""
    if kind is float and fits:
        # An integer of 400 digits is TOML too.
        fits = isinstance(value, int | float) and abs(value) <= 2**1023 and math.isfinite(value)
    require(fits, what, repr(value), ALLOWED[kind])
    return kind(value)


def as_toml(config: Config) -> str:
    """The file that `read_toml` gives that configuration of, but for what is None or NOT_KEPT; in --help's groups."""
    lines = ["# The options of this run: python train_jax.py --config FILE, or python -m torch_bn.training."]
    for group in GROUPS[1:]:
        held = {field.name: getattr(config, field.name) for field in dataclasses.fields(group)}
        lines += ["", f"# {group.__name__.lower()}", *_lines(held)]
    return "\n".join(lines) + "\n"


def _lines(held: Mapping[str, object]) -> list[str]:
    return [f"{name} = {_value(v)}" for name, v in held.items() if v is not None and name not in NOT_KEPT]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        # JSON's strings are TOML's but for DEL, and for half of a surrogate pair, which stands for a byte that is no
        # UTF-8 in the name of a folder: TOML can't name that one.
        text = json.dumps(str(value).encode(errors="replace").decode(), ensure_ascii=False)
        return text.replace("\x7f", "\\u007f")
    return repr(value)
