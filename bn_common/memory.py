"""What a process does with memory that it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# glibc's numbers of these options, see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Let this process keep what it has freed, for the next step; whether that could be said.

    A step asks for the same arrays each time: XLA for one buffer with all that it computes on the way, PyTorch for
    every tensor. From 32 MiB on, and below where that lay at the end of the heap, glibc gives them back to the system
    at once, and the next ones cost a page fault for every 4 KiB: as much time as the step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, NEVER) and mallopt(M_TRIM_THRESHOLD, NEVER))


def give_back() -> bool:
    """Give the system what this process has freed, but keeps between what it still holds; whether that could be said.

    Of arrays of every size that come and go, glibc keeps up to a third of the most that there ever was.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(0))


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around imports: what they make stays, so the garbage collector does not look through it, then or later.

    It would time and again, while JAX is imported and traces its first functions: 0.2 s of a start of 3.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
