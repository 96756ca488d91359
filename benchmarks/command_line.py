"""The benchmarks' command lines: options in a dataclass, bad ones end the program with exit status 2 and one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from bn_common.command_line import _in_one_line, refuse

Options = TypeVar("Options")


def parse(kind: type[Options], args: Sequence[str] | None, *, prog: str, description: str) -> Options:
    """An instance of the dataclass `kind` as the command line says."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, prog=prog, description=description, args=args)
    except SystemExit as stop:
        if stop.code == 2:
            refuse(prog, _in_one_line(_drawn(errors.getvalue())))
        sys.stderr.write(errors.getvalue())
        raise


def _drawn(box: str) -> str:
    """The box as tyro draws it in UTF-8; elsewhere it has hyphens, and a rule more below the title."""
    return re.sub("-{5,}", "─" * 5, re.sub(r"\A(.*\n) *-{5,} *\n", r"\1", box))
