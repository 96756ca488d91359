"""The bridge between the two wings, and the only package that imports both frameworks.

Each name is imported when it is asked for: `python -m parity dump` needs one framework, `compare` none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from parity import compare, convert, files, kinds, offline, report, rules, trajectory, weights  # noqa: F401
    from parity.checking import check
    from parity.report import Report
    from parity.testing import assert_parity

# Name -> the module that it lives in.
_NAMES = {"check": "checking", "assert_parity": "testing", "Report": "report"}
_MODULES = ("compare", "convert", "files", "kinds", "offline", "report", "rules", "trajectory", "weights")

__all__ = ["Report", "assert_parity", "check", "weights"]

if not TYPE_CHECKING:  # a name that is not there is an error for type checkers too

    def __getattr__(name: str) -> Any:
        if name in _NAMES:
            return getattr(importlib.import_module(f"parity.{_NAMES[name]}"), name)
        if name in _MODULES:
            return importlib.import_module(f"parity.{name}")
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
