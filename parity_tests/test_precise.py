"""Precise statistics: those of a whole data set, on both wings, in linen, NNX and PyTorch, native layers too."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_bn
import torch_bn
from jax_bn import precise_statistics, precise_statistics_nnx
from parity import weights


def data(shape=(70, 3), mean=1e4, seed=0):
    return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(np.float32)


def pieces(x, sizes=(10, 25, 2, 33)):
    """Batches of different sizes."""
    return np.split(x, np.cumsum(sizes)[:-1])


LAYERS = {
    "ours, biased": lambda: torch_bn.BatchNorm(num_features=3, num_dims=2),
    "ours, unbiased": lambda: torch_bn.BatchNorm(num_features=3, num_dims=2, unbiased_moving_var=True),
    "native": lambda: torch.nn.BatchNorm1d(3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_layer_in_torch(kind):
    """The statistics are those of the data set, however it is cut, far from 0; the variance as the layer keeps it."""
    x, layer = data(), LAYERS[kind]()
    layer.eval()
    torch_bn.precise_statistics(layer, [torch.tensor(p) for p in pieces(x)])
    wide, unbiased = x.astype(np.float64), int(kind != "ours, biased")
    mean, var = [b for b in layer.buffers() if b.ndim]
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(var, wide.var(0, ddof=unbiased), rtol=1e-6)
    assert not layer.training


@pytest.mark.parametrize("kind", ["ours, biased", "ours, unbiased", "flax", "nnx"])
def test_one_layer_in_jax(kind):
    x = data()
    unbiased = kind == "ours, unbiased"
    if kind == "nnx":
        layer = jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)).eval() or jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        layer.eval()
        precise_statistics_nnx(layer, map(jnp.asarray, pieces(x)))
        mean, var = layer.mean[...], layer.var[...]
        assert layer.use_running_average
        assert layer.observed is None
    else:
        layer = nn.BatchNorm() if kind == "flax" else jax_bn.BatchNorm(unbiased_moving_var=unbiased)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            variables = layer.init(jax.random.key(0), jnp.asarray(x), use_running_average=True)

            def apply(variables, x):
                return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

            new = precise_statistics(apply, variables, map(jnp.asarray, pieces(x)))
        assert (variables["batch_stats"]["mean"] == 0).all()
        jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
        mean, var = new["batch_stats"]["mean"], new["batch_stats"]["var"]
        assert mean.dtype == np.float32
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(var, wide.var(0, ddof=int(unbiased)), rtol=1e-6)


def test_blenet_on_both_sides(x64):
    """The whole network, batches of different sizes: both wings find the same statistics, and predict alike."""
    model = torch_bn.BLeNet(fig_size=12).double()
    flax_model = jax_bn.BLeNet(fig_size=12, param_dtype=jnp.float64)
    variables = weights.to_flax(model, flax_model)
    x = data((40, 1, 12, 12), mean=0.0).astype(np.float64)
    batches = pieces(x, (16, 4, 20))
    before = {name: v.clone() for name, v in model.state_dict().items()}
    torch_bn.precise_statistics(model.train(), [torch.tensor(b) for b in batches])
    assert model.training
    new = precise_statistics(
        lambda variables, x: flax_model.apply(variables, x, train=True, mutable=["batch_stats"]),
        variables,
        [jnp.asarray(np.moveaxis(b, 1, -1)) for b in batches],
    )
    found = weights.to_torch(new, model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13)
        assert torch.equal(value, before[name]) != ("moving" in name)
    # The first layer's are those of the data set itself, through the first convolution.
    inner = model.conv[0](torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(model.conv[1].moving_mean, inner.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(model.conv[1].moving_var, inner.var((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(
        flax_model.apply(new, jnp.asarray(np.moveaxis(x, 1, -1)), train=False),
        model.eval()(torch.tensor(x)).detach().numpy(),
        rtol=1e-10,
    )


def test_nnx_model_under_jit():
    """Dropout is off, the modes come back, a jitted forward will do."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.drop, self.bn = nnx.Dropout(0.5, rngs=rngs), jax_bn.nnx.BatchNorm(3, rngs=rngs)
            self.frozen = jax_bn.nnx.BatchNorm(3, frozen_statistics=True, rngs=rngs)

        def __call__(self, x):
            return self.frozen(self.bn(self.drop(x)))

    net, x = Net(nnx.Rngs(0)), data(mean=5.0)
    net.train()
    precise_statistics_nnx(net, map(jnp.asarray, pieces(x)), nnx.jit(lambda net, x: net(x)))
    np.testing.assert_allclose(net.bn.mean[...], x.astype(np.float64).mean(0), rtol=1e-6)
    assert not net.frozen.mean[...].any()
    assert not net.drop.deterministic
    assert not net.bn.use_running_average


def test_masks_count():
    """A padded batch counts for what is in it."""
    x = data((20, 3), mean=3.0)
    padded = np.concatenate([x[:12], np.full((4, 3), 1e3, np.float32)])
    mask = np.arange(16)[:, None] < 12
    layer = torch_bn.BatchNorm(num_features=3, num_dims=2)
    batches = [(torch.tensor(padded), torch.tensor(mask)), (torch.tensor(x[12:]), None)]
    torch_bn.precise_statistics(layer, batches, lambda layer, batch: layer(batch[0], mask=batch[1]))
    linen = jax_bn.BatchNorm(use_running_average=False)
    variables = linen.init(jax.random.key(0), jnp.asarray(x))
    new = precise_statistics(
        lambda variables, batch: linen.apply(variables, batch[0], mask=batch[1], mutable=["batch_stats"]),
        variables,
        [(jnp.asarray(padded), jnp.asarray(mask)), (jnp.asarray(x[12:]), None)],
    )
    truth = x.astype(np.float64)
    for mean, var in ((layer.moving_mean, layer.moving_var), tuple(new["batch_stats"][n] for n in ("mean", "var"))):
        np.testing.assert_allclose(mean, truth.mean(0), rtol=1e-6)
        np.testing.assert_allclose(var, truth.var(0), rtol=1e-6)


def test_refused_and_nothing_changed():
    model = torch.nn.Sequential(torch_bn.BatchNorm(num_features=3, num_dims=2), torch.nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    x = torch.tensor(data())
    bad = torch.full_like(x, torch.nan)
    cases = [
        (model, [], "number of batches that came through a batch norm is 0"),
        (model, [x, bad], "NaN or infinite"),
        (model, [x, x[:1]], "number of values per channel is 1"),
        (torch.nn.Linear(3, 3), [x], "batch norms in the module is 0"),
    ]
    for module, batches, words in cases:
        with pytest.raises(ValueError, match=words):
            torch_bn.precise_statistics(module, batches)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    linen = jax_bn.BatchNorm()
    variables = linen.init(jax.random.key(0), jnp.asarray(data()), use_running_average=True)

    def apply(variables, x, predict=False):
        return linen.apply(variables, x, use_running_average=predict, mutable=["batch_stats"])

    for batches, words in (([], "is 0; allowed: 1 or more"), ([jnp.full((4, 3), jnp.nan)], "NaN or infinite")):
        with pytest.raises(ValueError, match=words):
            precise_statistics(apply, variables, batches)
    with pytest.raises(ValueError, match="in training mode is 0"):
        precise_statistics(lambda v, x: apply(v, x, True), variables, [jnp.asarray(data())])
    layer = jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="apply is BatchNorm"):
        precise_statistics(layer, variables, [])
    with pytest.raises(TypeError, match="the model is BatchNorm"):
        precise_statistics_nnx(linen, [])
    with pytest.raises(ValueError, match=r"jax_bn.nnx.BatchNorm in the model is 0"):
        precise_statistics_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), [])
    with pytest.raises(ValueError, match="NaN or infinite"):
        precise_statistics_nnx(layer, [jnp.asarray(data()), jnp.full((4, 3), jnp.nan)])
    assert not layer.mean[...].any()
    assert (layer.var[...] == 1).all()
