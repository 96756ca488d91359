"""Batch norm alone, both wings against exact arithmetic, in this project's, PyTorch's and Flax's conventions."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import jax_bn
import torch_bn
from parity_tests.wings import DEVICE, WINGS, channels_last, channels_second
from truth import batch_norm as exact
from truth.hard_inputs import CONSTANT, HARD_INPUTS

SHAPES = {"rank 2": (16, 5), "rank 3": (6, 3, 7), "rank 4": (4, 3, 5, 6), "rank 5": (2, 2, 3, 2, 4), "m = 2": (2, 3)}
# Eps of the channel's largest true value; the gradient with respect to x passes through the normalised values a second
# time. Dbeta and dgamma are sums, held to the size of what is added, the Euclidean norm s = ||dy||_2 or ||dy x_hat||_2:
# what is left where terms cancel nobody needs to more digits than the terms have, and is less than rounding them costs.
#
# Of m terms of random sign a binary tree adds partial sums whose squares add up to s^2 at each of its log2(m) levels,
# and rounds each to within half a last place, evenly: eps / sqrt(12) of it at most, and eps sqrt(log2(m) / 12) s in
# all: 1.3 at m = 2^20. Blocks of n values one by one, and blocks of blocks, round n times a level where the sum has
# 1/n to n/n of what it will have: at most eps sqrt(n / 24) s for each of log(m) / log(n) levels, and as rounding is
# rarely of the whole last place, 0.7 of it: 1.3 at n = 16 and m = 2^20. Three standard deviations are 4 eps s for
# dbeta. (JAX on a CPU adds blocks of at most 16, and these nearly exactly: 0.6 at any m.) The terms of dgamma are
# themselves rounded, x - mu, dy x_hat and r, and mu is the sum of another such tree: twice that. Where all terms have
# one sign the partial sums are the sum, and it is rounded in eps of itself.
BOUNDS = {"y": 8, "moving_mean": 8, "moving_var": 8, "dx": 32, "dgamma": 8, "dbeta": 4}


def draw(shape, dtype, *, mean=0.0, std=1.0, seed=0):
    """x, gamma, beta, moving_mean, moving_var, dy."""
    rng = np.random.default_rng(seed)
    c = shape[1]
    arrays = (
        rng.normal(mean, std, shape),
        rng.uniform(0.5, 2, c),
        rng.normal(size=c),
        rng.normal(size=c),
        rng.uniform(0.5, 2, c),
        rng.normal(size=shape),
    )
    return tuple(a.astype(dtype) for a in arrays)


def check(wing, arrays, dtype, *, y_bound=BOUNDS["y"], truth_of=exact.batch_norm, **options):
    """Every output of a wing within BOUNDS of the truth, y within y_bound.

    Where terms cancel, their size counts and not what is left: the largest x for the mean, gamma dy / sqrt(var + eps)
    for dx, the norm of the terms for the sums.
    """
    given, truth = WINGS[wing](*arrays, **options), truth_of(*arrays, **options)
    x, gamma, _, moving_mean, _, dy = arrays
    axes = tuple(a for a in range(x.ndim) if a != 1)
    var_eps = truth.var.astype(float) + options.get("eps", 1e-5)
    of_dbeta, of_dgamma = exact.sizes_of_sums(x, dy, truth.mean, var_eps)
    scales = {
        "moving_mean": np.maximum(np.abs(x).max(axes), np.abs(moving_mean)),
        "dx": np.abs(gamma) * np.abs(dy).max(axes) / np.sqrt(var_eps),
        "dgamma": np.maximum(of_dgamma, np.abs(truth.dgamma.astype(float))),
        "dbeta": np.maximum(of_dbeta, np.abs(truth.dbeta.astype(float))),
    }
    for name, bound in BOUNDS.items():
        value = getattr(given, name)
        assert value.dtype == dtype, name
        error = exact.error_in_eps(value, getattr(truth, name), dtype, scales.get(name))
        bound = y_bound if name == "y" else bound
        assert error <= bound, f"{name}: {error:.1f} eps, bound {bound}"
    return given


# What is hard in float32 is easy for float64, which is looked at with `--all`.
FLOAT32_FIRST = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.thorough)], indirect=True
)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact(wing, shape, train, dtype):
    """N(0, 1): DESIGN.md has 4 eps for y here, 8 for the hard inputs below."""
    check(wing, draw(shape, dtype), dtype, train=train, y_bound=4)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(
    "options",
    [{"unbiased_moving_var": True}, {"momentum": 0.0}, {"momentum": 1.0}, {"momentum": 0.25, "eps": 1e-2}],
    ids=str,
)
def test_options(wing, options, dtype):
    check(wing, draw((4, 3, 5, 6), dtype), dtype, train=True, **options)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize(("mean", "std"), [(1e2, 1e-3), (1e4, 1.0), (1e6, 0.1), (-1e5, 1e-2)])
def test_large_mean(wing, mean, std, dtype):
    """Where E[x^2] - E[x]^2 and x * a + b lose everything."""
    check(wing, draw((64, 3, 4, 4), dtype, mean=mean, std=std), dtype, train=True)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("mean", [0, 1e4])
def test_sorted_batch(wing, mean, dtype):
    """The first quarter is unlike the rest, in x and dy: a mean guessed from it is 1.7 standard deviations off."""
    x, *others, dy = draw((64, 3, 4, 4), dtype, mean=mean, std=1e-2)
    x[:16] += 1
    dy[:16] += 100
    check(wing, (x, *others, dy), dtype, train=True)


@FLOAT32_FIRST
@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", [(640, 64), (10, 64, 8, 8), (2**18, 2), (2**12, 2, 8, 8)], ids=str)
def test_long_sums_that_cancel(wing, shape, masked, dtype):
    """Nothing is left of the sums of dy and dy (x - mu): added one by one, 2^18 terms would be off by a hundred eps."""
    arrays, mask, truth = cancelling_and_truth(shape, "float32", masked)
    arrays = tuple(v.astype(dtype) for v in arrays)
    check(wing, arrays, dtype, train=True, mask=mask, truth_of=lambda *_, **__: truth)


@pytest.mark.parametrize(
    ("shape", "axis"), [((97, 3), 1), ((3, 7, 11, 5), -1), ((5, 32, 1, 3), -1), ((3, 2, 7, 14), 1)], ids=str
)
def test_sums_of_any_size(shape, axis, dtype):
    """Blocks of whatever divides the size, and none of a prime one: dbeta of integers is exact."""
    x, gamma, _, _, _, dy = draw(shape, dtype)
    gamma, dy = np.resize(gamma, shape[axis]), np.rint(8 * dy)
    x, dy = np.moveaxis(x, axis, 1), np.moveaxis(dy, axis, 1)
    zero = np.zeros_like(gamma)
    given = check("jax", (x, gamma, zero, zero, zero, dy), dtype, train=True)
    np.testing.assert_array_equal(given.dbeta, dy.sum((0, *range(2, dy.ndim))))


def test_the_page_says_no_sum_is_farther_off_than_the_best_peer():
    """Or 2 eps: docs/batch_norm_exactness.md, as it was last made."""
    page = (Path(__file__).parents[1] / "docs" / "batch_norm_exactness.md").read_text()
    for table in "dgamma", "dbeta":
        rows = page.split(f"**{table}**")[1].split("\n\n")[1].splitlines()[2:]
        assert len(rows) == len(HARD_INPUTS)
        for row in rows:
            name, *errors = (cell.strip() for cell in row.strip("|").split("|"))
            ours, peers = errors[:2], [float(e.strip("<")) for e in errors[2:] if e != "NaN"]
            assert all(float(e.strip("<")) <= max(2, min(peers)) for e in ours), f"{table}, {name}"


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4096, 16), (2**18, 2), (256, 4, 28, 28), (2, 4, 300, 300)], ids=str)
def test_long_sums(wing, train, shape):
    """Of ordinary terms, in images large and small: what PyTorch would add one by one, in planes or over them."""
    arrays = draw(shape, "float32")
    check(wing, arrays, "float32", train=train, truth_of=exact.long_batch_norm)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", [(64, 50), (320, 20), (10, 2, 16, 16)], ids=str)
def test_sums_that_cancel(wing, shape, masked, dtype):
    """Fewer of them; and of float64, for which there is no wider type."""
    arrays, mask, truth = cancelling_and_truth(shape, dtype, masked, long=dtype == "float32")
    check(wing, arrays, dtype, train=True, mask=mask, truth_of=lambda *_, **__: truth)


def cancelling(shape, dtype, masked, mean=1e3):
    """Arrays as `draw`, whose sums of dy and of dy (x - mu) are 0 but for rounding, and a mask or None."""
    x, *others, dy = draw(shape, dtype, mean=mean)
    mask = (np.arange(shape[0]) % 5 > 0).reshape(-1, *[1] * (len(shape) - 1)) if masked else None
    axes = (0, *range(2, len(shape)))
    d = x - x.mean(axes, where=True if mask is None else mask, dtype=np.float64, keepdims=True)
    dy = dy - dy.mean(axes, dtype=np.float64, keepdims=True)
    dy -= d * (dy * d).mean(axes, keepdims=True) / (d * d).mean(axes, keepdims=True)
    return (x, *others, dy.astype(dtype)), mask


@functools.lru_cache(maxsize=2)  # for both wings, and both dtypes: the truth takes longer than they do
def cancelling_and_truth(shape, dtype, masked, long=True, mean=1e3):
    arrays, mask = cancelling(shape, dtype, masked, mean)
    truth_of = exact.long_batch_norm if long else exact.batch_norm
    return arrays, mask, truth_of(*arrays, train=True, mask=mask)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("shape", [(4096, 64), (64, 32, 28, 28)], ids=str)
def test_mean_of_values_around_zero(wing, shape, dtype):
    """Of m values N(0, 1) the mean is 1 / sqrt(m) large, and it is known to 8 eps of that.

    A tree of additions rounds it by sqrt(log2(m) / 12) eps / sqrt(m), 1.2 for m = 50,000. Differences to anything else
    than 0 that is not on the values' own grid are off by a hundredth of an eps, all the same way: 20 at that m.
    """
    x, gamma, beta, zero, _, dy = draw(shape, dtype)
    given = WINGS[wing](x, gamma, beta, 0 * zero, 0 * zero, dy, train=True, momentum=0.0)
    rows = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
    truth = np.array([math.fsum(row) for row in rows.astype(float)]) / rows.shape[1]
    error = np.abs(given.moving_mean - truth).max() * math.sqrt(rows.shape[1])
    assert error < 8 * np.finfo(dtype).eps


# The others have tests of their own: the variance of a constant channel is 0, and 1e-20 squared is below the normal
# numbers of float32 (XLA makes it 0).
FINITE = [name for name in HARD_INPUTS if name not in ("NaN in one channel", *CONSTANT) and "1e-20" not in name]


@FLOAT32_FIRST
@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("name", FINITE)
def test_hard_inputs(wing, name, dtype):
    """The rows of docs/batch_norm_exactness.md, up to a million rows; sums in integers are the truth."""
    arrays, truth = hard_input_and_truth(name)
    arrays = tuple(v.astype(dtype) for v in arrays)
    check(wing, arrays, dtype, train=True, momentum=0.0, truth_of=lambda *_, **__: truth)


@functools.lru_cache(maxsize=1)
def hard_input_and_truth(name):
    x, gamma, beta, dy = HARD_INPUTS[name](1)
    zero = np.zeros(len(gamma), np.float32)
    arrays = x, gamma, beta, zero, zero, dy
    return arrays, exact.long_batch_norm(*arrays, train=True, momentum=0.0)


@pytest.mark.parametrize("wing", WINGS)
def test_very_small_values(wing, dtype):
    """1e-20: epsilon is all that is left of the variance."""
    x, gamma, beta, *rest, dy = draw((16, 3, 4, 4), dtype, std=1e-20)
    arrays = x, gamma, 0 * beta, *rest, dy
    given, truth = WINGS[wing](*arrays, train=True), exact.batch_norm(*arrays, train=True)
    assert exact.error_in_eps(given.y, truth.y, dtype) <= 8
    assert np.abs(given.moving_mean - 0.9 * arrays[3]).max() <= 8 * np.finfo(dtype).eps


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("shape", [(16, 3, 4, 4), (64, 3)], ids=str)
@pytest.mark.parametrize("std", [1e13, 1e18])
def test_very_large_values(wing, std, shape):
    """As far as the variance goes in float32; many values are the same, so that their rounding is, too."""
    if std == 1e18 and (wing, DEVICE) == ("torch", "cuda"):
        pytest.skip("PyTorch's kernel for the statistics multiplies squares by m")
    x, *rest = draw(shape, "float32")
    check(wing, (np.clip(x, -1, 1) * np.float32(std), *rest), "float32", train=True)


@pytest.mark.parametrize("wing", WINGS)
def test_very_large_gradients(wing, x64):
    """Up to the end of float64: the gradients are those of dy, times a power of two."""
    *arrays, dy = draw((64, 3), "float64")
    given, larger = (WINGS[wing](*arrays, scale * dy, train=True) for scale in (1.0, 2.0**1010))
    for name in "dx", "dgamma", "dbeta":
        expected = getattr(given, name)
        bound = 32 * np.finfo(float).eps * np.abs(expected).max()
        np.testing.assert_allclose(getattr(larger, name) / 2.0**1010, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("wing", WINGS)
def test_nan_stays_in_its_channel(wing, dtype):
    """Bit for bit: the others come out as if it were not there, images and rank 2."""
    for shape in (16, 3, 4, 4), (64, 3):
        x, *rest = draw(shape, dtype)
        clean = WINGS[wing](x, *rest, train=True)
        x[5, 1] = np.nan
        given = WINGS[wing](x, *rest, train=True)
        for a, b in zip(given, clean, strict=True):
            a, b = (np.delete(v, 1, axis=1 if v.ndim > 1 else 0) for v in (a, b))
            np.testing.assert_array_equal(a, b)
        assert np.isnan(given.y[:, 1]).all()


@pytest.mark.parametrize("wing", WINGS)
def test_large_mean_in_prediction(wing, dtype):
    x, gamma, beta, _, var, dy = draw((64, 3), dtype, mean=1e6, std=0.1)
    mean = np.full(3, 1e6, dtype)
    check(wing, (x, gamma, beta, mean, var / 100, dy), dtype, train=False)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("value", [0.0, 0.1, 123456.789, -3.3e7, 3e38])
def test_constant_channel(wing, value, dtype):
    """y is beta, bit for bit, also where the sum of the values rounds, and the gradients are finite."""
    for shape in (8, 3, 4, 4), (7, 3, 11, 13), (1000, 3):
        x, *rest = draw(shape, dtype)
        x[:, 1] = value
        result = WINGS[wing](x, *rest, train=True, momentum=0.0)
        assert (result.y[:, 1] == rest[1][1]).all()
        assert result.moving_mean[1] == x[0, 1].ravel()[0]
        assert result.moving_var[1] == 0
        assert all(np.isfinite(v).all() for v in result)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("value", [1.0, 0.1, -1e4])
@pytest.mark.parametrize("shape", [(4096, 3), (64, 3, 16, 16)], ids=str)
def test_constant_gradient(wing, shape, value, dtype):
    """A common offset in dy, as the gradient of a mean is, changes beta's gradient alone; 16,384 terms cancel."""
    x, gamma, beta, mean, var, dy = draw(shape, dtype, mean=1.0)
    given = WINGS[wing](x, gamma, beta, mean, var, np.full_like(dy, value), train=True)
    eps, m = np.finfo(dtype).eps, x.size // 3
    assert np.abs(given.dx).max() <= 32 * eps * abs(value) * gamma.max()
    assert np.abs(given.dgamma).max() <= 8 * eps * abs(value) * math.sqrt(m)  # ||dy x_hat||_2
    np.testing.assert_allclose(given.dbeta, value * m, rtol=4 * eps)


@pytest.mark.parametrize("wing", WINGS)
def test_identity(wing, dtype):
    """With gamma = sqrt(var + eps) and beta = mean the layer is the identity."""
    x, _, _, mean, var, dy = draw((32, 3, 4, 4), dtype)
    axes = (0, 2, 3)
    mu, sigma2 = x.astype(np.float64).mean(axes), x.astype(np.float64).var(axes)
    result = WINGS[wing](x, np.sqrt(sigma2 + 1e-5).astype(dtype), mu.astype(dtype), mean, var, dy, train=True)
    np.testing.assert_allclose(result.y, x, atol=8 * np.finfo(dtype).eps * np.abs(x).max(), rtol=0)


@pytest.mark.parametrize("wing", WINGS)
def test_chain_of_batches(wing, dtype):
    """The moving statistics after 30 batches, from 0 and 0."""
    state, truth = (np.zeros(3, dtype), np.zeros(3, dtype)), (np.zeros(3), np.zeros(3))
    for seed in range(30):
        x, gamma, beta, _, _, dy = draw((8, 3, 2, 2), dtype, mean=3, seed=seed)
        result = WINGS[wing](x, gamma, beta, *state, dy, train=True)
        state = result.moving_mean, result.moving_var
        wide = x.astype(np.float64)
        truth = 0.9 * truth[0] + 0.1 * wide.mean((0, 2, 3)), 0.9 * truth[1] + 0.1 * wide.var((0, 2, 3))
    # Each step rounds once in eps of the value, and forgets a tenth: at most 10 such errors beside each other.
    np.testing.assert_allclose(state, truth, rtol=10 * 4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision(wing, half):
    """Statistics in float32 and y in x's dtype, within one eps of it."""
    x, gamma, beta, mean, var, _ = draw((16, 3, 4, 4), "float32", mean=2)
    if wing == "jax":
        low = jnp.asarray(channels_last(x)).astype(half)
        stats = jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(var))
        y, stats = jax_bn.batch_norm(low, jnp.asarray(gamma), jnp.asarray(beta), stats, train=True)
        assert y.dtype == half
        assert stats.mean.dtype == stats.var.dtype == "float32"
        low, y = channels_second(low.astype("float32")), channels_second(y.astype("float32"))
    else:
        low = torch.tensor(x).to(getattr(torch, half))
        y, *stats = torch_bn.batch_norm(low, *map(torch.tensor, (gamma, beta, mean, var)), train=True)
        assert y.dtype == low.dtype
        assert all(s.dtype == torch.float32 for s in stats)
        low, y = low.float().numpy(), y.float().numpy()
    wide = low.astype(np.float64)
    mu, sigma2 = wide.mean((0, 2, 3), keepdims=True), wide.var((0, 2, 3), keepdims=True)
    truth = gamma[:, None, None] * (wide - mu) / np.sqrt(sigma2 + 1e-5) + beta[:, None, None]
    eps = float(jnp.finfo(half).eps)
    assert np.abs(y - truth).max() <= eps * np.abs(truth).max()


def test_statistics_have_gradients(x64):
    """What comes back as new statistics depends on x, on both sides by the formula."""
    x, gamma, beta, mean, var, _ = draw((6, 2), "float64")
    weights = np.array([0.3, -2.0])
    tx = torch.tensor(x, requires_grad=True)
    _, tm, tv = torch_bn.batch_norm(tx, *map(torch.tensor, (gamma, beta, mean, var)), train=True)
    ((tm + 3 * tv) * torch.tensor(weights)).sum().backward()

    def loss(x):
        stats = jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(var))
        _, stats = jax_bn.batch_norm(x, jnp.asarray(gamma), jnp.asarray(beta), stats, train=True)
        return ((stats.mean + 3 * stats.var) * jnp.asarray(weights)).sum()

    truth = 0.1 * weights * (1 + 3 * 2 * (x - x.mean(0))) / 6
    np.testing.assert_allclose(tx.grad.numpy(), truth, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(x)), truth, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's forward mode
def test_derivatives_of_both_orders_and_modes(x64):
    """Against finite differences: forward and reverse mode, and the derivative of the derivative."""
    x, gamma, beta, mean, var, _ = draw((5, 2), "float64")
    arguments = [torch.tensor(v, requires_grad=True) for v in (x, gamma, beta)]
    stats = torch.tensor(mean), torch.tensor(var)

    def torch_fn(x, gamma, beta):
        return torch_bn.batch_norm(x, gamma, beta, *stats, train=True)

    assert torch.autograd.gradcheck(torch_fn, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(torch_fn, arguments)

    def jax_fn(x, gamma, beta):
        y, new = jax_bn.batch_norm(x, gamma, beta, jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(var)), train=True)
        return y, new

    check_grads(jax_fn, tuple(map(jnp.asarray, (x, gamma, beta))), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("shape", [(64, 3), (8, 3, 5, 5)], ids=str)
def test_second_derivatives_in_float64(shape, x64):
    """All digits of them, whatever the first ones' sums are taken from: as PyTorch has them of the formula."""
    x, gamma, beta, mean, var, weights = draw(shape, "float64", mean=3)
    along = draw(shape, "float64", seed=1)[-1]

    def formula(x, gamma, beta):
        axes, wide = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        d = x - x.mean(axes, keepdim=True)
        d_hat = d / torch.sqrt((d * d).mean(axes, keepdim=True) + 1e-5)
        return gamma.reshape(wide) * d_hat + beta.reshape(wide)

    def torch_second(function):
        leaves = [torch.tensor(v, requires_grad=True) for v in (x, gamma, beta)]
        loss = (torch.sin(function(*leaves)) * torch.tensor(weights)).sum()
        dx, dgamma, dbeta = torch.autograd.grad(loss, leaves, create_graph=True)
        of_first = (dx * torch.tensor(along)).sum() + (dgamma**2).sum() + (dbeta**2).sum()
        return [v.numpy() for v in torch.autograd.grad(of_first, leaves)]

    def jax_loss(x, gamma, beta):
        stats = jax_bn.BatchStats(jnp.asarray(mean), jnp.asarray(var))
        y, _ = jax_bn.batch_norm(x, gamma, beta, stats, train=True)
        return (jnp.sin(y) * jnp.asarray(channels_last(weights))).sum()

    def jax_first(*leaves):
        dx, dgamma, dbeta = jax.grad(jax_loss, (0, 1, 2))(*leaves)
        return (dx * jnp.asarray(channels_last(along))).sum() + (dgamma**2).sum() + (dbeta**2).sum()

    truth = torch_second(formula)
    stats = torch.tensor(mean), torch.tensor(var)
    ours = torch_second(lambda *leaves: torch_bn.batch_norm(*leaves, *stats, train=True)[0])
    dx, *others = jax.jit(jax.grad(jax_first, (0, 1, 2)))(*map(jnp.asarray, (channels_last(x), gamma, beta)))
    for found in ours, [channels_second(dx), *others]:
        for a, b in zip(found, truth, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(float).eps * np.abs(b).max())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rank", [2, 4])
def test_native_torch(rank, train, x64):
    """`nn.BatchNorm1d/2d` is this batch norm in PyTorch's convention: 1 - momentum, unbiased, variance from 1."""
    shape = (16, 5) if rank == 2 else (8, 5, 6, 6)
    x, gamma, beta, mean, var, dy = draw(shape, "float64")
    native = (torch.nn.BatchNorm1d if rank == 2 else torch.nn.BatchNorm2d)(5, momentum=0.3).double().train(train)
    with torch.no_grad():
        for name, value in zip(
            ("weight", "bias", "running_mean", "running_var"), (gamma, beta, mean, var), strict=True
        ):
            getattr(native, name).copy_(torch.tensor(value))
    tx = torch.tensor(x, requires_grad=True)
    y = native(tx)
    y.backward(torch.tensor(dy))
    for run in WINGS.values():
        ours = run(x, gamma, beta, mean, var, dy, train=train, momentum=0.7, unbiased_moving_var=True)
        pairs = zip(
            ours,
            (y, native.running_mean, native.running_var, tx.grad, native.weight.grad, native.bias.grad),
            strict=True,
        )
        for a, b in pairs:
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rank", [2, 4])
def test_native_flax(rank, train, x64):
    """`flax.linen.BatchNorm` is this batch norm with momentum as it stands, biased, variance from 1."""
    shape = (16, 5) if rank == 2 else (8, 5, 6, 6)
    x, gamma, beta, mean, var, dy = draw(shape, "float64")
    layer = nn.BatchNorm(use_running_average=not train, momentum=0.7, use_fast_variance=False)
    stats = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}

    def loss(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return (y * jnp.asarray(channels_last(dy))).sum(), (y, new["batch_stats"])

    arguments = tuple(map(jnp.asarray, (channels_last(x), gamma, beta)))
    # Flax itself promotes implicitly.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (dx, dgamma, dbeta), (y, new) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)
    theirs = channels_second(y), new["mean"], new["var"], channels_second(dx), dgamma, dbeta
    for run in WINGS.values():
        ours = run(x, gamma, beta, mean, var, dy, train=train, momentum=0.7)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
