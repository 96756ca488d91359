"""Layers inside what a framework makes of a part of a network: jit, remat and scan, checkpoint and compile."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.utils.checkpoint import checkpoint

import parity
from parity.sides.jax import record, side_of, structure

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


class Block(linen.Module):
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x, train):
        norm = functools.partial(linen.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=self.epsilon)
        x = linen.relu(norm()(linen.Dense(6)(x)))
        return linen.relu(norm()(linen.Dense(6)(x)))


def as_it_is(block, **_):
    return block


LINEN = {
    "as it is": as_it_is,
    "jit": functools.partial(linen.jit, static_argnums=2),
    "remat": functools.partial(linen.remat, static_argnums=2),
    "jit(remat)": lambda block: linen.jit(linen.remat(block, static_argnums=2), static_argnums=2),
}


class Net(linen.Module):
    transform: str
    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x, train):
        block = LINEN[self.transform](Block)
        x = block(name="one")(x, train)
        return linen.Dense(3)(block(self.epsilon, name="two")(x, train))


class NnxBlock(nnx.Module):
    def __init__(self, inputs, epsilon, rngs):
        norm = functools.partial(nnx.BatchNorm, 6, momentum=0.9, rngs=rngs)
        self.linear1, self.norm1 = nnx.Linear(inputs, 6, rngs=rngs), norm(epsilon=epsilon)
        self.linear2, self.norm2 = nnx.Linear(6, 6, rngs=rngs), norm(epsilon=epsilon)

    def __call__(self, x):
        return nnx.relu(self.norm2(self.linear2(nnx.relu(self.norm1(self.linear1(x))))))


NNX = {"as it is": as_it_is, "jit": nnx.jit, "remat": nnx.remat}


class NnxNet(nnx.Module):
    def __init__(self, transform, epsilon=1e-5):
        rngs = nnx.Rngs(0)
        self.transform = transform
        self.one, self.two = NnxBlock(5, 1e-5, rngs), NnxBlock(6, epsilon, rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        call = NNX[self.transform](lambda block, x: block(x))
        return self.head(call(self.two, call(self.one, x)))


class TorchBlock(nn.Sequential):
    def __init__(self, inputs, norms=True):
        def norm():
            return nn.BatchNorm1d(6) if norms else nn.LayerNorm(6)

        super().__init__(nn.Linear(inputs, 6), norm(), nn.ReLU(), nn.Linear(6, 6), norm(), nn.ReLU())


class TorchNet(nn.Module):
    def __init__(self, transform="as it is", norms=True):
        super().__init__()
        torch.manual_seed(0)
        self.transform = transform
        self.one, self.two = TorchBlock(5, norms), TorchBlock(6, norms)
        self.head = nn.Linear(6, 3)
        if transform == "compile":
            self.one, self.two = (torch.compile(block, backend="eager") for block in (self.one, self.two))

    def forward(self, x):
        for block in (self.one, self.two):
            if "checkpoint" in self.transform:
                x = checkpoint(block, x, use_reentrant="reentrant" in self.transform)
            else:
                x = block(x)
        return self.head(x)


def seen(report):
    return {row.flax_layer for row in report.layers if row.phase == "forward"} - {""}


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["train", "eval"])
@pytest.mark.parametrize(
    "made",
    [
        # As it is, other files have it; what is under jit and remat at once is under each.
        *(pytest.param((Net, t), marks=[pytest.mark.thorough] * (t != "jit(remat)")) for t in LINEN),
        *(pytest.param((NnxNet, t), marks=[pytest.mark.thorough] * (t == "as it is")) for t in NNX),
    ],
    ids=str,
)
def test_layers_inside_are_compared(made, train):
    """All nine layers, silently if they agree; another epsilon in the second block is found where it is."""
    kind, transform = made
    right, planted = (parity.check(TorchNet(), kind(transform, e), X, train=train) for e in (1e-5, 1e-2))
    assert not [d for d in right.diagnoses if d.code != "unbiased-variance"], str(right)
    assert not right.notes
    assert len(seen(right)) == 9
    assert planted.diagnoses[0].code == "epsilon", str(planted)
    assert planted.first_divergence.torch_layer == "two.1"
    assert planted.first_divergence.phase == "forward"


def test_as_it_was_where_it_can_not_be_opened():
    """A part that asks whether it is compiled: it is compared at its ends, as before."""

    class Compiled(linen.Module):
        @linen.compact
        def __call__(self, x):
            def inside(self, x):
                assert not jax.config.jax_disable_jit
                return linen.Dense(6)(x)

            return linen.Dense(3)(linen.jit(inside)(self, x))

    module = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    report = parity.check(module, Compiled(), X, train=False)
    assert report.ok, str(report)
    assert len(seen(report)) == 1
    assert any("which can't be looked into: Dense_1" in note for note in report.notes), report.notes


def test_nothing_stays_exchanged():
    """JAX's functions are back afterwards, also after an error; and a scan is left alone in between."""
    before = jax.checkpoint, jax.remat, jax.lax.scan

    class Broken(linen.Module):
        @linen.compact
        def __call__(self, x):
            linen.remat(linen.Dense)(3)(x)
            _, y = jax.lax.scan(lambda carry, row: (carry, row + carry), jnp.zeros(5), x)
            assert isinstance(x, jax.core.Tracer)
            if not jax.config.jax_disable_jit:
                return y
            raise OSError("while it is opened")

    side = side_of(Broken())
    layers, variables, _ = structure(side, [X], train=False)
    assert not side.is_opened
    zeros = {name: np.zeros(v.shape, np.float32) for name, v in variables.items()}
    assert not record(side, layers, zeros, [X], train=False).calls
    assert (jax.checkpoint, jax.remat, jax.lax.scan) == before
    assert not jax.config.jax_disable_jit


class LayerNormBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = linen.relu(linen.LayerNorm(epsilon=1e-5)(linen.Dense(6)(x)))
        return x


class LayerNormNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(LayerNormBlock()(LayerNormBlock()(x)))


@functools.cache
def rows_of_the_plain_network():
    return len(parity.check(TorchNet(norms=False), LayerNormNet(), X, train=True).layers)


@pytest.mark.parametrize("transform", ["checkpoint", "checkpoint, reentrant", "compile"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_parts_of_a_pytorch_network(transform):
    """Called once more in the backward pass, or compiled: every layer is compared once, its gradients too."""
    report = parity.check(TorchNet(transform, norms=False), LayerNormNet(), X, train=True)
    assert report.ok, str(report)
    assert len(report.layers) == rows_of_the_plain_network()
    assert not any(np.isnan(row.error) for row in report.layers)


def test_checkpointed_batch_norm_moves_twice():
    """PyTorch's own trap: the second call moves the running statistics once more. Not hidden."""
    report = parity.check(TorchNet("checkpoint"), Net("remat"), X, train=True)
    assert report.first_divergence.phase == "statistics"
    assert parity.check(TorchNet("checkpoint"), Net("remat"), X, train=False).ok
