"""The table of tensors: kinds from names and variables, and every kind's layout by what the layer computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.pairing import layouts, rules
from parity.pairing.layouts import SAME
from parity.pairing.rules import pair_tensors
from parity.records import kinds


def kind_of_torch(module):
    own = {name: tuple(v.shape) for name, v in module.named_parameters(recurse=False)}
    buffers = {name: tuple(v.shape) for name, v in module.named_buffers(recurse=False)}
    plain = kinds.kind_of([c.__name__ for c in type(module).__mro__], own | buffers, buffers)
    assert kinds.kind_of(kinds.class_names(type(module)), own | buffers, buffers) == plain
    return plain


class Subclassed(torch.nn.Conv2d):
    pass


TORCH_KINDS = [
    (torch.nn.Linear(2, 3), "linear"),
    (torch.nn.LazyLinear(3), "linear"),
    (torch.nn.Bilinear(2, 3, 4), "other"),
    (torch.nn.Conv1d(2, 3, 3), "conv"),
    (torch.nn.Conv3d(4, 4, 3, groups=4), "conv"),
    (Subclassed(2, 3, 3), "conv"),
    (torch.nn.ConvTranspose2d(2, 3, 3), "conv_transpose"),
    (torch.nn.BatchNorm2d(3), "batch_norm"),
    (torch.nn.SyncBatchNorm(3), "batch_norm"),
    (torch.nn.BatchNorm1d(3, track_running_stats=False), "batch_norm"),
    (torch.nn.LayerNorm((2, 3)), "layer_norm"),
    (torch.nn.GroupNorm(1, 3), "group_norm"),
    (torch.nn.InstanceNorm2d(3, affine=True), "group_norm"),
    (torch.nn.RMSNorm(3), "rms_norm"),
    (torch.nn.Embedding(3, 4), "embedding"),
    (torch.nn.MultiheadAttention(4, 2), "attention"),
    (torch.nn.PReLU(), "other"),
]


@pytest.mark.parametrize(("module", "kind"), TORCH_KINDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_kinds_of_torch(module, kind):
    if isinstance(module, torch.nn.LazyLinear):
        assert kinds.kind_of(kinds.class_names(type(module)), {}, ()) == kind
    else:
        assert kind_of_torch(module) == kind


FLAX_KINDS = {
    "linear": (nn.Dense, nn.DenseGeneral, nn.Einsum, nnx.Linear, nnx.LinearGeneral, nnx.Einsum),
    "conv": (nn.Conv, nn.ConvLocal, nnx.Conv),
    "conv_transpose": (nn.ConvTranspose, nnx.ConvTranspose),
    "batch_norm": (nn.BatchNorm, nnx.BatchNorm),
    "layer_norm": (nn.LayerNorm, nnx.LayerNorm),
    "group_norm": (nn.GroupNorm, nn.InstanceNorm, nnx.GroupNorm),
    "rms_norm": (nn.RMSNorm, nnx.RMSNorm),
    "embedding": (nn.Embed, nnx.Embed),
    "attention": (nn.MultiHeadDotProductAttention, nn.SelfAttention, nn.MultiHeadAttention, nnx.MultiHeadAttention),
    "other": (nn.WeightNorm, nn.SpectralNorm, nnx.LoRA),
}


@pytest.mark.parametrize("kind", FLAX_KINDS)
def test_kinds_of_flax(kind):
    for cls in FLAX_KINDS[kind]:
        assert kinds.kind_of(kinds.class_names(cls), {}, ()) == kind, cls


C = (3,)
BATCH_NORM = {"gamma": C, "beta": C, "moving_mean": C, "moving_var": C}
HAND_WRITTEN = [
    ("MyBatchNorm", BATCH_NORM, ("moving_mean", "moving_var"), "batch_norm"),
    ("BatchNorm", dict.fromkeys(BATCH_NORM, (1, 3, 1, 1)), ("moving_mean", "moving_var"), "batch_norm"),
    ("Foo", {"w": C, "b": C, "mu": C, "sigma2": C, "momentum": ()}, ("mu", "sigma2", "momentum"), "batch_norm"),
    ("Norm", {"w": C, "running_mean": C, "moving_variance": C}, ("running_mean", "moving_variance"), "batch_norm"),
    ("BN", {"g": C, "b": C}, (), "batch_norm"),
    ("LayerNorm2d", {"weight": C, "bias": C}, (), "layer_norm"),
    ("MyRMSNorm", {"g": C}, (), "rms_norm"),
    ("Affine", {"gamma": C, "beta": C}, (), "other"),
    ("ConvBNBlock", {"weight": (3, 3, 3, 3)}, (), "conv"),
    ("Conv2dSame", {"weight": (3, 3, 3, 3)}, (), "conv"),
    ("UpConv2D", {"weight": (3, 3, 3, 3)}, (), "conv_transpose"),
    ("MyLinear", {"W": (3, 3), "b": C}, (), "linear"),
    ("Net", {"temperature": ()}, (), "other"),
    ("Net", {"cls_token": (1, 1, 3), "pos_embed": (1, 4, 3)}, (), "other"),
    ("MultiHeadAttention", {"scale": ()}, (), "other"),
    ("my.models.SelfAttention", {}, (), "other"),
]


@pytest.mark.parametrize(("name", "shapes", "statistics", "kind"), HAND_WRITTEN, ids=[r[0] for r in HAND_WRITTEN])
def test_kinds_of_hand_written_classes(name, shapes, statistics, kind):
    assert kinds.kind_of([name, "Module"], shapes, statistics) == kind


def named(found):
    return {(pair.torch_name, pair.flax_name) for pair in found.pairs}


def test_hand_written_batch_norms_pair_by_role():
    flax = {"scale": C, "bias": C, "mean": C, "var": C}
    for own in (
        ("gamma", "beta", "moving_mean", "moving_var"),
        ("w", "b", "mu", "sigma2"),
        ("weight", "bias", "running_mean", "running_variance"),
        ("g", "shift", "ema_mean", "ema_var"),
    ):
        found = pair_tensors("batch_norm", dict.fromkeys(own, (1, 3, 1, 1)) | {"num_batches_tracked": ()}, flax)
        assert named(found) == set(zip(own, flax, strict=True))
        assert not found.torch_left
        assert not found.flax_left
        assert all(pair.fits for pair in found.pairs)


def test_what_is_left_over_is_told():
    found = pair_tensors("linear", {"weight": (2, 3), "bias": (2,)}, {"kernel": (3, 2)})
    assert named(found) == {("weight", "kernel")}
    assert found.torch_left == ["bias"]
    found = pair_tensors("linear", {"weight": (2, 3)}, {"kernel": (5, 2), "bias": (2,)})
    assert not found.pairs[0].fits
    assert found.flax_left == ["bias"]


def test_square_matrices_go_by_kind():
    a = np.arange(9.0).reshape(3, 3)
    (pair,) = pair_tensors("linear", {"weight": (3, 3)}, {"kernel": (3, 3)}).pairs
    np.testing.assert_array_equal(pair.to_flax(a), a.T)
    (pair,) = pair_tensors("embedding", {"weight": (3, 3)}, {"embedding": (3, 3)}).pairs
    np.testing.assert_array_equal(pair.to_flax(a), a)
    (pair,) = pair_tensors("other", {"matrix": (3, 3)}, {"matrix": (3, 3)}).pairs
    np.testing.assert_array_equal(pair.to_flax(a), a)


def test_bare_parameters():
    torch_shapes = {"cls_token": (1, 1, 4), "pos_embed": (1, 7, 4), "scale": (1, 4, 1, 1), "grid": (1, 4, 2, 3)}
    flax_shapes = {"cls": (1, 1, 4), "pos_embedding": (1, 7, 4), "scale": (4,), "grid": (1, 2, 3, 4)}
    found = pair_tensors("other", torch_shapes, flax_shapes)
    assert named(found) == set(zip(torch_shapes, flax_shapes, strict=True))
    grid = next(pair for pair in found.pairs if pair.torch_name == "grid")
    a = np.arange(24.0).reshape(1, 4, 2, 3)
    np.testing.assert_array_equal(grid.to_flax(a), a.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(grid.to_torch(grid.to_flax(a)), a)


def test_a_rule_for_one_name_moves_no_other():
    before, shapes = list(rules.RULES), dict.fromkeys(("const", "matrix", "theta"), (2, 2))
    try:
        rules.register("other", "const", "const", layouts.OUT_IN)
        paired = pair_tensors("other", shapes, {name.replace("theta", "Theta"): v for name, v in shapes.items()})
    finally:
        rules.RULES[:] = before
    moved = {pair.torch_name: pair.to_flax(np.array([[1, 2], [3, 4]])).tolist() for pair in paired.pairs}
    assert moved == {"const": [[1, 3], [2, 4]], "matrix": [[1, 2], [3, 4]], "theta": [[1, 2], [3, 4]]}


def test_register_is_one_line():
    assert not pair_tensors("linear", {"theta": (2, 2), "t2": (2, 2)}, {"A": (2, 2), "B": (2, 2)}).pairs
    try:
        rules.register("linear", "theta", "A", SAME)
        (pair,) = [p for p in pair_tensors("linear", {"theta": (2, 2)}, {"A": (2, 2)}).pairs if p.flax_name == "A"]
        a = np.arange(4.0).reshape(2, 2)
        np.testing.assert_array_equal(pair.to_flax(a), a)
    finally:
        rules.RULES.pop(0)
    with pytest.raises(ValueError, match="kind is 'lstm'; allowed: linear"):
        rules.register("lstm", "a", "b")


def conv_pair(rank, groups=1):
    k = (3, 2, 4)[:rank]
    layer = getattr(torch.nn, f"Conv{rank}d")(4, 8, k, groups=groups, stride=2, padding=1)
    return layer, nn.Conv(8, k, 2, padding=1, feature_group_count=groups)


def transposed_pair(rank, transpose_kernel, out=4):
    # Flax pads the dilated input: k - 1 - padding of PyTorch's.
    k, p = (3, 4)[:rank], 1
    layer = getattr(torch.nn, f"ConvTranspose{rank}d")(4, out, k, stride=2, padding=p)
    padding = [(n - 1 - p, n - 1 - p) for n in k]
    return layer, nn.ConvTranspose(out, k, (2,) * rank, padding=padding, transpose_kernel=transpose_kernel)


LAYERS = {
    "linear": (torch.nn.Linear(4, 4), nn.Dense(4), (4,)),
    "linear without bias": (torch.nn.Linear(4, 6, bias=False), nn.Dense(6, use_bias=False), (4,)),
    "linear, general": (torch.nn.Linear(4, 6), nn.DenseGeneral((2, 3)), (4,)),
    **{f"conv {n}d": (*conv_pair(n), (4, 8, 9, 7)[: n + 1]) for n in (1, 2, 3)},
    "conv grouped": (*conv_pair(2, 2), (4, 8, 9)),
    "conv depthwise": (*conv_pair(2, 4), (4, 8, 9)),
    "transposed 1d": (*transposed_pair(1, False), (4, 5)),
    "transposed 2d": (*transposed_pair(2, False), (4, 5, 6)),
    "transposed 2d, other channels": (*transposed_pair(2, False, 6), (4, 5, 6)),
    "layer norm": (torch.nn.LayerNorm(4), nn.LayerNorm(epsilon=1e-5), (4,)),
    "layer norm of images": (
        torch.nn.LayerNorm((4, 4, 4)),
        nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
        (4, 4, 4),
    ),
    "layer norm of sequences": (
        torch.nn.LayerNorm((5, 5)),
        nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2), feature_axes=(1, 2)),
        (5, 5),
    ),
    "rms norm": (torch.nn.RMSNorm(4, eps=1e-6), nn.RMSNorm(), (4,)),
    "group norm": (torch.nn.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5), (4, 3, 5)),
    "instance norm": (torch.nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm(epsilon=1e-5), (4, 3, 5)),
    "batch norm": (torch.nn.BatchNorm2d(4), nn.BatchNorm(use_running_average=True), (4, 3, 5)),
}


def randomised(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, v in module.state_dict().items():
            if v.is_floating_point():
                v.uniform_(0.5, 1.5) if name.endswith("var") else v.normal_()
    return module.double().eval()


def carried(kind, layer, variables, **options):
    """The layer's tensors by the rules, as variables; and back, bit for bit."""
    state = {name: v.numpy() for name, v in layer.state_dict().items()}
    flat = {"/".join(p.key for p in path): v.shape for path, v in jax.tree_util.tree_leaves_with_path(variables)}
    local = {name.partition("/")[2]: shape for name, shape in flat.items()}
    found = pair_tensors(kind, {n: v.shape for n, v in state.items()}, local, options)
    assert not found.torch_left
    assert not found.flax_left
    arrays = rules.to_flax_arrays(found.pairs, state)
    back = rules.to_torch_arrays(found.pairs, arrays)
    assert set(back) == {name for name in state if "num_batches" not in name}
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])
    leaves = [
        arrays["/".join(p.key for p in path).partition("/")[2]]
        for path, _ in jax.tree_util.tree_leaves_with_path(variables)
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), [jnp.asarray(a) for a in leaves])


@pytest.fixture
def promoting(x64):
    """Flax itself promotes ranks and dtypes."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", LAYERS)
def test_carried_layer_computes_the_same(name, promoting):
    layer, target, shape = LAYERS[name]
    layer = randomised(layer)
    x = np.random.default_rng(0).normal(size=(2, *shape))
    is_image = len(shape) > 1 and name != "layer norm of sequences"
    given_ = jnp.asarray(np.moveaxis(x, 1, -1) if is_image else x)
    variables = target.init(jax.random.key(0), given_)
    z = target.apply(carried(kind_of_torch(layer), layer, variables), given_)
    y = layer(torch.tensor(x)).detach().numpy()
    if name == "linear, general":
        z = z.reshape(2, 6)
    np.testing.assert_allclose(np.moveaxis(z, -1, 1) if is_image else z, y, atol=1e-12)


@pytest.mark.parametrize("out", [4, 6])
def test_transpose_kernel(out, promoting):
    """With transpose_kernel=True Flax's kernel is [*k, out, in], not flipped; a square one must be told."""
    layer, target = transposed_pair(2, True, out)
    layer, x = randomised(layer), np.random.default_rng(0).normal(size=(2, 4, 5, 6))
    given_ = jnp.asarray(np.moveaxis(x, 1, -1))
    variables = target.init(jax.random.key(0), given_)
    options = {"transpose_kernel": True} if out == 4 else {}
    z = target.apply(carried("conv_transpose", layer, variables, **options), given_)
    np.testing.assert_allclose(np.moveaxis(z, -1, 1), layer(torch.tensor(x)).detach().numpy(), atol=1e-12)


def test_embedding(promoting):
    layer, ids = randomised(torch.nn.Embedding(5, 5)), np.array([[1, 4], [0, 2]])
    target = nn.Embed(5, 5)
    variables = carried("embedding", layer, target.init(jax.random.key(0), jnp.asarray(ids)))
    np.testing.assert_array_equal(target.apply(variables, jnp.asarray(ids)), layer(torch.tensor(ids)).detach().numpy())


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention(separate, bias, promoting):
    """in_proj_weight is three kernels in Flax; with other key and value sizes PyTorch has three matrices, too."""
    sizes = {"kdim": 6, "vdim": 10} if separate else {}
    layer = randomised(torch.nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **sizes))
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, 4, sizes.get(name, 8))) for name in ("", "kdim", "vdim"))
    target = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=8, use_bias=bias)
    given_ = [jnp.asarray(a) for a in (q, k, v)]
    variables = carried("attention", layer, target.init(jax.random.key(0), *given_))
    y = layer(*map(torch.tensor, (q, k, v)), need_weights=False)[0].detach().numpy()
    np.testing.assert_allclose(target.apply(variables, *given_), y, atol=1e-12)


def test_behind_a_flatten(promoting):
    """The same matrix reads C, H, W in PyTorch and H, W, C in Flax."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(5, 24)), rng.normal(size=(2, 2, 3, 4))
    (pair,) = pair_tensors("linear", {"weight": w.shape}, {"kernel": (24, 5)}).pairs
    moved = rules.with_flatten(pair, (2, 3, 4))
    kernel = moved.to_flax(w)
    np.testing.assert_allclose(np.moveaxis(x, 1, -1).reshape(2, -1) @ kernel, x.reshape(2, -1) @ w.T, atol=1e-12)
    np.testing.assert_array_equal(moved.to_torch(kernel), w)
    layout = layouts.behind_flatten(2, 3, 4)
    np.testing.assert_array_equal(layout.to_flax(w), kernel)
    np.testing.assert_array_equal(layout.to_torch(kernel), w)


@settings(max_examples=30)
@given(data=st.data(), kind=st.sampled_from(["linear", "conv", "conv_transpose", "layer_norm", "attention"]))
def test_moves_are_permutations(data, kind):
    """There and back is the identity, and nothing is computed: any dtype goes through."""
    sizes = st.integers(1, 4)
    o, i, h, w = (data.draw(sizes) for _ in range(4))
    torch_shapes, flax_shapes = {
        "linear": ({"weight": (o, i), "bias": (o,)}, {"kernel": (i, o), "bias": (o,)}),
        "conv": ({"weight": (o, i, h, w)}, {"kernel": (h, w, i, o)}),
        "conv_transpose": ({"weight": (i, o, h, w)}, {"kernel": (h, w, i, o)}),
        "layer_norm": ({"weight": (i, h, w)}, {"scale": (h, w, i)}),
        "attention": (
            {"in_proj_weight": (3 * h * w, h * w), "out_proj.weight": (h * w, h * w)},
            {f"{n}/kernel": (h * w, h, w) for n in ("query", "key", "value")} | {"out/kernel": (h, w, h * w)},
        ),
    }[kind]
    found = pair_tensors(kind, torch_shapes, flax_shapes)
    assert not found.torch_left
    assert not found.flax_left
    arrays = {n: np.arange(np.prod(s), dtype=np.int64).reshape(s) for n, s in torch_shapes.items()}
    moved = rules.to_flax_arrays(found.pairs, arrays)
    assert {n: a.shape for n, a in moved.items()} == flax_shapes
    back = rules.to_torch_arrays(found.pairs, moved)
    assert all((back[n] == a).all() for n, a in arrays.items())
