"""What makes programs start and run faster changes nothing else, and takes no for an answer."""

import os
import subprocess
import sys

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


def test_what_is_damaged_is_compiled_anew_and_replaced(tmp_path):
    """Once, without a word, and never run."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "from jax_bn.settings import check_what_is_kept\n"
        "assert check_what_is_kept()\n"
        "compiled = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event.rpartition('/')[2]))\n"
        "print(jax.jit(lambda x: (x * 2).sum())(jnp.arange(4.0)))\n"
        "print(compiled.count('cache_hits'), compiled.count('cache_misses'))\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start():
        command = [sys.executable, "-W", "error", "-c", code]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stderr == ""
        result, found = said.stdout.splitlines()
        assert result == "12.0"
        return tuple(map(int, found.split()))

    def damage(how, pattern="*-cache"):
        for path in (tmp_path / "cache").glob(pattern):
            path.write_bytes(how(path.read_bytes()))

    _, programs = start()
    assert programs > 0
    flip = {"cut": lambda content: content[:50], "flipped": lambda content: content[:-9] + b"?" + content[-8:]}
    for how in flip.values():
        damage(how)
        assert start() == (0, programs)
    damage(lambda _: b"\xff", "*-sha256")
    assert start() == (0, programs)
    for path in (tmp_path / "cache").glob("*-sha256"):  # of another program: whole, though nothing says so
        path.unlink()
    assert start() == (programs, 0)
    damage(flip["cut"])
    assert start() == (0, programs)
    assert start() == (programs, 0)


def test_the_callers_folder_stays(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert settings.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_compiler_options_are_for_cpus(monkeypatch):
    for train in (False, True):
        assert jax.jit(lambda x: x + 1, compiler_options=settings.compiler_options(train=train))(1) == 2
    assert settings.compiler_options(train=True) != settings.compiler_options()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert settings.compiler_options(train=True) is None


def test_steps_are_computed_in_the_caller():
    """What train_jax.py starts with: as XLA's client for CPUs is made, its arrays are there when a call returns."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "from jax_bn.settings import compute_in_the_caller\n"
        "compute_in_the_caller()\n"
        "x = jnp.ones((1000, 1000))\n"
        "step = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x @ x / 1000, x)).lower(x).compile()\n"
        "print(all(step(x).is_ready() for _ in range(5)))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"
    without = code.replace("compute_in_the_caller()\nx", "x")
    said = subprocess.run([sys.executable, "-c", without], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False", "JAX does so by itself now, or has forgotten the option"
