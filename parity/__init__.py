"""The bridge between the two wings: what a user asks it for.

`import parity` needs neither framework: the functions here import them when they are called, and what is a framework's
through and through (`weights`, `to_flax`, `to_torch`, `lockstep`) is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from bn_common.installed import BOTH, need
from parity import offline, report, testing
from parity.check import check, trace
from parity.cli import convert
from parity.initialisation import check_initialisation
from parity.offline import compare, dump
from parity.pairing import rules
from parity.pairing.rules import register
from parity.records import kinds
from parity.report import Report
from parity.sides import weight_files as files
from parity.testing import assert_parity

if TYPE_CHECKING:
    from parity import trajectory, weights
    from parity.trajectory import lockstep
    from parity.weights import to_flax, to_torch

__all__ = [
    "Report",
    "assert_parity",
    "check",
    "check_initialisation",
    "compare",
    "convert",
    "dump",
    "files",
    "kinds",
    "lockstep",
    "offline",
    "register",
    "report",
    "rules",
    "testing",
    "to_flax",
    "to_torch",
    "trace",
    "trajectory",
    "weights",
]

# Modules by the names that they had before they lived in folders: `import parity.rules` finds them, too.
for _name, _module in {"convert": convert, "files": files, "kinds": kinds, "rules": rules}.items():
    sys.modules[f"parity.{_name}"] = _module

# Name -> the module that it lives in, of what needs both frameworks.
_LATE = {"to_flax": "weights", "to_torch": "weights", "lockstep": "trajectory"}

if not TYPE_CHECKING:  # which would let any name pass

    def __getattr__(name: str) -> Any:
        if name in (*_LATE, *_LATE.values()):
            need(f"parity.{name}", *BOTH)
            module = importlib.import_module(f"parity.{_LATE.get(name, name)}")
            return getattr(module, name) if name in _LATE else module
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
