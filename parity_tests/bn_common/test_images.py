"""Image files: which grey levels come of them, and what is refused, with which words."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import image_data
from bn_common import images
from bn_common.images import read_image

LEVELS = image_data.load_sample().test_images[0]


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_a_training_image_comes_back_bit_for_bit(tmp_path):
    """Grey, in colours, with a palette, with an alpha channel that hides nothing, and in 16 bits."""
    grey = Image.fromarray(LEVELS)
    forms = {
        "L": grey,
        "RGB": grey.convert("RGB"),
        "P": grey.convert("P"),
        "LA": grey.convert("LA"),
        "RGBA": grey.convert("RGBA"),
    }
    forms["16 bits"] = Image.fromarray(LEVELS.astype(np.uint16) * 257)
    for name, image in forms.items():
        found = read_image(saved(tmp_path / f"{name}.png", image), 28)
        assert (found.dtype, found.shape) == (np.uint8, (28, 28))
        np.testing.assert_array_equal(found, LEVELS, err_msg=name)
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png", 28, resize=True), LEVELS, err_msg=name)
    inverted = saved(tmp_path / "inverted.png", 255 - LEVELS)
    np.testing.assert_array_equal(read_image(inverted, 28, invert=True), LEVELS)
    near = read_image(saved(tmp_path / "a.jpg", LEVELS, quality=95), 28)
    assert np.abs(near.astype(int) - LEVELS).max() < 16
    near = read_image(saved(tmp_path / "b.jpg", grey.convert("RGB").convert("CMYK"), quality=95), 28)
    assert np.abs(near.astype(int) - LEVELS).max() < 32
    assert read_image(tmp_path / "a.jpg", None).shape == (28, 28)


def test_colours(tmp_path):
    """By their weights in ITU-R BT.601."""
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8).repeat(4, 0)
    found = read_image(saved(tmp_path / "a.png", colours), 4)
    np.testing.assert_array_equal(found[0], [76, 150, 29, 255])


@pytest.mark.parametrize("invert", [False, True])
def test_what_is_transparent_is_background(invert, tmp_path):
    """Whatever colour is hidden there, and whichever kind of transparency it is: background is what is learnt as 0."""
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., :3] = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    half = np.full((4, 4), 200, np.uint8)
    half[0] = 100
    files = {
        "RGBA": saved(tmp_path / "a.png", hidden),
        "a grey level": saved(tmp_path / "b.png", half, transparency=200),
        "a colour of a palette": saved(tmp_path / "c.png", Image.fromarray(half).convert("P"), transparency=200),
    }
    for name, path in files.items():
        found = read_image(path, 4, invert=invert)
        shown = found if name == "RGBA" else found[1:]
        np.testing.assert_array_equal(shown, 0, err_msg=name)
        assert name == "RGBA" or (found[0] == (155 if invert else 100)).all()


def test_resized(tmp_path):
    """The longer side fits, the shorter one is filled up with background: neither squeezed nor cut off."""
    tall = np.full((80, 40), 200, np.uint8)
    found = read_image(saved(tmp_path / "a.png", tall), 28, resize=True)
    assert found.shape == (28, 28)
    assert (found[:, 7:21] == 200).all()
    assert not found[:, :7].any()
    assert not found[:, 21:].any()
    found = read_image(saved(tmp_path / "b.png", 255 - tall), 28, resize=True, invert=True)
    assert (found[:, 7:21] == 200).all()
    assert not found[:, :7].any()
    assert (
        read_image(saved(tmp_path / "c.png", np.full((1, 4000), 9, np.uint8)), 28, resize=True)[13].tolist() == [9] * 28
    )
    large = np.kron(LEVELS, np.ones((8, 8), np.uint8))
    found = read_image(saved(tmp_path / "d.png", large), 28, resize=True)
    assert np.abs(found.astype(int) - LEVELS).mean() < 4


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a right angle
    lying = Image.fromarray(np.rot90(LEVELS).copy())
    found = read_image(saved(tmp_path / "a.png", lying, exif=exif), 28)
    np.testing.assert_array_equal(found, LEVELS)


def png(width, height, data=b"", kind=b"IDAT"):
    """As it comes, with check sums."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, data) + chunk(b"IEND", b"")


def content(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


SAMPLE = content(LEVELS, "PNG")
LARGE = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
BAD = {
    "empty": (b"", "no image of these formats"),
    "text": (b"no image", "no image of these formats; allowed: a PNG or JPEG file"),
    "a GIF": (content(LEVELS, "GIF"), "no image of these formats"),
    "another size": (content(LEVELS[:20], "PNG"), "is 28 x 20; allowed: 28 x 28, or any size with --resize"),
    "a bomb": (png(2**31 - 1, 2**31 - 1, zlib.compress(bytes(100))), "(too many pixels|is 2147483647 x)"),
    "a smaller bomb": (
        png(12_000, 12_000, zlib.compress(bytes(12_000 * 12_001))),
        "is 12000 x 12000; allowed: up to 67",
    ),
    "a bomb of text": (png(28, 28, b"a\0\0" + zlib.compress(bytes(10**8)), b"zTXt"), "damaged"),
    "an animation": (
        content(LEVELS, "PNG", save_all=True, append_images=[Image.fromarray(LARGE)]),
        "an animation of 2 pictures",
    ),
    "no pixels": (png(28, 28), "damaged"),
    "a byte that flipped": (flipped(content(LARGE, "PNG", compress_level=0), 400), "damaged"),
    **{f"cut off at {n}": (SAMPLE[:n], "(damaged|no image)") for n in (8, 20, 60, len(SAMPLE) // 2, len(SAMPLE) - 8)},
    **{f"JPEG cut off at {n}": (content(LARGE, "JPEG")[:n], "(damaged|no image)") for n in (3, 100, 600)},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("resize", [False, True])
def test_refused_in_one_line(name, resize, tmp_path):
    data, words = BAD[name]
    (tmp_path / "bad.png").write_bytes(data)
    if name == "another size" and resize:
        assert read_image(tmp_path / "bad.png", 28, resize=True).shape == (28, 28)
        return
    with pytest.raises(ValueError, match=r"^image .*bad.png.*; allowed: ") as found:
        read_image(tmp_path / "bad.png", 28, resize=resize)
    assert re.search(words, str(found.value)), str(found.value)


def test_no_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="No such file or directory; allowed: a PNG or JPEG file"):
        read_image(tmp_path / "none.png", 28)
    with pytest.raises(ValueError, match="Is a directory"):
        read_image(tmp_path, 28)
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="of more than 100 bytes; allowed: up to that"):
        read_image(saved(tmp_path / "a.png", LEVELS), 28)
