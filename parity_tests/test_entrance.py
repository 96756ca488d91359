"""Bad input: a ValueError on both sides, in the same words, before any state has changed."""

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_bn
import torch_bn
from parity_tests.wings import channels_last


def call_both(shape=(4, 3), dtype="float32", per_channel=3, train=True, **options):
    """The messages of both wings' batch_norm for the same bad input; names that differ between the wings unified."""
    messages = []
    x, v = np.ones(shape), np.ones(per_channel, np.float32)
    mask = options.pop("mask", None)
    masks = {} if mask is None else {"mask": torch.tensor(mask)}, {} if mask is None else {"mask": jnp.asarray(mask)}
    tx = torch.tensor(x).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match="allowed") as caught:
        torch_bn.batch_norm(tx, *[torch.tensor(v)] * 4, train=train, **masks[0], **options)
    messages.append(str(caught.value))
    options = {{"eps": "epsilon"}.get(name, name): value for name, value in options.items()}
    jax_x = jnp.asarray(channels_last(x) if len(shape) > 1 else x, dtype)
    stats = jax_bn.BatchStats(jnp.asarray(v), jnp.asarray(v))
    with pytest.raises(ValueError, match="allowed") as caught:
        jax_bn.batch_norm(jax_x, jnp.asarray(v), jnp.asarray(v), stats, train=train, **masks[1], **options)
    messages.append(str(caught.value))
    unified = []
    for message in messages:
        for ours, theirs in (("epsilon", "eps"), ("scale", "gamma")):
            message = message.replace(ours, theirs)
        unified.append(message.replace(str(tuple(jax_x.shape)), "SHAPE").replace(str(tuple(shape)), "SHAPE"))
    return unified


BAD = {
    "rank 0": {"shape": ()},
    "rank 1": {"shape": (4,)},
    "no channel": {"shape": (4, 0), "per_channel": 0},
    "another channel count": {"per_channel": 4},
    "rank 2 statistics": {"per_channel": (1, 3)},
    "int32": {"dtype": "int32"},
    "bool": {"dtype": "bool"},
    "complex": {"dtype": "complex64"},
    "one value": {"shape": (1, 3)},
    "one pixel": {"shape": (1, 3, 1, 1)},
    "no value": {"shape": (0, 3)},
    "momentum None alone": {"momentum": None},
    **{f"n = {v}": {"momentum": None, "num_batches_tracked": v} for v in (-1, 1.5, True, "a")},
    **{f"train {v}": {"train": v} for v in (None, 1, "yes")},
    "float mask": {"mask": np.ones((4, 1), np.float32)},
    "long mask": {"mask": np.ones((5, 1), bool)},
    "mask of higher rank": {"mask": np.ones((1, 4, 3), bool)},
    **{f"axis {v}": {"axis": v} for v in (2, -3, 1.0, True, None, "1", (), (1, 1), (0, 1))},
    **{f"eps {v}": {"eps": v} for v in (0.0, -1e-5, 1e-60, 1e-40, math.nan, math.inf, "1e-5", None, True)},
    **{f"momentum {v}": {"momentum": v} for v in (-0.1, 1.1, math.nan, "0.9", False)},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_batch_norm(bad):
    with jax.enable_x64(True):  # so that JAX knows every dtype
        first, second = call_both(**bad)
    assert first == second


@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction])
def test_any_real_number_will_do(number, x64):
    """And a numpy float64 does not widen the statistics of float32."""
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    _, mean, var = torch_bn.batch_norm(
        torch.tensor(x), *[torch.tensor(v)] * 4, train=True, momentum=number(0.5), eps=number(0.25)
    )
    stats = jax_bn.BatchStats(jnp.asarray(v), jnp.asarray(v))
    _, stats = jax_bn.batch_norm(
        *map(jnp.asarray, (x, v, v)), stats, train=True, momentum=number(0.5), epsilon=number(0.25)
    )
    assert mean.dtype == var.dtype == torch.float32
    assert stats.mean.dtype == stats.var.dtype == np.float32
    assert (var == 0.5).all()
    assert (stats.var == 0.5).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smallest_epsilon(dtype, x64):
    """What is accepted does what it says: a constant channel becomes beta, also where the moving variance is 0."""
    eps = float(np.finfo(dtype).smallest_normal)
    x, one, zero = np.ones((4, 3), dtype), np.ones(3, dtype), np.zeros(3, dtype)
    for train in (True, False):
        mean = zero if train else one
        y, *_ = torch_bn.batch_norm(*map(torch.tensor, (x, one, one, mean, zero)), train=train, eps=eps)
        stats = jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(zero))
        z, _ = jax_bn.batch_norm(*map(jnp.asarray, (x, one, one)), stats, train=train, epsilon=eps)
        assert (y == 1).all()
        assert (z == 1).all()


def test_one_value_is_enough_in_prediction():
    x = np.array([[3.0, 5.0]], np.float32)
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    y, *_ = torch_bn.batch_norm(*map(torch.tensor, (x, one, zero, one, one)), train=False)
    stats = jax_bn.BatchStats(jnp.asarray(one), jnp.asarray(one))
    z, same = jax_bn.batch_norm(*map(jnp.asarray, (x, one, zero)), stats, train=False)
    np.testing.assert_allclose(y, [[2, 4]], rtol=1e-5)
    np.testing.assert_allclose(z, [[2, 4]], rtol=1e-5)
    assert same is stats


def test_counters_that_are_arrays():
    """One integer."""
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    stats = jax_bn.BatchStats(jnp.asarray(v), jnp.asarray(v))
    for bad in (np.ones(3, np.int32), np.ones((), np.float32)):
        with pytest.raises(ValueError, match="num_batches_tracked is") as first:
            torch_bn.batch_norm(
                *map(torch.tensor, (x, v, v, v, v)), train=True, momentum=None, num_batches_tracked=torch.tensor(bad)
            )
        with pytest.raises(ValueError, match="num_batches_tracked") as second:
            jax_bn.batch_norm(
                *map(jnp.asarray, (x, v, v)), stats, train=True, momentum=None, num_batches_tracked=jnp.asarray(bad)
            )
        assert str(first.value) == str(second.value)


@pytest.mark.parametrize("bad", [{"mean": 1, "var": 1}, (1,), (1, 1, 1), None], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_statistics_that_are_no_pair(bad, train):
    one = jnp.ones(3)
    with pytest.raises(TypeError, match="allowed: a BatchStats"):
        jax_bn.batch_norm(jnp.ones((4, 3)), one, one, bad, train=train)


def test_no_array():
    v = [1.0, 1.0]
    with pytest.raises(TypeError, match="x is list; allowed"):
        torch_bn.batch_norm([[1.0, 2.0]], v, v, v, v, train=False)
    with pytest.raises(TypeError, match="x is list; allowed"):
        jax_bn.batch_norm([[1.0, 2.0]], v, v, jax_bn.BatchStats(v, v), train=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fig_size": 11},
        {"fig_size": 0},
        {"fig_size": -28},
        {"fig_size": 28.0},
        {"fig_size": "28"},
        {"fig_size": True},
        {"channels": 0},
        {"channels": 1.5},
        {"channels": None},
        {"num_class": 0},
        {"num_class": -10},
    ],
    ids=str,
)
def test_blenet_sizes(sizes):
    messages = []
    for model in (torch_bn.BLeNet, jax_bn.BLeNet):
        with pytest.raises(ValueError, match="allowed: an integer >= ") as caught:
            model(**{"channels": 1, "fig_size": 28, "num_class": 10} | sizes)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("fig_size", [12, 13])
def test_smallest_fig_size(fig_size):
    assert torch_bn.BLeNet(channels=1, fig_size=fig_size, num_class=2)(torch.zeros(2, 1, fig_size, fig_size)).shape == (
        2,
        2,
    )
    model, x = jax_bn.BLeNet(1, fig_size, 2), jnp.zeros((2, fig_size, fig_size, 1))
    outcome, _ = jax.eval_shape(partial(model.init_with_output, train=True), jax.random.key(0), x)
    assert outcome.shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 28, 28), "float32"),
        ((0, 1, 28, 28), "float32"),
        ((4, 1, 27, 28), "float32"),
        ((4, 3, 28, 28), "float32"),
        ((4, 28, 28), "float32"),
        ((4, 784), "float32"),
        ((4, 1, 28, 28), "uint8"),
        ((4, 1, 28, 28), "int32"),
    ],
    ids=str,
)
def test_blenet_input(shape, dtype):
    """A batch of 1 in training, say, must not move the convolution's statistics before the linear layer refuses."""
    model = torch_bn.BLeNet(channels=1, fig_size=28, num_class=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="allowed"):
        model(torch.ones(shape).to(getattr(torch, dtype)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    flax_model = jax_bn.BLeNet()
    init = partial(flax_model.init, train=False)
    variables = jax.tree.map(
        lambda v: jnp.ones(v.shape), jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    )
    x = jnp.asarray(channels_last(np.ones(shape)), dtype)
    with pytest.raises(ValueError, match="allowed"):
        flax_model.apply(variables, x, train=True, mutable=["batch_stats"])


def test_layer_keeps_its_statistics_when_it_refuses():
    layer = torch_bn.BatchNorm(num_features=3, num_dims=2)
    for x in (torch.ones(1, 3), torch.ones(4, 2), torch.ones(4, 3, 2), torch.ones(4, 3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="allowed"):
            layer(x)
    assert not layer.moving_mean.any()
    assert not layer.moving_var.any()


@pytest.mark.parametrize(
    "bad",
    [
        {"num_features": 0},
        {"num_features": "3"},
        {"num_dims": 1},
        {"momentum": 2},
        {"num_dims": ()},
        {"axis": 2},
        {"dtype": torch.int32},
        {"dtype": torch.complex64},
        {"eps": 0},
        {"initial_moving_var": -1.0},
    ],
    ids=str,
)
def test_layer_arguments(bad):
    """At construction, on both sides where both have the argument."""
    with pytest.raises(ValueError, match="allowed"):
        torch_bn.BatchNorm(**{"num_features": 3, "num_dims": 2} | bad)
    both = {"momentum": "momentum", "eps": "epsilon", "initial_moving_var": "initial_moving_var"}
    bad = {both[name]: value for name, value in bad.items() if name in both}
    if bad:
        with pytest.raises(ValueError, match="allowed"):
            jax_bn.BatchNorm(**bad)


@pytest.mark.parametrize("bad", [{"momentum": -1}, {"eps": math.nan}], ids=str)
def test_blenet_options(bad):
    with pytest.raises(ValueError, match="allowed"):
        torch_bn.BLeNet(**bad)
    with pytest.raises(ValueError, match="allowed"):
        jax_bn.BLeNet(**{{"eps": "epsilon"}.get(name, name): value for name, value in bad.items()})


@pytest.mark.parametrize("layer", [jax_bn.BLeNet, jax_bn.BatchNorm])
def test_platform(layer):
    with pytest.raises(ValueError, match="platform is 3; allowed: None, or a name"):
        layer(platform=3)
