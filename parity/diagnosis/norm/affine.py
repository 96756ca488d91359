"""What a normalising layer may do with its scale and its bias: as it should, and every known way otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from parity.diagnosis.finding import Finding
from parity.diagnosis.norm.sources import Array, NormSide


class AffineMap(NamedTuple):
    """One way.

    Attributes:
      name: what it is called in `NormBehaviour.affine`.
      needs: which parameters a layer must have for it.
      applied: (gamma, beta) -> what x_hat is multiplied by, and what is added; where there is none, gamma is 1, beta 0.
      code: of the mistake.
      evidence: behind the side's name.
    """

    name: str
    needs: frozenset[str]
    applied: Callable[[Array, Array], tuple[Array, Array]]
    code: str
    evidence: str


ONE, ZERO = np.ones(()), np.zeros(())
NEITHER, GAMMA, BETA = frozenset[str](), frozenset({"gamma"}), frozenset({"beta"})
HELD = AffineMap("held", NEITHER, lambda gamma, beta: (gamma, beta), "", "as it should be")
# The likelier first; of two that come to the same numbers, the first.
WRONG = (
    AffineMap("swapped", GAMMA | BETA, lambda gamma, beta: (beta, gamma), "affine-swapped",
              "multiplies by beta and adds gamma"),
    AffineMap("bias missing", BETA, lambda gamma, beta: (gamma, ZERO), "bias-missing", "does not add its beta"),
    AffineMap("scale missing", GAMMA | BETA, lambda gamma, beta: (ONE, beta), "affine-missing",
              "does not multiply by its gamma"),
    AffineMap("missing", GAMMA, lambda gamma, beta: (ONE, ZERO), "affine-missing",
              "applies neither its gamma nor its beta"),
    AffineMap("offset", GAMMA, lambda gamma, beta: (1 + gamma, beta), "norm-offset",
              "multiplies by 1 + gamma, the other side by gamma"),
)  # fmt: skip


def affine_maps(side: NormSide) -> list[tuple[str, Array, Array]]:
    """(name, scale, bias) of what this side may do with its parameters, as it should first; no two the same."""
    has = {name for name in ("gamma", "beta") if getattr(side, name) is not None}
    gamma = ONE if side.gamma is None else side.gamma
    beta = ZERO if side.beta is None else side.beta
    found: list[tuple[str, Array, Array]] = []
    for way in (HELD, *WRONG):
        a, b = way.applied(gamma, beta)
        known = (np.array_equal(a + 0 * gamma, c + 0 * gamma) and np.array_equal(b + 0 * beta, d + 0 * beta)
                 for _, c, d in found)  # fmt: skip
        if way.needs <= has and not any(known):
            found.append((way.name, a, b))
    return found


def affine_findings(side: str, affine: str) -> Iterator[Finding]:
    """What is said of a side that does this with its parameters."""
    yield from (Finding(way.code, f"{side} {way.evidence}") for way in WRONG if way.name == affine)
