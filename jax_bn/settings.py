"""What makes XLA's programs start and run faster, beside what they compute. JAX only: PyTorch is asked for nothing."""

from __future__ import annotations

import os
from pathlib import Path

import jax


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
