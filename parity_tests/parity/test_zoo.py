"""Correct pairs: `parity.check` says nothing about them, in training and in prediction, at any batch and seed."""

from __future__ import annotations

import copy

import flax.linen as linen
import jax
import numpy as np
import pytest
import torch

import parity
from parity_tests.parity.planted.training import RIGHT, cross_entropy, deep, optax_cross_entropy, small
from parity_tests.parity.zoo import ZOO, outputs, randomise, twisted
from parity_tests.parity.zoo.others import own_norm

# The same networks are there in linen, and NNX is there in smaller ones.
LARGE_IN_NNX = {"resnet-nnx", "vgg-nnx", "vit-nnx"}
CASES = [
    pytest.param(
        pair,
        mode,
        id=f"{pair.name}-{mode}",
        # In prediction there is less to be silent about than in training.
        marks=[pytest.mark.thorough] * ((mode == "eval" and "train" in pair.modes) or pair.name in LARGE_IN_NNX),
    )
    for pair in ZOO
    for mode in pair.modes
]


@pytest.mark.thorough
@pytest.mark.parametrize(("pair", "mode"), CASES)
@pytest.mark.usefixtures("x64")
def test_the_zoo_is_right(pair, mode):
    """Without `parity`: the weights carried by hand, float64."""
    for given, truth in zip(*outputs(pair, 0, 4, mode == "train"), strict=True):
        given = given if given.shape == truth.shape else np.moveaxis(given, 1, -1)
        assert given.shape == truth.shape
        assert np.abs(given - truth).max() <= pair.bound * np.abs(truth).max()


def silent(report) -> None:
    assert report.ok, report
    assert list(report.diagnoses) == []
    assert report.first_divergence is None
    # What is beyond its bound all the same says why.
    assert {report.verdict(row) for row in report.layers} <= {"ok", "rounding", "cut otherwise"}


def check(pair, mode, batch: int, seed: int, fresh: bool):
    torch.manual_seed(seed)
    module = pair.torch()
    if not fresh:
        randomise(module, seed)
    inputs = pair.inputs(np.random.default_rng(seed), batch)
    kwargs = {} if pair.flax_inputs is None else {"flax_inputs": pair.flax_inputs(inputs)}
    return parity.check(module, pair.flax(), *inputs, train=mode == "train", **kwargs, **pair.options)


@pytest.mark.parametrize(("pair", "mode"), CASES)
def test_silence(pair, mode):
    silent(check(pair, mode, batch=4, seed=0, fresh=False))


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["vgg", "mlp-nnx", "vit", "hand-both", "native-and-own-batch-norm", "conv1d"])
def test_silence_as_initialised(name, mode):
    pair = next(pair for pair in ZOO if pair.name == name)
    silent(check(pair, mode, batch=6, seed=3, fresh=True))


@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize("name", ["blenet", "flag-LinenTrain"])
def test_silence_at_any_batch(name, batch):
    pair = next(pair for pair in ZOO if pair.name == name)
    silent(check(pair, "train", batch=batch, seed=batch, fresh=False))


@pytest.mark.parametrize("name", RIGHT)
def test_silence_about_the_same_optimizer(name):
    made = small(steps=3, optimizers=RIGHT[name])
    silent(parity.check(made.torch_module, made.flax_module, *made.inputs, **made.options))


def test_silence_about_the_same_loss_and_steps():
    made = deep(steps=3, optimizers=RIGHT["adam"], loss=(cross_entropy(), optax_cross_entropy()))
    silent(parity.check(made.torch_module, made.flax_module, *made.inputs, **made.options))


def test_rounding_is_no_mistake():
    """Flax's fast variance loses two digits of float32 at a mean ten times the standard deviation."""
    x = (10 + np.random.default_rng(0).normal(size=(16, 4, 5, 5))).astype(np.float32)
    silent(parity.check(randomise(own_norm(4)), linen.BatchNorm(momentum=0.9), x))


@pytest.mark.parametrize("train", [True, False])
def test_flax_call(train):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    module = randomise(twisted.mode_torch())
    silent(parity.check(module, twisted.LinenMode(), x, train=train, flax_call=twisted.call_mode))


def test_nothing_is_changed():
    made = deep()
    module = made.torch_module.eval()
    before = copy.deepcopy(module.state_dict())
    x = made.inputs[0].copy()
    enabled = jax.config.jax_enable_x64
    parity.check(module, made.flax_module, x, train=True)
    assert not module.training
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in module.parameters())
    assert np.array_equal(x, made.inputs[0])
    assert jax.config.jax_enable_x64 == enabled
