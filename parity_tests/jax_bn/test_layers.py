"""jax_bn.BatchNorm as a drop-in for flax.linen.BatchNorm, and statistics across devices."""

import importlib
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_bn
from jax_bn.batch_norm import Options, batch_statistics


def x_like(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(2, 3, shape), jnp.float32)


@pytest.mark.parametrize("shape", [(8, 3), (4, 5, 3), (2, 5, 5, 3)])
def test_same_variables_as_flax(shape):
    x = x_like(shape)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    ours = jax_bn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), ours, theirs)
    assert jax.tree.all(shapes)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_checkpoint_of_flax_is_taken():
    """The same variables in either: the same y and the same new statistics, with Flax's defaults given."""
    x = x_like((6, 4, 4, 3))
    layer = nn.BatchNorm(use_fast_variance=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = layer.init(jax.random.key(0), x, use_running_average=False)
        y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        z = layer.apply(variables, x, use_running_average=True)
    ours = jax_bn.BatchNorm()
    our_y, our_new = ours.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(our_y, y, atol=2e-6)
    np.testing.assert_allclose(ours.apply(variables, x, use_running_average=True), z, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), our_new, new)


def test_initialising_moves_nothing():
    """Also with a batch of one, from which Flax's users like to initialise."""
    for x in (x_like((1, 3)), x_like((9, 3))):
        variables = jax_bn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
        assert not variables["batch_stats"]["mean"].any()
        assert (variables["batch_stats"]["var"] == 1).all()


def test_mode_is_given_once():
    layer, x = jax_bn.BatchNorm(), x_like((4, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        jax_bn.BatchNorm(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)


def test_options():
    x = x_like((4, 3))
    layer = jax_bn.BatchNorm(
        use_running_average=False, use_scale=False, use_bias=False, initial_moving_var=1.0, momentum=0.5
    )
    variables = layer.init(jax.random.key(0), x)
    assert "params" not in variables
    y, new = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.5 + 0.5 * np.var(x, 0), rtol=1e-6)
    layer = jax_bn.BatchNorm(
        use_running_average=False, unbiased_moving_var=True, epsilon=0.25, momentum=0.9, initial_moving_var=0.0
    )
    y, new = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.1 * np.var(x, 0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(y.var(0), np.var(x, 0) / (np.var(x, 0) + 0.25), rtol=1e-6)
    low = jax_bn.BatchNorm(use_running_average=False, dtype=jnp.bfloat16)
    y, variables = low.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def sharded(transform, layout):
    """BLeNet-like use: loss, gradients and statistics of a batch spread over two devices."""
    x = jnp.asarray(np.random.default_rng(0).normal(1e3, 1, layout), jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=layout), jnp.float32)
    scale, bias = jnp.asarray([2.0, 0.5, 1.0]), jnp.asarray([0.1, 0.2, 0.3])
    stats = jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))
    return transform(x, dy, scale, bias, stats)


def loss(x, dy, scale, bias, stats, axis_name):
    y, stats = jax_bn.batch_norm(x, scale, bias, stats, train=True, axis_name=axis_name, unbiased_moving_var=True)
    return (y * dy).sum(), (y, stats)


def grad_of(axis_name):
    return jax.grad(lambda *a: loss(*a, axis_name), argnums=0, has_aux=True)


def check_against_whole(dx, y, stats):
    """As if the two halves had been one batch; a mean of 1e3 would show E[x^2] - E[x]^2."""
    whole_dx, (whole_y, whole_stats) = sharded(jax.jit(grad_of(None)), (8, 4, 3))
    np.testing.assert_allclose(y, whole_y, atol=4e-6)
    np.testing.assert_allclose(dx, whole_dx, atol=4e-6)
    np.testing.assert_allclose(stats.mean, whole_stats.mean, rtol=3e-7)
    np.testing.assert_allclose(stats.var, whole_stats.var, rtol=1e-6)


def test_vmap_axis():
    def run(x, dy, scale, bias, stats):
        split = jax.vmap(grad_of("batch"), in_axes=(0, 0, None, None, None), axis_name="batch")
        return split(x.reshape(2, 4, 4, 3), dy.reshape(2, 4, 4, 3), scale, bias, stats)

    dx, (y, stats) = sharded(jax.jit(run), (8, 4, 3))
    for device in range(2):
        check_against_whole(
            dx.reshape(8, 4, 3), y.reshape(8, 4, 3), jax.tree.map(lambda s, device=device: s[device], stats)
        )


def test_shard_map():
    """Two devices; the statistics come out as replicated, and with one collective a layer in the forward pass."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def run(x, dy, scale, bias, stats):
        fn = jax.shard_map(
            grad_of("data"), mesh=mesh, in_specs=(split, split, whole, whole, whole), out_specs=(split, (split, whole))
        )
        return jax.jit(fn)(x, dy, scale, bias, stats)

    dx, (y, stats) = sharded(run, (8, 4, 3))
    check_against_whole(dx, y, stats)

    def forward(*arguments):
        return loss(*arguments, "data")[1]

    fn = jax.shard_map(forward, mesh=mesh, in_specs=(split, split, whole, whole, whole), out_specs=(split, whole))
    text = sharded(jax.jit(fn).lower, (8, 4, 3)).as_text()
    assert text.count("all_reduce") + text.count("all_gather") == 1


def test_one_value_a_device_is_enough_for_two_devices():
    x = x_like((2, 3))
    stats = jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))
    fn = jax.vmap(
        lambda x: jax_bn.batch_norm(x, jnp.ones(3), jnp.zeros(3), stats, train=True, axis_name="i")[0], axis_name="i"
    )
    np.testing.assert_allclose(fn(x[:, None]).mean(0), 0, atol=1e-6)


def test_blenet_over_two_devices(x64, quickly_compiled):
    """One image on each device is a batch of two. In float64: two images leave every normalised value near +-1, and
    what is between them is rounding, blown up layer by layer.
    """
    x = x_like((2, 12, 12, 1)).astype(jnp.float64)
    model = jax_bn.BLeNet(fig_size=12, param_dtype=jnp.float64)
    spread = model.clone(axis_name="i")
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    whole, _ = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"]))(x)
    one_each = jax.jit(
        jax.vmap(lambda x: spread.apply(variables, x[None], train=True, mutable=["batch_stats"])[0][0], axis_name="i")
    )
    np.testing.assert_allclose(one_each(x), whole, rtol=1e-12)


def test_transformations():
    """jit with donation, scan over batches, vmap over models, checkpoint: the same numbers as without."""
    xs = x_like((5, 8, 3))
    ones, zeros = jnp.ones(3), jnp.zeros(3)
    stats = jax_bn.BatchStats(zeros, zeros)

    def step(stats, x):
        y, stats = jax_bn.batch_norm(x, ones, zeros, stats, train=True)
        return stats, y

    scanned, ys = jax.lax.scan(step, stats, xs)
    looped, alone = stats, jax.jit(step)
    for x, y in zip(xs, ys, strict=True):
        looped, z = alone(looped, x)
        np.testing.assert_allclose(y, z, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, looped)

    def total(x, scale):
        return (jax_bn.batch_norm(x, scale, zeros, stats, train=True)[0] ** 3).sum()

    scales = jnp.stack([ones, 2 * ones])
    both = jax.jit(jax.vmap(jax.grad(total), in_axes=(None, 0)))(xs[0], scales)
    np.testing.assert_allclose(
        both[1], jax.jit(jax.grad(jax.checkpoint(total)))(xs[0], scales[1]), rtol=2e-5, atol=1e-5
    )


def test_forward_mode_and_linearize(x64, quickly_compiled):
    """jvp and linearize are the transposes of vjp; the Hessian is the same by either way round."""
    x, dx, dy = (np.random.default_rng(i).normal(size=(6, 2)) for i in range(3))
    scale, bias = jnp.asarray([0.5, 2.0]), jnp.asarray([1.0, -1.0])
    stats = jax_bn.BatchStats(jnp.zeros(2), jnp.zeros(2))

    def normalise(x, scale, bias):
        return jax_bn.batch_norm(x, scale, bias, stats, train=True)

    primals, tangents = (jnp.asarray(x), scale, bias), (jnp.asarray(dx), bias, scale)
    out, tangent = jax.jvp(normalise, primals, tangents)
    linearized, linear = jax.linearize(normalise, *primals)
    again, transpose = jax.vjp(normalise, *primals)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), out, linearized)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), out, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), tangent, linear(*tangents))
    cotangents = (jnp.asarray(dy), jax_bn.BatchStats(scale, bias))
    left = sum((a * b).sum() for a, b in zip(jax.tree.leaves(cotangents), jax.tree.leaves(tangent), strict=True))
    right = sum((a * b).sum() for a, b in zip(transpose(cotangents), tangents, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-12)

    def total(x):
        return (normalise(x, scale, bias)[0] ** 3).sum()

    hessian = jax.jit(jax.hessian(total))(primals[0])
    for other in (jax.jacrev(jax.jacfwd(total)), jax.jacrev(jax.grad(total))):
        np.testing.assert_allclose(hessian, jax.jit(other)(primals[0]), rtol=1e-9, atol=1e-12)


def test_donated_and_batched():
    """jit with x donated; vmap over batches is a loop over batches."""
    xs = x_like((3, 8, 4))
    stats = jax_bn.BatchStats(jnp.zeros(4), jnp.zeros(4))

    def step(x, stats):
        return jax_bn.batch_norm(x, jnp.ones(4), jnp.zeros(4), stats, train=True)

    ys, moved = jax.vmap(step, in_axes=(0, None))(xs, stats)
    donated = jax.jit(step, donate_argnums=(0, 1))
    for i, x in enumerate(xs):
        y, one = donated(x + 0, jax.tree.map(jnp.copy, stats))
        np.testing.assert_allclose(ys[i], y, atol=1e-6)
        np.testing.assert_allclose(moved.var[i], one.var, rtol=1e-6)


def test_one_sum_over_the_devices_each_way():
    """`jax.shard_map` with gradients by x, scale and bias: one collective forward, and one backward."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def gradients(axis_name, x, dy, scale, bias):
        def loss(x, scale, bias):
            stats = jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))
            y, stats = jax_bn.batch_norm(x, scale, bias, stats, train=True, axis_name=axis_name)
            return (y * dy).sum(), stats

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)

    x, dy, scale, bias = x_like((8, 4, 3)), x_like((8, 4, 3), 1), jnp.asarray([2.0, 0.5, 1.0]), jnp.ones(3)
    spread = jax.jit(
        jax.shard_map(
            lambda *a: gradients("data", *a),
            mesh=mesh,
            in_specs=(split, split, whole, whole),
            out_specs=((split, whole, whole), whole),
        )
    )
    found, truth = spread(x, dy, scale, bias), jax.jit(partial(gradients, None))(x, dy, scale, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, truth)
    assert spread.lower(x, dy, scale, bias).as_text().count("stablehlo.all_reduce") == 2


@pytest.mark.parametrize("counts", [(5, 3), (8, 0), (1, 1)])
def test_uneven_pieces(counts, x64, quickly_compiled):
    """Devices with different numbers of examples, padded, as one batch; also with none, or one, on a device."""
    x, dy = (np.random.default_rng(i).normal(1e3 * (1 - i), 1, (sum(counts), 4, 3)) for i in range(2))
    scale, bias = jnp.asarray([2.0, 0.5, 1.0]), jnp.asarray([0.1, 0.2, 0.3])
    stats = jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))
    mask = np.stack([np.arange(8) < n for n in counts]).reshape(2, 8, 1, 1)

    def padded(v):
        rows = np.full((2, 8, 4, 3), -7.0)
        rows[mask[:, :, 0, 0]] = v
        return jnp.asarray(rows)

    def loss(x, dy, mask, axis_name):
        y, new = jax_bn.batch_norm(
            x, scale, bias, stats, train=True, mask=mask, axis_name=axis_name, unbiased_moving_var=True
        )
        return (jnp.where(jnp.ones_like(y, bool) if mask is None else mask, y, 0) * dy).sum(), (y, new)

    gradient = jax.grad(loss, has_aux=True)
    spread = jax.jit(jax.vmap(lambda *a: gradient(*a, "i"), axis_name="i"))
    dx, (y, new) = spread(padded(x), padded(dy), jnp.asarray(mask))
    whole_dx, (whole_y, whole) = jax.jit(gradient, static_argnums=(2, 3))(jnp.asarray(x), jnp.asarray(dy), None, None)
    keep = mask[:, :, 0, 0]
    np.testing.assert_allclose(np.asarray(y)[keep], whole_y, atol=1e-9)
    np.testing.assert_allclose(np.asarray(dx)[keep], whole_dx, atol=1e-9)
    for device in range(2):
        np.testing.assert_allclose(new.mean[device], whole.mean, rtol=1e-14)
        np.testing.assert_allclose(new.var[device], whole.var, rtol=1e-11)


@pytest.mark.usefixtures("two_devices")
def test_groups_of_devices():
    """axis_index_groups: each group is a batch of its own."""
    x = x_like((2, 8, 3))
    layer = jax_bn.BatchNorm(use_running_average=False, axis_name="i", axis_index_groups=[[0], [1]])
    variables = layer.init(jax.random.key(0), x[0])
    found = jax.pmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0], axis_name="i")(x)
    alone = jax_bn.BatchNorm(use_running_average=False)
    for i in range(2):
        np.testing.assert_allclose(found[i], alone.apply(variables, x[i], mutable=["batch_stats"])[0], atol=1e-6)


def test_complex_as_flax_has_it():
    """var is the mean of |x - mu|^2; y has unit variance. Real parameters beside complex x are promoted implicitly."""
    with jax.numpy_dtype_promotion("standard"):
        complex_layer()


def complex_layer():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 3)) + 1j * rng.normal(2, 3, size=(64, 3)), jnp.complex64)
    layer = jax_bn.BatchNorm(momentum=0.9, use_running_average=False, dtype=jnp.complex64)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.complex64
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-4)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}], ids=str)
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_result_dtype_is_that_of_flax(options, x_dtype):
    x = x_like((8, 3)).astype(x_dtype)
    results = []
    for kind in (nn.BatchNorm, jax_bn.BatchNorm):
        layer = kind(use_running_average=False, **options)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            variables = layer.init(jax.random.key(0), x)
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
        results.append((y.dtype, jax.tree.map(lambda v: v.dtype, variables | new)))
    assert results[0] == results[1]


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(8, 3), (8, 4, 4, 3)], ids=str)
def test_sharded_under_jit(shape, kind):
    """A batch that `jax.jit` spreads over the devices, whether the types say so or not: as the whole batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    x, stats = x_like(shape), jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))

    def loss(x):
        y, new = jax_bn.batch_norm(x, jnp.ones(3), jnp.zeros(3), stats, train=True)
        return (y**3).sum(), (y, new)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    whole = gradient(x)
    with jax.set_mesh(mesh):
        spread = gradient(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread, whole)


def test_float32_is_trained_in_float32():
    """Only the sums of blocks are widened, never x or dy; and forward over reverse mode is reverse over reverse."""
    x, stats = x_like((32, 3)), jax_bn.BatchStats(jnp.zeros(3), jnp.zeros(3))

    def total(x):
        return (jax_bn.batch_norm(x, jnp.ones(3), jnp.zeros(3), stats, train=True)[0] ** 3).sum()

    widened = set(re.findall(r"f64\[[^]]*\]", str(jax.make_jaxpr(jax.grad(total))(x))))
    assert widened <= {"f64[3]", "f64[2,3]"}
    forward, reverse = (jax.jit(jacobian(jax.grad(total)))(x) for jacobian in (jax.jacfwd, jax.jacrev))
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["step", "statistics"])
def test_the_form_follows_the_platform_compiled_for(what, monkeypatch):
    """Not the host's: what is exported for an accelerator is the same text wherever that is done, and no CPU's."""
    x, stats = jnp.ones((16, 4, 4, 6)), jax_bn.BatchStats(jnp.zeros(6), jnp.ones(6))

    def step(x):
        y, moved = jax_bn.batch_norm(x, jnp.ones(6), jnp.zeros(6), stats, train=True)
        return (y**3).sum(), moved

    def statistics(x):
        return batch_statistics(x, Options())

    asked = {"step": lambda x: jax.grad(step, has_aux=True)(x), "statistics": statistics}[what]
    texts = {}
    for host in "cpu", "gpu", "tpu":
        importlib.import_module("jax_bn.batch_norm")._on_its_platform.clear_cache()
        monkeypatch.setattr(jax, "default_backend", lambda host=host: host)
        for platform in "cpu", "cuda", "tpu":
            exported = jax.export.export(jax.jit(lambda x: asked(x)), platforms=(platform,))(x)
            texts.setdefault(platform, set()).add(exported.mlir_module())
    assert [len(found) for found in texts.values()] == [1, 1, 1]
    assert "f64" in min(texts["cpu"])
    assert "f64" not in min(texts["cuda"] | texts["tpu"])
