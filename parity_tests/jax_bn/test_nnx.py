"""The NNX form: in place of `flax.nnx.BatchNorm`, and the same as the linen form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_bn


def x_like(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(2, 3, shape), jnp.float32)


def promoting(call, *args, **kwargs):
    """Flax itself promotes implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return call(*args, **kwargs)


def test_state_is_as_flax_has_it():
    ours, theirs = (kind(3, rngs=nnx.Rngs(0)) for kind in (jax_bn.nnx.BatchNorm, nnx.BatchNorm))
    a, b = nnx.state(ours), nnx.state(theirs)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert isinstance(ours, nnx.BatchNorm)
    assert isinstance(ours.mean, nnx.BatchStat)
    assert isinstance(ours.scale, nnx.Param)


def test_goes_on_from_a_checkpoint_of_flax():
    """The same state in either, in training and in prediction, by .train() and .eval()."""
    theirs, ours = (kind(3, rngs=nnx.Rngs(0)) for kind in (nnx.BatchNorm, jax_bn.nnx.BatchNorm))
    for seed in range(3):
        promoting(theirs, x_like((8, 4, 3), seed))
    nnx.update(ours, nnx.state(theirs))
    x = x_like((8, 4, 3), 9)
    np.testing.assert_allclose(ours(x), promoting(theirs, x), atol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), nnx.state(ours), nnx.state(theirs))
    ours.eval()
    theirs.eval()
    before = jax.tree.map(jnp.copy, nnx.state(ours))
    np.testing.assert_allclose(ours(x), promoting(theirs, x), atol=5e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), before)
    ours.train()
    ours(x)
    assert (ours.mean[...] != before["mean"][...]).all()


@pytest.mark.parametrize("options", [{}, {"unbiased_moving_var": True, "initial_moving_var": 0.0, "momentum": 0.9}])
@pytest.mark.parametrize("dtypes", [(None, "float32"), ("bfloat16", "float32"), (None, "bfloat16")], ids=str)
def test_same_as_linen(options, dtypes):
    """Bit for bit, with and without a mask."""
    dtype, param_dtype = dtypes
    x = x_like((8, 5, 3)).astype("bfloat16" if param_dtype == "bfloat16" else "float32")
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(8, 1, 1)) < 0.7)
    options = options | {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype)}
    for given in ({}, {"mask": mask}):
        # Left to itself, NNX promotes to its statistics' dtype, too; Flax's own comparison with linen does the same.
        layer = jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), promote_dtype=lambda arrays, **_: arrays, **options)
        linen = jax_bn.BatchNorm(use_running_average=False, **options)
        variables = linen.init(jax.random.key(0), x)
        y, new = linen.apply(variables, x, mutable=["batch_stats"], **given)
        z = layer(x, **given)
        assert y.dtype == z.dtype == (dtype or x.dtype)
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(new["batch_stats"]["mean"], layer.mean[...])
        np.testing.assert_array_equal(new["batch_stats"]["var"], layer.var[...])


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["float16", "float32"])
@pytest.mark.parametrize("x_dtype", ["float16", "float32"])
def test_result_dtype_is_that_of_flax(dtype, param_dtype, x_dtype):
    options = {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": nnx.Rngs(0)}
    x = x_like((8, 3)).astype(x_dtype)
    ours, theirs = jax_bn.nnx.BatchNorm(3, **options), nnx.BatchNorm(3, **options)
    assert ours(x).dtype == promoting(theirs, x).dtype


def test_trained_under_jit():
    """nnx.jit and nnx.value_and_grad: statistics move, and the loss falls."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.bn, self.b = (
                nnx.Linear(4, 8, rngs=rngs),
                jax_bn.nnx.BatchNorm(8, rngs=rngs),
                nnx.Linear(8, 1, rngs=rngs),
            )

        def __call__(self, x):
            return self.b(jnp.tanh(self.bn(self.a(x))))

    net, x = Net(nnx.Rngs(0)), x_like((32, 4))
    y = jnp.sin(x[:, :1])

    @nnx.jit
    def step(net):
        loss, grads = nnx.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(net)
        params = nnx.state(net, nnx.Param)
        nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return loss

    losses = [float(promoting(step, net)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert (net.bn.mean[...] != 0).any()


def test_frozen_and_options():
    x = x_like((8, 3))
    layer = jax_bn.nnx.BatchNorm(3, use_scale=False, use_bias=False, frozen_statistics=True, rngs=nnx.Rngs(0))
    assert layer.scale is None
    np.testing.assert_allclose(layer(x), x / np.sqrt(np.float32(1 + 1e-5)), rtol=1e-6)
    assert not layer.mean[...].any()
    with pytest.raises(ValueError, match="use_running_average is None"):
        jax_bn.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(x)
    for bad in ({"momentum": 2}, {"epsilon": 0}, {"initial_moving_var": -1}):
        with pytest.raises(ValueError, match="allowed"):
            jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **bad)
    layer = jax_bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for bad in (x_like((1, 3)), x_like((8, 4)), x_like((3,))):
        with pytest.raises(ValueError, match="allowed"):
            layer(bad)
    assert not layer.mean[...].any()
