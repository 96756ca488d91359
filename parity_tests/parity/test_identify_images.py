"""Images that a function resizes or pads between two layers: PyTorch's functions and JAX's, and near misses."""

import itertools

import jax
import numpy as np
import pytest
import torch

from parity.diagnosis.between.chains import Source
from parity.diagnosis.between.family import findings

F = torch.nn.functional
SWAP = pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])
THOROUGH = pytest.mark.parametrize(
    "swap", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["flax", "torch"]
)
U = np.random.default_rng(0).normal(size=(3, 8, 6, 4))


def through(function, u=U):
    """A function of PyTorch's (channels second) of u (channels last)."""
    return np.moveaxis(function(torch.from_numpy(np.moveaxis(u, -1, 1).copy())).numpy(), 1, -1)


def named(first, second, swap=False, more=()):
    return findings([Source("conv2", U), *more], *((second, first) if swap else (first, second)), train=False)


def codes(*args, **kwargs):
    return [finding.code for finding in named(*args, **kwargs)]


def interpolated(size, **options):
    return lambda x: F.interpolate(x, size, **options)


def jax_resized(size, method, **options):
    return np.asarray(jax.image.resize(U, (len(U), *size, U.shape[-1]), method, **options))


UP, DOWN = (12, 9), (5, 4)
TORCH = {
    "nearest": {"mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear, corners": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": False},
    "bicubic, corners": {"mode": "bicubic", "align_corners": True},
    "area": {"mode": "area"},
}
ANTIALIASED = {
    "bilinear, antialiased": {"mode": "bilinear", "antialias": True},
    "bicubic, antialiased": {"mode": "bicubic", "antialias": True},
}


@pytest.mark.parametrize("size", [UP, DOWN], ids=["up", "down"])
@THOROUGH
def test_resize(size, swap):
    ways = TORCH if size == UP else TORCH | ANTIALIASED
    made = {name: through(interpolated(size, **options)) for name, options in ways.items()}
    for first, second in itertools.combinations(made, 2):
        assert codes(made[first], made[second], swap) == ["resize"], (first, second)


@THOROUGH
def test_resize_of_jax(x64, swap):
    """JAX has PyTorch's bilinear way, but antialiased where it makes smaller; its nearest is nearest-exact."""
    made = {name: through(interpolated(DOWN, **options)) for name, options in (TORCH | ANTIALIASED).items()}
    assert codes(made["bilinear, antialiased"], jax_resized(DOWN, "bilinear")) == []
    assert codes(made["bilinear"], jax_resized(DOWN, "bilinear"), swap) == ["resize"]
    assert codes(made["bilinear"], jax_resized(DOWN, "bilinear", antialias=False), swap) == []
    assert codes(made["nearest-exact"], jax_resized(DOWN, "nearest"), swap) == []
    for method in ("nearest", "linear", "cubic", "lanczos3"):
        for antialias in (True, False):
            other = jax_resized(DOWN, method, antialias=antialias)
            expected = {("linear", True): "bilinear, antialiased", ("linear", False): "bilinear"}
            right = expected.get((method, antialias))
            if right is None and method != "nearest":
                assert codes(made["bilinear, corners"], other, swap) == ["resize"], (method, antialias)


@THOROUGH
def test_resize_beside_other_things(swap):
    """Behind or before an activation, added to a skip, or joined to it."""
    skip = Source("conv1", np.random.default_rng(1).normal(size=(3, *UP, 4)))
    sides = [through(interpolated(UP, **TORCH[name])) for name in ("nearest", "bilinear")]
    assert codes(*(through(F.relu, side) for side in sides), swap) == ["resize"]
    before = [through(lambda x, n=n: interpolated(UP, **TORCH[n])(F.gelu(x))) for n in ("nearest", "bilinear")]
    assert codes(*before, swap) == ["resize"]
    assert codes(*(side + skip.value for side in sides), swap, more=[skip]) == ["resize"]
    joined = [np.concatenate([side, through(torch.arctan, skip.value)], -1) for side in sides]
    assert codes(*joined, swap, more=[skip]) == ["resize"]
    # The same way with another activation is the activation.
    assert codes(through(F.relu, sides[1]), through(F.gelu, sides[1]), swap) == ["activation"]


@SWAP
def test_what_is_no_other_resize(swap):
    """A blurred image, and one moved by half a pixel."""
    right = through(interpolated(UP, **TORCH["bilinear"]))
    blurred = through(lambda x: F.avg_pool2d(F.pad(interpolated(UP, **TORCH["bilinear"])(x), (1, 1, 1, 1)), 3, 1))
    moved = 0.5 * (right + np.roll(right, 1, 1))
    assert codes(right, blurred, swap) == ["unexplained"]
    assert codes(right, moved, swap) == ["unexplained"]


MODES = {name: {"mode": name} for name in ("constant", "reflect", "replicate", "circular")} | {
    "ones": {"mode": "constant", "value": 1.0}
}


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (0, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("activation", [lambda x: x, F.relu])
@THOROUGH
def test_pad_mode(widths, activation, swap):
    made = {name: through(lambda x, o=o: F.pad(activation(x), widths, **o)) for name, o in MODES.items()}
    for first, second in itertools.combinations(made, 2):
        assert codes(made[first], made[second], swap) == ["pad-mode"], (first, second)
    # One mode of other widths is the padding; with another activation inside, the activation.
    left, right, top, bottom = widths
    for options in MODES.values():
        other = through(lambda x, o=options: F.pad(activation(x), (left + 1, right - 1, top, bottom), **o))
        assert codes(through(lambda x, o=options: F.pad(activation(x), widths, **o)), other, swap) == ["padding"]
    silu = through(lambda x: F.pad(F.silu(x), widths, mode="reflect"))
    assert codes(made["reflect"], silu, swap) == ["activation"]


@SWAP
def test_what_is_no_other_pad_mode(swap):
    """Noise around the image, and a border that is repeated at half its size."""
    right = through(lambda x: F.pad(x, (1, 1, 1, 1)))
    noise = np.random.default_rng(2).normal(size=right.shape)
    noise[:, 1:-1, 1:-1] = U
    half = through(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"))
    half[:, [0, -1]] *= 0.5
    for wrong in (noise, half):
        assert codes(right, wrong, swap) == ["unexplained"]
