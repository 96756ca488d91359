"""Conventions of the moving statistics: chains of batches in each, and what can be carried from one to another."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bn_common.conventions import FLAX, KERAS, ONNX, PROJECT, PYTORCH, Convention, complement, convert_moving_var
from parity_tests.test_batch_norm import draw
from parity_tests.wings import WINGS, channels_last

CONVENTIONS = {"project": PROJECT, "PyTorch": PYTORCH, "Flax": FLAX, "Keras": KERAS, "ONNX": ONNX}
SHAPES = {"m = 2": (2, 3), "rank 2": (8, 3), "rank 4": (4, 3, 2, 2)}


def chain(wing, convention, shape, dtype, batches=30):
    """moving_mean and moving_var after some batches in a convention."""
    state = np.zeros(3, dtype), np.full(3, convention.initial_moving_var, dtype)
    options = {"momentum": convention.momentum, "unbiased_moving_var": convention.unbiased_moving_var}
    for seed in range(batches):
        x, gamma, beta, _, _, dy = draw(shape, dtype, mean=3, seed=seed)
        result = WINGS[wing](x, gamma, beta, *state, dy, train=True, **options)
        state = result.moving_mean, result.moving_var
    return state


def batches_of(shape, dtype, batches=30):
    return [draw(shape, dtype, mean=3, seed=seed)[0] for seed in range(batches)]


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_chains(wing, convention, shape, dtype):
    """30 batches against the formula in longdouble."""
    mean, var = np.zeros(3, np.longdouble), np.full(3, convention.initial_moving_var, np.longdouble)
    axes, a = tuple(i for i in range(len(shape)) if i != 1), np.longdouble(convention.momentum)
    for x in batches_of(shape, dtype):
        wide = x.astype(np.longdouble)
        mean = a * mean + (1 - a) * wide.mean(axes)
        var = a * var + (1 - a) * wide.var(axes, ddof=int(convention.unbiased_moving_var))
    # A step rounds some 4 eps of its value; the sum of the weights of all steps is 1.
    np.testing.assert_allclose(
        np.array(chain(wing, convention, shape, dtype), np.longdouble), [mean, var], rtol=8 * np.finfo(dtype).eps
    )


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 2, 2)], ids=str)
def test_chain_of_native_torch(shape, x64):
    native = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(3).double()
    for x in batches_of(shape, "float64"):
        native(torch.tensor(x))
    for wing in WINGS:
        found = chain(wing, PYTORCH, shape, "float64")
        np.testing.assert_allclose(found, (native.running_mean, native.running_var), rtol=1e-12)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 2, 2)], ids=str)
def test_chain_of_native_flax(shape, x64):
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    with jax_promotion():
        for x in batches_of(shape, "float64"):
            params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
            variables = {"params": params, "batch_stats": stats}
            stats = layer.apply(variables, jnp.asarray(channels_last(x)), mutable=["batch_stats"])[1]["batch_stats"]
    for wing in WINGS:
        found = chain(wing, FLAX, shape, "float64")
        np.testing.assert_allclose(found, (stats["mean"], stats["var"]), rtol=1e-12)


def jax_promotion():
    """Flax itself promotes implicitly."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("other_unbiased", [False, True])
@pytest.mark.parametrize("other_start", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0])
def test_converted_is_as_if_kept(unbiased, start, other_unbiased, other_start, momentum):
    """What a convention would have kept, from what another has."""
    source, target = Convention(momentum, unbiased, start), Convention(momentum, other_unbiased, other_start)
    kept, wanted = (chain("torch", convention, (8, 3), "float64")[1] for convention in (source, target))
    given = kept.copy()
    found = convert_moving_var(kept, source, target, values_per_channel=8, num_batches=30)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)
    np.testing.assert_array_equal(kept, given)


def test_what_is_not_needed_is_not_asked_for():
    var = np.array([1.0, 2.0], np.float32)
    biased, unbiased = PROJECT, PROJECT._replace(unbiased_moving_var=True)
    found = convert_moving_var(var, biased, unbiased, values_per_channel=5)
    np.testing.assert_array_equal(found, var * np.float32(1.25))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(convert_moving_var(var, PYTORCH, PYTORCH), var)
    cumulative = Convention(None, True, 1.0)
    np.testing.assert_array_equal(
        convert_moving_var(var, cumulative, cumulative._replace(initial_moving_var=0.0), num_batches=3), var
    )
    np.testing.assert_array_equal(
        convert_moving_var(np.ones(2), cumulative, cumulative._replace(initial_moving_var=0.0), num_batches=0), 0
    )


REFUSED = {
    "momenta": (PYTORCH, FLAX._replace(unbiased_moving_var=True), {"num_batches": 3}, "target's momentum is 0.99"),
    "no m": (PROJECT, PROJECT._replace(unbiased_moving_var=True), {}, "values_per_channel is None"),
    "m = 1": (PROJECT, PROJECT._replace(unbiased_moving_var=True), {"values_per_channel": 1}, "integer >= 2"),
    "no n": (PYTORCH, PROJECT, {"values_per_channel": 8}, "num_batches is None"),
    "n < 0": (PYTORCH, PROJECT, {"values_per_channel": 8, "num_batches": -1}, "integer >= 0"),
}


@pytest.mark.parametrize(("source", "target", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(source, target, options, words):
    with pytest.raises(ValueError, match=words):
        convert_moving_var(np.ones(2), source, target, **options)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.01, 0.3, 0.0, 1.0, None, 1e-3, 0.123456789])
def test_complement_comes_back(momentum):
    assert complement(complement(momentum)) == momentum
    assert complement(0.1) == 0.9
    assert complement(0.9) == 0.1
