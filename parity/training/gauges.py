"""Parameters that the network does not see, found from the numbers: a bias before a batch norm, a key's bias.

Their true gradient is 0, their computed one rounding noise, out of which Adam makes steps of full size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from parity.records.inputs import Inputs
from parity.records.side import Snapshot

# In float64 a sum that cancels leaves some 1e-16 of its terms; no gradient that trains anything is as small.
SMALL = 1e-10
# A one-ulp nudge changes noise altogether, and a true gradient by some 1e-14.
CHANGED = 1e-3


class Follower(NamedTuple):
    """A statistic that follows a gauge: statistic <- (1 - rate) * statistic + rate * (bias + what the network sees)."""

    bias: str
    statistic: str
    rate: float


class Gauges(NamedTuple):
    """Which elements are gauges (PyTorch's name -> mask), and which statistics follow them."""

    masks: dict[str, NDArray[np.bool_]]
    followers: list[Follower]


class Run(Protocol):
    """A side in training, see `parity.sides.torch.train.TorchRun`."""

    def step(self, inputs: Inputs, *target: NDArray) -> float:
        """One step; gives the loss before it."""

    def gradients(self) -> dict[str, NDArray]:
        """Of the last step."""

    def statistics_after(
        self, inputs: Inputs, name: str | None = None, shift: NDArray | float = 0.0
    ) -> dict[str, NDArray]:
        """The statistics that a run leaves, with one parameter shifted."""


def find(make: Callable[..., Run], inputs: Inputs, target: NDArray) -> Gauges:
    """Finds the gauges of a network, on PyTorch's side and in float64.

    Args:
      make: a fresh run in float64, with or without `nudge`.
      inputs: a batch.
      target: its target.
    """
    gradients = []
    for seed in (None, 1, 2):
        run = make(nudge=None if seed is None else np.random.default_rng(seed))
        run.step(inputs, target)
        gradients.append(run.gradients())
    base, *others = gradients
    largest = max((np.abs(g).max(initial=0.0) for g in base.values()), default=0.0)
    masks = {}
    for name, g in base.items():
        change = np.max([np.abs(other[name] - g) for other in others], axis=0)
        small = (np.abs(g) < SMALL * largest) & (change < SMALL * largest)
        # By chance an element of noise may come out the same: its tensor's other elements speak for it.
        if (small & (change > CHANGED * np.abs(g))).any():
            masks[name] = small
    return Gauges(masks, _followers(make(), masks, inputs))


def _followers(run: Run, masks: Mapping[str, NDArray], inputs: Inputs) -> list[Follower]:
    """Moves each gauge, and looks which statistic moves along."""
    found = []
    before = run.statistics_after(inputs)
    for name, mask in masks.items():
        shift = np.where(mask, np.random.default_rng(3).normal(size=mask.shape), 0.0)
        after = run.statistics_after(inputs, name, shift)
        for statistic, value in after.items():
            moved = value - before[statistic]
            if moved.shape != shift.shape or not mask.all():
                continue
            rate = float((moved * shift).sum() / (shift * shift).sum())
            if abs(rate) > 1e-6 and np.allclose(moved, rate * shift, rtol=1e-6, atol=1e-9):
                found.append(Follower(name, statistic, rate))
    return found


class Fixed:
    """Takes what gauges do out of one run's snapshots: what is left is what the network sees.

    A gauge itself is left out, the optimiser's buffers for it too. A statistic that follows a gauge counts as
    `statistic - average of the gauge`, an average with the statistic's own rate: the moving mean of a layer without
    bias. (bias - moving_mean, which decides a prediction, is its opposite once the average has caught up.)
    """

    def __init__(self, gauges: Gauges) -> None:
        self.gauges = gauges
        self.averages: dict[str, NDArray] = {}

    def before_step(self, parameters: Mapping[str, NDArray]) -> None:
        """To be told of the parameters that a step begins with."""
        for follower in self.gauges.followers:
            bias = parameters[follower.bias].astype(np.float64)
            average = self.averages.get(follower.statistic, np.zeros_like(bias))
            self.averages[follower.statistic] = (1 - follower.rate) * average + follower.rate * bias

    def __call__(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot without gauges, in float64."""
        fixed: Snapshot = {}
        for kind, named in snapshot.items():
            fixed[kind] = {}
            for name, value in named.items():
                value = value.astype(np.float64)
                if kind == "statistics" and name in self.averages:
                    value = value - self.averages[name]
                elif kind != "statistics" and name in self.gauges.masks:
                    value = np.where(self.gauges.masks[name], 0.0, value)
                fixed[kind][name] = value
        return fixed
