"""Any shape, dtype, scale and convention: both wings against exact arithmetic (hypothesis)."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.test_batch_norm import check
from parity_tests.wings import WINGS

# JAX takes its shapes from a list, as XLA compiles each anew: few channels with some, prime and no pixels; channels
# beside a single pixel; m = 2; ranks 2 to 5. PyTorch takes any.
SHAPES = [(2, 1), (7, 5), (3, 2, 5), (1, 3, 4, 2), (5, 1, 3, 3), (4, 6, 2, 6), (2, 40, 1, 1), (2, 2, 2, 1, 3)]
OPTIONS = [
    {"train": True, "momentum": 0.9, "eps": 1e-5},
    {"train": True, "momentum": 0.0, "eps": 1e-12},
    {"train": True, "momentum": 0.99, "eps": 1e-3, "unbiased_moving_var": True},
    {"train": False},
]


@st.composite
def cases(draw, shapes):
    """x, gamma, beta, moving_mean, moving_var, dy in float64, and the options."""
    shape = tuple(draw(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wide = (-1, *[1] * (len(shape) - 2))
    c = shape[1]
    std = 10.0 ** rng.uniform(draw(st.sampled_from([-12, -3, 0])), draw(st.sampled_from([0, 3, 6])), c)
    mean = draw(st.sampled_from([0.0, 1.0, -1e3, 1e6])) * std * rng.choice([1.0, 1e-2], c)
    x = mean.reshape(wide) + std.reshape(wide) * rng.normal(size=shape)
    if draw(st.booleans()):
        x[:, rng.integers(c)] = mean[0]  # a constant channel
    if draw(st.booleans()):
        x.reshape(-1)[rng.integers(x.size)] *= draw(st.sampled_from([-1e3, 1e3]))
    dy = draw(st.sampled_from([0.0, 1.0, -100.0])) + rng.normal(size=shape) * draw(st.sampled_from([0.0, 1.0]))
    arrays = x, rng.normal(size=c), rng.normal(size=c), mean + std * rng.normal(size=c), std**2, dy
    return arrays, draw(st.sampled_from(OPTIONS))


ANY = st.lists(st.integers(1, 7), min_size=2, max_size=5).filter(lambda shape: np.prod(shape) >= 2 * shape[1])


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("wing", WINGS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_exact(wing, name, data):
    arrays, options = data.draw(cases(st.sampled_from(SHAPES) if wing == "jax" else ANY))
    with jax.enable_x64(name == "float64"):
        check(wing, tuple(v.astype(name) for v in arrays), name, **options)
