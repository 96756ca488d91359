"""What a report says beside its verdict: what the numbers cannot show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from parity.records.kinds import HALF
from parity.records.recording import Recording

SIDES = "PyTorch", "Flax"


def of_half(dtypes: Sequence[str]) -> Iterator[str]:
    """Where the parameters of a side are of 16 bits.

    Args:
      dtypes: of PyTorch's and of Flax's.
    """
    hidden = [(side, dtype) for side, dtype in zip(SIDES, dtypes, strict=True) if dtype in HALF]
    if hidden:
        told = " and ".join(f"{side}'s parameters are {dtype}" for side, dtype in hidden)
        least = max(HALF[dtype] for _, dtype in hidden)
        yield (
            f"{told}: compared is in float64; what the sides do otherwise in 16 bits, as a sum or a softmax in "
            f"float32, is not seen below {least:.1g}"
        )


def loss_rounds_by(runs: Sequence[Recording]) -> float:
    """How much the losses are rounded in a float64 run: float32's eps, where one computes in it inside."""
    return float(np.finfo(np.float32).eps) if any(run.rounds_loss for run in runs) else 0.0


def of_rounded_losses(runs: Sequence[Recording]) -> Iterator[str]:
    """Where a loss computes in float32 inside of a float64 run: of its own, or as the network's outputs are float32.

    Args:
      runs: PyTorch's and Flax's.
    """
    seen = f"below {30 * loss_rounds_by(runs):.1g} nothing is seen in the losses, the gradients and the steps"
    for by_network, text in (
        (True, "network computes in float32 inside, as of dtype=float32"),
        (False, "loss computes in float32 inside, as of float32 targets"),
    ):
        both = zip(SIDES, runs, strict=True)
        sides = [f"{side}'s" for side, run in both if run.rounds_loss and run.rounds_outputs == by_network]
        if sides:
            yield f"{' and '.join(sides)} {text}: {seen}"
