"""JAX as strict as it can be: two virtual devices, no implicit dtype promotion, rank promotion an error.

Warnings are errors too (pyproject.toml).
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Name of the dtype to test in; JAX knows float64 while the test runs if that is it."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def x64():
    """JAX knows float64 while the test runs."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No cache folder, no system folder and no mirror: only the sample is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("image_data.sources.DEBIAN_FOLDER", tmp_path / "no-such-folder")
    # Port 9 (discard) of this machine: refused at once.
    monkeypatch.setattr("image_data.download.MIRRORS", ("http://127.0.0.1:9",))
