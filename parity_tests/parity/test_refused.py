"""What cannot be trained with, or on, is refused in one line before anything runs on."""

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import parity
from parity.trajectory import PairedOptimizer

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
SGD = lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1)


class Right(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


class Asserts(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "a closure is needed"
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizers", "said"),
    [
        ((torch.optim.LBFGS, SGD[1]), "PyTorch's LBFGS, which says TypeError: .*closure"),
        ((lambda p: Asserts(p, 0.1), SGD[1]), "PyTorch's Asserts, which says AssertionError: a closure is needed"),
        ((SGD[0], optax.lbfgs()), "a transformation of optax's that says TypeError: .*value"),
    ],
)
def test_optimizers_that_want_more_than_gradients(optimizers, said, tmp_path):
    module = nn.Linear(4, 3)
    before = {name: v.clone() for name, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"optimizers has {said}.*; allowed: ") as told:
        parity.check(module, Right(), X, steps=2, optimizers=optimizers)
    assert "\n" not in str(told.value)
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    rule = PairedOptimizer(lambda p, lr: optimizers[0](p), lambda lr: optimizers[1])
    with pytest.raises(ValueError, match=f"optimizers has {said}"):
        parity.lockstep(module, Right(), [(X, np.zeros(6, np.int64))], steps=1, optimizer=rule)
    pair = zip((module, Right()), optimizers, SGD, strict=True)
    for network, optimizer in ((network, one) for network, one, usual in pair if one is not usual):
        with pytest.raises(ValueError, match=f"optimizers has {said}"):
            parity.dump(network, [X], tmp_path / "a", optimizer=optimizer, steps=1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("losses", "shape"),
    [((lambda y: y**2, lambda y: y**2), r"\(6, 3\)"), ((lambda y: (y.sum(), y.sum()),) * 2, r"\(2,\)")],
)
def test_a_loss_that_is_no_number(side, losses, shape, tmp_path):
    module, name = nn.Linear(4, 3), ("PyTorch", "JAX")[side]
    pair = [lambda y: y.sum(), lambda y: y.sum()]
    pair[side] = losses[side]
    said = f"^loss is of shape {shape} in {name}; allowed: one number, such as the mean"
    for call in (
        lambda: parity.check(module, Right(), X, loss=tuple(pair)),
        lambda: parity.check(module, Right(), X, loss=tuple(pair), steps=1, optimizers=SGD),
        lambda: parity.trace(module, Right(), X, loss=tuple(pair)),
        lambda: parity.dump((module, Right())[side], [X], tmp_path / "a", loss=pair[side]),
        lambda: parity.lockstep(
            module,
            Right(),
            [(X, np.zeros(6))],
            steps=1,
            loss=tuple((lambda y, t, one=one: one(y)) for one in pair),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_one_number_in_whatever_shape_is_a_loss():
    losses = (lambda y: y.sum().reshape(1)), lambda y: jnp.sum(y)[None]
    report = parity.check(nn.Linear(4, 3), Right(), X, loss=losses)
    assert report.ok, report
