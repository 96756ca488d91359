"""Correct pairs: `parity.check` says nothing about them, in training and in prediction, at any batch and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parity
from parity_tests.parity.zoo import ZOO, outputs, randomise

CASES = [pytest.param(pair, mode, id=f"{pair.name}-{mode}") for pair in ZOO for mode in pair.modes]


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


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["vgg", "mlp-nnx", "vit", "hand-both", "native-and-own-batch-norm", "conv1d"])
def test_silence_as_initialised(name, mode):
    pair = next(pair for pair in ZOO if pair.name == name)
    silent(check(pair, mode, batch=6, seed=3, fresh=True))


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("name", ["blenet", "flag-LinenTrain"])
def test_silence_at_any_batch(name, batch):
    pair = next(pair for pair in ZOO if pair.name == name)
    silent(check(pair, "train", batch=batch, seed=batch, fresh=False))
