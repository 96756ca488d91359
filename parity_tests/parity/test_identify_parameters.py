"""What happened to parameters that were carried over by hand."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis.parameters.family import findings

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def codes(found):
    return [finding.code for finding in found]


def of_kernel(kind, truth, held, **options):
    bias = normal(4)
    return findings(kind, {"kernel": truth, "bias": bias}, {"kernel": held, "bias": bias}, **options)


class TestLinear:
    @pytest.mark.parametrize("shape", [(5, 5), (5, 3)])
    def test_transposed(self, shape):
        kernel = normal(*shape)
        assert codes(of_kernel("linear", kernel, kernel.T)) == ["kernel-transposed"]

    def test_reshaped(self):
        kernel = normal(5, 3)
        assert codes(of_kernel("linear", kernel, kernel.T.reshape(5, 3))) == ["kernel-transposed"]

    def test_symmetric(self):
        kernel = normal(5, 5)
        kernel += kernel.T
        assert of_kernel("linear", kernel, kernel.T) == []

    @pytest.mark.parametrize("spatial", [(3, 4, 5), (3,), None])
    def test_flatten_order(self, spatial):
        raw = normal(60, 7)  # rows in C, H, W order
        truth = raw.reshape(3, 4, 5, 7).transpose(1, 2, 0, 3).reshape(60, 7)
        (found,) = of_kernel("linear", truth, raw, spatial=spatial)
        assert found.code == "flatten-order"
        twice = truth.reshape(3, 4, 5, 7).transpose(1, 2, 0, 3).reshape(60, 7)
        assert codes(of_kernel("linear", truth, twice, spatial=spatial)) == ["flatten-order"]
        assert codes(of_kernel("linear", truth, raw.T, spatial=spatial)) == ["kernel-transposed", "flatten-order"]
        assert codes(of_kernel("linear", truth, raw.T, raw={"kernel": raw.T})) == ["kernel-transposed", "flatten-order"]

    def test_flatten_with_height_and_width_exchanged(self):
        truth = normal(60, 7)
        held = truth.reshape(4, 5, 3, 7).transpose(1, 0, 2, 3).reshape(60, 7)
        (found,) = of_kernel("linear", truth, held, spatial=(3, 4, 5))
        assert found.code == "flatten-order"
        assert "W, H, C" in found.evidence


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
class TestConv:
    def kernel(self, rank, inputs=4, features=4):
        return normal(*(3,) * rank, inputs, features)

    def test_flipped(self, kind, rank):
        kernel = self.kernel(rank, 1, 8)
        assert codes(of_kernel(kind, kernel, np.flip(kernel, tuple(range(rank))))) == ["kernel-flipped"]

    @pytest.mark.parametrize("features", [4, 6])
    def test_transposed(self, kind, rank, features):
        kernel = self.kernel(rank, features=features)
        assert codes(of_kernel(kind, kernel, kernel.swapaxes(-1, -2))) == ["kernel-transposed"]

    def test_height_and_width_exchanged(self, kind, rank):
        kernel = normal(*range(2, 2 + rank), 4, 4)
        expected = ["kernel-hw-swapped"] if rank > 1 else []
        order = (*range(rank - 2), rank - 1, rank - 2, rank, rank + 1) if rank > 1 else range(3)
        assert codes(of_kernel(kind, kernel, kernel.transpose(*order))) == expected

    @pytest.mark.parametrize(("inputs", "features"), [(4, 6), (3, 3), (1, 8)])
    def test_pytorch_order(self, kind, rank, inputs, features):
        kernel = self.kernel(rank, inputs, features)
        raw = kernel.transpose(rank + 1, rank, *range(rank))
        assert codes(of_kernel(kind, kernel, raw)) == ["kernel-layout"]
        assert codes(of_kernel(kind, kernel, raw.reshape(kernel.shape))) == ["kernel-layout"]
        assert codes(of_kernel(kind, kernel, raw, raw={"kernel": raw})) == ["kernel-layout"]

    def test_transposed_and_flipped(self, kind, rank):
        kernel = self.kernel(rank)
        held = np.flip(kernel, tuple(range(rank))).swapaxes(-1, -2)
        assert codes(of_kernel(kind, kernel, held)) == ["kernel-transposed", "kernel-flipped"]

    def test_symmetric(self, kind, rank):
        kernel = self.kernel(rank)
        kernel += np.flip(kernel, tuple(range(rank)))
        assert of_kernel(kind, kernel, np.flip(kernel, tuple(range(rank)))) == []


def batch_norm(**changes):
    names = {"scale": normal(5), "bias": normal(5), "mean": normal(5), "var": np.abs(normal(5)) + 0.5}
    return names, {role: changes[role](names) if role in changes else value for role, value in names.items()}


class TestNorm:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"scale": lambda p: p["bias"], "bias": lambda p: p["scale"]}, ["affine-swapped"]),
            ({"scale": lambda p: np.ones(5), "bias": lambda p: np.zeros(5)}, ["affine-missing"]),
            ({"scale": lambda p: np.ones(5)}, ["affine-missing"]),
            ({"bias": lambda p: np.zeros(5)}, ["bias-missing"]),
            ({"var": lambda p: np.ones(5)}, ["initial-variance"]),
            ({"var": lambda p: np.zeros(5), "mean": lambda p: np.zeros(5)}, ["initial-variance"]),
            ({"mean": lambda p: np.zeros(5)}, ["unexplained"]),
            ({"mean": lambda p: p["var"], "var": lambda p: p["mean"]}, ["unexplained"]),
            ({"var": lambda p: p["var"] * 256 / 255}, ["unbiased-variance"]),
            ({"var": lambda p: p["var"] * 15 / 16}, ["unbiased-variance"]),
            ({"var": lambda p: np.sqrt(p["var"])}, ["unexplained"]),
            ({"scale": lambda p: np.ones(5), "bias": lambda p: np.zeros(5), "var": lambda p: np.ones(5)},
             ["affine-missing", "initial-variance"]),
            ({"scale": lambda p: p["scale"] * 2}, ["unexplained"]),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("names", [None, ("gamma", "beta", "moving_mean", "moving_var")])
    def test_mistakes(self, changes, expected, names):
        truth, held = batch_norm(**changes)
        if names:
            held = dict(zip(names, held.values(), strict=True))
        assert codes(findings("batch_norm", truth, held)) == expected

    def test_initial_values_exchanged(self):
        zeros, ones = np.zeros(5), np.ones(5)
        assert codes(findings("layer_norm", {"scale": ones, "bias": zeros}, {"scale": zeros, "bias": ones})) == [
            "affine-swapped"
        ]

    @pytest.mark.parametrize(("start", "other"), [(0.0, 1.0), (1.0, 0.0)])
    def test_where_the_variance_starts(self, start, other):
        truth = {"mean": np.zeros(5), "var": np.full(5, start)}
        (found,) = findings("batch_norm", truth, truth | {"var": np.full(5, other)})
        assert found.code == "initial-variance"
        assert f"starts at {other:g}" in found.evidence

    def test_absent_on_one_side(self):
        truth, _ = batch_norm()
        without = {"mean": truth["mean"], "var": truth["var"]}
        assert codes(findings("batch_norm", truth, without)) == ["affine-missing"]
        assert codes(findings("batch_norm", without, truth)) == ["affine-missing"]
        assert codes(findings("batch_norm", truth, without | {"scale": truth["scale"]})) == ["bias-missing"]

    def test_pytorch_names(self):
        truth, held = batch_norm()
        renamed = zip(("weight", "bias", "running_mean", "running_var"), truth.values(), strict=True)
        assert findings("batch_norm", dict(renamed), held) == []


class TestOther:
    @pytest.mark.parametrize("bias", [np.zeros(4), None])
    def test_bias_missing(self, bias):
        truth = {"kernel": normal(5, 4), "bias": normal(4)}
        held = {"kernel": truth["kernel"]} | ({} if bias is None else {"bias": bias})
        assert codes(findings("linear", truth, held)) == ["bias-missing"]
        if bias is None:
            assert codes(findings("linear", held, truth)) == ["bias-missing"]

    @pytest.mark.parametrize(("dtype", "name"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")])
    def test_rounded(self, dtype, name):
        kernel = normal(5, 4)
        (found,) = of_kernel("linear", kernel, kernel.astype(dtype).astype(np.float64))
        assert found.code == "unexplained"
        assert f"rounded to {name}" in found.evidence

    def test_not_loaded(self):
        kernel = normal(3, 3, 8, 8)
        (found,) = of_kernel("conv", kernel, normal(3, 3, 8, 8))
        assert found.code == "unexplained"
        assert "freshly initialised" in found.evidence

    def test_scaled(self):
        kernel = normal(3, 3, 8, 8)
        (found,) = of_kernel("conv", kernel, kernel * 3)
        assert found.code == "unexplained"
        assert "times 3" in found.evidence

    def test_where(self):
        kernel = normal(3, 4)
        held = kernel.copy()
        held[1, 2] += 1
        (found,) = of_kernel("linear", kernel, held)
        assert "1 of 12 numbers, the most at (1, 2)" in found.evidence

    def test_shape(self):
        (found,) = of_kernel("linear", normal(3, 4), normal(3, 5))
        assert "shape (3, 5)" in found.evidence

    def test_embedding(self):
        table = normal(7, 5)
        assert codes(findings("embedding", {"embedding": table}, {"embedding": table.T})) == ["kernel-transposed"]

    def test_other_kinds(self):
        query = normal(8, 2, 4)
        assert findings("attention", {"query/kernel": query}, {"query/kernel": query}) == []
        assert codes(findings("other", {"table": query}, {"table": query + 1})) == ["unexplained"]

    def test_no_numbers(self):
        with pytest.raises(ValueError, match=r"given\['kernel'\] is of dtype"):
            findings("linear", {"kernel": normal(2, 2)}, {"kernel": np.array([["a"]])})


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 99), st.booleans())
@settings(max_examples=60)
def test_correct_parameters_are_silent(shape, seed, single):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=shape), rng.normal(size=shape[-1])
    held = {"kernel": kernel, "bias": bias}
    if single:
        held = {name: value.astype(np.float32) for name, value in held.items()}
    kind = "linear" if len(shape) == 2 else "conv"
    assert findings(kind, {"kernel": kernel, "bias": bias}, held) == []
    var = np.abs(bias)
    norm = {"scale": bias, "bias": bias[::-1].copy(), "mean": bias, "var": var}
    assert findings("batch_norm", norm, norm | {"var": var.astype(np.float32)}) == []
