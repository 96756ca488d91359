"""What training keeps on one side only was never compared: it is told, and not ok where it changes."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


class TorchMean(nn.Module):
    """Keeps a moving average of what it hands on; of rate 0 it is a constant."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x):
        if self.training and self.rate:
            self.average.mul_(1 - self.rate).add_(self.rate * x.detach().mean(0))
        return x


class TorchNet(nn.Module):
    def __init__(self, where="", rate=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.where, self.rate = nn.Linear(6, 6), nn.Linear(6, 3), where, rate
        if where == "child":
            self.mean = TorchMean(rate)
        elif where:
            (self.a if where == "layer" else self).register_buffer("average", torch.zeros(6))

    def forward(self, x):
        x = self.a(x)
        if self.where == "child":
            x = self.mean(x)
        elif self.where and self.training:
            kept = self.a.average if self.where == "layer" else self.average
            kept.mul_(1 - self.rate).add_(self.rate * x.detach().mean(0))
        return self.b(torch.tanh(x))


class LinenMean(linen.Module):
    collection: str
    rate: float

    @linen.compact
    def __call__(self, x, train):
        kept = self.variable(self.collection, "average", jnp.zeros, 6)
        if train and not self.is_initializing():
            kept.value = (1 - self.rate) * kept.value + self.rate * x.mean(0)
        return x


class LinenNet(linen.Module):
    collection: str = ""
    rate: float = 0.1
    bare: bool = False

    @linen.compact
    def __call__(self, x, train):
        x = linen.Dense(6, name="a")(x)
        if self.bare:
            kept = self.variable(self.collection, "average", jnp.zeros, 6)
            if train and not self.is_initializing():
                kept.value = (1 - self.rate) * kept.value + self.rate * x.mean(0)
        elif self.collection:
            x = LinenMean(self.collection, self.rate, name="mean")(x, train)
        return linen.Dense(3, name="b")(jnp.tanh(x))


class Kept(nnx.Variable):
    pass


class NnxNet(nnx.Module):
    def __init__(self, kind=nnx.BatchStat, rate=0.1):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.average, self.rate = kind(jnp.zeros(6)), rate

    def __call__(self, x, train):
        x = self.a(x)
        if train:
            self.average[...] = (1 - self.rate) * self.average[...] + self.rate * x.mean(0)
        return self.b(jnp.tanh(x))


@pytest.mark.parametrize(
    ("torch_net", "flax_net", "told"),
    [
        (TorchNet("child"), LinenNet(), "PyTorch's mean (average) has no partner in Flax"),
        (TorchNet("layer"), LinenNet(), "PyTorch's a (average) has no partner in Flax"),
        (TorchNet("root"), LinenNet(), "PyTorch's TorchNet (average) has no partner in Flax"),
        (TorchNet(), LinenNet("batch_stats"), "Flax's mean (average) has no partner in PyTorch"),
        (TorchNet(), LinenNet("ema"), "Flax's mean (average) has no partner in PyTorch"),
        (TorchNet(), LinenNet("batch_stats", bare=True), "Flax's LinenNet (average) has no partner in PyTorch"),
        (TorchNet(), NnxNet(), "Flax's NnxNet (average) has no partner in PyTorch"),
        (TorchNet(), NnxNet(Kept), "Flax's network (average) has no partner in PyTorch"),
    ],
)
def test_what_one_side_keeps_is_told(torch_net, flax_net, told):
    report = parity.check(torch_net, flax_net, X)
    assert not report.ok
    assert [(d.code, d.evidence) for d in report.diagnoses] == [("no-partner", told)]
    assert report.first_divergence.phase == "statistics"
    assert all(row.ok for row in report.layers)


@pytest.mark.parametrize(
    ("torch_net", "flax_net"),
    [
        (TorchNet("child"), LinenNet("batch_stats")),
        (TorchNet("root"), LinenNet("ema")),
        (TorchNet("child"), NnxNet(Kept)),
        (TorchNet("child", rate=0), LinenNet()),
        (TorchNet(), LinenNet("ema", rate=0.0)),
    ],
    ids=["both", "of two names", "in two places", "PyTorch's constant", "Flax's constant"],
)
def test_what_both_keep_or_does_not_change_is_silent(torch_net, flax_net):
    report = parity.check(torch_net, flax_net, X)
    assert report.ok, report
    assert not report.notes


@pytest.mark.parametrize("flax_net", [LinenNet("batch_stats", 0.2), LinenNet("ema", 0.2), NnxNet(Kept, 0.2)])
def test_what_both_keep_otherwise_is_not_ok(flax_net):
    assert not parity.check(TorchNet("child"), flax_net, X).ok


def test_a_mistake_beside_it_is_told_too():
    """A statistic of a layer's own explains nothing of what arrives behind it."""

    class Wrong(LinenNet):
        @linen.compact
        def __call__(self, x, train):
            return linen.Dense(3, name="b")(linen.sigmoid(linen.Dense(6, name="a")(x)))

    report = parity.check(TorchNet("layer"), Wrong(), X)
    assert {d.code for d in report.diagnoses} == {"activation", "no-partner"}


def test_in_prediction_it_is_a_note():
    report = parity.check(TorchNet(), LinenNet("batch_stats"), X, train=False)
    assert report.ok
    said = "Flax's mean (average) has no partner in PyTorch: what training makes of it was not compared"
    assert report.notes == [said]
    assert not parity.check(TorchNet("child"), LinenNet("batch_stats"), X, train=False).notes
