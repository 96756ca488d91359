"""NNX modules that hold arrays which are no variables, such as tables of frequencies: these stay in the module."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import parity

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(1.0, 5.0) / 3, persistent=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x) * self.table))


class Flax(nnx.Module):
    def __init__(self, rngs, divisor=3):
        self.first, self.second = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.table = jnp.arange(1.0, 5.0) / divisor

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x) * self.table))


@pytest.fixture
def torch_module():
    torch.manual_seed(0)
    return Torch()


def test_a_table_is_left_as_it_is(torch_module):
    optimizers = (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1))
    report = parity.check(torch_module, Flax(nnx.Rngs(0)), X, steps=2, optimizers=optimizers)
    assert report.ok, report


def test_another_table_differs(torch_module):
    assert not parity.check(torch_module, Flax(nnx.Rngs(0), divisor=4), X).ok


def test_weights_both_ways(torch_module):
    """As a state, and as the module that has it."""
    module = Flax(nnx.Rngs(0))
    nnx.update(module, parity.weights.to_flax(torch_module, module))
    for variables in module, nnx.state(module):
        for name, value in parity.weights.to_torch(variables, torch_module).items():
            np.testing.assert_array_equal(value, torch_module.state_dict()[name])
        assert parity.check(torch_module, module, X, variables=variables).ok


def test_weight_norm_is_refused(torch_module):
    """Its scales are arrays: nothing would be carried into them, in silence."""
    module = Flax(nnx.Rngs(0))
    module.first = nnx.WeightNorm(module.first, rngs=nnx.Rngs(0))
    for refused in parity.weights.to_flax, lambda *pair: parity.check(*pair, X):
        with pytest.raises(ValueError, match=r"nnx\.WeightNorm stands at first; allowed"):
            refused(torch_module, module)
