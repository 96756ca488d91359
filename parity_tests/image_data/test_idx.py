"""The IDX reader against damaged, swapped and lying files: each a ValueError with the file, the find, the expected."""

import gzip
import struct

import numpy as np
import pytest

from image_data import read_idx, read_images, read_labels, write_idx
from image_data.idx import ALWAYS, ELEMENT_TYPES
from parity_tests import damage

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([9, 0], np.uint8)


def raw(array, *, magic=None, shape=None, extra=b""):
    """Bytes of a plain IDX file, with lies on demand."""
    shape = array.shape if shape is None else shape
    head = struct.pack(f">BBBB{len(shape)}I", *(magic or (0, 0, 8, len(shape))), *shape)
    return head + array.tobytes() + extra


@pytest.mark.parametrize("code", ELEMENT_TYPES, ids=hex)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_element_type(tmp_path, code, suffix):
    array = (np.arange(24).reshape(2, 3, 4) - (0 if code == 8 else 12)).astype(ELEMENT_TYPES[code].newbyteorder("="))
    path = tmp_path / f"a{suffix}"
    write_idx(path, array)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(suffix)
    back = read_idx(path)
    assert back.dtype == array.dtype
    assert back.dtype.isnative
    np.testing.assert_array_equal(back, array)


def test_big_endian_by_hand(tmp_path):
    """Against bytes written down by hand, not by our own writer."""
    path = tmp_path / "a"
    path.write_bytes(bytes.fromhex("00000b02 00000001 00000003 0001 0100 ffff"))
    np.testing.assert_array_equal(read_idx(path), [[1, 256, -1]])


def test_told_apart_by_content(tmp_path):
    """Gzip without .gz and plain with it, as they come out of browsers that unpack behind one's back."""
    for name, content in (("a", gzip.compress(raw(IMAGES))), ("a.gz", raw(IMAGES))):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_idx(tmp_path / name), IMAGES)


WHOLE = gzip.compress(raw(IMAGES), mtime=0)
DAMAGED = {
    "empty": (b"", "magic bytes none"),
    "text": (b"<html>", "magic bytes 3c 68 74 6d"),
    "little-endian magic": (bytes([3, 8, 0, 0]) + raw(IMAGES)[4:], "magic bytes 03 08 00 00"),
    "element type": (raw(IMAGES, magic=(0, 0, 0x0A, 3)), "element type 0x0a"),
    "no dimensions": (raw(IMAGES)[:9], "5 bytes of dimensions; expected 12"),
    "short": (raw(IMAGES)[:-1], "23 bytes behind the header; expected 24"),
    "trailing": (raw(IMAGES, extra=b"x"), "trailing bytes"),
    "huge header": (raw(IMAGES, shape=(2**32 - 1,) * 3), "24 bytes behind the header; expected 79228162458924105385"),
    "huge header, 255 dimensions": (raw(IMAGES, magic=(0, 0, 14, 255), shape=(2**32 - 1,) * 255), "24 bytes"),
    "nothing in a huge shape": (raw(IMAGES[:0], shape=(0, 2**32 - 1, 2**32 - 1)), "one that numpy can hold"),
    "100 dimensions": (raw(IMAGES[0, 0, :1], magic=(0, 0, 8, 100), shape=(1,) * 100), "one that numpy can hold"),
    "truncated gzip": (WHOLE[:-12], "ends too soon"),
    "gzip without its trailer": (WHOLE[:-8], "ends too soon"),
    "gzip header only": (WHOLE[:10], "ends too soon"),
    "CRC": (WHOLE[:-8] + bytes([WHOLE[-8] ^ 1]) + WHOLE[-7:], "CRC"),
    "gzip data": (WHOLE[:12] + b"\xff\xff\xff" + WHOLE[15:], "damaged gzip"),
    "garbage behind gzip": (WHOLE + b"garbage", "damaged gzip"),
    "huge header in gzip": (gzip.compress(raw(IMAGES, shape=(2**31, 2**31))), "expected 4611686018427387904"),
}


def test_gzip_data_that_take_a_thousand_times_the_file(tmp_path):
    path, shape = tmp_path / "black.gz", (1 << 17, 32, 32)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(struct.pack(">BBBB3I", 0, 0, 8, 3, *shape))
        for _ in range(128):
            file.write(bytes(1 << 20))
    said = damage.tried(lambda: read_idx(path), 0)
    assert said is not None
    assert f"found gzip data of more than {ALWAYS} bytes; expected at most 32 times the file" in said


@pytest.mark.parametrize(("content", "found"), DAMAGED.values(), ids=DAMAGED)
def test_damaged(tmp_path, content, found):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected") as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert found in str(caught.value)


def test_every_truncation_is_found(tmp_path):
    """Not one byte can be missing, plain or compressed."""
    path = tmp_path / "a"
    for content in (raw(IMAGES), WHOLE):
        for length in range(len(content)):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="expected"):
                read_idx(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(ValueError, match="found a folder"):
        read_idx(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", "a" * 300):
        with pytest.raises(ValueError, match="a file that can't be read"):
            read_idx(tmp_path / name)
    with pytest.raises(ValueError, match="null byte"):
        read_idx(f"{tmp_path}/a\0b")


def test_images_and_labels(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_idx(images, IMAGES)
    write_idx(labels, LABELS)
    np.testing.assert_array_equal(read_images(images), IMAGES)
    np.testing.assert_array_equal(read_labels(labels), LABELS)
    with pytest.raises(ValueError, match="a label file in its place"):
        read_images(labels)
    with pytest.raises(ValueError, match="an image file in its place"):
        read_labels(images)
    write_idx(labels, np.array([3, 10], np.uint8))
    with pytest.raises(ValueError, match="found label 10 at index 1; expected labels from 0 to 9"):
        read_labels(labels)
    assert read_labels(labels, num_class=11)[1] == 10
    write_idx(labels, LABELS.astype(np.int32))
    with pytest.raises(ValueError, match="found int32"):
        read_labels(labels)
    write_idx(images, IMAGES[:0])
    with pytest.raises(ValueError, match=r"images of shape \(0, 3, 4\)"):
        read_images(images)


def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="allowed"):
        write_idx(tmp_path / "a", np.zeros(2, np.int64))
