"""Batch norm's form for TPUs, run here: in one pass around the moving mean, and in two where that is far off."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_bn
from jax_bn.batch_norm import Options, batch_norm_with
from parity_tests.test_batch_norm import check, draw
from parity_tests.wings import WINGS, Result, channels_last, channels_second
from truth import batch_norm as exact
from truth.hard_inputs import HARD_INPUTS

# Where the moving mean is: so many standard deviations from the mean, at 0, far away, or nowhere.
SHIFTS = {"near": 0.3, "at the limit": 0.49999, "beyond": 0.6, "far": 30.0, "0": "0", "1e6": "1e6", "NaN": "nan"}
INPUTS = ["N(0, 1)", "mean 1e4, std 1", "mean 1e6, std 0.1", "one outlier of 1e6", "m = 2, one ulp apart", "constant"]
compiled = importlib.import_module("jax_bn.batch_norm")._on_its_platform
module = importlib.import_module("jax_bn.statistics")


@functools.partial(jax.jit, static_argnums=7)
def step(x, gamma, beta, mean, var, dy, mask, options):
    def loss(x, gamma, beta):
        stats = jax_bn.BatchStats(mean, var)
        y, stats = batch_norm_with(x, gamma, beta, stats, Options(mask=mask, **dict(options)), train=True)
        return (y * dy).sum(), (y, stats)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gamma, beta)


def run(x, gamma, beta, moving_mean, moving_var, dy, *, train, platform="tpu", mask=None, **options):
    """As `parity_tests.wings.run_jax`, in the form for a platform. A NaN in moving_mean is not handed on."""
    assert train
    arrays = channels_last(x), gamma, beta, moving_mean, moving_var, channels_last(dy)
    mask = None if mask is None else jnp.asarray(channels_last(mask))
    options = tuple((options | {"platform": platform}).items())
    (dx, dgamma, dbeta), (y, stats) = step(*map(jnp.asarray, arrays), mask, options)
    return Result(channels_second(y), *map(np.asarray, stats), channels_second(dx), *map(np.asarray, (dgamma, dbeta)))


@pytest.fixture(autouse=True)
def _a_cpu_as_a_tpu(monkeypatch):
    """Sums in blocks: XLA's CPU would add some shapes one by one."""
    monkeypatch.setitem(WINGS, "tpu", run)
    monkeypatch.setattr(importlib.import_module("jax_bn.channels"), "_adds_in_blocks", lambda x, channels: True)
    yield
    compiled.clear_cache()


@functools.lru_cache(maxsize=1)
def input_and_truth(name):
    given = HARD_INPUTS[name](1)
    x, gamma, beta, dy = given._replace(x=given.x[:16], dy=given.dy[:16])
    zero = np.zeros(len(gamma), np.float32)
    return (x, gamma, beta, dy), exact.long_batch_norm(x, gamma, beta, zero, zero, dy, train=True, momentum=0.0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs_from_any_shift(name, shift):
    """Within the bounds of test_batch_norm.py wherever the moving mean is."""
    (x, gamma, beta, dy), truth = input_and_truth(name)
    away = SHIFTS[shift]
    if isinstance(away, str):
        mean = np.full(len(gamma), float(away), np.float32)
    else:
        axes = (0, *range(2, x.ndim))
        mean = (x.mean(axes, float) + away * x.std(axes, float)).astype(np.float32)
    given = run(x, gamma, beta, mean, np.zeros_like(gamma), dy, train=True, momentum=0.0)
    if shift == "NaN":  # 0 times that is what the new moving mean is, as ever
        assert np.isnan(given.moving_mean).all()
        given = given._replace(moving_mean=truth.mean.astype(np.float32))
    if name == "constant":
        np.testing.assert_array_equal(given.y, np.broadcast_to(beta[:, None, None], x.shape))
        assert not given.moving_var.any()
        return
    WINGS["tpu"] = lambda *_, **__: given
    arrays = x, gamma, beta, np.nan_to_num(mean), np.zeros_like(gamma), dy
    check("tpu", arrays, "float32", train=True, momentum=0.0, truth_of=lambda *_, **__: truth)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_constant_gradient(mean, platform):
    """As in test_batch_norm.py: of x - mu with a rounded mu nothing may be added up m times, nor of e."""
    x, gamma, beta, near, var, dy = draw((4096, 3), "float32", mean=mean)
    for value in 1, 3, 0.7:
        given = run(x, gamma, beta, 0 * near + mean + 0.4, var, np.full_like(dy, value), train=True, platform=platform)
        eps = np.finfo(np.float32).eps
        assert np.abs(given.dgamma).max() <= 8 * eps * value * 64  # ||dy x_hat||_2
        assert np.abs(given.dx).max() <= 32 * eps * value * gamma.max()


def test_one_pass_where_the_mean_is_known(monkeypatch):
    """The second is not run there: it would give NaN here; and is wherever one channel is beyond the limit."""
    two = module._in_two_passes
    monkeypatch.setattr(module, "_in_two_passes", lambda *a, **k: jax.tree.map(lambda v: v * np.nan, two(*a, **k)))
    compiled.clear_cache()
    x, gamma, beta, _, var, dy = draw((64, 3), "float32", mean=5.0)
    near = x.mean(0) + 0.4 * x.std(0)
    options = {"momentum": 0.75, "train": True}
    assert np.isfinite(run(x, gamma, beta, near, var, dy, **options).y).all()
    near[1] = x[:, 1].mean() + 0.6 * x[:, 1].std()
    assert np.isnan(run(x, gamma, beta, near, var, dy, **options).y).all()


@pytest.mark.parametrize("near", [True, False], ids=["near", "far"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_derivatives_are_those_on_a_cpu(platform, masked, near, x64):
    """Forward, reverse, forward over reverse, under vmap: in float64, of y and of the new statistics."""
    x, gamma, beta, mean, var, dy = map(jnp.asarray, draw((2, 3, 4, 5), "float64", mean=2.0))
    mean = jnp.full_like(gamma[:1].repeat(5), 2.1 if near else -50.0)
    gamma, beta, var = (jnp.resize(v, 5) for v in (gamma, beta, var))
    mask = (
        jnp.asarray(np.random.default_rng(2).uniform(size=(3, 4, 5)) < 0.6).at[:, :, 0].set(False) if masked else None
    )

    def derivatives(name):
        options = Options(mask=mask, platform=name)

        def loss(x, gamma, beta):
            stats = jax_bn.BatchStats(mean, var)
            y, stats = batch_norm_with(x, gamma, beta, stats, options, train=True)
            return (y * dy[0]).sum() + (y**3).sum() + (stats.mean * stats.var).sum()

        def second(x):
            gradient = jax.grad(loss, argnums=(0, 1, 2))
            return jax.jvp(gradient, (x, gamma, beta), (dy[1], beta, gamma)), loss(x, gamma, beta)

        return jax.jit(jax.vmap(second))(x)

    for one, other in zip(*map(jax.tree.leaves, (derivatives(platform), derivatives("cpu"))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_one_sum_of_two_values_over_devices(far, masked):
    """Around the mean that all devices share: [2, C] a layer and direction, however many there are.

    Masked is all that the second device has, and a channel on both.
    """
    mesh = Mesh(np.array(jax.devices()[:2]), "d")
    x, gamma, beta, _, _, dy = draw((8, 3), "float32", mean=5.0)
    mean = np.full(3, -50.0 if far else 5.1, np.float32)

    mask = np.ones((8, 3), bool)
    mask[4:], mask[:, 2] = False, False
    mask = mask if masked else None

    def loss(x, gamma, beta, mean, dy, mask):
        options = Options(axis_name="d", platform="tpu", mask=mask)
        y, stats = batch_norm_with(x, gamma, beta, jax_bn.BatchStats(mean, jnp.ones(3)), options, train=True)
        return jax.lax.psum((y * dy).sum(), "d"), stats

    def gradients(*arrays):
        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    whole, one = PartitionSpec("d"), PartitionSpec()
    specs = {"in_specs": (whole, one, one, one, whole, whole if masked else one), "out_specs": ((whole, one, one), one)}
    spread = jax.jit(jax.shard_map(gradients, mesh=mesh, **specs))
    arrays = *map(jnp.asarray, (x, gamma, beta, mean, dy)), None if mask is None else jnp.asarray(mask)
    (dx, dgamma, dbeta), stats = spread(*arrays)
    alone = run(x, gamma, beta, mean, np.ones(3, np.float32), dy, train=True, mask=mask)
    for given, wanted in (
        (dx, alone.dx),
        (dgamma, alone.dgamma),
        (dbeta, alone.dbeta),
        (stats.mean, alone.moving_mean),
    ):
        np.testing.assert_allclose(given, wanted, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(stats.var, alone.moving_var, rtol=1e-6)
    # As it is sent on a TPU; on a CPU each device's values are a row of their own, see `jax_bn.devices.send`.
    text = spread.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    reduced = re.findall(r"all_reduce.*?->\s*tensor<([^>]*)>", text, re.DOTALL)
    # Forward and backward; and the merge, which grows with the mesh, in the branch for means that are far.
    assert sorted(reduced) == ["2x3xf32", "3x3xf32" if masked else "2x3xf32", "4x2x3xf32"], reduced


def test_the_merge_where_nothing_says_that_the_mean_is_shared():
    """Under vmap and in groups each device may have a moving mean of its own: the statistics are still the batch's."""
    x, gamma, beta, _, var, dy = draw((8, 3), "float32", mean=5.0)
    means = np.array([[5.1] * 3, [-50.0] * 3], np.float32)

    def normalized(x, mean):
        options = Options(axis_name="d", platform="tpu", momentum=0.0)
        stats = jax_bn.BatchStats(mean, jnp.asarray(var))
        return batch_norm_with(x, jnp.asarray(gamma), jnp.asarray(beta), stats, options, train=True)

    y, stats = jax.jit(jax.vmap(normalized, axis_name="d"))(jnp.asarray(x.reshape(2, 4, 3)), jnp.asarray(means))
    alone = run(x, gamma, beta, means[0], var, dy, train=True, momentum=0.0)
    np.testing.assert_allclose(y.reshape(8, 3), alone.y, atol=1e-5)
    np.testing.assert_allclose(stats.mean, np.stack([alone.moving_mean] * 2), rtol=1e-6)
