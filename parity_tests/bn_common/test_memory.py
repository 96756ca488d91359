"""A process that keeps its memory: where the C library can be told so."""

import contextlib
import gc
import subprocess
import sys

import pytest

from bn_common import memory

# Pages that a process takes anew for 64 MiB which it has just freed.
PROGRAM = """
import resource
from bn_common.memory import keep_memory
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
assert keep_memory()
faults()
print(first, faults())
"""


# MiB that a process has of 64 which it has freed, below something that it still holds.
FREED = """
import os
from bn_common.memory import give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

first = resident()
many = [bytearray(100_000) for _ in range(671)]
many = many[-1:]
kept = resident() - first
given = give_back()
print(kept, given, resident() - first)
"""


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_given_back():
    kept, given, left = subprocess.check_output([sys.executable, "-c", FREED], text=True).split()
    assert given == "True"
    assert float(kept) > 32
    assert float(left) < 8


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    first, again = map(int, subprocess.check_output([sys.executable, "-c", PROGRAM]).split())
    assert again < first / 4, (first, again)


def test_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_memory() is False
    assert memory.give_back() is False


def test_nothing_is_collected_among_imports():
    """Nor afterwards among what they have made; all else is again."""
    before = gc.get_freeze_count()
    try:
        with contextlib.suppress(ModuleNotFoundError), memory.imports():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
