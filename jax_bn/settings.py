"""What makes XLA's programs start and run faster, beside what they compute. JAX only: PyTorch is asked for nothing."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bn_common.files import write_whole


def compiler_options(*, train: bool = False) -> dict[str, int] | None:
    """The `compiler_options` of `jax.jit` for the default backend.

    On a CPU: vectors of 512 bits, where it has them. LLVM prefers 256 bits, as old processors slowed down for more.

    Args:
      train: for a training step. LLVM's second level of optimisation, and not the third: BLeNet's step is compiled in
        three quarters of the time and takes as long. Prediction would take a twelfth longer.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_cpu_prefer_vector_width": 512} | ({"xla_backend_optimization_level": 2} if train else {})


def compute_in_the_caller() -> None:
    """On a CPU, compute in the thread that calls; to be said before JAX looks for its devices.

    In a thread of XLA's, as else, glibc gives memory back to the system whatever `bn_common.memory` says, and all of it
    beyond 64 MiB: a step of BLeNet on 1024 images then takes half as long again for page faults.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def be_deterministic() -> None:
    """Have XLA take kernels for GPUs that add in a fixed order, the same each time; before JAX looks for devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def say_errors_once() -> None:
    """Orbax's log of what it could not write, trace for trace, is left out: `jax_bn.checkpoint` raises it.

    So is what TensorStore's threads print when its other writes find the first one to have failed.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def say(unraisable: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            before(unraisable)

    sys.unraisablehook = say


def find_devices() -> None:
    """Let JAX look for its devices.

    Raises:
      ValueError: JAX_PLATFORMS names what this machine does not have.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda, where its plugin is not installed
        why = str(error).partition(" (set JAX_PLATFORMS")[0] or "it is not there"
        allowed = "what JAX finds on this machine, or nothing"
        raise ValueError(f"JAX_PLATFORMS is {jax.config.jax_platforms!r}: {why}; allowed: {allowed}") from None  # type: ignore[attr-defined]


class CheckedCache:
    """JAX's cache of compiled programs, which gives what was written or nothing.

    JAX writes entries in place, warns about each that it can't read, at every start, and never replaces one; and a
    flipped byte that can be read is run. Here each has its SHA-256 beside it, and goes when that is another. One
    without, by another program or a process killed in the midst of it, is to be whole at least.

    Args:
      kept: JAX's own cache.
      folder: where it has its files.
      unpack: what JAX does first with an entry; raises where it can't.
    """

    def __init__(self, kept: Any, folder: str, unpack: Callable[[bytes], bytes]) -> None:
        self._kept, self._path, self._unpack = kept, folder, unpack  # JAX asks for the path

    def get(self, key: str) -> bytes | None:
        """What was written for the key."""
        value = self._kept.get(key)
        if value is None:
            return None
        digest = self._digest_file(key)
        try:
            if digest.read_bytes() == _sha256(value):
                return value
        except FileNotFoundError:
            # Whatever it raises: the compressors have errors of their own.
            with contextlib.suppress(Exception):
                self._unpack(value)
                return value
        with contextlib.suppress(OSError):  # a folder that can't be written: compiled anew each time
            for path in (digest, digest.with_name(f"{key}-cache")):
                path.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Write it, unless there is something already: what another process is writing now may differ in its times."""
        if not self._digest_file(key).exists():
            self._kept.put(key, value)
            write_whole(self._digest_file(key), _sha256(value))

    def clear(self) -> None:
        """As JAX does it."""
        self._kept.clear()

    def _digest_file(self, key: str) -> Path:
        return Path(self._path) / f"{key}-sha256"


def _sha256(value: bytes) -> bytes:
    return hashlib.sha256(value).hexdigest().encode()


def check_what_is_kept() -> bool:
    """Have JAX use `CheckedCache` from its first compilation on; whether it has a place for it."""
    # JAX says where the cache is, but not which it is.
    compilation_cache = importlib.import_module("jax._src.compilation_cache")
    make, unpack = (getattr(compilation_cache, name, None) for name in ("get_file_cache", "decompress_executable"))
    if make is None or unpack is None:
        return False

    def make_checked(path: str) -> tuple[CheckedCache, str] | None:
        made: tuple[Any, str] | None = make(path)
        return None if made is None else (CheckedCache(made[0], made[1], unpack), made[1])

    compilation_cache.get_file_cache = make_checked  # type: ignore[attr-defined]
    return True


def keep_compiled() -> Path | None:
    """Keep what XLA compiles in the user's cache folder, for the next start; returns the folder.

    None where it can't be written, and where JAX_COMPILATION_CACHE_DIR or the caller has chosen one already.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "jax_bn" / "xla"
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # All of it: a start has a dozen programs of a tenth of a second each beside the step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
