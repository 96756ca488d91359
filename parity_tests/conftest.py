"""JAX as strict as it can be: two virtual devices, no implicit dtype promotion, rank promotion an error.

Warnings are errors too (pyproject.toml).
"""

import gc
import importlib
import os
import random
import sys

# Two workers share the processor (`-n 2` in pyproject.toml): threads of PyTorch's that wait for each other on a core
# that is taken make it ten times slower. Programs that the tests start inherit this. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The same examples each time, none of them kept from an earlier run, and no clock: a busy machine fails no test.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked `thorough`")


LONGEST = (
    "test_planted.py", "test_zoo.py", "test_batch_norm.py", "test_programs.py", "test_blenet.py", "test_lockstep.py",
    "test_identify_glue.py", "test_options.py", "test_processes.py", "test_mesh.py", "test_distributed.py",
    "test_offline.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """What shows once more what others show, or looks at the tests' own networks, is for `--all`: CI's."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # The longest files first: else one of the two workers ends with one of them, and the other waits.
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


# A third of the suite's time would go to XLA compiling what it has compiled before: the same step in another test, the
# same initialisation in each process that a test starts.
CACHE = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """XLA keeps what it compiles, in a folder of this session only, for all tests and the processes they start."""
    for name, value in (CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla"))}).items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


# JAX keeps every program for as long as the process lives, a megabyte or two each: a process would grow to 4 GB.
MOST_PROGRAMS = 250
programs_kept = 0


def count_program(event, seconds, **_):
    global programs_kept
    programs_kept += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(count_program)


def forget_programs():
    """What is needed again is read from XLA's folder."""
    global programs_kept
    jax.clear_caches()
    gc.collect()
    programs_kept = 0


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """A file's programs go with it."""
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def few_programs():
    """And sooner, of a file that has many."""
    yield
    if programs_kept > MOST_PROGRAMS:
        forget_programs()


@pytest.fixture(autouse=True)
def seeded():
    """Modules made without a seed have the same weights in every run: one test in a hundred runs failed by chance.

    Whatever a test's weights happen to be: a ReLU behind positive numbers only is no ReLU, and rightly passes.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the global generator is what other people's code draws from
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def float32_products():
    """On an accelerator too, where JAX multiplies float32 in TF32 or bfloat16 unless told otherwise."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def two_devices():
    """The test needs two: a CPU has them (above), a machine with one accelerator has not."""
    if jax.device_count() < 2:
        pytest.skip("one device")


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
def quickly_compiled(monkeypatch):
    """XLA optimises little and compiles in an eighth of the time: for tests that look at no float32 rounding, no speed.

    What makes the most of it, the emitters of fused loops, JAX has an option for with `jax.jit` and none for all.
    """
    compiler = importlib.import_module("jax._src.compiler")
    options_of = compiler.get_compile_options

    def without_emitters(*args, env_options_overrides=None, **options):
        overrides = {"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {})
        return options_of(*args, env_options_overrides=overrides, **options)

    monkeypatch.setattr(compiler, "get_compile_options", without_emitters)
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No cache folder, no system folder and no mirror: only the sample is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("image_data.sources.DEBIAN_FOLDER", tmp_path / "no-such-folder")
    # Port 9 (discard) of this machine: refused at once.
    monkeypatch.setattr("image_data.download.MIRRORS", ("http://127.0.0.1:9",))
