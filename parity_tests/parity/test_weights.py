"""Weights both ways: bit-exact, strict, every problem in one error."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from flax.traverse_util import flatten_dict

import jax_bn
import torch_bn
from parity import weights
from parity.sides import jax as flax_side
from parity.sides.jax import layers as flax_layers
from parity_tests.parity.zoo import ZOO, randomise
from parity_tests.parity.zoo.pair import carry


def randomised(module, dtype=torch.float32, seed=0):
    """The module with all its tensors drawn at random, statistics too."""
    torch.manual_seed(seed)
    module = module.to(dtype)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.normal_()
        if name.endswith("var"):
            value.abs_()
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


def test_kinds_must_match_both_ways():
    with pytest.raises(TypeError, match="allowed for LayerNorm"):
        weights.to_flax(torch.nn.Linear(2, 2), nn.LayerNorm())
    with pytest.raises(ValueError, match="weight has no variable"):
        weights.to_torch({"params": {}}, torch.nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"flax_module is int; allowed: a flax.linen.Module"):
        weights.to_flax(torch.nn.Linear(2, 2), 3)
    with pytest.raises(TypeError, match=r"flax_module is int; allowed: a flax.linen.Module"):
        weights.to_torch({"params": {}}, torch.nn.Linear(2, 2), flax_module=3)


def flat(variables):
    return flax_side.nnx_state(variables) if isinstance(variables, nnx.State) else flax_side.flat(variables)


def assert_same_state(found, module):
    assert list(found) == list(module.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(found[name], value), name


ONE_INPUT = {pair.name: pair for pair in ZOO if len(pair.inputs(np.random.default_rng(0), 2)) == 1}
# NNX modules compute their initial weights when they are made, which takes a minute for the two large ones.
SLOW = {"resnet-nnx", "vgg-nnx"}
# Of these the weights alone do not say which layer is which, or one has a layer that the other has not.
NOT_STRICT = {"twins-with-a-map", "layer-called-thrice"}
ZOO_OF_WEIGHTS = [
    pair for name, pair in ONE_INPUT.items() if not name.startswith("flag") and name not in SLOW | NOT_STRICT
]
# Variables alone do not say that these flatten C, H, W as PyTorch does, or transpose a kernel of equal channels.
NEEDS_MODULE = {"setup-permutes-first", "decoder-gradient"}
# The block that is called second was made first, so that its number says the opposite of the order.
NEEDS_ORDER = {"convnext"}


@pytest.mark.parametrize("pair", ZOO_OF_WEIGHTS, ids=lambda pair: pair.name)
def test_zoo(pair):
    """Against weights carried by hand; and back, with JAX's sorted dicts, and without the Flax module."""
    torch.manual_seed(0)
    module, flax_module = randomise(pair.torch()), pair.flax()
    variables = weights.to_flax(module, flax_module)
    found, wanted = flat(variables), carry(module, pair.table)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)
    by_jax = jax.tree.map(lambda a: a, variables)
    assert_same_state(weights.to_torch(by_jax, module, flax_module=flax_module), module)
    if pair.name in NEEDS_ORDER:
        with pytest.warns(weights.ParityWarning, match="only their order says which is which of stage1.0"):
            assert_same_state(weights.to_torch(variables, module), module)
    elif pair.name not in NEEDS_MODULE:
        assert_same_state(weights.to_torch(variables, module), module)
    if pair.name not in NEEDS_MODULE | NEEDS_ORDER:
        assert_same_state(weights.to_torch(by_jax, module), module)


def test_attention_blocks_keep_the_order_of_the_variables():
    """Twelve blocks alike, told apart by their order alone, whatever the process's seed of hashes."""
    kernels = {part: {"kernel": (8, 8)} for part in ("query", "key", "value", "out")}
    blocks = {f"block_{i}": {"attention": kernels} for i in range(12)}
    shapes = {"/".join(("params", *path)): shape for path, shape in flatten_dict(blocks).items()}
    assert [layer.path for layer in flax_layers.of_variables(shapes).layers] == [f"{b}/attention" for b in blocks]


@pytest.mark.parametrize("name", ["resnet", "vgg", "vit-hand", "text", "conv1d", "mlp-nnx"])
def test_zoo_from_a_state_dict(name):
    """Without the module: only names, order and shapes are there. As a compiled module in DDP has them."""
    module, flax_module = randomise(ONE_INPUT[name].torch()), ONE_INPUT[name].flax()
    state = {f"module._orig_mod.{n}": v for n, v in module.state_dict().items()}
    wanted = carry(module, ONE_INPUT[name].table)
    found = flat(weights.to_flax(state, flax_module))
    for n, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[n]), value, err_msg=n)


class Shortcut(torch.nn.Module):
    """A residual block whose shortcut is defined and called last."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.conv2, self.bn2 = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
        self.downsample = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)


class FlaxShortcut(nn.Module):
    """The same, the shortcut first: all batch norms have the same shapes."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train)(x)

        shortcut = norm(nn.Conv(4, (1, 1))(x))
        x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        return norm(nn.Conv(4, (3, 3))(x)) + shortcut


@pytest.mark.parametrize("source", ["module", "state_dict"])
def test_layers_in_another_order(source):
    module = randomised(Shortcut())
    variables = weights.to_flax(module if source == "module" else module.state_dict(), FlaxShortcut())
    np.testing.assert_array_equal(variables["params"]["BatchNorm_0"]["scale"], module.downsample[1].weight.detach())
    np.testing.assert_array_equal(variables["params"]["BatchNorm_2"]["scale"], module.bn2.weight.detach())
    for given in (variables, jax.tree.map(lambda a: a, variables)):
        assert_same_state(weights.to_torch(given, module), module)


class Flattening(nn.Module):
    """Convolution, flatten, batch norm, linear; `channels_first` flattens as PyTorch does."""

    channels_first: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
        x = x.transpose(0, 3, 1, 2) if self.channels_first else x
        x = nn.BatchNorm(use_running_average=True)(x.reshape(x.shape[0], -1))
        return nn.Dense(5)(x)


def flattening(permute=False):
    class Permute(torch.nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1) if permute else x

    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), Permute(), torch.nn.Flatten()
    return randomised(torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(4 * 25), torch.nn.Linear(4 * 25, 5)))


@pytest.mark.parametrize("torch_permutes", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
def test_behind_a_flatten(torch_permutes, channels_first):
    """Whether inputs are reordered goes by what both sides do; a batch norm behind the flatten is reordered too."""
    module, flax_module = flattening(torch_permutes).eval(), Flattening(channels_first)
    module[5].running_var.abs_()
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    variables = weights.to_flax(module, flax_module)
    with jax.numpy_rank_promotion("allow"):
        z = flax_module.apply(variables, jnp.asarray(np.moveaxis(x, 1, -1)))
    y = module(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(z, y, atol=1e-4 * abs(y).max())
    moved = not np.array_equal(variables["params"]["Dense_0"]["kernel"], module[6].weight.detach().T)
    assert moved == (torch_permutes == channels_first)
    assert_same_state(weights.to_torch(variables, module, flax_module=flax_module), module)


def test_images_that_are_no_squares_need_inputs():
    module = randomised(
        torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 6 * 4, 5))
    )
    flax_module = nn.Sequential([nn.Conv(2, (3, 3), padding="VALID"), lambda x: x.reshape(x.shape[0], -1), nn.Dense(5)])
    x = np.zeros((1, 3, 8, 6), np.float32)
    variables = weights.to_flax(module, flax_module, inputs=[x])
    kernel = module[2].weight.detach().numpy().reshape(5, 2, 6, 4).transpose(2, 3, 1, 0).reshape(48, 5)
    np.testing.assert_array_equal(variables["params"]["layers_2"]["kernel"], kernel)
    assert_same_state(weights.to_torch(variables, module, flax_module=flax_module, inputs=[x]), module)


def test_several_inputs():
    pair = next(pair for pair in ZOO if pair.name == "two-inputs-tuple")
    module, flax_module = randomise(pair.torch()), pair.flax()
    with pytest.raises(ValueError, match=r"flax_module takes none .*; allowed: inputs=\[\.\.\.\]"):
        weights.to_flax(module, flax_module)
    inputs = pair.inputs(np.random.default_rng(0), 2)
    options = {} if pair.flax_inputs is None else {"flax_inputs": pair.flax_inputs(inputs)}
    found = flat(weights.to_flax(module, flax_module, inputs=inputs, **options))
    for name, value in carry(module, pair.table).items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


def test_layer_map():
    """Two heads of one shape, called in another order: only the map can know."""
    module = randomised(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
    flax_module = nn.Sequential([nn.Dense(3), nn.Dense(3)])
    variables = weights.to_flax(module, flax_module, layer_map={"0": "layers_1", "1": "layers_0"})
    np.testing.assert_array_equal(variables["params"]["layers_1"]["kernel"], module[0].weight.detach().T)
    with pytest.raises(ValueError, match="layer_map names 'nowhere'"):
        weights.to_flax(module, flax_module, layer_map={"0": "nowhere"})


def test_order_that_is_lost_and_needed_is_asked_for():
    """Sorted by JAX, and no name says which is which."""
    module = randomised(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
    kernels = {name: {"kernel": jnp.eye(3), "bias": jnp.zeros(3)} for name in ("alpha", "beta")}
    with pytest.raises(ValueError, match=r"alphabetical order.*allowed: flax_module=\.\.\., "):
        weights.to_torch(jax.tree.map(lambda a: a, {"params": kernels}), module)


def test_transpose_kernel_is_read_from_the_module():
    module = randomised(torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 4, 3)))
    for transpose_kernel in (False, True):
        flax_module = nn.Sequential([nn.ConvTranspose(4, (3, 3), padding="VALID", transpose_kernel=transpose_kernel)])
        variables = weights.to_flax(module, flax_module)
        x = np.random.default_rng(0).normal(size=(1, 4, 5, 5)).astype(np.float32)
        with jax.numpy_rank_promotion("allow"):
            z = flax_module.apply(variables, jnp.asarray(np.moveaxis(x, 1, -1)))
        y = module(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(np.moveaxis(z, -1, 1), y, atol=1e-4)
        assert_same_state(weights.to_torch(variables, module, flax_module=flax_module), module)


def test_prefixes_and_wrappers():
    plain = randomised(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)))
    flax_module = nn.Sequential([nn.Dense(4), nn.Dense(4)])
    wanted = weights.to_flax(plain, flax_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's compiler warns of PyTorch
        compiled = torch.compile(plain)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    for source in (compiled, {f"module.{n}": v for n, v in plain.state_dict().items()}, torch.nn.DataParallel(plain)):
        found = weights.to_flax(source, flax_module)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, wanted))
    back = weights.to_torch(wanted, compiled)
    compiled.load_state_dict(back)
    assert_same_state(back, compiled)


def test_counters():
    """num_batches_tracked goes over where both have it, stays as it is where only PyTorch has."""
    native = randomised(torch.nn.BatchNorm1d(3, momentum=None))
    native.num_batches_tracked.fill_(7)
    target = jax_bn.BatchNorm(momentum=None)
    variables = weights.to_flax(native, target)
    assert variables["batch_stats"]["num_batches_tracked"] == 7
    variables["batch_stats"]["num_batches_tracked"] = jnp.array(9, jnp.int32)
    assert weights.to_torch(variables, native)["num_batches_tracked"] == 9
    back = weights.to_torch(weights.to_flax(native, nn.BatchNorm()), native)
    assert back["num_batches_tracked"] == 7
    ours = torch_bn.BatchNorm(num_features=3, num_dims=2)
    assert weights.to_flax(ours, target)["batch_stats"]["num_batches_tracked"] == 0


def test_tied_weights():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(7, 4)
            self.head = torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    class FlaxTied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(7, 4)
            return table.attend(table(ids))

    module = randomised(Tied())
    variables = weights.to_flax(module, FlaxTied())
    np.testing.assert_array_equal(variables["params"]["Embed_0"]["embedding"], module.embedding.weight.detach())
    assert_same_state(weights.to_torch(variables, module), module)


def test_nothing_is_changed():
    module = randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout()))
    module.train()
    before = {name: v.clone() for name, v in module.state_dict().items()}
    random = torch.get_rng_state()
    flax_module = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    kernel = np.array(flax_module.layers[0].kernel[...])
    state = weights.to_flax(module, flax_module)
    assert module.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[name]) for name, v in module.state_dict().items())
    np.testing.assert_array_equal(flax_module.layers[0].kernel[...], kernel)
    nnx.update(flax_module, state)
    assert not np.array_equal(flax_module.layers[0].kernel[...], kernel)
    assert_same_state(weights.to_torch(state, module), module)
    assert_same_state(weights.to_torch(flax_module, module), module)


def test_not_finite_is_said_aloud():
    module = randomised(torch.nn.Linear(2, 2))
    module.weight.data[0, 0] = torch.nan
    with pytest.warns(weights.ParityWarning, match="weight hold NaN or infinity"):
        variables = weights.to_flax(module, nn.Dense(2))
    with pytest.warns(weights.ParityWarning, match="params/kernel hold NaN or infinity"):
        weights.to_torch(variables, module)


def test_conventions_are_noted():
    native = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, eps=1e-3))
    (momentum, unbiased, epsilon) = weights.notes(
        native, nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    )
    assert "1 and layers_1: momentum (weight of the old value) is 0.9 in PyTorch and 0.99 in Flax" in momentum
    assert "unbiased_moving_var is True in PyTorch and False in Flax" in unbiased
    assert "epsilon is 0.001 in PyTorch and 1e-05 in Flax" in epsilon
    assert weights.notes(torch_bn.BLeNet(), jax_bn.BLeNet()) == []


def test_lazy_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are new, says PyTorch, once a process
        lazy = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match="weight is uninitialised; allowed: a lazy module that has been called once"):
        weights.to_flax(lazy, nn.Dense(3))
    lazy(torch.zeros(1, 2))
    assert weights.to_flax(lazy, nn.Dense(3))["params"]["kernel"].shape == (2, 3)


def test_what_either_side_lacks():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    flax_module = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)])
    with pytest.raises(ValueError, match=r"1 problem\(s\):\n  0.bias is missing \(for params/layers_0/bias\)"):
        weights.to_flax(module, flax_module)
    variables = flax_module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"1 problem\(s\):\n  params/layers_0/bias is left over"):
        weights.to_torch(variables, module)


@pytest.mark.parametrize("channels", [8, 5])
def test_behind_a_pool_that_counts_its_padding(channels):
    """Its border is smaller than its middle, so that a channel is not one number everywhere; [8, 8, 8] hides most."""
    size = 8 if channels == 8 else 4
    source = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 3, padding=1),
        torch.nn.AvgPool2d(3, 2, 1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(channels * size * size, 4),
    )

    class Target(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(channels, (3, 3))(x)
            x = nn.tanh(nn.pool(x, 0.0, jax.lax.add, (3, 3), (2, 2), ((1, 1), (1, 1))) / 9)
            return nn.Dense(4)(x.reshape(x.shape[0], -1))

    x = np.random.default_rng(0).normal(size=(2, 3, 2 * size, 2 * size)).astype(np.float32)
    variables = weights.to_flax(source, Target(), inputs=[x])
    y = Target().apply(variables, jnp.asarray(np.moveaxis(x, 1, -1)))
    np.testing.assert_allclose(y, source(torch.from_numpy(x)).detach().numpy(), atol=2e-6)
