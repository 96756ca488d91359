"""What to write instead of a mistake, made of the arguments that the two layers themselves were given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from parity.diagnosis.fixes import Fix
from parity.records.constructors import NotSayableError, Said, line

TERMS: Mapping[str, tuple[str, ...]] = {
    "affine-missing": ("scale", "bias"),
    "bias-missing": ("bias",),
    "epsilon": ("epsilon",),
    "momentum-inverted": ("momentum",),
    "momentum": ("momentum",),
    "statistics-frozen": ("momentum",),
    # Together they say which numbers a kernel meets: of one the others may follow.
    **dict.fromkeys(("stride", "dilation", "padding"), ("stride", "dilation", "mode", "padding")),
}
"""Which terms of `constructors` a mistake is in: code -> these."""


def own_fix(code: str, torch: Said | None, flax: Said | None, cut: Sequence[bool] = (False, False)) -> Fix | None:
    """The lines of two layers as they are, and as each would be like the other.

    Args:
      code: of the mistake.
      torch: what PyTorch's layer is made with; None where that is not known.
      flax: Flax's.
      cut: whether PyTorch leaves out positions of what comes of it, and whether Flax does: the terms say what is left.

    Returns:
      Of either framework (as it is, like the other); None where the arguments do not show the mistake, or one framework
      has no such argument: then nothing is known that could be shown.
    """
    if torch is None or flax is None or code not in TERMS:
        return None
    differ = {t for t in TERMS[code] if torch.terms.get(t) != flax.terms.get(t)}
    differ |= {"padding"} if "mode" in differ else set()  # Flax has one argument for both
    terms = [t for t in TERMS[code] if t in differ]
    if not terms or any(said.terms.get(t) is None for said in (torch, flax) for t in terms):
        return None
    try:
        lines = [
            (line(own, terms), line(own.like(other, terms), terms)) for own, other in ((torch, flax), (flax, torch))
        ]
    except NotSayableError:
        return None
    lines = [(a, f"{b}  # and nothing left out behind it" if c else b) for (a, b), c in zip(lines, cut, strict=True)]
    return Fix(*lines) if all(wrong != right for wrong, right in lines) else None


def in_linen(fix: Fix) -> Fix:
    """The same where Flax's modules are linen: its functions have the same names and arguments there."""
    wrong, right = (re.sub(r"\bnnx\.", "nn.", line) for line in fix.flax)
    return fix._replace(flax=(wrong, right))
