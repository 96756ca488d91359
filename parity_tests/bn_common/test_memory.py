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


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    first, again = map(int, subprocess.check_output([sys.executable, "-c", PROGRAM]).split())
    assert again < first / 4, (first, again)


def test_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_memory() is False


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
