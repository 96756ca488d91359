"""BLeNet's form for CPUs is another implementation of the same network: against `BLeNet.layers`, and against truth."""

import contextlib
import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jax_bn
from jax_bn import blenet_cpu
from parity.comparison import bounds
from parity.records import distance

# Blocks one by one and at once, odd sizes of either convolution and its pool, many taps, odd batches. (test_blenet.py
# compares other sizes with PyTorch.)
SIZES = [(1, 13, 17), (2, 30, 19)]
OVER_SIZES = pytest.mark.parametrize(("channels", "fig_size", "batch"), SIZES, ids=str)
MODES = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
GAUGES = {"Conv_0", "Conv_1", "Dense_0", "Dense_1"}


@contextlib.contextmanager
def layer_by_layer():
    """In here BLeNet computes layer by layer on a CPU too: somebody might be looking."""
    with nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs)):
        yield


def case(channels, fig_size, batch, dtype):
    """A model, variables off their initial values, images and labels."""
    rng = np.random.default_rng(0)
    model = jax_bn.BLeNet(channels=channels, fig_size=fig_size, param_dtype=jnp.dtype(dtype))
    x = jnp.asarray(rng.normal(size=(batch, fig_size, fig_size, channels)), dtype)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x)
    # Not the kernels: in prediction the sigmoids would saturate, and hide every mistake.
    shifted = jax.tree.map_with_path(
        lambda path, v: v if path[-1].key == "kernel" else v + jnp.asarray(rng.uniform(0.2, 0.5, v.shape), dtype),
        variables,
    )
    return model, shifted, x, jnp.asarray(rng.integers(0, 10, batch), jnp.int32)


def outcome(model, variables, x, labels, train):
    """Logits, new statistics, gradients by the parameters and by x, as one tree of numpy arrays."""

    def loss(params, x):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, updated = model.apply(given, x, train=train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, updated["batch_stats"])

    gradients, found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)
    return jax.tree.map(np.asarray, (*found, *gradients))


@MODES
@OVER_SIZES
@pytest.mark.usefixtures("quickly_compiled")
def test_float64(channels, fig_size, batch, train, x64):
    args = case(channels, fig_size, batch, "float64")
    fast = outcome(*args, train)
    with layer_by_layer():
        plain = outcome(*args, train)
    largest = max(np.abs(v).max() for v in jax.tree.leaves(plain[2]))
    for (path, wanted), found in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(fast), strict=True):
        name = jax.tree_util.keystr(path)
        gauge = train and path[0].idx == 2 and path[1].key in GAUGES and path[2].key == "bias"
        error = distance.relative_error(found, wanted, largest) if gauge else distance.relative_error(found, wanted)
        assert error <= bounds.FLOAT64, name
        if gauge and jax.default_backend() == "cpu":
            assert not found.any(), f"{name}: the gradient of a bias before a batch norm is exactly 0"


@pytest.mark.thorough
@pytest.mark.parametrize(("channels", "fig_size", "batch"), [(1, 30, 33)], ids=str)
def test_float32(channels, fig_size, batch, x64):
    """Against float64 from the same numbers, layer by layer."""
    train = True
    model, variables, x, labels = case(channels, fig_size, batch, "float32")
    fast = outcome(model, variables, x, labels, train)
    wide = model.clone(param_dtype=jnp.float64)
    with layer_by_layer():
        truth = outcome(wide, *jax.tree.map(lambda v: v.astype(jnp.float64), (variables, x)), labels, train)
    assert all(v.dtype == np.float32 for v in jax.tree.leaves(fast))
    assert distance.relative_error(fast[0], truth[0]) <= bounds.FLOAT32_LOGITS
    both = [jax.tree.leaves(_without_gauges(o[2])) for o in (truth, fast)]
    vectors = [np.concatenate([v.ravel() for v in leaves]) for leaves in both]
    assert np.linalg.norm(vectors[0] - vectors[1]) <= bounds.FLOAT32_GRADIENTS * np.linalg.norm(vectors[0])


def _without_gauges(gradients):
    return {n: {k: v for k, v in g.items() if not (n in GAUGES and k == "bias")} for n, g in gradients.items()}


@pytest.mark.parametrize(
    "shape", [(5, 6, 1, 6), (12, 17, 2, 3), (16, 16, 6, 16), (21, 24, 2, 3), (29, 46, 1, 6)], ids=str
)
def test_convolve(shape, x64, quickly_compiled):
    """Values, and both derivatives, of every way to compute a convolution."""
    rng = np.random.default_rng(1)
    height, width, ci, co = shape
    x, w = jnp.asarray(rng.normal(size=(height, width, ci, 3))), jnp.asarray(rng.normal(size=(5, 5, ci, co)))

    def plain(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("HWCN", "HWIO", "HWCN"))

    wanted, transposed = jax.vjp(plain, x, w)
    ways = [functools.partial(blenet_cpu.convolve, train=train) for train in (True, False)]
    for function in (*ways, blenet_cpu._by_blocks, blenet_cpu._by_taps):
        found, pulled = jax.vjp(function, x, w)
        assert distance.relative_error(found, wanted) <= bounds.FLOAT64
        dy = jnp.asarray(rng.normal(size=wanted.shape))
        for a, b in zip(transposed(dy), pulled(dy), strict=True):
            assert distance.relative_error(b, a) <= bounds.FLOAT64


def _traced(batch=16, fig_size=12, train=True, **options):
    model = jax_bn.BLeNet(fig_size=fig_size, **options)
    x = jax.ShapeDtypeStruct((batch, fig_size, fig_size, 1), "float32")
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)

    def forward(variables, x):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    return jax.jit(forward).trace(variables, x)


def _lowered(platform, **options):
    return _traced(**options).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_accelerators_run_the_layers(platform):
    assert _lowered(platform).count("stablehlo.convolution") == 2
    assert "stablehlo.convolution" not in _lowered("cpu")


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_platform_that_is_known(train):
    """The other form is not even traced; where it is not known, both are, one beside the other."""
    both, cpu, layers = (str(_traced(train=train, platform=name).jaxpr) for name in (None, "cpu", "gpu"))
    assert [form.count("conv_general_dilated[") for form in (both, cpu, layers)] == [2, 0, 2]
    assert ["platform_index" in form for form in (both, cpu, layers)] == [True, False, False]


def test_few_examples_run_the_layers():
    assert "stablehlo.convolution" in _lowered("cpu", batch=blenet_cpu.FEWEST_EXAMPLES - 1)


def test_a_symbolic_batch():
    """Its form follows the size, once it is known: for each the same program as of that size from the start."""
    model, variables, x, _ = case(1, 12, blenet_cpu.FEWEST_EXAMPLES, "float32")
    predict = jax.jit(functools.partial(model.apply, train=False))
    (size,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    exported = jax.export.export(predict, platforms=("cpu", "cuda", "tpu"))(variables, shape)
    if jax.default_backend() == "cpu":
        for n in 1, blenet_cpu.FEWEST_EXAMPLES - 1, blenet_cpu.FEWEST_EXAMPLES:
            assert (exported.call(variables, x[:n]) == predict(variables, x[:n])).all()
    forms = [jax.export.export(predict, platforms=(name,))(variables, shape).mlir_module() for name in ("cpu", "tpu")]
    products = [form.count("stablehlo.dot_general") for form in forms]
    assert products[0] > 3, "the blocks are products, beside the layers' three"
    assert products[1] == 3


def test_large_images_are_predicted_by_the_layers():
    largest = blenet_cpu.LARGEST_PREDICTED
    assert "stablehlo.convolution" in _lowered("cpu", fig_size=largest + 1, train=False)
    assert "stablehlo.convolution" not in _lowered("cpu", fig_size=largest, train=False)
    assert "stablehlo.convolution" not in _lowered("cpu", fig_size=largest + 1, train=True)


def test_who_looks_at_layers_sees_them(quickly_compiled):
    model, variables, x, _ = case(1, 12, 16, "float32")
    seen = []

    def note(call, args, kwargs, context):
        seen.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        model.apply(variables, x, train=False)
    assert {"Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_3", "Dense_2"} <= set(seen)
    _, captured = model.apply(variables, x, train=False, capture_intermediates=True, mutable=["intermediates"])
    assert {"Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_3", "Dense_2"} <= captured["intermediates"].keys()


def test_variables_that_do_not_fit_are_refused_by_flax(quickly_compiled):
    model, variables, x, _ = case(1, 12, 16, "float32")
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, x, train=True)
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        model.apply({"params": variables["params"]}, x, train=False)
    other = case(1, 16, 16, "float32")[1]
    with pytest.raises(flax.errors.ScopeParamShapeError):
        model.apply(other, x, train=False)
    few = {**variables, "params": {n: v for n, v in variables["params"].items() if n != "Dense_1"}}
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        model.apply(few, x, train=False)


def test_mixed_dtypes_run_the_layers(x64, quickly_compiled):
    """The dtype of the outcome is Flax's."""
    model, variables, x, _ = case(1, 12, 16, "float32")
    with jax.numpy_dtype_promotion("standard"):
        assert model.apply(variables, x.astype(jnp.bfloat16), train=False).dtype == jnp.float32
        assert model.apply(variables, x.astype(jnp.float64), train=False).dtype == jnp.float64


def test_transformations(x64, quickly_compiled):
    """Forward mode over reverse mode gives what it gives layer by layer, and vmap over models what each gives."""
    model, variables, x, labels = case(1, 12, 16, "float64")
    params = variables["params"]
    direction = jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape), params)

    def loss(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, _ = model.apply(given, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def derivatives():
        return jax.jvp(jax.value_and_grad(loss), (params,), (direction,))

    fast = jax.jit(derivatives)()
    with layer_by_layer():
        plain = jax.jit(lambda: derivatives())()
    for a, b in zip(plain, fast, strict=True):  # values, tangents; the gauges' are 0, so the scale is that of all
        largest = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(a[1]))
        assert distance.relative_error(b[0], a[0]) <= bounds.FLOAT64
        for (path, wanted), found in zip(jax.tree.leaves_with_path(a[1]), jax.tree.leaves(b[1]), strict=True):
            assert distance.relative_error(found, wanted, largest) <= bounds.FLOAT64, jax.tree_util.keystr(path)
    two = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, params)
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(two), [fast[0][0]] * 2, rtol=bounds.FLOAT64)
