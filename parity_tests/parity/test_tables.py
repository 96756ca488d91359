"""Flax's variables that are no floating point, or in a collection of the module's own: they stay the module's."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
ORDER = (2, 0, 1, 3)


class Torch(nn.Module):
    def __init__(self, order=ORDER):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("turn", torch.tensor([1, 1j, -1, 0.5j]))

    def forward(self, x):
        return self.head((x * self.turn * (1 - 1j)).real[:, self.order])


class Net(linen.Module):
    collection: str
    order: tuple[int, ...] = ORDER

    @linen.compact
    def __call__(self, x):
        if self.collection == "params":
            order = self.param("order", lambda _: jnp.array(self.order))
        else:
            order = self.variable(self.collection, "order", lambda: jnp.array(self.order)).value
        other = "constants" if self.collection == "params" else self.collection
        turn = self.variable(other, "turn", lambda: jnp.array([1, 1j, -1, 0.5j])).value
        shift = self.variable("constants", "shift", lambda: jnp.zeros(4)).value
        return linen.Dense(3)((x * turn * (1 - 1j)).real[:, order] + shift)


class Fixed(nnx.Variable):
    pass


class NnxNet(nnx.Module):
    def __init__(self, collection, order=ORDER):
        kind = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "constants": Fixed}[collection]
        self.head, self.order = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), kind(jnp.array(order))
        self.turn = Fixed(jnp.array([1, 1j, -1, 0.5j]))

    def __call__(self, x):
        return self.head((x * self.turn[...] * (1 - 1j)).real[:, self.order[...]])


COLLECTIONS = pytest.mark.parametrize("collection", ["params", "batch_stats", "constants"])
MAKE = pytest.mark.parametrize("make", [Net, NnxNet])


@COLLECTIONS
@MAKE
@pytest.mark.parametrize("train", [True, False])
def test_check(make, collection, train):
    report = parity.check(Torch(), make(collection), X, train=train)
    assert report.ok, report
    assert not parity.check(Torch(), make(collection, (0, 1, 2, 3)), X, train=train).ok


@COLLECTIONS
def test_steps_and_lockstep(collection):
    optimizers = (lambda p: torch.optim.SGD(p, 0.1)), optax.sgd(0.1)
    report = parity.check(Torch(), Net(collection), X, steps=2, optimizers=optimizers)
    assert report.ok, report
    loss = lambda y, t: (y**2).mean(), lambda y, t: (y**2).mean()
    assert parity.lockstep(Torch(), Net(collection), [(X, np.zeros(5))], steps=2, loss=loss).ok


@COLLECTIONS
@MAKE
def test_weights_both_ways(make, collection):
    variables = parity.to_flax(Torch(), make(collection), inputs=[X])
    if make is Net:
        inside = {name for name in ("params", "batch_stats") if "order" in variables[name]}
        assert inside == {collection} - {"constants"}
        if inside:
            np.testing.assert_array_equal(variables[collection]["order"], ORDER)
    state = parity.to_torch(variables, Torch(), flax_module=make(collection), inputs=[X])
    assert all(torch.equal(v, state[name]) for name, v in Torch().state_dict().items())
    report = parity.check(Torch(), make(collection), X, variables=variables)
    assert report.ok, report


@COLLECTIONS
@MAKE
def test_dumps(make, collection, tmp_path):
    parity.dump(Torch(), [X], tmp_path / "torch")
    parity.dump(make(collection), [X], tmp_path / "flax", weights=tmp_path / "torch")
    report = parity.compare(tmp_path / "torch", tmp_path / "flax")
    assert report.ok, report
    parity.dump(make(collection), [X], tmp_path / "own")
    if make is NnxNet:
        parity.dump(make(collection), [X], tmp_path / "again", weights=tmp_path / "own")


class Complex(linen.Module):
    @linen.compact
    def __call__(self, x):
        turn = self.param("turn", lambda _: jnp.array([1, 1j, -1, 0.5j]))
        return linen.Dense(3)((x * turn * (1 - 1j)).real[:, np.array(ORDER)])


def test_a_complex_parameter_is_not_carried_and_that_is_said():
    report = parity.check(Torch(), Complex(), X)
    assert any("params/turn is complex64, which is not carried" in note for note in report.notes)
    with pytest.raises(ValueError, match="params/turn is complex64; allowed: floating point"):
        parity.to_flax(Torch(), Complex(), inputs=[X])
