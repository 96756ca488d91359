"""Where a finding is placed, and of what: what differs already is no source of what follows."""

import flax.linen as linen
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import parity


class TwoBranches(nn.Module):
    """A stem whose pooled result two layers take, as the first block of a residual network does."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.short = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.max_pool2d(F.silu(self.stem(x)), 3, 2, 1)
        return self.a(x) + self.short(x)


class FlaxTwoBranches(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(6, (3, 3), name="stem")(x)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        return linen.Conv(4, (3, 3), name="a")(x) + linen.Conv(4, (1, 1), name="short")(x)


@pytest.mark.parametrize("train", [False, True])
def test_one_mistake_before_two_layers_is_one(train):
    """The second's input is the first's in PyTorch; in Flax it is none that PyTorch has."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    report = parity.check(TwoBranches(), FlaxTwoBranches(), x, train=train)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("activation", "a")]
    assert not any("besides" in note for note in report.notes)
