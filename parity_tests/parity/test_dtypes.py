"""Modules of 16 bits and of 64: compared in float64 like all others, and what 16 bits hide is said."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
DTYPES = {"bfloat16": (torch.bfloat16, jnp.bfloat16), "float16": (torch.float16, jnp.float16)}
DTYPES["float64"] = torch.float64, jnp.float64


def torch_net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)).to(dtype)


class Net(linen.Module):
    dtype: Any = None
    param_dtype: Any = jnp.float32
    is_tanh: bool = False
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = linen.LayerNorm(epsilon=self.epsilon, **types)(linen.Dense(16, **types)(x))
        return linen.Dense(3, **types)(linen.gelu(x, approximate=self.is_tanh))


class NnxNet(nnx.Module):
    def __init__(self, dtype=None, param_dtype=jnp.float32, is_tanh=False, epsilon=1e-5):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
        self.a, self.norm = nnx.Linear(8, 16, **types), nnx.LayerNorm(16, epsilon=epsilon, **types)
        self.b, self.is_tanh = nnx.Linear(16, 3, **types), is_tanh

    def __call__(self, x):
        return self.b(nnx.gelu(self.norm(self.a(x)), approximate=self.is_tanh))


KINDS = pytest.mark.parametrize("own", [(), ("param_dtype",), ("dtype", "param_dtype")], ids=["none", "param", "both"])


@KINDS
@pytest.mark.parametrize("make", [Net, NnxNet])
@pytest.mark.parametrize("name", DTYPES)
def test_a_module_of_another_dtype(name, make, own):
    """Whatever the inputs are; and a mistake that its rounding would hide is named."""
    torch_dtype, flax_dtype = DTYPES[name]
    types = {option: flax_dtype for option in own if name != "float64" or make is Net}
    for x in (X, X.astype(np.float64), X.astype(np.float16)):
        report = parity.check(torch_net(torch_dtype), make(**types), x)
        assert report.ok, report
    hidden = [note for note in report.notes if "in 16 bits" in note]
    assert len(hidden) == (name != "float64")
    assert all(f"PyTorch's parameters are {name}" in note for note in hidden)
    assert all((f"Flax's parameters are {name}" in note) == bool(own) for note in hidden)
    report = parity.check(torch_net(torch_dtype), make(**types, is_tanh=True), X)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("activation", "2")]
    report = parity.check(torch_net(torch_dtype), make(**types, epsilon=1.1e-5), X)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("epsilon", "1")]


@pytest.mark.parametrize("make", [Net, NnxNet])
def test_16_bits_on_one_side_only_where_the_other_has_32(make):
    report = parity.check(torch_net(torch.float32), make(dtype=jnp.bfloat16), X)
    assert "matmul-precision" in [d.code for d in report.diagnoses]


def test_dumps(tmp_path):
    for is_tanh in (False, True):
        parity.dump(torch_net(torch.bfloat16), [X], tmp_path / "torch")
        module = Net(jnp.bfloat16, jnp.bfloat16, is_tanh)
        parity.dump(module, [X], tmp_path / "flax", weights=tmp_path / "torch")
        report = parity.compare(tmp_path / "torch", tmp_path / "flax")
        assert [d.code for d in report.diagnoses] == ["activation"] * is_tanh
        assert any("in 16 bits" in note for note in report.notes)


def test_the_users_module_stays_as_it_is():
    module, other = Net(jnp.bfloat16, jnp.bfloat16), NnxNet(jnp.bfloat16)
    for flax_module in (module, other):
        parity.check(torch_net(torch.bfloat16), flax_module, X)
    assert module.dtype == jnp.bfloat16
    assert other.a.dtype == jnp.bfloat16


class Gate(linen.Module):
    """Squeeze and excitation of MobileNetV3; `wide`: the derivative is 1e-8 of itself too large."""

    wide: bool = False

    @linen.compact
    def __call__(self, x):
        y = linen.Dense(8)(linen.relu(linen.Dense(4)(x)))
        gate = linen.hard_sigmoid(y)
        if self.wide:
            gate += 1e-8 * (gate - jax.lax.stop_gradient(gate))
        return linen.Dense(3)(x * gate)


class TorchGate(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 3)
        self.gate = nn.Hardsigmoid(inplace)

    def forward(self, x):
        return self.c(x * self.gate(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hard_sigmoid_has_its_derivative_in_float64(inplace):
    """PyTorch's own has 1/6 in float32, also of float64."""
    pair, adam = (TorchGate(inplace), Gate()), (lambda p: torch.optim.Adam(p, 1e-2), optax.adam(1e-2))
    assert parity.check(*pair, X, train=False).ok
    assert parity.check(*pair, X, steps=2, optimizers=adam).ok
    assert not parity.check(pair[0], Gate(wide=True), X, train=False).ok


def test_a_hard_sigmoid_outside_of_a_check_is_pytorchs_own():
    x = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    before, original = nn.functional.hardsigmoid.__code__, nn.functional.hardsigmoid(x).grad_fn
    parity.check(TorchGate(False), Gate(), X, train=False)
    assert nn.functional.hardsigmoid.__code__ is before
    assert type(nn.functional.hardsigmoid(x).grad_fn) is type(original)
