"""Modules that hold buffers alone: mean and deviation of the inputs, a table of positions, in variables or in code."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
# Exact in float32, as constants that a module has in its code are computed in float64.
MEAN, STD = (0.25, 0.5, -0.75, 1.0), (1.0, 2.0, 4.0, 0.5)


class TorchStandardized(nn.Module):
    def __init__(self, persistent=True):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN), persistent=persistent)
        self.register_buffer("std", torch.tensor(STD), persistent=persistent)

    def forward(self, x):
        return (x - self.mean) / self.std


def torch_net(persistent=True, factor=1.0):
    torch.manual_seed(0)
    net = nn.Sequential(TorchStandardized(persistent), nn.Linear(4, 3))
    net[0].std *= factor
    return net


class Standardized(linen.Module):
    collection: str

    @linen.compact
    def __call__(self, x):
        if self.collection == "code":
            return (x - jnp.array(MEAN)) / jnp.array(STD)
        mean = self.variable(self.collection, "mean", lambda: jnp.array(MEAN)).value
        return (x - mean) / self.variable(self.collection, "std", lambda: jnp.array(STD)).value


class Net(linen.Module):
    collection: str

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(Standardized(self.collection)(x))


class Constant(nnx.Variable):
    pass


class NnxStandardized(nnx.Module):
    def __init__(self, kind):
        self.mean, self.std = kind(jnp.array(MEAN)), kind(jnp.array(STD))

    def __call__(self, x):
        return (x - self.mean[...]) / self.std[...]


class NnxNet(nnx.Module):
    def __init__(self, collection):
        kind = {"batch_stats": nnx.BatchStat, "constants": Constant}[collection]
        self.norm, self.head = NnxStandardized(kind), nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.norm(x))


KINDS = [(Net, "code"), (Net, "constants"), (Net, "batch_stats"), (NnxNet, "constants"), (NnxNet, "batch_stats")]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("make", "collection"), KINDS)
def test_buffers_alone_need_no_partner(make, collection, persistent, train):
    report = parity.check(torch_net(persistent), make(collection), X, train=train)
    assert report.ok, report


@pytest.mark.parametrize("collection", ["code", "constants", "batch_stats"])
def test_another_constant_is_seen_unless_it_is_carried(collection):
    report = parity.check(torch_net(factor=1.01), Net(collection), X)
    assert report.ok == (collection == "batch_stats"), report
    given = parity.to_flax(torch_net(), Net(collection), inputs=[X])
    report = parity.check(torch_net(factor=1.01), Net(collection), X, variables=given)
    assert not report.ok


@pytest.mark.parametrize("collection", ["code", "constants", "batch_stats"])
def test_weights_both_ways(collection):
    variables = parity.to_flax(torch_net(factor=2.0), Net(collection), inputs=[X])
    kept = variables["batch_stats"]
    assert bool(kept) == (collection == "batch_stats")
    if kept:
        np.testing.assert_array_equal(kept["Standardized_0"]["std"], 2 * np.array(STD, np.float32))
    state = parity.to_torch(variables, torch_net(), flax_module=Net(collection), inputs=[X])
    assert torch.equal(state["0.std"], torch.tensor(STD) * (2 if kept else 1))


def test_what_only_flax_has_in_its_variables_is_missing():
    with pytest.raises(ValueError, match=r"missing \(for batch_stats/Standardized_0/mean"):
        parity.to_flax(nn.Sequential(nn.Linear(4, 3)), Net("batch_stats"), inputs=[X])


class TorchPositions(nn.Module):
    """A table longer than the sequence, beside layers; and one of a mask's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.register_buffer("table", torch.randn(16, 4))
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, ids):
        return self.head(self.embed(ids) + self.table[: ids.shape[1]])


class Positions(linen.Module):
    @linen.compact
    def __call__(self, ids):
        table = self.variable("batch_stats", "table", lambda: jnp.zeros((16, 4))).value
        self.variable("batch_stats", "mask", lambda: jnp.zeros((16, 16)))
        return linen.Dense(3)(linen.Embed(9, 4)(ids) + table[: ids.shape[1]])


def test_a_table_at_the_root():
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    report = parity.check(TorchPositions(), Positions(), ids)
    assert report.ok, report
    variables = parity.to_flax(TorchPositions(), Positions())
    assert variables["batch_stats"]["table"].shape == (16, 4)
