"""What makes programs start and run faster changes nothing else, and takes no for an answer."""

import jax
import pytest

from jax_bn import settings

NAMES = [
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
]


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """JAX as it is without a cache folder; a cache folder of the user's that is empty."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def test_what_is_compiled_is_kept(no_cache):
    folder = settings.keep_compiled()
    assert folder == no_cache / "jax_bn" / "xla"
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert settings.keep_compiled() is None, "chosen already"


def test_nowhere_to_keep_it(no_cache):
    no_cache.write_text("a file")
    assert settings.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_callers_folder_stays(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert settings.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_compiler_options_are_for_cpus(monkeypatch):
    assert jax.jit(lambda x: x + 1, compiler_options=settings.compiler_options())(1) == 2
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert settings.compiler_options() is None
