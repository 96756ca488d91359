"""Arrays from .npy, .npz and .safetensors files that may be damaged or hostile.

What a header promises is looked at before anything is unpacked or allocated: the memory that a file takes is a small
multiple of its size, or what its reader said that it expects.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from parity.records import strict_json
from parity.records.kinds import as_native, is_too_wide

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What safetensors calls numpy's types. Its own reader for numpy knows no bfloat16.
SAFE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# What compressed numbers may unpack to where nothing else says how much is expected: deflate reaches 1,000 times the
# file, numbers of a network seldom twice, one of which 19 in 20 are zero some ten times.
MOST_TIMES, ALWAYS = 32, 1 << 26
# Numpy reads no longer one of a file that is not trusted, and advises to trust it.
LONGEST_HEADER = 10_000
_CHUNK = 1 << 20
# What Python's readers raise of damaged archives, besides ValueError.
ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, KeyError, IndexError)


def allowed_bytes(path: Path, expected: int | None = None) -> int:
    """How many bytes a file or folder may unpack to: `expected` and ALWAYS; where it is None, a multiple of its size.

    What is not compressed is as large as the file, and allowed whatever is expected.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    return max(size, ALWAYS + (MOST_TIMES * size if expected is None else expected))


def read(path: Path, expected: int | None = None) -> dict[str, NDArray]:
    """The arrays of a .npz file by name, in their order; of a .npy file the one, under "".

    Args:
      path: the file; its content says which of the two it is.
      expected: how many bytes of arrays there should be, at most; None: not known.

    Raises:
      ValueError: it can't be read, holds objects, or promises more than it holds or than is allowed; in one line.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            file.seek(0)
            if start != np.lib.format.MAGIC_PREFIX:
                with zipfile.ZipFile(file) as archive:
                    return _read_npz(archive, allowed_bytes(path, expected))
            shape, dtype = _header(file.read(LONGEST_HEADER))
            file.seek(0)
            _check_size(path.name, shape, dtype, path.stat().st_size)
            return {"": as_native(np.lib.format.read_array(file, allow_pickle=False))}
    except ERRORS as error:
        raise ValueError(one_line(error)) from None


def _read_npz(archive: zipfile.ZipFile, most: int) -> dict[str, NDArray]:
    members = archive.infolist()
    check_members(members, most)
    found: dict[str, NDArray] = {}
    for member in members:
        name = member.filename.removesuffix(".npy")
        content = b"".join(chunks(archive, member))
        shape, dtype = _header(content[:LONGEST_HEADER])
        _check_size(name, shape, dtype, len(content))
        found[name] = as_native(np.lib.format.read_array(io.BytesIO(content), allow_pickle=False))
    if len(found) < len(members):
        raise ValueError("it has two arrays of one name")
    return found


def check_regular(path: str | Path) -> None:
    """ValueError for a pipe or a device, which may be without end, or never begin."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")


def read_safetensors(content: bytes, dtypes: Collection[str] = SAFE) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """The arrays of a .safetensors file by name, in the order of its header, and its metadata.

    Args:
      content: of the whole file.
      dtypes: which of SAFE may be in it.

    Raises:
      ValueError: it can't be read, or has another dtype; in one line.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError(f"its header is said to have {length} bytes, and the file has {len(content)}")
    header = an_object(strict_json.loads(content[8 : 8 + length]), "its header")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in [*dtypes]:
            dtype = entry.get("dtype") if isinstance(entry, dict) else entry
            raise ValueError(f"{name[:80]!r} is {str(dtype)[:40]}; allowed: {', '.join(dtypes)}")
    try:
        views = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError as error:
        raise ValueError(one_line(error)) from None
    found = {}
    for name in entries:
        view = views.pop(name)
        found[name] = np.frombuffer(bytes(view["data"]), SAFE[view["dtype"]]).reshape(view["shape"]).copy()
    return found, an_object(header.get("__metadata__", {}), "its metadata")


def an_object(value: Any, what: str) -> dict[str, Any]:
    """What was read from JSON, or ValueError where it has no names."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {type(value).__name__}; allowed: an object of names")
    return value


def check_members(members: list[zipfile.ZipInfo], most: int) -> None:
    """ValueError for a zip file that says that it unpacks to more, or has two members of one name."""
    check_bytes(sum(member.file_size for member in members), most)
    if len({member.filename for member in members}) < len(members):
        raise ValueError("it has two members of one name")


def check_bytes(unpacked: int, most: int) -> None:
    """ValueError for more than `allowed_bytes`."""
    if unpacked > most:
        raise ValueError(f"it unpacks to {unpacked / 1e6:.0f} MB; allowed: {most / 1e6:.0f} MB")


def chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """What is in it, a part at a time, so that a size that is a lie costs nothing; at the end the CRC is compared."""
    with archive.open(member) as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _header(content: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a .npy file, from its first LONGEST_HEADER bytes."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its arrays are of .npy's version {version}; allowed: 1.0 and 2.0")
    length = int.from_bytes(content[8 : 10 if version == (1, 0) else 12], "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"a header is said to have {length} bytes; allowed: {LONGEST_HEADER}")
    reader = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    try:
        shape, _, dtype = reader(stream)
    except Exception as error:  # numpy reads it as Python: whatever its tokeniser, parser and dtypes raise
        raise ValueError(f"a header can't be read ({one_line(error)})") from None
    if dtype.hasobject:
        raise ValueError("it holds objects of Python's; allowed: numbers")
    if dtype.fields is not None or dtype.subdtype is not None:
        raise ValueError(f"it holds {str(dtype)[:80]}; allowed: plain numbers")
    if is_too_wide(dtype):
        raise ValueError(f"it holds {dtype}; allowed: numbers of up to 64 bits, complex ones of twice as many")
    return shape, dtype


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], held: int) -> None:
    if any(isinstance(n, bool) or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"{name[:80]!r} is said to be {dtype} {str(shape)[:80]}, and has {held} bytes")


def one_line(error: BaseException) -> str:
    """What it says, in short."""
    return " ".join(str(error).split())[:200] or type(error).__name__
