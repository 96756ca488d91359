"""Weights both ways: bit-exact, strict, every problem in one error."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_bn
import torch_bn
from parity import weights


def randomised(module, dtype=torch.float32, seed=0):
    """The module with all its tensors drawn at random, statistics too."""
    torch.manual_seed(seed)
    module = module.to(dtype)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    return module


PAIRS = {
    "BLeNet": (lambda: torch_bn.BLeNet(), lambda: jax_bn.BLeNet()),
    "BLeNet 3x33": (
        lambda: torch_bn.BLeNet(channels=3, fig_size=33, num_class=7),
        lambda: jax_bn.BLeNet(3, 33, 7),
    ),
    "BatchNorm": (lambda: torch_bn.BatchNorm(num_features=5, num_dims=4), lambda: jax_bn.BatchNorm()),
    "native to ours": (lambda: torch.nn.BatchNorm2d(5), lambda: jax_bn.BatchNorm(use_running_average=False)),
    "ours to native": (lambda: torch_bn.BatchNorm(num_features=5, num_dims=2), lambda: nn.BatchNorm()),
    "native to native": (lambda: torch.nn.BatchNorm1d(5), lambda: nn.BatchNorm(use_running_average=True)),
    "without affine": (
        lambda: torch.nn.BatchNorm1d(5, affine=False),
        lambda: nn.BatchNorm(use_bias=False, use_scale=False),
    ),
    "Linear": (lambda: torch.nn.Linear(4, 4), lambda: nn.Dense(4)),
    "Linear without bias": (lambda: torch.nn.Linear(4, 6, bias=False), lambda: nn.Dense(6, use_bias=False)),
    "Conv2d": (lambda: torch.nn.Conv2d(4, 6, (3, 5)), lambda: nn.Conv(6, (3, 5))),
    "grouped Conv2d": (
        lambda: torch.nn.Conv2d(4, 6, 3, groups=2, padding="valid"),
        lambda: nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID"),
    ),
}


@pytest.mark.parametrize(("torch_module", "flax_module"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("from_state_dict", [False, True])
def test_round_trip_is_bit_exact(torch_module, flax_module, from_state_dict, dtype):
    source, target = randomised(torch_module(), getattr(torch, dtype)), flax_module()
    variables = weights.to_flax(source.state_dict() if from_state_dict else source, target)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(variables))
    back = weights.to_torch(variables, torch_module())
    assert list(back) == list(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(back[name], value), name
    source.load_state_dict(back)


def test_bfloat16():
    source = randomised(torch.nn.Linear(3, 4), torch.bfloat16)
    variables = weights.to_flax(source, nn.Dense(4))
    assert variables["params"]["kernel"].dtype == jnp.bfloat16
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in weights.to_torch(variables, source).items())


def test_copies():
    """Training on one side does not reach into the other."""
    source = randomised(torch.nn.BatchNorm1d(3))
    variables = weights.to_flax(source, nn.BatchNorm())
    before = np.array(variables["params"]["scale"])
    source.weight.data.zero_()
    assert (variables["params"]["scale"] == jnp.asarray(before)).all()
    back = weights.to_torch(variables, source)
    back["bias"].zero_()
    assert source.bias.any()


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_carried_layer_computes_the_same(kind):
    rng = np.random.default_rng(0)
    if kind == "Linear":
        source, target, x = torch.nn.Linear(4, 4), nn.Dense(4), rng.normal(size=(3, 4))
    else:
        source, target = torch.nn.Conv2d(4, 4, 3), nn.Conv(4, (3, 3), padding="VALID")
        x = rng.normal(size=(3, 4, 6, 7))
    y = source(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    z = target.apply(weights.to_flax(source, target), jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32))
    np.testing.assert_allclose(np.moveaxis(z, -1, 1), y, atol=2e-6)


def test_all_problems_in_one_error():
    state = torch_bn.BLeNet().state_dict()
    del state["conv.1.gamma"]
    state["fc.6.bias"] = torch.zeros(11)
    state["fc.3.weight"] = state["fc.3.weight"].T
    state["head.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="4 problem") as caught:
        weights.to_flax(state, jax_bn.BLeNet())
    for part in (
        "conv.1.gamma is missing",
        "fc.6.bias has shape (11,)",
        "fc.3.weight has shape",
        "head.weight is left",
    ):
        assert part in str(caught.value)

    variables = weights.to_flax(torch_bn.BLeNet(), jax_bn.BLeNet())
    del variables["params"]["Dense_0"]["bias"]
    variables["batch_stats"]["BatchNorm_1"]["var"] = jnp.zeros(15)
    variables["params"]["Extra_0"] = {"kernel": jnp.zeros(1)}
    with pytest.raises(ValueError, match="3 problem") as caught:
        weights.to_torch(variables, torch_bn.BLeNet())
    for part in ("Dense_0/bias is missing", "BatchNorm_1/var has shape (15,)", "Extra_0/kernel is left over"):
        assert part in str(caught.value)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"fc.0.weight has shape"):
        weights.to_flax(torch_bn.BLeNet(fig_size=32), jax_bn.BLeNet(fig_size=28))
    with pytest.raises(ValueError, match=r"fc.6.weight has shape"):
        weights.to_flax(torch_bn.BLeNet(num_class=9), jax_bn.BLeNet())
    with pytest.raises(ValueError, match="shape"):
        weights.to_flax(torch.nn.Linear(3, 4), nn.Dense(5))


def test_rounding_is_refused():
    with pytest.raises(ValueError, match="jax_enable_x64 is off"):
        weights.to_flax(torch.nn.Linear(2, 2).double(), nn.Dense(2))


@pytest.mark.parametrize("bad", [None, [1], {"weight": np.zeros(2)}, nn.Dense(2)], ids=repr)
def test_wrong_kind_of_argument(bad):
    with pytest.raises(TypeError, match="allowed"):
        weights.to_flax(bad, nn.Dense(2))
    with pytest.raises(TypeError, match="allowed"):
        weights.to_torch({"params": {}}, bad)


def test_order_does_not_count():
    for source, target in ((torch.nn.Linear(3, 4), nn.Dense(4)), (torch.nn.Conv2d(3, 4, 2), nn.Conv(4, (2, 2)))):
        variables = weights.to_flax(dict(sorted(source.state_dict().items())), target)
        assert torch.equal(weights.to_torch(variables, source)["weight"], source.weight)


def test_kinds_are_not_mixed_up():
    """Names and shapes fit, but the layer computes something else."""
    with pytest.raises(TypeError, match="allowed"):
        weights.to_flax(torch.nn.ConvTranspose2d(3, 3, 3), nn.Conv(3, (3, 3)))
    with pytest.raises(TypeError, match="allowed for Dense"):
        weights.to_flax(torch.nn.BatchNorm1d(3), nn.Dense(3))


def test_only_floating_point():
    with pytest.raises(ValueError, match="bias is int64; allowed: floating point"):
        weights.to_flax({"weight": torch.zeros(2, 2), "bias": torch.zeros(2, dtype=torch.int64)}, nn.Dense(2))


def test_unknown_module():
    with pytest.raises(TypeError, match="allowed: BLeNet, BatchNorm"):
        weights.to_flax(torch.nn.Linear(2, 2), nn.LayerNorm())
    with pytest.raises(TypeError, match="allowed: BLeNet, BatchNorm"):
        weights.to_torch({"params": {}}, torch.nn.LayerNorm(2))
