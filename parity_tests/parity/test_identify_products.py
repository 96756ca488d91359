"""What two linear layers or convolutions differ in, found from their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis.product.family import findings
from parity.diagnosis.product.fits import ProductSide
from parity_tests.parity.product_sides import WINGS, flax_side, torch_side

pytestmark = pytest.mark.usefixtures("x64")

SPATIAL = {1: (11,), 2: (9, 8), 3: (6, 5, 7)}


def draw(rank, channels=4, features=4, *, k=3, groups=1, seed=0, n=3, spatial=None, mean=0.0):
    rng = np.random.default_rng(seed)
    k = (k,) * rank if isinstance(k, int) else k
    x = rng.normal(mean, size=(n, *(spatial or SPATIAL[rank]), channels))
    return x, rng.normal(size=(*k, channels // groups, features)), rng.normal(size=features)


def codes(found):
    return [finding.code for finding in found]


def pair(wing, kind, x, kernel, bias, right, wrong, applied=None):
    """The mistake in one wing: `right` and `wrong` are (PyTorch's options, Flax's options)."""
    if wing == "torch":
        return torch_side(kind, x, kernel, bias, applied, **wrong[0]), flax_side(kind, x, kernel, bias, **right[1])
    return torch_side(kind, x, kernel, bias, **right[0]), flax_side(kind, x, kernel, bias, applied, **wrong[1])


def both(**options):
    return options, dict(options)


@pytest.mark.parametrize("wing", WINGS)
class TestKernel:
    def test_square_linear_transposed(self, wing):
        rng = np.random.default_rng(0)
        x, kernel, bias = rng.normal(size=(6, 5)), rng.normal(size=(5, 5)), rng.normal(size=5)
        found = findings("linear", *pair(wing, "linear", x, kernel, bias, ({}, {}), ({}, {}), kernel.T))
        assert codes(found) == ["kernel-transposed"]

    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_flipped(self, wing, rank, groups):
        x, kernel, bias = draw(rank, groups=groups)
        flipped = np.flip(kernel, tuple(range(rank)))
        same = both(padding=1, groups=groups)
        assert codes(findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, flipped))) == ["kernel-flipped"]

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_depthwise_flipped(self, wing, rank):
        x, kernel, bias = draw(rank, groups=4, features=8)
        flipped = np.flip(kernel, tuple(range(rank)))
        same = both(padding=1, groups=4)
        assert codes(findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, flipped))) == ["kernel-flipped"]

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_in_and_out_exchanged(self, wing, rank):
        x, kernel, bias = draw(rank)
        same = both(padding=1)
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, kernel.swapaxes(-1, -2)))
        assert codes(found) == ["kernel-transposed"]

    @pytest.mark.parametrize("rank", [2, 3])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_height_and_width_exchanged(self, wing, rank, groups):
        x, kernel, bias = draw(rank, groups=groups)
        same = both(padding=1, groups=groups)
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, kernel.swapaxes(rank - 1, rank - 2)))
        assert codes(found) == ["kernel-hw-swapped"]

    def test_height_and_width_exchanged_of_unequal_size(self, wing):
        x, kernel, bias = draw(2, k=(3, 1))
        same = both(padding=0)
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, kernel.swapaxes(0, 1)))
        assert codes(found) == ["kernel-hw-swapped"]

    @pytest.mark.parametrize(("rank", "channels", "features"), [(1, 4, 6), (2, 4, 6), (3, 4, 6), (2, 3, 3), (1, 3, 3)])
    def test_layout(self, wing, rank, channels, features):
        x, kernel, bias = draw(rank, channels, features)
        same = both(padding=1)
        raw = kernel.transpose(rank + 1, rank, *range(rank)).reshape(kernel.shape)
        assert codes(findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, raw))) == ["kernel-layout"]

    def test_two_at_once(self, wing):
        x, kernel, bias = draw(2)
        same = both(padding=1)
        flipped = np.flip(kernel, (0, 1)).swapaxes(-1, -2)
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, flipped))
        assert codes(found) == ["kernel-transposed", "kernel-flipped"]

    def test_symmetric_kernels_are_not_flipped(self, wing):
        x, kernel, bias = draw(2)
        kernel = kernel + kernel[::-1, ::-1]
        same = both(padding=1)
        assert findings("conv", *pair(wing, "conv", x, kernel, bias, same, same, kernel[::-1, ::-1])) == []

    @pytest.mark.parametrize("rank", [1, 2])
    def test_transposed_convolution_flipped(self, wing, rank):
        x, kernel, bias = draw(rank, features=3)
        right = ({"stride": 2, "padding": 2}, {"stride": 2, "padding": "VALID"})
        right[0]["padding"] = 0
        found = findings(
            "conv_transpose",
            *pair(wing, "conv_transpose", x, kernel, bias, right, right, np.flip(kernel, tuple(range(rank)))),
        )
        assert codes(found) == ["kernel-flipped"]


@pytest.mark.parametrize("wing", WINGS)
class TestGeometry:
    @pytest.mark.parametrize("hints", [True, False])
    @pytest.mark.parametrize("rank", [1, 2])
    def test_padding_at_stride_two(self, wing, rank, hints):
        x, kernel, bias = draw(rank, spatial=(8,) * rank)
        low = [(0, 1)] * rank
        if wing == "flax":
            torch = torch_side("conv", x, kernel, bias, stride=2, padding=1, hints=hints)
            flax = flax_side("conv", x, kernel, bias, stride=2, padding="SAME", hints=hints)
        else:
            padded = np.pad(x, ((0, 0), *low, (0, 0)))
            torch = torch_side("conv", padded, kernel, bias, stride=2, hints=False)
            torch = torch._replace(x=x, dx=None)
            flax = flax_side("conv", x, kernel, bias, stride=2, padding=1, hints=hints)
        (found,) = findings("conv", torch, flax)
        assert found.code == "padding"
        assert "(1, 1)" in found.evidence
        assert "SAME = (0, 1)" in found.evidence
        assert "at stride 2" in found.evidence

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_padding_missing(self, wing, rank):
        x, kernel, bias = draw(rank)
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, both(padding=1), both(padding=0)))
        assert codes(found) == ["padding"]

    @pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
    def test_padding_mode(self, wing, mode):
        x, kernel, bias = draw(2)
        width = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
        zeros = torch_side("conv", x, kernel, bias, padding=1)
        other = torch_side("conv", np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=width), kernel, bias, hints=False)
        other = other._replace(x=x, dx=None, dkernel=None)
        (found,) = findings("conv", *((other, zeros) if wing == "torch" else (zeros, other)))
        assert found.code == "padding"
        assert mode in found.evidence

    def test_causal(self, wing):
        x, kernel, bias = draw(1, k=4)
        same, causal = (
            flax_side("conv", x, kernel, bias, padding="SAME"),
            flax_side("conv", x, kernel, bias, padding=[(3, 0)]),
        )
        (found,) = findings("conv", *((causal, same) if wing == "torch" else (same, causal)))
        assert found.code == "padding"
        assert "CAUSAL = (3, 0)" in found.evidence

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_stride(self, wing, rank):
        x, kernel, bias = draw(rank)
        right, wrong = ({"padding": 1, "stride": 2}, {"padding": 1, "stride": 2}), both(padding=1, stride=1)
        (found,) = findings("conv", *pair(wing, "conv", x, kernel, bias, right, wrong))
        assert found.code == "stride"

    def test_stride_along_one_axis(self, wing):
        x, kernel, bias = draw(2)
        right, wrong = both(padding=1, stride=(2, 1)), both(padding=1, stride=(1, 2))
        (found,) = findings("conv", *pair(wing, "conv", x, kernel, bias, right, wrong))
        assert found.code == "stride"
        assert "(2, 1)" in found.evidence

    @pytest.mark.parametrize("rank", [1, 2])
    @pytest.mark.parametrize("padding", [0, "same"])
    def test_dilation(self, wing, rank, padding):
        x, kernel, bias = draw(rank)
        of_flax = padding if padding == 0 else "SAME"
        right = {"padding": padding}, {"padding": of_flax}
        wrong = {"padding": padding, "dilation": 2}, {"padding": of_flax, "dilation": 2}
        found = findings("conv", *pair(wing, "conv", x, kernel, bias, right, wrong))
        assert codes(found) == ["dilation"]

    def test_stride_and_flip(self, wing):
        x, kernel, bias = draw(2)
        found = findings(
            "conv",
            *pair(wing, "conv", x, kernel, bias, both(padding=1, stride=2), both(padding=1), kernel[::-1, ::-1]),
        )
        assert codes(found) == ["kernel-flipped", "stride"]

    @pytest.mark.parametrize("rank", [1, 2])
    def test_transposed_convolution_padding(self, wing, rank):
        x, kernel, bias = draw(rank)
        right = {"stride": 2, "padding": 1, "output_padding": 1}, {"stride": 2, "padding": [(1, 2)] * rank}
        wrong = {"stride": 2, "padding": 0, "output_padding": 0}, {"stride": 2, "padding": "SAME"}
        (found,) = findings("conv_transpose", *pair(wing, "conv_transpose", x, kernel, bias, right, wrong))
        assert found.code == "padding"

    def test_transposed_convolution_stride(self, wing):
        x, kernel, bias = draw(2)
        right = {"stride": 2, "padding": 0}, {"stride": 2, "padding": "VALID"}
        wrong = {"stride": 1, "padding": 0}, {"stride": 1, "padding": "VALID"}
        (found,) = findings("conv_transpose", *pair(wing, "conv_transpose", x, kernel, bias, right, wrong))
        assert found.code == "stride"


@pytest.mark.parametrize("wing", WINGS)
class TestBias:
    @pytest.mark.parametrize("kind", ["linear", "conv", "conv_transpose"])
    def test_not_added(self, wing, kind):
        x, kernel, bias = draw(2)
        if kind == "linear":
            x, kernel = x[:, 0, 0], kernel[0, 0]
        right = ({}, {"padding": "VALID"} if kind != "linear" else {})
        wrong = ({"add_bias": False}, right[1] | {"add_bias": False})
        assert codes(findings(kind, *pair(wing, kind, x, kernel, bias, right, wrong))) == ["bias-missing"]

    @pytest.mark.parametrize("size", [1.0, 0.0])
    def test_absent_on_one_side(self, wing, size):
        x, kernel, bias = draw(2)
        with_bias = flax_side("conv", x, kernel, bias * size, padding="VALID")
        without = torch_side("conv", x, kernel, None)
        sides = (without, with_bias) if wing == "torch" else (with_bias, without)
        assert codes(findings("conv", *sides)) == ["bias-missing"]


def reduced(values, dtype):
    return np.asarray(jnp.asarray(values, dtype).astype(jnp.float64))


def tf32(values):
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
class TestPrecision:
    def sides(self, wing, kind, rounded, mean=0.0, **options):
        x, kernel, bias = draw(2, 16, 8, n=8, mean=mean)
        if kind == "linear":
            x, kernel = x[:, 0, 0], kernel[0, 0]
        exact = torch_side(kind, x, kernel, bias, **options)
        single = torch_side(kind, rounded(x), kernel, bias, rounded(kernel), dtype=np.float32, **options)
        single = single._replace(x=x, y=single.y.astype(np.float64), dx=None)
        return (single, exact) if wing == "torch" else (exact, single)

    @pytest.mark.parametrize("mean", [0.0, 1.0])
    @pytest.mark.parametrize(
        ("rounded", "name"),
        [
            (lambda a: reduced(a, jnp.bfloat16), "bfloat16"),
            (tf32, "TF32"),
            (lambda a: reduced(a, jnp.float16), "float16"),
        ],
    )
    def test_operands(self, wing, kind, rounded, name, mean):
        (found,) = findings(kind, *self.sides(wing, kind, rounded, mean))
        assert found.code == "matmul-precision"
        assert name in found.evidence or (name == "float16" and "TF32" in found.evidence)

    def test_outputs_too(self, wing, kind):
        torch, flax = self.sides(wing, kind, lambda a: reduced(a, jnp.bfloat16))
        torch, flax = (
            (torch._replace(y=reduced(torch.y, jnp.bfloat16)), flax)
            if wing == "torch"
            else (torch, flax._replace(y=reduced(flax.y, jnp.bfloat16)))
        )
        (found,) = findings(kind, torch, flax)
        assert found.code == "matmul-precision"
        assert "every output is such a number" in found.evidence

    def test_noise_of_that_size(self, wing, kind):
        sides = dict(zip(WINGS, self.sides(wing, kind, lambda a: a), strict=True))
        noise = 1 + 2e-3 * np.random.default_rng(1).normal(size=sides[wing].y.shape)
        sides[wing] = sides[wing]._replace(y=sides[wing].y * noise)
        (found,) = findings(kind, sides["torch"], sides["flax"])
        assert found.code == "matmul-precision"
        assert "bfloat16" in found.evidence

    def test_float32_is_no_mistake(self, wing, kind):
        assert findings(kind, *self.sides(wing, kind, lambda a: a)) == []

    def test_scale_is_no_noise(self, wing, kind):
        sides = dict(zip(WINGS, self.sides(wing, kind, lambda a: a), strict=True))
        sides[wing] = sides[wing]._replace(y=sides[wing].y * 1.004)
        (found,) = findings(kind, sides["torch"], sides["flax"])
        assert found.code == "unexplained"


def test_precision_and_padding_at_once():
    x, kernel, bias = draw(2, 8, 8, spatial=(8, 8))
    torch = torch_side("conv", x, kernel, bias, stride=2, padding=1)
    low = flax_side(
        "conv",
        reduced(x, jnp.bfloat16),
        reduced(kernel, jnp.bfloat16),
        bias,
        stride=2,
        padding="SAME",
        dtype=np.float32,
    )
    found = findings("conv", torch, low._replace(x=x, kernel=kernel, dx=None, dkernel=None))
    assert codes(found) == ["padding", "matmul-precision"]


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.parametrize("kind", ["linear", "conv", "conv_transpose"])
class TestGradient:
    def sides(self, kind):
        x, kernel, bias = draw(2)
        if kind == "linear":
            x, kernel = x[:, 0, 0], kernel[0, 0]
        options = {} if kind == "linear" else {"padding": "VALID"}
        return torch_side(kind, x, kernel, bias), flax_side(kind, x, kernel, bias, **options)

    @pytest.mark.parametrize(("field", "word"), [("dx", "input gradient"), ("dkernel", "kernel gradient")])
    @pytest.mark.parametrize("factor", [2.0, 0.0])
    def test_not_the_derivative(self, wing, kind, field, word, factor):
        sides = dict(zip(WINGS, self.sides(kind), strict=True))
        sides[wing] = sides[wing]._replace(**{field: getattr(sides[wing], field) * factor})
        (found,) = findings(kind, sides["torch"], sides["flax"])
        name = "PyTorch" if wing == "torch" else "Flax"
        assert found.code == "unexplained"
        assert found.evidence.startswith(f"the {word} of {name}'s")
        assert "2 times" in found.evidence or "zero" in found.evidence


def test_gradient_through_a_rearranged_kernel():
    x, kernel, bias = draw(2)
    side = torch_side("conv", x, kernel, bias, kernel.swapaxes(-1, -2), padding=1)
    dkernel = torch_side("conv", x, kernel.swapaxes(-1, -2), bias, padding=1).dkernel.swapaxes(-1, -2)
    found = findings("conv", side._replace(dkernel=dkernel), flax_side("conv", x, kernel, bias, padding=1))
    assert codes(found) == ["kernel-transposed"]


@pytest.mark.parametrize("wing", WINGS)
def test_unexplained_names_the_side(wing):
    x, kernel, bias = draw(2)
    right = torch_side("conv", x, kernel, bias, padding=1)
    wrong = right._replace(y=np.tanh(right.y), dx=None, dkernel=None)
    (found,) = findings("conv", *((wrong, right) if wing == "torch" else (right, wrong)))
    assert found.code == "unexplained"
    assert found.evidence.startswith("PyTorch" if wing == "torch" else "Flax")


def test_other_parameters_are_no_other_behaviour():
    x, kernel, bias = draw(2)
    torch = torch_side("conv", x, kernel, bias, padding=1)
    flax = flax_side("conv", x, kernel[::-1], bias + 1, padding=1)
    assert findings("conv", torch, flax) == []


def test_grouped_transposed_convolution():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 7, 4)), rng.normal(size=(4, 3, 3))
    y = torch.nn.functional.conv_transpose1d(
        torch.from_numpy(x.transpose(0, 2, 1)), torch.from_numpy(weight), stride=2, groups=2
    )
    y = y.numpy().transpose(0, 2, 1)
    kernel = weight.transpose(2, 0, 1)[::-1]  # [k, in, out / groups]
    right = ProductSide(x, y, kernel, None)
    flipped = torch.nn.functional.conv_transpose1d(
        torch.from_numpy(x.transpose(0, 2, 1)), torch.from_numpy(weight[..., ::-1].copy()), stride=2, groups=2
    )
    wrong = ProductSide(x, flipped.numpy().transpose(0, 2, 1), kernel, None)
    assert codes(findings("conv_transpose", right, wrong)) == ["kernel-flipped"]


def test_kernels_held_the_other_way_round_are_no_mistake():
    x, kernel, bias = draw(2, features=3)
    right = torch_side("conv_transpose", x, kernel, bias, stride=2)
    other = right._replace(kernel=kernel.swapaxes(-1, -2), y=right.y - bias, dkernel=None)
    assert codes(findings("conv_transpose", right, other)) == ["bias-missing"]


def test_unknown_kind():
    x, kernel, bias = draw(1)
    side = torch_side("conv", x, kernel, bias)
    with pytest.raises(ValueError, match="kind is 'dense'; allowed: 'linear'"):
        findings("dense", side, side)


def test_is_quick():
    x, kernel, bias = draw(2, 16, 32, spatial=(14, 14), n=8)
    torch = torch_side("conv", x, kernel, bias, padding=1)
    flax = flax_side("conv", x, kernel, bias, kernel[::-1], padding=1)
    assert codes(findings("conv", torch, flax)) == ["kernel-flipped"]


@st.composite
def correct_pairs(draw_):
    kind = draw_(st.sampled_from(["linear", "conv", "conv_transpose"]))
    rank = draw_(st.integers(1, 3))
    groups = draw_(st.sampled_from([1, 2, 4])) if kind == "conv" else 1
    k = draw_(st.integers(1, 3))
    spatial = tuple(draw_(st.integers(3, 6)) for _ in range(rank))
    seed, mean = draw_(st.integers(0, 99)), draw_(st.sampled_from([0.0, 1.0, 100.0]))
    dtype = draw_(st.sampled_from([np.float32, np.float64]))
    x, kernel, bias = draw(rank, 4, 4, k=k, groups=groups, spatial=spatial, seed=seed, mean=mean)
    if draw_(st.booleans()):
        bias = None
    stride, hints = draw_(st.integers(1, 3)), draw_(st.booleans())
    if kind == "linear":
        return kind, (x, kernel[(0,) * rank], bias), {}, {}, dtype, hints
    padding = draw_(st.integers(0, k - 1))
    if kind == "conv":
        options = {"stride": stride, "padding": padding, "groups": groups}
        return kind, (x, kernel, bias), options, options, dtype, hints
    flax = {"stride": stride, "padding": [(k - 1 - padding, k - 1 - padding)] * rank}
    return kind, (x, kernel, bias), {"stride": stride, "padding": padding}, flax, dtype, hints


@given(correct_pairs())
@settings(max_examples=40)
def test_correct_pairs_are_silent(case):
    kind, arrays, of_torch, of_flax, dtype, hints = case
    with jax.enable_x64(True):
        torch = torch_side(kind, *arrays, dtype=dtype, hints=hints, **of_torch)
        flax = flax_side(kind, *arrays, dtype=dtype, hints=hints, **of_flax)
    assert findings(kind, torch, flax, tolerance=1e-9 if dtype == np.float64 else 1e-5) == []
    assert findings(kind, torch, flax) == []
