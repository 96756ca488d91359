"""Any shape, dtype, scale and convention: both wings against exact arithmetic (hypothesis)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_bn
import torch_bn
from parity_tests.test_batch_norm import check
from parity_tests.wings import WINGS, channels_last, channels_second
from truth import batch_norm as exact

# JAX takes its shapes from a list, as XLA compiles each anew: few channels with some, prime and no pixels; channels
# beside a single pixel; m = 2; ranks 2 to 5; one set of options for each shape. PyTorch takes any, in any combination.
SHAPES = [(2, 1), (7, 5), (3, 2, 5), (1, 3, 4, 2), (5, 1, 3, 3), (4, 6, 2, 6), (2, 40, 1, 1), (2, 2, 2, 1, 3)]
OPTIONS = [
    {"train": True, "momentum": 0.9, "eps": 1e-5},
    {"train": True, "momentum": 0.0, "eps": 1e-12},
    {"train": True, "momentum": 0.99, "eps": 1e-3, "unbiased_moving_var": True},
    {"train": False},
]


@st.composite
def cases(draw, shapes, first=None):
    """x, gamma, beta, moving_mean, moving_var, dy in float64, and the options: any, or in turn from the first on."""
    shape = tuple(draw(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wide = (-1, *[1] * (len(shape) - 2))
    c = shape[1]
    std = 10.0 ** rng.uniform(draw(st.sampled_from([-12, -3, 0])), draw(st.sampled_from([0, 3, 6])), c)
    mean = draw(st.sampled_from([0.0, 1.0, -1e3, 1e6])) * std * rng.choice([1.0, 1e-2], c)
    x = mean.reshape(wide) + std.reshape(wide) * rng.normal(size=shape)
    if draw(st.booleans()):
        x[:, rng.integers(c)] = mean[0]  # a constant channel
    if draw(st.booleans()):
        x.reshape(-1)[rng.integers(x.size)] *= draw(st.sampled_from([-1e3, 1e3]))
    dy = draw(st.sampled_from([0.0, 1.0, -100.0])) + rng.normal(size=shape) * draw(st.sampled_from([0.0, 1.0]))
    arrays = x, rng.normal(size=c), rng.normal(size=c), mean + std * rng.normal(size=c), std**2, dy
    if first is None:
        return arrays, draw(st.sampled_from(OPTIONS))
    return arrays, OPTIONS[(first + SHAPES.index(shape)) % len(OPTIONS)]


ANY = st.lists(st.integers(1, 7), min_size=2, max_size=5).filter(lambda shape: np.prod(shape) >= 2 * shape[1])


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("wing", WINGS)
@settings(max_examples=30)
@given(data=st.data())
def test_exact(wing, name, data):
    in_turn = cases(st.sampled_from(SHAPES), first=int(name == "float64"))
    arrays, options = data.draw(in_turn if wing == "jax" else cases(ANY))
    with jax.enable_x64(name == "float64"):
        check(wing, tuple(v.astype(name) for v in arrays), name, **options)


@jax.jit
def jax_step(x, others, dy):
    def loss(x, gamma, beta):
        y, stats = jax_bn.batch_norm(x, gamma, beta, jax_bn.BatchStats(*others[2:]), train=True)
        return (y.astype(np.float32) * dy).sum(), (y, stats)

    gradients, (y, stats) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, *others[:2])
    return y, *stats, *gradients


def run_half(wing, half, arrays):
    """The arrays as this wing has them in the half type (gamma and the rest stay float32), and what it makes of them.

    Everything as float32, in which the half types are exact; the dtypes are looked at here.
    """
    x, *others, dy = arrays
    if wing == "torch":
        low, low_dy = (torch.tensor(v).to(getattr(torch, half)) for v in (x, dy))
        leaves = [low.requires_grad_(), *[torch.tensor(v, requires_grad=True) for v in others[:2]]]
        y, *stats = torch_bn.batch_norm(*leaves, *map(torch.tensor, others[2:]), train=True)
        found = [v.detach() for v in (y, *stats, *torch.autograd.grad((y.float() * low_dy.float()).sum(), leaves))]
        names = [str(v.dtype).removeprefix("torch.") for v in found]
        low, low_dy, *found = (v.detach().float().numpy() for v in (low, low_dy, *found))
    else:
        low, low_dy = (jnp.asarray(channels_last(v)).astype(half) for v in (x, dy))
        found = jax_step(low, tuple(map(jnp.asarray, others)), low_dy.astype(np.float32))
        names = [v.dtype.name for v in found]
        low, low_dy, *found = (np.asarray(v.astype(np.float32)) for v in (low, low_dy, *found))
        low, low_dy, found[0], found[3] = map(channels_second, (low, low_dy, found[0], found[3]))
    assert names == [half, "float32", "float32", half, "float32", "float32"]
    return (low, *others, low_dy), dict(
        zip(("y", "moving_mean", "moving_var", "dx", "dgamma", "dbeta"), found, strict=True)
    )


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("wing", WINGS)
@settings(max_examples=30)
@given(data=st.data())
def test_half(wing, half, data):
    """y and dx within one eps of the half type; what is float32 within float32's bounds."""
    shape = tuple(data.draw(st.sampled_from(SHAPES) if wing == "jax" else ANY))
    rng, c = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), shape[1]
    mean, std = data.draw(st.sampled_from([0.0, 1.0, -300.0])), data.draw(st.sampled_from([1e-2, 1.0, 30.0]))
    x, dy = mean + std * rng.normal(size=shape), data.draw(st.sampled_from([0.0, 5.0])) + rng.normal(size=shape)
    if data.draw(st.booleans()):
        x[:, rng.integers(c)] = mean  # a constant channel
    gamma = rng.uniform(0.5, 2, c) * rng.choice([-1, 1], c)
    arrays = x, gamma, rng.normal(size=c), mean + std * rng.normal(size=c), np.full(c, std**2), dy
    (low, *others, low_dy), found = run_half(wing, half, tuple(v.astype(np.float32) for v in arrays))
    truth = exact.batch_norm(low, *others, low_dy, train=True)
    axes = tuple(a for a in range(x.ndim) if a != 1)
    largest_dy = np.abs(low_dy).max(axes)
    sizes = {
        "moving_mean": np.maximum(np.abs(low).max(axes), np.abs(others[2])),
        "dx": np.abs(others[0]) * largest_dy / np.sqrt(truth.var.astype(float) + 1e-5),
        "dgamma": np.maximum(largest_dy, np.abs(truth.dgamma.astype(float))),
        "dbeta": np.maximum(largest_dy, np.abs(truth.dbeta.astype(float))),
    }
    # Both are rounded to the half type last, by half an eps of it.
    for name, dtype, bound in (
        ("y", half, 1), ("dx", half, 1), ("moving_mean", "float32", 8), ("moving_var", "float32", 8),
        ("dgamma", "float32", 32), ("dbeta", "float32", 8),
    ):  # fmt: skip
        scale = sizes.get(name)
        eps32 = float(np.finfo("float32").eps)
        error = exact.error_in_eps(found[name], getattr(truth, name), "float32", scale)
        assert error * eps32 <= bound * float(jnp.finfo(dtype).eps), f"{name}: {error:.1f} float32 eps"
