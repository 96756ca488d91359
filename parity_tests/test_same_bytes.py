"""However a batch norm is asked, it is the same program: to the bit the same numbers, not just close ones.

`Options` given whole and arguments given one by one; the layers and the function. So what carries the options from one
place to another loses none and mixes up none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_bn
import jax_bn.nnx
import torch_bn
from jax_bn.batch_norm import Options as JaxOptions
from jax_bn.batch_norm import batch_norm_with as jax_batch_norm_with
from torch_bn.batch_norm import Options as TorchOptions
from torch_bn.batch_norm import batch_norm_with as torch_batch_norm_with

SHAPE, CHANNELS = (6, 4, 5), {1: 4, -1: 5, 2: 5}
MASK = np.random.default_rng(7).random(SHAPE) < 0.7
# Each option by itself, and all of them together.
CALLS = {
    "defaults": {},
    "momentum": {"momentum": 0.75},
    "epsilon": {"epsilon": 0.1},
    "unbiased": {"unbiased_moving_var": True},
    "axis": {"axis": 2},
    "mask": {"mask": MASK},
    "tracked": {"momentum": None, "num_batches_tracked": 3},
    "all": {"momentum": None, "epsilon": 0.1, "unbiased_moving_var": True, "axis": 2, "mask": MASK}
    | {"num_batches_tracked": 3},
}
FIELDS = {"unbiased_moving_var": "unbiased", "num_batches_tracked": "tracked"}


def whole(options):
    return {FIELDS.get(name, name): value for name, value in options.items()}


def arrays(axis, dtype="float32"):
    """x, gamma, beta, moving mean and variance, dy."""
    rng, c = np.random.default_rng(3), CHANNELS[axis]
    values = rng.normal(3, 2, SHAPE), rng.uniform(0.5, 2, c), rng.normal(0, 1, c), rng.normal(0, 1, c)
    return [v.astype(dtype) for v in (*values, rng.uniform(0.5, 2, c), rng.normal(0, 1, SHAPE))]


def assert_same_bytes(one, other):
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(one) == len(other) > 0
    for a, b in zip(map(np.asarray, one), map(np.asarray, other), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def differs(one, other):
    return any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def run_jax(function, axis):
    """y, the new statistics and the gradients of what `function(x, gamma, beta, stats)` gives."""
    x, gamma, beta, mean, var, dy = map(jnp.asarray, arrays(axis))

    def loss(x, gamma, beta):
        y, stats = function(x, gamma, beta, jax_bn.BatchStats(mean, var))
        return (y * dy).sum(), (y, stats)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gamma, beta)


def run_torch(function, axis):
    x, gamma, beta, mean, var, dy = map(torch.tensor, arrays(axis))
    leaves = [v.requires_grad_() for v in (x, gamma, beta)]
    y, *stats = function(*leaves, mean, var)
    gradients = torch.autograd.grad((y * dy).sum(), leaves)
    return [v.detach().numpy() for v in (*gradients, y, *stats)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "predict"])
@pytest.mark.parametrize("name", CALLS)
def test_options_given_whole_and_one_by_one(name, train):
    options = CALLS[name]
    axis = last = options.get("axis", -1)
    jax_singly = run_jax(lambda *v: jax_bn.batch_norm(*v, train=train, **options), axis)
    jax_whole = run_jax(lambda *v: jax_batch_norm_with(*v, JaxOptions(**whole(options)), train=train), axis)
    assert_same_bytes(jax_singly, jax_whole)
    axis = options.get("axis", 1)
    options = options | ({"mask": torch.tensor(MASK)} if "mask" in options else {})
    eps = {"eps" if key == "epsilon" else key: value for key, value in options.items()}
    torch_singly = run_torch(lambda *v: torch_bn.batch_norm(*v, train=train, **eps), axis)
    torch_whole = run_torch(lambda *v: torch_batch_norm_with(*v, TorchOptions(**whole(options)), train=train), axis)
    assert_same_bytes(torch_singly, torch_whole)
    if train and name not in ("defaults", "axis"):  # no option is lost both ways
        assert differs(run_jax(lambda *v: jax_bn.batch_norm(*v, train=True, axis=last), last), jax_whole)
        assert differs(run_torch(lambda *v: torch_bn.batch_norm(*v, train=True, axis=axis), axis), torch_whole)


# What a layer is made with, beside a mask in the call.
LAYERS = {name: options for name, options in CALLS.items() if name not in ("tracked", "all")} | {
    "all": {"momentum": 0.75, "epsilon": 0.1, "unbiased_moving_var": True, "axis": 2, "mask": MASK}
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_and_the_function(name):
    attributes = {"momentum": 0.9} | {key: value for key, value in LAYERS[name].items() if key != "mask"}
    mask = LAYERS[name].get("mask")
    axis = attributes.get("axis", -1)
    function = run_jax(lambda *v: jax_bn.batch_norm(*v, train=True, mask=mask, **attributes), axis)

    def linen(x, gamma, beta, stats):
        variables = {"params": {"scale": gamma, "bias": beta}, "batch_stats": stats._asdict()}
        layer = jax_bn.BatchNorm(use_running_average=False, **attributes)
        y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, jax_bn.BatchStats(**new["batch_stats"])

    def with_nnx(x, gamma, beta, stats):
        layer = jax_bn.nnx.BatchNorm(len(gamma), rngs=nnx.Rngs(0), **attributes)
        given = {"scale": gamma, "bias": beta, "mean": stats.mean, "var": stats.var}
        for key, value in given.items():
            getattr(layer, key).set_value(value)
        y = layer(x, use_running_average=False, mask=mask)
        return y, jax_bn.BatchStats(layer.mean.get_value(), layer.var.get_value())

    assert_same_bytes(run_jax(linen, axis), function)
    assert_same_bytes(run_jax(with_nnx, axis), function)

    axis = attributes.get("axis", 1)
    attributes = {"eps" if key == "epsilon" else key: value for key, value in attributes.items()}
    mask = None if mask is None else torch.tensor(mask)

    def layer(x, gamma, beta, mean, var):
        layer = torch_bn.BatchNorm(num_features=len(gamma), num_dims=3, **attributes)
        del layer.gamma, layer.beta
        layer.gamma, layer.beta = gamma, beta  # no parameters: the gradients are looked at
        layer.moving_mean, layer.moving_var = mean.clone(), var.clone()
        y = layer(x, mask)
        return y, layer.moving_mean, layer.moving_var

    asked = run_torch(lambda *v: torch_bn.batch_norm(*v, train=True, mask=mask, **attributes), axis)
    assert_same_bytes(run_torch(layer, axis), asked)
