"""The IDX file format of MNIST and its relatives, gzip-compressed or plain.

A file is two zero bytes, one byte for the element type, one for the number of dimensions, each dimension as a
big-endian uint32, and the elements, big-endian, last dimension fastest (Y. LeCun, C. Cortes, C. J. C. Burges, "The
MNIST database of handwritten digits").
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

ELEMENT_TYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
# What gzip data may unpack to: deflate reaches 1,000 times the file, photographs and drawings seldom ten times.
MOST_TIMES, ALWAYS = 32, 1 << 26


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array in an IDX file, gzip-compressed or plain (told apart by the content, not by the name).

    Args:
      path: the file.

    Returns:
      An array in native byte order, with the file's element type and dimensions.

    Raises:
      ValueError: the file is missing, a folder or unreadable; truncated or damaged gzip data, or such that unpacks to
        more than MOST_TIMES its size (ALWAYS bytes of a small one); no IDX magic; an unknown element type; a payload
        shorter or longer than the header says. The message names the file, what was found and what was expected. A
        header that promises more than the file holds costs no memory.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path}: found a folder; expected an IDX file")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, which may be without end
        raise ValueError(f"{path}: found no regular file; expected an IDX file")
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: found a name with a null byte; expected the name of an IDX file")
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse(path, raw)
            most = max(ALWAYS, MOST_TIMES * os.fstat(raw.fileno()).st_size)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(path, stream, most)  # type: ignore[arg-type]
    except FileNotFoundError:
        raise ValueError(f"{path}: found no such file; expected an IDX file") from None
    except EOFError:
        raise ValueError(f"{path}: found gzip data that ends too soon; expected a whole gzip file") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: found damaged gzip data ({error}); expected a whole gzip file") from None
    except OSError as error:
        raise ValueError(f"{path}: found a file that can't be read ({error.strerror}); expected an IDX file") from None


def _parse(path: Path, stream: BinaryIO, most: float = math.inf) -> NDArray[Any]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"{path}: found magic bytes {magic.hex(' ') or 'none'}; expected 00 00, a type, a rank")
    if magic[2] not in ELEMENT_TYPES:
        known = ", ".join(f"{code:#04x}" for code in ELEMENT_TYPES)
        raise ValueError(f"{path}: found element type {magic[2]:#04x}; expected one of {known}")
    dtype, rank = ELEMENT_TYPES[magic[2]], magic[3]
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise ValueError(f"{path}: found {len(header)} bytes of dimensions; expected {4 * rank} for rank {rank}")
    shape = struct.unpack(f">{rank}I", header)
    expected = math.prod(shape) * dtype.itemsize
    payload, enough = bytearray(), min(expected, most)
    while len(payload) <= enough and (chunk := stream.read(min(_CHUNK, int(enough) + 1 - len(payload)))):
        payload += chunk
    if most < len(payload) <= expected:
        raise ValueError(
            f"{path}: found gzip data of more than {most} bytes; expected at most {MOST_TIMES} times the file"
        )
    if len(payload) != expected:
        found = f"{len(payload)} bytes" if len(payload) < expected else "trailing bytes"
        raise ValueError(f"{path}: found {found} behind the header; expected {expected} for shape {shape}")
    try:
        array = np.frombuffer(payload, dtype).reshape(shape)
    except ValueError as error:  # no element at all in a huge shape, or too many dimensions
        raise ValueError(f"{path}: found shape {shape}; expected one that numpy can hold ({error})") from None
    return array.astype(dtype.newbyteorder("="), copy=False)


def write_idx(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """Write an array as an IDX file, gzip-compressed if the name ends in .gz; the same array gives the same bytes.

    Raises:
      ValueError: the array's dtype is none of IDX's, or its rank is above 255.
    """
    codes = {dtype.newbyteorder("="): code for code, dtype in ELEMENT_TYPES.items()}
    if array.dtype not in codes:
        raise ValueError(f"the dtype is {array.dtype}; allowed: {', '.join(map(str, codes))}")
    if array.ndim > 255:
        raise ValueError(f"the rank is {array.ndim}; allowed: 255 or less")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, codes[array.dtype], array.ndim, *array.shape)
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    Path(path).write_bytes(gzip.compress(content, 9, mtime=0) if Path(path).suffix == ".gz" else content)
