import numpy as np
import pytest

from parity.records.distance import relative_error, relative_norm_error


@pytest.mark.parametrize("measure", [relative_error, relative_norm_error])
def test_measures(measure):
    truth = np.array([[3.0, 0.0], [0.0, -4.0]])
    assert measure(truth, truth) == 0
    assert measure(np.zeros(3), np.zeros(3)) == 0
    assert measure(np.ones(3), np.zeros(3)) == np.inf
    assert measure([np.nan], [1.0]) == np.inf
    assert measure([1.0], [np.inf]) == np.inf
    assert measure(np.zeros(3), np.zeros((3, 1))) == np.inf


def test_values():
    truth, given = np.array([3.0, -4.0]), np.array([3.0, -3.0])
    assert relative_error(given, truth) == 0.25
    assert relative_error(given, truth, scale=10) == 0.1
    assert relative_norm_error(given, truth) == 0.2
