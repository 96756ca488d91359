"""Layers that Flax keeps in one, stacked along an axis by scan or vmap, against as many layers of PyTorch."""

import functools
import warnings

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity import weights

D, COUNT = 6, 3
X = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(D, 1e-6), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, count=COUNT):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(count)), nn.Linear(D, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Ensemble(nn.Module):
    def __init__(self, count=4):
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(D, 3) for _ in range(count))

    def forward(self, x):
        return torch.stack([member(x) for member in self.members], 1)


class LinenBlock(linen.Module):
    epsilon: float = 1e-6

    @linen.compact
    def __call__(self, x, _=None):
        y = linen.Dense(D)(linen.LayerNorm(self.epsilon)(x))
        return x + linen.Dense(D)(jnp.tanh(y)), None


class LinenStack(linen.Module):
    axis: int = 0
    epsilon: float = 1e-6
    remat: bool = False
    count: int = COUNT

    @linen.compact
    def __call__(self, x):
        block = linen.remat(LinenBlock) if self.remat else LinenBlock
        scan = linen.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.count)
        return linen.Dense(2)(scan(self.epsilon)(x, None)[0])


class LinenEnsemble(linen.Module):
    @linen.compact
    def __call__(self, x):
        many = functools.partial(linen.vmap, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        return many(linen.Dense, out_axes=1, axis_size=4)(3)(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.first, self.second = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + self.second(jnp.tanh(self.first(self.norm(x))))


class NnxStack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(NnxBlock)(rngs.split(COUNT))
        self.head = nnx.Linear(D, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(
            nnx.scan(lambda y, block: block(y), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        )


class NnxEnsemble(nnx.Module):
    def __init__(self, rngs):
        self.members = nnx.vmap(lambda rngs: nnx.Linear(D, 3, rngs=rngs))(rngs.split(4))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None), out_axes=1)(self.members, x)


PAIRS = {
    "scan": (Stack, LinenStack),
    "scan, axis 1": (Stack, lambda: LinenStack(axis=1)),
    "scan of remat": (Stack, lambda: LinenStack(remat=True)),
    "scan, as many layers as features": (lambda: Stack(D), lambda: LinenStack(axis=1, count=D)),
    "vmap": (Ensemble, LinenEnsemble),
    "nnx scan": (Stack, lambda: NnxStack(nnx.Rngs(0))),
    "nnx vmap": (Ensemble, lambda: NnxEnsemble(nnx.Rngs(0))),
}


def pair(name):
    torch.manual_seed(0)
    module = PAIRS[name][0]()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module, PAIRS[name][1]()


def applied(module, variables, x):
    if isinstance(module, nnx.Module):
        nnx.update(module, variables)
        return module(x)
    return module.apply(variables, x)


@pytest.mark.parametrize("name", PAIRS)
def test_a_stack_is_carried_both_ways(name):
    mine, theirs = pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = weights.to_flax(mine, theirs, inputs=[X])
        state = weights.to_torch(variables, PAIRS[name][0](), flax_module=theirs, inputs=[X])
    truth = mine(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(applied(theirs, variables, jnp.asarray(X)), truth, rtol=0, atol=1e-5)
    assert state.keys() == mine.state_dict().keys()
    for key, v in mine.state_dict().items():
        assert torch.equal(state[key], v), key


@pytest.mark.parametrize("name", PAIRS)
def test_check_compares_a_stack_layer_by_layer(name):
    report = parity.check(*pair(name), X)
    assert report.ok, str(report)
    names = dict.fromkeys(row.flax_layer for row in report.layers)
    assert sum("[2]" in layer for layer in names) == (1 if "vmap" in name else 3), names
    # What a scan does in its turns is seen, what vmap does at once is not: there the gradients are compared.
    seen = {row.quantity for row in report.layers if "[2]" in row.flax_layer}
    assert ("output" in seen) == ("vmap" not in name)
    assert "bias gradient" in seen


@pytest.mark.parametrize("name", ["scan", "scan, axis 1", "nnx scan"])
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1)])
def test_layers_stacked_in_another_order_are_named(name, order):
    mine, theirs = pair(name)
    axis = 1 if "axis" in name else 0
    variables = weights.to_flax(mine, theirs, inputs=[X])

    def moved(path, a):
        return np.take(a, order, axis) if COUNT in np.shape(a) else a

    variables = jax.tree_util.tree_map_with_path(moved, variables)
    report = parity.check(mine, theirs, X, variables=variables)
    assert [d.code for d in report.diagnoses] == ["weight-order"] * 3, str(report)  # norm, first and second
    assert ("in reversed order" in report.diagnoses[0].evidence) == (order == (2, 1, 0))
    assert f"[{np.flatnonzero(np.arange(3) - order)[0]}] holds" in report.diagnoses[0].evidence


def test_a_mistake_inside_of_a_scan_is_named_layer_by_layer():
    mine, _ = pair("scan")
    report = parity.check(mine, LinenStack(epsilon=1e-2), X)
    assert [d.code for d in report.diagnoses] == ["epsilon"], report
    assert report.diagnoses[0].layers == [f"layers.{i}.norm" for i in range(3)]


def test_a_stack_of_another_number_of_layers_is_refused():
    mine, _ = pair("scan")
    with pytest.raises(ValueError, match=r"allowed: one that fits \(4, 6, 6\)"):
        weights.to_flax(mine, LinenStack(count=4), inputs=[X])
