"""What each side makes of the network's input: scale, normalisation and layout, in either wing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis.between import input as inputs

SWAP = pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])
SHAPES = [(6, 8, 8, 3), (4, 6, 5, 3), (5, 9, 9, 1), (8, 12), (3, 7, 4)]


def named(x, one, other, swap=False, tolerance=1e-9):
    """x in Flax's layout; what arrives at either side's first layer, as functions of x."""
    first = one(x), other(x)
    torch_input = np.moveaxis(x, -1, 1)
    torch_first, flax_first = reversed(first) if swap else first
    return inputs.findings(x, torch_first, flax_first, torch_input=torch_input, flax_input=x, tolerance=tolerance)


def codes(found):
    return [finding.code for finding in found]


def image(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape)


def same(x):
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "scale", [lambda x: 255 * x, lambda x: x / 255, lambda x: 0.3 * x, lambda x: 2 * x - 1, lambda x: (x - 0.13) / 0.31]
)
@SWAP
def test_scale(shape, scale, swap):
    assert codes(named(image(shape), same, scale, swap)) == ["input-scale"]


@SWAP
def test_scale_evidence(swap):
    found = named(image((4, 8, 8, 3)), same, lambda x: 255 * x, swap)
    assert ("1/255" if swap else "255 times PyTorch's (0..255 for 0..1)") in found[0].evidence
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = named(image((4, 8, 8, 3)), same, lambda x: (x - mean) / std, swap)
    assert codes(found) == ["input-scale"]
    assert "(x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]" in found[0].evidence
    assert codes(named(image((4, 8, 8, 3)), lambda x: (x - mean) / std, lambda x: (x - 0.5) / std, swap)) == [
        "input-scale"
    ]


def unswapped(x):
    """N,C,H,W in memory, called N,H,W,C."""
    return np.moveaxis(x, -1, 1).reshape(x.shape)


LAYOUTS = {
    "reshaped": unswapped,
    "as it is": lambda x: np.moveaxis(x, -1, 1),
    "hw": lambda x: x.swapaxes(1, 2),
}
TURNED = {
    "channels reversed (BGR for RGB)": lambda x: x[..., ::-1],
    "H reversed": lambda x: x[:, ::-1],
    "W reversed": lambda x: x[:, :, ::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6, 8, 8, 3), (4, 6, 5, 3)])
@SWAP
def test_layout(layout, shape, swap):
    change = LAYOUTS[layout]
    assert codes(named(image(shape), same, change, swap)) == ["input-layout"]
    both = named(image(shape), same, lambda x: 255 * change(x), swap)
    assert set(codes(both)) == {"input-layout", "input-scale"}


@pytest.mark.parametrize("what", TURNED)
@SWAP
def test_turned_over(what, swap):
    """No layout, and so no known mistake; but it is said what it is, with a scale beside it in the same breath."""
    x, change = image((4, 6, 5, 3)), TURNED[what]
    (found,) = named(x, same, change, swap)
    (both,) = named(x, same, lambda x: 255 * change(x), swap)
    assert found.code == both.code == "unexplained"
    assert what in found.evidence
    assert what in both.evidence
    assert "255" in both.evidence


@SWAP
def test_flattened(swap):
    def chw(x):
        return np.moveaxis(x, -1, 1).reshape(len(x), -1)

    x = image((6, 4, 5, 3))
    assert codes(named(x, chw, lambda x: x.reshape(len(x), -1), swap)) == ["flatten-order"]
    assert codes(named(x, chw, lambda x: 255 * chw(x), swap)) == ["input-scale"]
    assert named(x[..., :1], chw, lambda x: x.reshape(len(x), -1), swap) == []


@SWAP
def test_more_before_the_first_layer(swap):
    x = image((6, 8, 8, 3)) - 0.5
    assert codes(named(x, same, np.tanh, swap)) == ["activation"]
    pooled = [lambda x, f=f: f(x.reshape(6, 4, 2, 4, 2, 3), axis=(2, 4)) for f in (np.max, np.mean)]
    assert codes(named(x, *pooled, swap)) == ["pool-kind"]
    # What comes before may be anything, if it is the same.
    assert codes(named(x, np.arctan, lambda x: 255 * np.arctan(x), swap)) == ["input-scale"]


@SWAP
def test_unexplained(swap):
    found = named(3 * image((6, 8, 8, 3)), same, np.trunc, swap)
    assert codes(found) == ["unexplained"]
    assert "whole numbers" in found[0].evidence
    assert codes(named(image((6, 8, 8, 3)), same, lambda x: image(x.shape, 5), swap)) == ["unexplained"]
    half = named(image((6, 8, 8, 3)), same, lambda x: x.astype(np.float16).astype(np.float64), swap)
    assert codes(half) == ["unexplained"]
    assert "float16" in half[0].evidence


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.booleans())
def test_correct_pairs(seed, shape, normalised):
    x = image(shape, seed)

    def read(x):
        return (x - 0.3) / 0.2 if normalised else x

    assert named(x, read, lambda x: read(x) * (1 + 1e-14)) == []
    assert named(np.floor(10 * x), read, lambda x: read(x.astype(np.int64))) == []


@SWAP
def test_float32(swap):
    x = image((6, 8, 8, 3)).astype(np.float32)
    found = named(x, same, lambda x: (x - np.float32(0.13)) / np.float32(0.31), swap, tolerance=1e-5)
    assert codes(found) == ["input-scale"]
    assert "(x - 0.13) / 0.31" in found[0].evidence
    assert codes(named(x, same, lambda x: x * np.float32(255), swap, tolerance=1e-5)) == ["input-scale"]
    assert named(x, same, lambda x: x.astype(np.float64) * (1 + 1e-7), swap, tolerance=1e-5) == []


@SWAP
def test_normalisations_that_are_nearly_the_same_are_told_apart(swap):
    x = image((4, 8, 8, 3))
    (found,) = named(x, lambda x: (x - 0.485) / 0.229, lambda x: (x - 0.485) / 0.229001, swap)
    first, second = found.evidence.removeprefix("PyTorch's first layer gets ").split(", Flax's ")
    assert found.code == "input-scale"
    assert first != second
    (found,) = named(x, same, lambda x: (1 + 3e-6) * x, swap)
    assert "is 1 times" not in found.evidence
