"""Files damaged in every way, and what a reader may do with one: give what is in it, or one line of ValueError."""

import io
import tracemalloc
import warnings

import numpy as np

from parity.records.array_files import ALWAYS, MOST_TIMES

# Counts and sizes at which a careless reader allocates, wraps round or overruns.
NUMBERS = [n.to_bytes(8, "little") for n in (0, 1, 127, 2**31 - 1, 2**32 - 1, 900_000_000, 2**63 - 1, 2**64 - 1)]


def damaged(content, steps):
    """The bytes after each step of (kind, where as a part of the length, number)."""
    made = bytearray(content)
    for kind, part, number in steps:
        at = int(part * len(made))
        if kind == "flip" and made:
            made[min(at, len(made) - 1)] ^= 1 << number % 8
        elif kind == "cut":
            del made[at:]
        elif kind == "drop":
            del made[at : at + number % 64]
        elif kind == "double":
            made[at:at] = made[at : at + number % 64]
        elif kind == "number":
            value = NUMBERS[number % len(NUMBERS)]
            value = value[: (1, 2, 4, 8)[number // 8 % 4]]
            made[at : at + len(value)] = value if number % 64 < 32 else value[::-1]
    return bytes(made)


KINDS = "flip", "cut", "drop", "double", "number"


def every_kind(content, rng, count):
    """That many damaged files, the first of them cut at evenly spread places."""
    cuts = np.linspace(0, 1, count // 4, endpoint=False)
    yield from (damaged(content, [("cut", part, 0)]) for part in cuts)
    for _ in range(count - len(cuts)):
        steps = [(KINDS[rng.integers(5)], rng.random(), int(rng.integers(512))) for _ in range(rng.integers(1, 4))]
        yield damaged(content, steps)


def tried(read, size):
    """What the reader says of a file of that size, or None where it reads it; anything else is raised.

    Python's and numpy's memory is measured; a file may take what the readers allow, twice.
    """
    said, most = None, 2 * (ALWAYS + MOST_TIMES * size)
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except ValueError as error:
        said = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert said is None or "\n" not in said, said
    assert said is None or len(said) < 1000, said
    assert peak <= most, f"{peak} bytes for a file of {size}"
    return said


def arrays():
    """A few small ones, of several dtypes."""
    rng = np.random.default_rng(0)
    return {
        "params/Dense_0/kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "params/Dense_0/bias": np.zeros(3),
        "batch_stats/BatchNorm_0/count": np.array(7, np.int32),
    }


def bytes_of(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()
