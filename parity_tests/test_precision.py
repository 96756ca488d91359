"""BLeNet in bfloat16: what is computed in it, what stays float32, and how far it is from the truth, in both wings."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jax_bn
import torch_bn
from bn_common.config import Config
from jax_bn import mesh
from jax_bn.training import init_state, train_step
from parity import weights
from parity.records.distance import relative_norm_error
from parity_tests.wings import channels_last

# Convolutions, linear layers, sigmoids and pools, each of whose results is rounded to 8 bits: by half a unit of 2^-8 at
# most, of what reaches the logits with a gain of about one. The gradient goes through twice as many.
DEPTH, UNIT = 5 + 4 + 2, 2.0**-8
LOGITS, GRADIENTS = DEPTH * UNIT, 2 * DEPTH * UNIT


@pytest.fixture(scope="module")
def pair():
    """PyTorch's initial weights, the same for Flax, and images [N, C, H, W] with their labels."""
    torch.manual_seed(0)
    model, rng = torch_bn.BLeNet(channels=1, fig_size=12, num_class=10), np.random.default_rng(0)
    variables = weights.to_flax(model, jax_bn.BLeNet(fig_size=12))
    return model, variables, rng.normal(size=(64, 1, 12, 12)).astype(np.float32), rng.integers(0, 10, 64)


def run_torch(pair, dtype):
    """Logits, gradients by name, and the module, of which the statistics have moved."""
    model = torch_bn.BLeNet(channels=1, fig_size=12, num_class=10, dtype=dtype)
    model.load_state_dict(pair[0].state_dict())
    logits = model(torch.from_numpy(pair[2]))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(pair[3])).backward()
    return logits.detach().numpy(), {name: v.grad.numpy() for name, v in model.named_parameters()}, model


def jax_loss(model, batch_stats, x, labels, params):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, updated["batch_stats"])


def run_jax(pair, dtype):
    model, variables = jax_bn.BLeNet(fig_size=12, dtype=dtype), pair[1]
    x, labels = jnp.asarray(channels_last(pair[2])), jnp.asarray(pair[3], jnp.int32)
    loss = partial(jax_loss, model, variables["batch_stats"], x, labels)
    gradients, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert {v.dtype.name for v in jax.tree.leaves((gradients, stats))} == {"float32"}
    named = weights.to_torch({"params": gradients, "batch_stats": stats}, pair[0])
    return np.asarray(logits), {name: v.numpy() for name, v in named.items() if "moving" not in name}, loss


RUNS = {"jax": (run_jax, jnp.bfloat16), "torch": (run_torch, torch.bfloat16)}


@pytest.mark.parametrize("wing", RUNS)
def test_close_to_float32(wing, pair):
    """As close as bfloat16 can be, and no closer: it is what was computed in. All that comes out is float32."""
    run, dtype = RUNS[wing]
    (exact, exact_gradients, _), (logits, gradients, _) = run(pair, None), run(pair, dtype)
    assert logits.dtype == np.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert UNIT / 16 < error <= LOGITS
    # The biases before a batch norm have none.
    names = [name for name in gradients if not re.fullmatch(r"(conv\.[04]|fc\.[03])\.bias", name)]
    both = [np.concatenate([found[name].ravel() for name in names]) for found in (gradients, exact_gradients)]
    assert {v.dtype for v in both} == {np.dtype(np.float32)}
    assert UNIT / 16 < relative_norm_error(*both) <= GRADIENTS


def test_what_is_computed_in_bfloat16_in_torch(pair):
    _, _, model = run_torch(pair, torch.bfloat16)
    seen = {}
    for name, layer in model.named_modules():
        if name.count(".") == 1:
            layer.register_forward_hook(
                lambda layer, args, y, name=name: seen.__setitem__(name, (args[0].dtype, y.dtype))
            )
    model(torch.from_numpy(pair[2]))
    assert {y for _, y in seen.values()} == {torch.bfloat16}
    assert {x for name, (x, _) in seen.items() if name != "conv.0"} == {torch.bfloat16}
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_what_is_computed_in_bfloat16_in_jax(pair):
    """Every convolution and product, forward and backward, but for the sums of batch norm."""
    text = str(jax.make_jaxpr(jax.grad(run_jax(pair, jnp.bfloat16)[2], has_aux=True))(pair[1]["params"]))
    assert set(re.findall(r":(\w+)\[[\d,]+\] = conv_general_dilated", text)) == {"bf16"}
    assert len(re.findall(r":bf16\[[\d,]+\] = dot_general", text)) >= 3 * 3 - 1
    assert len(re.findall(r":bf16\[[\d,]+\] = logistic", text)) == 4
    assert not re.findall(r":bf16\[[\d,]+\] = (?:rsqrt|log|exp)\b", text)


@pytest.mark.usefixtures("two_devices")
def test_gradients_are_summed_in_float32():
    """Over devices: after the rounding to bfloat16 has been undone, not before."""
    devices = mesh.make_mesh(Config(devices=2))
    model = jax_bn.BLeNet(fig_size=12, dtype=jnp.bfloat16, axis_name=mesh.AXIS)
    optimizer = optax.sgd(0.1)
    state = init_state(model, optimizer, 0)
    step = mesh.on_mesh(
        partial(train_step, model, optimizer, axis_name=mesh.AXIS), devices, (mesh.SAME, mesh.SHARE, mesh.SHARE)
    )
    text = str(jax.make_jaxpr(step)(state, jnp.zeros((8, 12, 12, 1)), jnp.zeros(8, jnp.int32)))
    summed = re.findall(r":(\w+)\[[\d,]*\](?:\{[^}]*\})? = psum", text)
    assert len(summed) > 10
    assert set(summed) == {"f32"}


def test_refused():
    with pytest.raises(ValueError, match="dtype is float64; allowed: None, float16, bfloat16"):
        torch_bn.BLeNet(channels=1, fig_size=12, num_class=10, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype is int32; allowed: None, float16"):
        jax_bn.BLeNet(dtype=jnp.int32)
