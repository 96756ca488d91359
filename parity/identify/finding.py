"""What an identification finds."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """One known mistake, recognised at one place.

    Attributes:
      code: which mistake, see `docs/parity_mistakes.md`; or "unexplained".
      evidence: one sentence with the numbers that show it.
      role: what is charged there: "" the layer itself, or "activation", "pool", "dropout", "flatten" of what lies
        between two layers.
    """

    code: str
    evidence: str
    role: str = ""
