"""Linear layers of Flax's that keep their matrix [out, in], as PyTorch's: seen from what they make of numbers."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import parity

X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)


class InOut(nn.Module):
    """A linear layer that keeps its matrix as [in, out], as GPT-2's in PyTorch."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class OutIn(linen.Module):
    """GPT-2's in Flax."""

    features: int
    use_bias: bool = True

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", jax.nn.initializers.normal(1.0), (self.features, x.shape[-1]))
        y = x @ kernel.T
        return y + self.param("bias", jax.nn.initializers.zeros, (self.features,)) if self.use_bias else y


class NnxOutIn(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.kernel = nnx.Param(rngs.params.normal((outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x):
        return x @ self.kernel[...].T + self.bias


class Linen(linen.Module):
    width: int = 8
    activation: str = "tanh"

    @linen.compact
    def __call__(self, x):
        x = getattr(jnp, self.activation)(OutIn(self.width, name="fc")(x))
        return linen.Dense(8, name="head")(OutIn(8, name="proj")(x))


class Nnx(nnx.Module):
    def __init__(self, width=8, activation="tanh"):
        rngs, self.activation = nnx.Rngs(0), activation
        self.fc, self.proj, self.head = NnxOutIn(8, width, rngs), NnxOutIn(width, 8, rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(self.proj(getattr(jnp, self.activation)(self.fc(x))))


def pytorch(first=nn.Linear, width=8):
    torch.manual_seed(0)
    named = {"fc": first(8, width), "tanh": nn.Tanh(), "proj": nn.Linear(width, 8), "head": nn.Linear(8, 8)}
    module = nn.Sequential()
    for name, layer in named.items():
        module.add_module(name, layer)
    return module


@pytest.mark.parametrize(
    ("make", "first", "width"), [(Linen, nn.Linear, 8), (Linen, InOut, 8), (Nnx, nn.Linear, 8), (Nnx, InOut, 12)]
)
def test_a_matrix_out_in_beside_one_in_out(make, first, width):
    """Of square ones the shapes say nothing; PyTorch's own may be either way round, too."""
    module, flax_module = pytorch(first, width), make(width)
    kernels = {name: getattr(module, name).weight.detach().numpy() for name in ("fc", "proj", "head")}
    right = {"fc": kernels["fc"].T if first is InOut else kernels["fc"], "proj": kernels["proj"]}
    right["head"] = kernels["head"].T
    carried = parity.to_flax(module, flax_module, inputs=[X])
    for name, kernel in right.items():
        held = carried["params"][name] if make is Linen else carried[name]
        np.testing.assert_array_equal(np.asarray(held["kernel"][...]), kernel)
    state = parity.to_torch(carried, module, flax_module=flax_module, inputs=[X])
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    report = parity.check(module, flax_module, X, variables=carried, train=False)
    assert report.ok, report
    assert not report.diagnoses


def test_what_is_wrong_there_is_named():
    """The matrix transposed by hand, and another activation behind it."""
    module = pytorch()
    wrong = parity.to_flax(module, Linen(), inputs=[X])
    wrong["params"]["fc"]["kernel"] = wrong["params"]["fc"]["kernel"].T
    report = parity.check(module, Linen(), X, variables=wrong)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("kernel-transposed", "fc")]
    report = parity.check(module, Linen(activation="sin"), X)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("activation", "tanh")]


class LinenImages(linen.Module):
    """What is flattened channels last goes into a layer with as many outputs as inputs."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(2, (3, 3), name="conv")(x)
        return OutIn(32, name="fc")(x.reshape(len(x), -1))


@pytest.mark.parametrize("layer", [nn.Linear, InOut])
def test_behind_a_flatten(layer):
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("conv", nn.Conv2d(2, 2, 3, padding=1))
    module.add_module("flat", nn.Flatten())
    module.add_module("fc", layer(32, 32))
    carried = parity.to_flax(module, LinenImages(), inputs=[IMAGES])
    state = parity.to_torch(carried, module, flax_module=LinenImages(), inputs=[IMAGES])
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    assert parity.check(module, LinenImages(), IMAGES, variables=carried, train=False).ok


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.query(x)) * self.key(x) + self.value(x)


class Fused(linen.Module):
    order: str = "query key value"
    bias_of: str = "layer"

    @linen.compact
    def __call__(self, x):
        y = OutIn(24, use_bias=self.bias_of == "layer", name="qkv")(x)
        part = dict(zip(self.order.split(), jnp.split(y, 3, -1), strict=True))
        return jnp.tanh(part["query"]) * part["key"] + part["value"]


@pytest.mark.parametrize("order", ["query key value", "key query value"])
def test_three_layers_in_one_whose_matrix_is_out_in(order):
    torch.manual_seed(0)
    module, flax_module = Three(), Fused(order)
    carried = parity.to_flax(module, flax_module, inputs=[X])
    parts = [getattr(module, name) for name in order.split()]
    np.testing.assert_array_equal(carried["params"]["qkv"]["kernel"], torch.cat([p.weight for p in parts]).detach())
    np.testing.assert_array_equal(carried["params"]["qkv"]["bias"], torch.cat([p.bias for p in parts]).detach())
    assert parity.check(module, flax_module, X).ok
    state = parity.to_torch(carried, module, flax_module=flax_module, inputs=[X])
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_a_dump_that_knows_no_numbers():
    """A matrix of Flax's with a bias on its first axis, and nothing that says it is [out, in]: no cut is tried."""
    from parity.pairing.recut.linear import sizes_of
    from parity.records.recording import Layer
    from parity.records.structure import Structure

    layer = Layer("qkv", "linear", "OutIn", {"kernel": "params/qkv/kernel", "bias": "params/qkv/bias"})
    shapes = {"params/qkv/kernel": (24, 8), "params/qkv/bias": (24,)}
    assert sizes_of(layer, Structure([layer], shapes), "flax") is None
    layer.config["out_in"] = True
    sizes = sizes_of(layer, Structure([layer], shapes), "flax")
    assert sizes is not None
    assert sizes[:2] == (8, 24)


class SquareInOut(linen.Module):
    """As Flax's own, written by hand: square, so that its shape does not tell [in, out] from [out, in]."""

    @linen.compact
    def __call__(self, x):
        return x @ self.param("kernel", jax.nn.initializers.normal(1.0), (8, 8))


class NnxSquareInOut(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((8, 8)))

    def __call__(self, x):
        return x @ self.kernel[...]


@pytest.mark.parametrize("make", [SquareInOut, NnxSquareInOut])
def test_a_square_matrix_in_flaxs_own_order_is_no_other(make):
    torch.manual_seed(0)
    module = nn.Linear(8, 8, bias=False)
    report = parity.check(module, make(), X)
    assert report.ok, report
    leaves = jax.tree.leaves(parity.to_flax(module, make(), inputs=[X]))
    assert [np.array_equal(leaf, module.weight.detach().numpy().T) for leaf in leaves if np.ndim(leaf) == 2] == [True]
