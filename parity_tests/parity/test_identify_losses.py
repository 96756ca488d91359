"""Losses of the same output: reductions and shifted labels, in either wing, from values and gradients alone."""

import jax
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity.diagnosis import loss as losses

SHAPES = [(16, 10), (7, 2), (12, 3), (4, 5, 6), (3, 4, 4, 5)]
SWAP = pytest.mark.parametrize("swap", [False, True], ids=["flax", "torch"])


def data(shape, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, shape[-1], shape[:-1])
    labels.flat[0], labels.flat[1] = 0, shape[-1] - 1
    return 2 * rng.normal(size=shape), labels


def both(output, function):
    """Value and gradient of a loss of PyTorch's, given the output with the classes last."""
    x = torch.from_numpy(output).requires_grad_()
    value = function(x)
    value.backward()
    return float(value.detach()), x.grad.numpy()


def entropy(labels, reduction="mean", smoothing=0.0):
    labels = torch.from_numpy(labels).reshape(-1)
    return lambda x: torch.nn.functional.cross_entropy(
        x.reshape(-1, x.shape[-1]), labels, reduction=reduction, label_smoothing=smoothing
    )


def named(output, one, other, swap=False, tolerance=1e-9):
    (a, da), (b, db) = (both(output, f) for f in ((other, one) if swap else (one, other)))
    return losses.findings(a, b, da, db, output, tolerance=tolerance)


def codes(found):
    return [finding.code for finding in found]


@pytest.mark.parametrize("shape", SHAPES)
@SWAP
def test_sum_for_mean(shape, swap):
    output, labels = data(shape)
    found = named(output, entropy(labels), entropy(labels, "sum"), swap)
    assert codes(found) == ["loss-reduction"]
    assert f"mean over {np.prod(shape[:-1])} " in found[0].evidence
    assert f"{'PyTorch' if swap else 'Flax'} takes the sum" in found[0].evidence


@pytest.mark.parametrize(
    ("other", "number"),
    [
        (lambda x, y: ((x - y) ** 2).sum(), "over 60 elements"),
        (lambda x, y: ((x - y) ** 2).sum(1).mean(), "over 5 columns"),
        (lambda x, y: ((x - y) ** 2).mean(1).sum(), "over 12 examples"),
        (lambda x, y: ((x - y) ** 2).mean() / 2, "half of the squared error"),
        (lambda x, y: ((x - y) ** 2).mean() * 0.7, "0.7"),
    ],
)
@SWAP
def test_squared_error(other, number, swap):
    output, target = data((12, 5))[0], torch.from_numpy(data((12, 5), 1)[0])
    found = named(output, lambda x: ((x - target) ** 2).mean(), lambda x: other(x, target), swap)
    assert codes(found) == ["loss-reduction"]
    assert number in found[0].evidence or number == "0.7"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["around", "held"])
@pytest.mark.parametrize("by", [1, -1])
@SWAP
def test_labels_from_1(shape, way, by, swap):
    output, labels = data(shape)
    k = shape[-1]
    shifted = (labels + by) % k if way == "around" else np.clip(labels + by, 0, k - 1)
    assert codes(named(output, entropy(labels), entropy(shifted), swap)) == ["label-offset"]
    assert set(codes(named(output, entropy(labels), entropy(shifted, "sum"), swap))) == {
        "label-offset",
        "loss-reduction",
    }
    smoothed = entropy(labels, smoothing=0.1), entropy(shifted, smoothing=0.1)
    assert codes(named(output, *smoothed, swap)) == ["label-offset"]


@pytest.mark.parametrize("one_hot", [False, True])
def test_labels_without_a_column(one_hot, x64):
    """optax: labels from 1 take the last class out of the columns: NaN, or a one-hot row of zeros."""
    output, labels = data((16, 10))
    value, gradient = both(output, entropy(labels))

    def loss(x):
        if one_hot:
            return optax.softmax_cross_entropy(x, jax.nn.one_hot(labels + 1, 10)).mean()
        return optax.softmax_cross_entropy_with_integer_labels(x, jax.numpy.asarray(labels + 1)).mean()

    flax_value, flax_gradient = jax.value_and_grad(loss)(jax.numpy.asarray(output))
    found = losses.findings(value, float(flax_value), gradient, np.asarray(flax_gradient), output)
    assert codes(found) == ["label-offset"]
    assert "1 more" in found[0].evidence


@SWAP
def test_unexplained(swap):
    output, labels = data((16, 10))
    found = named(output, entropy(labels), entropy(labels, smoothing=0.1), swap)
    assert codes(found) == ["unexplained"]
    assert "smooths labels by 0" in found[0].evidence
    assert "constant" in named(output, entropy(labels), lambda x: entropy(labels)(x) + 1, swap)[0].evidence
    rng = np.random.default_rng(3)
    assert codes(named(output, entropy(labels), entropy(rng.permutation(labels)), swap)) == ["unexplained"]
    assert codes(named(output, entropy(labels), lambda x: (x**2).mean(), swap)) == ["unexplained"]


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from(["mean", "sum"]), st.sampled_from([0.0, 0.2])
)
def test_correct_pairs(seed, shape, reduction, smoothing):
    output, labels = data(shape, seed)
    one = entropy(labels, reduction, smoothing)
    assert named(output, one, lambda x: one(x) * (1 + 1e-13)) == []


@SWAP
def test_float32(swap):
    output, labels = data((16, 10))
    (a, da), (b, db) = both(output.astype(np.float32), entropy(labels)), both(output, entropy((labels + 1) % 10, "sum"))
    given = (b, a, db, da) if swap else (a, b, da, db)
    assert set(codes(losses.findings(*given, output, tolerance=1e-5))) == {"label-offset", "loss-reduction"}
    (b, db) = both(output, entropy(labels))
    assert losses.findings(a, b, da, db, output, tolerance=1e-5) == []


def test_shapes():
    with pytest.raises(ValueError, match=r"flax_gradient.shape is \(3,\); allowed"):
        losses.findings(1.0, 1.0, np.ones((3, 2)), np.ones(3), np.ones((3, 2)), tolerance=1e-9)


def masked(labels, counted, divide_by):
    """Cross-entropy of the rows that are counted, by hand."""
    rows = torch.from_numpy(np.asarray(counted))

    def loss(x):
        each = torch.nn.functional.cross_entropy(x, torch.from_numpy(labels), reduction="none")
        return torch.where(rows, each, 0).sum() / divide_by

    return loss


@SWAP
def test_rows_left_out_on_one_side(swap):
    output, labels = data((10, 5))
    counted = np.arange(10) % 3 != 1
    found = named(output, masked(labels, counted, 7), masked(labels, counted | True, 10), swap)
    assert codes(found) == ["ignore-index"]
    assert f"{'Flax' if swap else 'PyTorch'} leaves out rows 1, 4, 7 (from 0)" in found[0].evidence
    # Divided by all rows on both sides; and, the second mistake, summed on one.
    found = named(output, masked(labels, counted, 10), masked(labels, counted | True, 10), swap)
    assert codes(found) == ["ignore-index"]
    found = named(output, masked(labels, counted, 7), masked(labels, counted | True, 1), swap)
    assert codes(found) == ["ignore-index", "loss-reduction"]


@SWAP
def test_rows_left_out_and_counted_in_the_mean(swap):
    output, labels = data((10, 5))
    counted = np.arange(10) % 3 != 1
    found = named(output, masked(labels, counted, 7), masked(labels, counted, 10), swap)
    assert codes(found) == ["ignore-index"]
    one = "PyTorch" if not swap else "Flax"
    assert found[0].evidence.startswith(f"3 rows out of 10 are left out on both sides: {one} takes the mean")


@SWAP
def test_no_row_is_called_left_out(swap):
    """A margin of 1 for 0.5: rows without a gradient that nobody left out. And left out, but with other labels."""
    output, labels = data((10, 5))
    margin = [
        lambda x, m=m: torch.nn.functional.multi_margin_loss(x, torch.from_numpy(labels), margin=m) for m in (1.0, 0.1)
    ]
    assert codes(named(output, *margin, swap)) == ["unexplained"]
    counted = np.arange(10) % 3 != 1
    found = named(output, masked(labels, counted, 7), masked(np.roll(labels, 1), counted | True, 10), swap)
    assert "ignore-index" not in codes(found)


@SWAP
@pytest.mark.parametrize("delta", [0.25, 0.3])
def test_a_huber_loss_for_a_smooth_l1(delta, swap):
    output, target = data((8, 4))[0], torch.from_numpy(data((8, 4), 1)[0])
    found = named(
        output,
        lambda x: torch.nn.functional.smooth_l1_loss(x, target, beta=delta),
        lambda x: torch.nn.functional.huber_loss(x, target, delta=delta),
        swap,
    )
    assert codes(found) == ["huber-delta"]
    assert f"{'PyTorch' if swap else 'Flax'}'s is a Huber loss of delta {delta}" in found[0].evidence


@SWAP
def test_a_huber_loss_summed_or_not_is_no_smooth_l1(swap):
    output, target = data((8, 4))[0], torch.from_numpy(data((8, 4), 1)[0])
    losses_of = [
        lambda x, how=how: how(torch.nn.functional.huber_loss(x, target, delta=0.5, reduction="none"))
        for how in (torch.mean, lambda v: v.mean(1).sum())
    ]
    found = named(output, *losses_of, swap)
    assert codes(found) == ["loss-reduction"]
    assert "mean over 8 examples" in found[0].evidence
