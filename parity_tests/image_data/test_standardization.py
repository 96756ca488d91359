import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from image_data import FeatureStatistics, feature_statistics, pixel_mean_and_std, standardize, unstandardize


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8, 1e15])
def test_mean_0_and_std_1(offset):
    x = np.random.default_rng(0).integers(-500, 500, (1000, 4)) * np.array([0.5, 1, 7, 100]) + offset
    z = standardize(x)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-13)
    np.testing.assert_allclose(z.std(0), 1, rtol=1e-13)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-300, 1e15, 1 / 3 * 1e200])
def test_constant_feature(value):
    """Becomes exactly 0, and comes back exactly."""
    x = np.stack([np.full(7, value), np.arange(7)], 1)
    statistics = feature_statistics([x[:3], x[3:4], x[4:]])
    z = standardize(x, statistics)
    assert (z[:, 0] == 0).all()
    assert (unstandardize(z, statistics)[:, 0] == value).all()
    assert statistics.std[0] == 0
    assert statistics.scale[0] == 1


@pytest.mark.parametrize("base", [1.0, -1e8, 0.1, 1e150])
def test_nearly_constant_feature(base):
    """Values one ulp apart: still mean 0 and std 1, where a mean in one float64 would be off by the whole spread."""
    x = np.full((9, 1), base)
    x[::2] = np.nextafter(base, np.inf)
    z = standardize(x)
    np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-14)


def test_spread_that_underflows():
    """Squares below the smallest float64: taken as constant, nothing overflows."""
    z = standardize(np.array([[1e-200], [3e-200]]))
    assert np.isfinite(z).all()


rows = hnp.arrays(np.float64, st.tuples(st.integers(3, 40), st.integers(1, 4)), elements=st.floats(-1e6, 1e6, width=32))


@given(rows, st.data())
def test_streaming_and_merging_are_the_whole(x, data):
    """However the rows are cut, and in whatever order the parts are merged."""
    cuts = sorted(data.draw(st.sets(st.integers(1, len(x) - 1), max_size=5)))
    parts = [p for p in np.split(x, cuts) if len(p)]
    whole = FeatureStatistics.of(x)
    size = np.abs(x).max() + 1e-300
    for merged in (feature_statistics(parts), feature_statistics(parts[::-1])):
        assert merged.num_examples == len(x)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14, atol=1e-15 * size)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-12, atol=1e-28 * size**2)


@given(rows)
def test_inverse(x):
    statistics = FeatureStatistics.of(x)
    back = unstandardize(standardize(x, statistics), statistics)
    np.testing.assert_allclose(back, x, rtol=1e-14, atol=1e-15 * (np.abs(x).max() + 1e-300))


def test_dtypes_and_shapes():
    x = np.random.default_rng(0).integers(0, 255, (20, 3, 2)).astype(np.uint8)
    assert standardize(x).dtype == np.float64
    assert standardize(x).shape == x.shape
    assert standardize(x.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(standardize(x).std(0), 1)


def test_statistics_of_another_data_set():
    train, test = np.array([[0.0], [2.0]]), np.array([[5.0]])
    assert standardize(test, FeatureStatistics.of(train)) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    x = np.zeros((4, 10))
    x[2, 7] = bad
    with pytest.raises(ValueError, match="feature 7;"):
        standardize(x)
    with pytest.raises(ValueError, match="feature 7;"):
        standardize(x, FeatureStatistics.of(np.zeros((4, 10))))
    images = np.zeros((4, 2, 3))
    images[1, 1, 2] = bad
    with pytest.raises(ValueError, match=r"feature \(1, 2\);"):
        FeatureStatistics.of(images)
    with pytest.raises(ValueError, match="feature 0, 1, 2, 3, 4 and 5 more;"):
        FeatureStatistics.of(np.full((2, 10), bad))


def test_overflow():
    x = np.array([[0.0, 1e200], [0.0, -1e200]])
    with pytest.raises(ValueError, match="too far apart for float64 in feature 1"):
        FeatureStatistics.of(x)
    with pytest.raises(ValueError, match="too far apart for float64 in feature 1"):
        feature_statistics([x[:1], x[1:]])


@pytest.mark.parametrize(
    "x", [np.zeros((0, 3)), np.zeros(3), np.array([["a"]]), np.array([[1j]])], ids=["0", "1", "a", "j"]
)
def test_refused(x):
    with pytest.raises(ValueError, match="allowed"):
        FeatureStatistics.of(x)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="allowed"):
        standardize(np.zeros((2, 3)), FeatureStatistics.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="allowed"):
        FeatureStatistics.of(np.zeros((2, 3))).merge(FeatureStatistics.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match="0 batches"):
        feature_statistics([])


def test_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2500, 5, 5)).astype(np.uint8)
    mean, std = images.mean(), images.astype(np.longdouble).std()
    np.testing.assert_allclose(pixel_mean_and_std(images), (mean, std), rtol=2**-52)
    assert pixel_mean_and_std(np.zeros((3, 2, 2), np.uint8)) == (0, 1)
