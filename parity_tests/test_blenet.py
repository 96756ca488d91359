"""BLeNet with shared weights: both wings against float64, and against each other, at `comparison.bounds`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from numpy.typing import NDArray

import image_data
import jax_bn
import torch_bn
from parity import weights
from parity.comparison import bounds
from parity.records import distance
from parity.wings.blenet import BLENET_GAUGES
from parity_tests.wings import channels_second

BATCH_SIZE = 32
SIZES = [(1, 12), (1, 28), (1, 33), (3, 12), (3, 28), (3, 33)]
MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
OVER_SIZES = pytest.mark.parametrize(("channels", "fig_size"), SIZES, ids=str)
# The smallest, the usual, and the most of what is odd: float32 is optimised as users have it, which takes its time.
OVER_SOME_SIZES = pytest.mark.parametrize(("channels", "fig_size"), [(1, 12), (1, 28), (3, 33)], ids=str)


class Outcome(NamedTuple):
    """A step's outcome by PyTorch's names. Gauges' gradients (true value 0) stand apart, under "gauges"."""

    logits: NDArray
    input_gradient: NDArray
    gradients: dict[str, NDArray]
    gauges: dict[str, NDArray]
    statistics: dict[str, NDArray]


def outcome(logits, input_gradient, named_gradients, statistics) -> Outcome:
    by_kind: tuple[dict, dict] = ({}, {})
    for name, value in named_gradients.items():
        by_kind[name in BLENET_GAUGES][name] = np.asarray(value)
    return Outcome(
        np.asarray(logits), np.asarray(input_gradient), *by_kind, {k: np.asarray(v) for k, v in statistics.items()}
    )


def make(channels, fig_size, dtype, seed=0):
    """A PyTorch BLeNet with moved statistics and gamma, beta off their initial values; images and labels."""
    torch.manual_seed(seed)
    model = torch_bn.BLeNet(channels=channels, fig_size=fig_size, num_class=10).to(getattr(torch, dtype))
    for name, value in model.state_dict().items():
        if "gamma" in name or "moving_var" in name:
            value.uniform_(0.5, 1.5)
        elif "beta" in name or "moving_mean" in name:
            value.normal_(0, 0.3)
    rng = np.random.default_rng(seed)
    if (channels, fig_size) == (1, 28):
        sample = image_data.load_sample()
        mean, std = image_data.pixel_mean_and_std(sample.train_images)
        x = ((sample.train_images[:BATCH_SIZE] - mean) / std)[:, None]
    else:
        x = rng.normal(size=(BATCH_SIZE, channels, fig_size, fig_size))
    return model, x.astype(dtype), rng.integers(0, 10, BATCH_SIZE)


def torch_outcome(state_dict, x, labels, train) -> Outcome:
    model = torch_bn.BLeNet(channels=x.shape[1], fig_size=x.shape[2], num_class=10).to(torch.tensor(x).dtype)
    model.load_state_dict(state_dict)
    model.train(train)
    x = torch.tensor(x, requires_grad=True)
    logits = model(x)
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outcome(logits.detach(), x.grad, gradients, dict(model.named_buffers()))


def jax_outcome(model, x, labels, train) -> Outcome:
    flax_model = jax_bn.BLeNet(channels=x.shape[1], fig_size=x.shape[2], num_class=10)
    variables = weights.to_flax(model, flax_model)

    def loss(params, x):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, new = flax_model.apply(given, x, train=train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels, jnp.int32))
        return losses.mean(), (logits, new["batch_stats"])

    nhwc = jnp.asarray(np.moveaxis(x, 1, -1))
    (gradients, dx), (logits, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], nhwc)
    both = weights.to_torch({"params": gradients, "batch_stats": stats}, model)
    statistics = {name: both[name] for name, _ in model.named_buffers()}
    return outcome(logits, channels_second(dx), {n: both[n] for n, _ in model.named_parameters()}, statistics)


def as_vector(named: dict[str, NDArray]) -> NDArray:
    return np.concatenate([named[name].ravel().astype(np.float64) for name in sorted(named)])


@MODES
@OVER_SIZES
@pytest.mark.usefixtures("quickly_compiled")
def test_float64(channels, fig_size, train, x64):
    """Tensor by tensor: this is where a mistake in the mathematics shows."""
    model, x, labels = make(channels, fig_size, "float64")
    a, b = torch_outcome(model.state_dict(), x, labels, train), jax_outcome(model, x, labels, train)
    assert distance.relative_error(a.logits, b.logits) <= bounds.FLOAT64
    assert distance.relative_error(a.input_gradient, b.input_gradient) <= bounds.FLOAT64
    for kind in ("gradients", "statistics"):
        for name, value in getattr(a, kind).items():
            assert distance.relative_error(value, getattr(b, kind)[name]) <= bounds.FLOAT64, name
    if train:
        for wing in (a, b):
            largest = np.abs(as_vector(wing.gradients)).max()
            for name, value in wing.gauges.items():
                assert distance.relative_error(value, np.zeros_like(value), largest) <= bounds.FLOAT64, name
    else:
        for name, value in a.gauges.items():
            assert distance.relative_error(value, b.gauges[name]) <= bounds.FLOAT64, name


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.thorough)], ids=["train", "eval"])
# Three channels and odd sizes: float64, above, in the default run too.
@pytest.mark.parametrize(
    ("channels", "fig_size"), [(1, 12), (1, 28), pytest.param(3, 33, marks=pytest.mark.thorough)], ids=str
)
def test_float32(channels, fig_size, train, x64):
    """Each wing in float32 against float64 from the same weights and images; the gradient as one vector."""
    model, x, labels = make(channels, fig_size, "float32")
    truth = torch_outcome(model.state_dict(), x.astype(np.float64), labels, train)
    for wing in (torch_outcome(model.state_dict(), x, labels, train), jax_outcome(model, x, labels, train)):
        assert wing.logits.dtype == np.float32
        assert distance.relative_error(wing.logits, truth.logits) <= bounds.FLOAT32_LOGITS
        error = distance.relative_norm_error(as_vector(wing.gradients), as_vector(truth.gradients))
        assert error <= bounds.FLOAT32_GRADIENTS
        error = distance.relative_norm_error(wing.input_gradient, truth.input_gradient)
        assert error <= bounds.FLOAT32_GRADIENTS
        for name, value in truth.statistics.items():
            assert distance.relative_error(wing.statistics[name], value) <= bounds.FLOAT32_LOGITS, name


def test_parameter_count():
    """62,158 on both sides."""
    model = torch_bn.BLeNet()
    assert sum(p.numel() for p in model.parameters()) == 62_158
    init = partial(jax_bn.BLeNet().init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 62_158


@pytest.mark.parametrize("wing", ["jax", "torch"])
def test_initial_weights(wing):
    """Uniform in +-1/sqrt(fan_in): inside, up to the edge, and with its variance; gamma 1, beta 0, statistics 0."""
    if wing == "torch":
        torch.manual_seed(0)
        state = torch_bn.BLeNet().state_dict()
    else:
        variables = jax.jit(partial(jax_bn.BLeNet().init, train=False))(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        state = weights.to_torch(variables, torch_bn.BLeNet())
    fan_in = {"conv.0": 25, "conv.4": 150, "fc.0": 400, "fc.3": 120, "fc.6": 84}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in fan_in:
            bound = fan_in[layer] ** -0.5
            assert value.abs().max() <= bound, name
            if value.numel() >= 100:
                # The largest of n uniform values: below 1 - 10/n with probability e^-10. The variance is 1/3.
                assert value.abs().max() >= bound * (1 - 10 / value.numel()), name
                assert abs(float((value / bound).square().mean()) * 3 - 1) < 4 / value.numel() ** 0.5, name
            else:
                # No two alike, and not all near 0: that none of 6 is above 0.2 has probability 6e-5.
                assert value.unique().numel() == value.numel(), name
                assert value.abs().max() > 0.2 * bound, name
        else:
            assert (value == (1 if kind == "gamma" else 0)).all(), name


@MODES
@pytest.mark.usefixtures("quickly_compiled")
def test_options(train, x64):
    """momentum and epsilon reach every batch norm of both networks."""
    source, x, labels = make(1, 12, "float64")
    model = torch_bn.BLeNet(channels=1, fig_size=12, momentum=0.25, eps=0.5).double().train(train)
    model.load_state_dict(source.state_dict())
    flax_model = jax_bn.BLeNet(fig_size=12, momentum=0.25, epsilon=0.5)
    variables = weights.to_flax(model, flax_model)
    logits, new = flax_model.apply(variables, jnp.asarray(np.moveaxis(x, 1, -1)), train=train, mutable=["batch_stats"])
    default = torch_outcome(source.state_dict(), x, labels, train)
    ours = model(torch.tensor(x)).detach()
    assert distance.relative_error(logits, ours) <= bounds.FLOAT64
    assert distance.relative_error(ours, default.logits) > 0.01
    for name, value in weights.to_torch(variables | new, model).items():
        assert distance.relative_error(value, model.state_dict()[name]) <= bounds.FLOAT64, name
        if "moving" in name and train:
            assert distance.relative_error(value, default.statistics[name]) > 0.01, name


@pytest.mark.usefixtures("quickly_compiled")
def test_largest_differences_of_a_wrong_network_are_seen(x64):
    """The test above can fail: one gamma off by 1e-9 is found."""
    model, x, labels = make(1, 12, "float64")
    a = torch_outcome(model.state_dict(), x, labels, True)
    model.conv[1].gamma.data[0] *= 1 + 1e-9
    b = jax_outcome(model, x, labels, True)
    assert distance.relative_error(a.logits, b.logits) > bounds.FLOAT64
