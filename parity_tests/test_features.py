"""What users of Flax, PyTorch and Keras expect of batch norm: masks, axes, averages, frozen statistics; both wings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_bn
import torch_bn
from parity_tests.test_batch_norm import check, draw
from parity_tests.wings import WINGS


def stats_of(mean, var):
    return jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(var))


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("mask_shape", [(8, 1, 1, 1), (8, 1, 4, 4), (8, 3, 4, 4)], ids=["rows", "pixels", "all"])
def test_mask(wing, mask_shape, unbiased, dtype):
    """Against exact arithmetic: statistics of the positions that count, y and gradients everywhere."""
    arrays = draw((8, 3, 4, 4), dtype, mean=1e3)
    mask = np.random.default_rng(5).uniform(size=mask_shape) < 0.6
    mask[:2] = True
    check(wing, arrays, dtype, train=True, mask=mask, unbiased_moving_var=unbiased)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("filling", [0.0, 1e30, np.nan, np.inf])
def test_padding_is_as_if_it_were_not_there(wing, filling, dtype):
    """Whatever it is filled with, as long as no gradient comes back from it."""
    x, gamma, beta, mean, var, dy = draw((6, 3, 5), dtype)
    alone = WINGS[wing](x, gamma, beta, mean, var, dy, train=True)
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool).reshape(8, 1, 1)
    padded_x, padded_dy = np.full((8, 3, 5), filling, dtype), np.zeros((8, 3, 5), dtype)
    padded_x[mask.ravel()], padded_dy[mask.ravel()] = x, dy
    padded = WINGS[wing](padded_x, gamma, beta, mean, var, padded_dy, train=True, mask=mask)
    cut = padded._replace(y=padded.y[mask.ravel()], dx=padded.dx[mask.ravel()])
    for name, a, b in zip(cut._fields, cut, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(dtype).eps * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_channel_without_values_moves_nothing(wing, unbiased):
    x, *rest = draw((4, 3, 2), "float32")
    mask = np.ones((4, 3, 2), bool)
    mask[:, 0], mask[1:, 1], mask[0, 1, 1] = False, False, False  # channel 0: none; channel 1: one
    result = WINGS[wing](x, *rest, train=True, mask=mask, unbiased_moving_var=unbiased)
    assert all(np.isfinite(v).all() for v in result)
    np.testing.assert_array_equal(result.moving_mean[:2], rest[2][:2])
    np.testing.assert_array_equal(result.moving_var[:2], rest[3][:2])
    assert result.moving_mean[2] != rest[2][2]


@pytest.mark.parametrize("wing", WINGS)
def test_integer_mask_and_none(wing):
    """1 and 0 as True and False; a mask of ones is no mask; in prediction it means nothing."""
    arrays = draw((8, 3, 4), "float32")
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1]).reshape(8, 1, 1)
    for a, b in zip(
        WINGS[wing](*arrays, train=True, mask=mask),
        WINGS[wing](*arrays, train=True, mask=mask.astype(bool)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(WINGS[wing](*arrays, train=True, mask=mask * 0 + 1), WINGS[wing](*arrays, train=True), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for a, b in zip(WINGS[wing](*arrays, train=False, mask=mask), WINGS[wing](*arrays, train=False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -4])
def test_axis(axis, train):
    """The channel axis anywhere, as if it had been moved there."""
    x, gamma, beta, mean, var, _ = draw((5, 5, 5, 5), "float32")
    ty, tm, tv = torch_bn.batch_norm(*map(torch.tensor, (x, gamma, beta, mean, var)), train=train, axis=axis)
    stats = stats_of(mean, var)
    jy, js = jax_bn.batch_norm(*map(jnp.asarray, (x, gamma, beta)), stats, train=train, axis=axis)
    moved = torch.tensor(np.ascontiguousarray(np.moveaxis(x, axis, 1)))
    y, m, v = torch_bn.batch_norm(moved, *map(torch.tensor, (gamma, beta, mean, var)), train=train)
    y = np.moveaxis(y.numpy(), 1, axis)
    for a in (ty.numpy(), jy):
        np.testing.assert_allclose(a, y, atol=2e-6)
    for a, b in ((tm, m), (tv, v), (js.mean, m), (js.var, v)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_several_axes(x64):
    """A value for each pair of them, as Flax has it."""
    x = draw((4, 3, 5, 6), "float64")[0]
    gamma, zeros = np.random.default_rng(0).uniform(0.5, 2, (3, 6)), np.zeros((3, 6))
    y, stats = jax_bn.batch_norm(
        *map(jnp.asarray, (x, gamma, zeros)), stats_of(zeros, zeros), train=True, axis=(-1, 1), momentum=0.0
    )
    mu, var = x.mean((0, 2)), x.var((0, 2))
    np.testing.assert_allclose(stats.mean, mu, atol=1e-14)
    np.testing.assert_allclose(stats.var, var, rtol=1e-13)
    truth = (x - mu[:, None]) / np.sqrt(var[:, None] + 1e-5) * gamma[:, None]
    np.testing.assert_allclose(y, truth, atol=1e-13)
    with pytest.raises(ValueError, match="one axis of x"):
        torch_bn.batch_norm(torch.tensor(x), *[torch.zeros(3, 6)] * 4, train=True, axis=(1, 3))


def test_cumulative_average(x64):
    """momentum None: the plain mean over the batches, in the function and in all layers, as nn.BatchNorm has it."""
    xs = [draw((8, 3, 4, 4), "float64", mean=2, seed=seed)[0] for seed in range(7)]
    native = torch.nn.BatchNorm2d(3, momentum=None).double()
    ours = torch_bn.BatchNorm(num_features=3, num_dims=4, momentum=None, unbiased_moving_var=True).double()
    linen = jax_bn.BatchNorm(
        use_running_average=False, momentum=None, unbiased_moving_var=True, axis=1, param_dtype=jnp.float64
    )
    nnx_layer = jax_bn.nnx.BatchNorm(3, momentum=None, unbiased_moving_var=True, axis=1, rngs=nnx.Rngs(0))
    variables = linen.init(jax.random.key(0), jnp.asarray(xs[0]))
    stats = stats_of(np.zeros(3), np.zeros(3))
    for n, x in enumerate(xs):
        native(torch.tensor(x))
        ours(torch.tensor(x))
        _, updated = linen.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
        variables = variables | updated
        nnx_layer(jnp.asarray(x))
        _, stats = jax_bn.batch_norm(
            jnp.asarray(x), jnp.ones(3), jnp.zeros(3), stats, train=True, axis=1, momentum=None,
            unbiased_moving_var=True, num_batches_tracked=n,
        )  # fmt: skip
    truth = np.mean([x.mean((0, 2, 3)) for x in xs], 0), np.mean([x.var((0, 2, 3), ddof=1) for x in xs], 0)
    for counter in (
        ours.num_batches_tracked,
        variables["batch_stats"]["num_batches_tracked"],
        nnx_layer.num_batches_tracked,
    ):
        assert int(counter) == 7
    for found in (
        (native.running_mean, native.running_var),
        (ours.moving_mean, ours.moving_var),
        (variables["batch_stats"]["mean"], variables["batch_stats"]["var"]),
        stats,
    ):
        np.testing.assert_allclose(found, truth, rtol=1e-13)
    # NNX, as Flax has it, keeps its statistics in float32.
    np.testing.assert_allclose((nnx_layer.mean[...], nnx_layer.var[...]), truth, rtol=1e-6)


def test_frozen_statistics():
    """In training mode: predicted with, not moved; x, gamma and beta still have gradients, those of prediction."""
    x, gamma, beta, mean, var, dy = draw((8, 3, 2, 2), "float32")
    layer = torch_bn.BatchNorm(num_features=3, num_dims=4, frozen_statistics=True)
    with torch.no_grad():
        for name, value in (("gamma", gamma), ("beta", beta), ("moving_mean", mean), ("moving_var", var)):
            getattr(layer, name).copy_(torch.tensor(value))
    tx = torch.tensor(x, requires_grad=True)
    y = layer.train()(tx)
    y.backward(torch.tensor(dy))
    assert np.array_equal(layer.moving_mean, mean)
    assert np.array_equal(layer.moving_var, var)
    found = [y.detach(), tx.grad, layer.gamma.grad, layer.beta.grad]

    linen = jax_bn.BatchNorm(use_running_average=False, frozen_statistics=True, axis=1)
    stats = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}

    def loss(x, params):
        y, new = linen.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y * jnp.asarray(dy)).sum(), (y, new["batch_stats"])

    params = {"scale": jnp.asarray(gamma), "bias": jnp.asarray(beta)}
    (dx, dparams), (z, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(jnp.asarray(x), params)
    jax.tree.map(np.testing.assert_array_equal, new, stats)
    predicted = WINGS["torch"](x, gamma, beta, mean, var, dy, train=False)
    truth = predicted.y, predicted.dx, predicted.dgamma, predicted.dbeta
    for a, b, c in zip(found, truth, (z, dx, dparams["scale"], dparams["bias"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-6)
        np.testing.assert_allclose(c, b, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_mixed_precision(half):
    """float32 parameters and statistics with a half input, and half parameters too: float32 inside, y as x."""
    x, gamma, beta, mean, var, _ = draw((16, 3, 4, 4), "float32", mean=3)
    for halved in (0, 2, 4):  # how many of gamma, beta, mean, var are half as well
        names = [half] * halved + ["float32"] * (4 - halved)
        low = torch.tensor(x).to(getattr(torch, half))
        others = [torch.tensor(v).to(getattr(torch, n)) for v, n in zip((gamma, beta, mean, var), names, strict=True)]
        y, m, v = torch_bn.batch_norm(low, *others, train=True)
        wide, mw, vw = torch_bn.batch_norm(low.float(), *[v.float() for v in others], train=True)
        assert y.dtype == low.dtype
        assert torch.equal(y, wide.to(low.dtype))
        assert m.dtype == v.dtype == torch.float32
        assert torch.equal(m, mw)
        assert torch.equal(v, vw)
        jlow = jnp.asarray(x, half)
        jothers = [jnp.asarray(v, n) for v, n in zip((gamma, beta, mean, var), names, strict=True)]
        jy, js = jax_bn.batch_norm(jlow, *jothers[:2], jax_bn.BatchStats(*jothers[2:]), train=True, axis=1)
        assert jy.dtype == half
        assert js.mean.dtype == js.var.dtype == np.float32
        np.testing.assert_allclose(jy.astype(np.float32), y.float(), atol=2 * float(jnp.finfo(half).eps) * 4)
        np.testing.assert_allclose(js.var, v, rtol=1e-5)
