"""A padding and what is left out behind it, as in a causal convolution, are one thing, and one finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from parity.diagnosis.finding import Located
from parity.pairing.translation import Translation


def with_chomps(found: Sequence[Located], translation: Translation) -> list[Located]:
    """The findings, where a convolution pads otherwise and positions of what it gives are left out: at the convolution.

    Args:
      found: all of them; those of `between.cuts` stand in front of the layer behind.
      translation: which of Flax's layers is which.
    """
    told = list(found)
    for f in found:
        if f.finding.cut is None:
            continue
        layer = f.finding.cut[0].source.removeprefix("the output of ")
        for i, g in enumerate(told):
            if g.layer == layer and not g.is_between and g.finding.pads is not None and g.finding.cut is None:
                mine, theirs = f.finding.cut
                evidence = f"{g.finding.evidence}; of what it gives PyTorch leaves out {mine}, Flax {theirs}"
                told[i] = g._replace(finding=replace(g.finding, evidence=evidence, cut=f.finding.cut))
                told.remove(f)
                break
        else:
            pair = translation.pair_of.get(layer)
            if pair is not None:
                # Both pad alike: it is at the layer whose positions they are.
                at = told.index(f)
                told[at] = f._replace(layer=layer, flax_layer=pair.flax.path, is_between=False)
    # Where what is left out is not seen, as behind the last layer, it is as behind the others of that rule.
    known = {f.finding.pads.rule: f.finding for f in reversed(told) if f.finding.pads and f.finding.cut}
    for i, f in enumerate(told):
        pads = f.finding.pads
        if pads is not None and f.finding.cut is None and pads.rule in known:
            told[i] = f._replace(finding=replace(f.finding, like=known[pads.rule]))
    return told
