"""The truth for long inputs against the one in mpmath, and its sums against integers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from truth import batch_norm as exact

# (mean, std): the hard ones cancel in x - mean, in the variance and in dgamma.
INPUTS = [(0.0, 1.0), (1e6, 0.1), (-1e5, 1e-2), (0.0, 1e-20), (3.0, 0.0)]


def draw(shape, mean, std, seed=0):
    """x, gamma, beta, moving_mean, moving_var, dy."""
    rng, c = np.random.default_rng(seed), shape[1]
    arrays = (
        rng.normal(mean, std, shape),
        rng.uniform(0.5, 2, c),
        rng.normal(size=c),
        rng.normal(size=c),
        rng.uniform(0.5, 2, c),
        rng.normal(0.5, 1, shape),
    )
    return tuple(a.astype(np.float32) for a in arrays)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("mean", "std"), INPUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (40, 3, 4, 2)], ids=str)
def test_long_is_the_same(shape, mean, std, train, masked):
    """Per channel to 50 digits, y and dx within 1e-3 float32 eps."""
    arrays = draw(shape, mean, std)
    mask = None
    if masked:
        mask = np.random.default_rng(1).uniform(size=(shape[0], *[1] * (len(shape) - 1))) < 0.7
        mask[0] = True
    options = {"train": train, "momentum": 0.25, "mask": mask, "unbiased_moving_var": not masked}
    truth, given = exact.batch_norm(*arrays, **options), exact.long_batch_norm(*arrays, **options)
    _, gamma, _, _, _, dy = arrays
    for name in ("moving_mean", "moving_var", "mean", "var", "dgamma", "dbeta"):
        a, b = getattr(given, name), getattr(truth, name)
        # A variance and a dgamma of exactly 0 are what rounding leaves of them in mpmath.
        assert all(abs(p - q) <= 1e-50 * max(abs(q), mean**2, 1) for p, q in zip(a, b, strict=True)), name
    largest_dy = np.abs(dy).max(tuple(i for i in range(len(shape)) if i != 1))
    scale = gamma * largest_dy / np.sqrt((truth.var + 1e-5).astype(float))
    assert given.y.dtype == given.dx.dtype == np.longdouble
    for a, b, size in ((given.y, truth.y, np.abs(truth.y.astype(float))), (given.dx, truth.dx, scale.reshape(-1, 1))):
        size = np.moveaxis(size, 1, 0).reshape(shape[1], -1).max(1) if size.shape == shape else size[:, 0]
        # longdouble as two doubles, which mpmath takes without rounding
        first = a.astype(np.float64)
        error = exact._to_mp(first) + exact._to_mp((a - first).astype(np.float64)) - b
        error = np.moveaxis(np.abs(error), 1, 0).reshape(shape[1], -1).max(1)
        assert (error <= 1e-3 * 2.0**-23 * size).all()


@pytest.mark.parametrize("seed", range(3))
def test_sums_do_not_round(seed):
    """Of values over the whole range of float64, and against integers where these are known."""
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.normal(size=200), rng.integers(-1000, 900, 200))
    assert exact._exact_sum(values) == sum(map(Fraction, values.tolist()))
    whole = rng.integers(-(2**53), 2**53, 100_000)
    assert exact._exact_sum(whole.astype(np.float64)) == sum(whole.tolist())
    assert exact._exact_sum(np.zeros(3)) == 0
    assert exact._exact_sum(np.array([5e-324, -5e-324, 5e-324])) == Fraction(5e-324)


def test_masked_gradients_are_derivatives():
    """Of sum(y * dy), by differences of exact values."""
    x, gamma, beta, mean, var, dy = draw((6, 2), 1.0, 1.0)
    mask = np.array([1, 1, 0, 1, 0, 1], bool)[:, None]

    def loss(x):
        return (exact.batch_norm(x, gamma, beta, mean, var, dy, train=True, mask=mask).y * exact._to_mp(dy)).sum()

    dx = exact.batch_norm(x, gamma, beta, mean, var, dy, train=True, mask=mask).dx
    wide = x.astype(np.float64)
    for i in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[i] = 2.0**-20
        assert float((loss(wide + step) - loss(wide - step)) * 2**19 - dx[i]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1.0)], ids=str)
def test_long_is_the_same_in_float64(mean, std):
    """Whose products have more bits than float64: per channel to 50 digits, y and dx within the bounds it gives."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(mean, std, (40, 3, 4, 2)), rng.normal(size=(40, 3, 4, 2))
    arrays = (x, *rng.uniform(0.5, 2, (4, 3)), dy)
    truth, given = (f(*arrays, train=True) for f in (exact.batch_norm, exact.long_batch_norm))
    for name in ("moving_mean", "moving_var", "mean", "var", "dgamma", "dbeta"):
        pairs = zip(getattr(given, name), getattr(truth, name), strict=True)
        assert all(abs(p - q) <= 1e-50 * max(abs(q), mean**2, 1) for p, q in pairs), name
    if np.finfo(np.longdouble).nmant >= 63:
        for a, b, bound in ((given.y, truth.y, 2**-7), (given.dx, truth.dx, 2**-9 * (2 + math.sqrt(320)))):
            first = a.astype(np.float64)
            error = exact._to_mp(first) + exact._to_mp((a - first).astype(np.float64)) - b
            assert np.abs(error).max() <= bound * 2**-52 * np.abs(b).max()


def test_long_error_is_the_same():
    """Measured in longdouble as in mpmath."""
    arrays = draw((40, 3, 4, 2), 1e4, 1.0)
    truth, given = (f(*arrays, train=True) for f in (exact.batch_norm, exact.long_batch_norm))
    y = truth.y.astype(np.float32)
    error = exact.error_in_eps(y, given.y, "float32")
    assert error == pytest.approx(exact.error_in_eps(y, truth.y, "float32"), rel=1e-6)
    assert 0 < error <= 0.5
    y[3, 1, 0, 0] = np.nan
    assert exact.error_in_eps(y, given.y, "float32") == np.inf
