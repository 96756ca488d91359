"""An activation before a norm on one side and behind it on the other."""

from __future__ import annotations

from collections.abc import Callable

from parity.diagnosis.between import family as between
from parity.diagnosis.between.activations import activation_of
from parity.diagnosis.between.chains import Source
from parity.diagnosis.finding import Finding, Located
from parity.pairing.translation import Translation
from parity.records import kinds
from parity.records.recording import NETWORK, Recording


class NormOrder:
    """Makes one finding of the two activations, one too many and one too few, that a norm stands between.

    Attributes:
      translation: between the two sides.
      forced: Flax's run in single-layer mode.
      free: Flax's own run.
      tolerance: of a quantity of a call, relative.
    """

    def __init__(
        self,
        translation: Translation,
        forced: Recording,
        free: Recording,
        tolerance: Callable[[tuple[str, int], str], float],
    ) -> None:
        self.translation, self.free, self.tolerance = translation, free, tolerance
        self.torch: Recording = translation.torch
        self.flax_calls = {call.key: call for call in forced.calls}

    def findings(self, found: list[Located]) -> list[Located]:
        """An activation before a batch norm on one side and behind it on the other is one mistake."""
        calls = self.torch.calls
        for position, call in enumerate(calls[1:], 1):
            pair = self.translation.pair_of.get(call.path)
            before = [f for f in found if f.key == call.key and f.finding.charges == "activation"]
            if pair is None or pair.kind not in kinds.NORMS or not before:
                continue
            mine = self.flax_calls[pair.flax.path, call.index]
            tolerance = self.tolerance(call.key, "input")
            u = self.translation.input(call, 0), mine.arrived[0]
            source = (
                self.translation.output(calls[position - 1])
                if calls[position - 1].path in self.translation.pair_of
                else None
            )
            if source is None or source.shape != u[0].shape:
                continue
            acts = [activation_of(source, side, tolerance) for side in u]
            if "identity" not in acts or None in acts or acts[0] == acts[1]:
                continue
            early = "Flax" if acts[0] == "identity" else "PyTorch"
            name = acts[1] if acts[0] == "identity" else acts[0]
            behind = calls[position + 1].key if position + 1 < len(calls) else NETWORK
            after = [
                f for f in found if f.key == behind and f.position > position - 1 and f.finding.charges == "activation"
            ]
            text = f"{early} applies {name} before {call.path}, the other side behind it"
            if not after and not self._behind(position, early, name, tolerance):
                continue
            found = [f for f in found if f not in before and f not in after]
            found.append(
                Located(
                    "forward",
                    position - 0.5,
                    call.path,
                    pair.flax.path,
                    Finding("norm-after-activation", text),
                    call.key,
                )
            )
        return found

    def _behind(self, position: int, early: str, name: str | None, tolerance: float) -> bool:
        """Whether the side that is late applies this activation behind the norm, by its own run.

        In single-layer mode it may leave no trace: ReLU of what is positive already.
        """
        calls, late = self.torch.calls, "Flax" if early == "PyTorch" else "PyTorch"
        if position + 1 >= len(calls):
            return False
        norm, behind = calls[position], calls[position + 1]
        if late == "PyTorch":
            u, v = self.translation.output(norm), self.translation.input(behind, 0)
        else:
            pairs = self.translation.pair_of
            free = {call.key: call for call in self.free.calls}
            keys = [(pairs[c.path].flax.path, c.index) for c in (norm, behind) if c.path in pairs]
            if len(keys) < 2 or any(key not in free for key in keys):
                return False
            u, v = free[keys[0]].output, free[keys[1]].arrived[0]
        chain = between.describe([Source(norm.path, u)], v, tolerance)
        return chain is not None and chain.activation == name
