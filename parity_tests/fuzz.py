"""`make fuzz`: hypothesis damages files and gives them to the readers, for a minute each.

    python -m parity_tests.fuzz                      all readers
    python -m parity_tests.fuzz npz dump --seconds 10

What a reader answers with anything but its array or one line of ValueError, or with more memory than a small multiple
of the file, is printed, and kept in parity_tests/corpus/READER, which the suite reads.
"""

import argparse
import gzip
import hashlib
import json
import struct
import tempfile
import time
from pathlib import Path

import hypothesis
import numpy as np
import safetensors.numpy
import torch
from hypothesis import strategies as st

from image_data.idx import read_idx
from parity import offline
from parity.cli.named_objects import read_arrays
from parity.records import dump_file
from parity.sides import weight_files
from parity_tests import damage

CORPUS = Path(__file__).parent / "corpus"


def dumps():
    """A small dump of PyTorch's, both files in one: the JSON's length, the JSON, the arrays."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    with tempfile.TemporaryDirectory() as folder:
        x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
        offline.dump(module, [x], Path(folder) / "a")
        arrays, about = (file.read_bytes() for file in dump_file.files_of(Path(folder) / "a"))
    return struct.pack("<I", len(about)) + about + arrays


def read_dump(path):
    """Both files of `dumps`, the digests put right where they can be, so that what is behind them is looked at."""
    content = path.read_bytes()
    length = int.from_bytes(content[:4], "little")
    about, arrays = content[4 : 4 + length], content[4 + length :]
    for name, part in zip(dump_file.files_of(path.with_suffix("")), (arrays, about), strict=True):
        name.write_bytes(part)
    try:
        parsed = json.loads(about)
        parsed["sha256"] = hashlib.sha256(arrays).hexdigest()
        parsed.pop("checksum", None)
        path.with_suffix(".json").write_text(json.dumps(parsed))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return dump_file.load_whole(path.with_suffix(""))


def idx(compressed):
    content = struct.pack(">BBBB2I", 0, 0, 8, 2, 3, 4) + bytes(range(12))
    return gzip.compress(content, mtime=0) if compressed else content


def weights(suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        weight_files.save(path, damage.arrays(), {"framework": "flax"})
        return path.read_bytes()


# Reader -> (suffix, what it reads with, whole files to begin with).
READERS = {
    "idx": ("", read_idx, lambda: [idx(True), idx(False)]),
    "npy": (".npy", lambda p: read_arrays("--inputs", p), lambda: [damage.bytes_of(lambda f: np.save(f, np.eye(3)))]),
    "npz": (
        ".npz",
        weight_files.load,
        lambda: [weights(".npz"), damage.bytes_of(lambda f: np.savez_compressed(f, **damage.arrays()))],
    ),
    "pt": (".pt", weight_files.load, lambda: [weights(".pt")]),
    "safetensors": (
        ".safetensors",
        weight_files.load,
        lambda: [weights(".safetensors"), safetensors.numpy.save({"a": np.ones(2)})],
    ),
    "dump": (".bytes", read_dump, lambda: [dumps()]),
}


def try_file(name, content, folder):
    """What the reader says of this content; AssertionError or whatever it raises where that is not allowed."""
    suffix, read, _ = READERS[name]
    path = Path(folder) / f"file{suffix}"
    path.write_bytes(content)
    return damage.tried(lambda: read(path), len(content))


STEP = st.tuples(st.sampled_from(damage.KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 511))


def kept(name):
    """The damaged files that were found for a reader."""
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def fuzz(name, seconds, folder):
    """How many files were tried, and what was found."""
    wholes = READERS[name][2]()
    end, count, batch = time.monotonic() + seconds, 0, 0
    last: list[bytes] = []

    def one(whole, steps):
        nonlocal count
        count += 1
        last[:] = [damage.damaged(whole, steps)]
        try_file(name, last[0], folder)

    while time.monotonic() < end:
        batch += 1
        given = hypothesis.given(st.sampled_from(wholes), st.lists(STEP, min_size=1, max_size=4))(one)
        quiet = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
        options = {"max_examples": 500, "deadline": None, "database": None, "suppress_health_check": quiet}
        try:
            hypothesis.settings(**options)(hypothesis.seed(batch)(given))()
        except Exception as error:  # whatever a reader raises is what is looked for
            found = CORPUS / name / f"{hashlib.sha256(last[0]).hexdigest()[:12]}.bin"
            found.parent.mkdir(parents=True, exist_ok=True)
            found.write_bytes(last[0])
            return count, f"{type(error).__name__}: {str(error).splitlines()[:1]}; kept as {found}"
    return count, None


def main():
    parser = argparse.ArgumentParser(description="damage files, and read them")
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; none: all")
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    unknown = [name for name in given.readers if name not in READERS]
    if unknown:
        parser.error(f"readers is {unknown[0]}; allowed: {', '.join(READERS)}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in given.readers or READERS:
            count, found = fuzz(name, given.seconds, folder)
            print(f"{name}: {count} files, {found or 'nothing found'}", flush=True)
            failed |= found is not None
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
