"""Image files, as a network that was trained on grey, square images takes them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bn_common.checks import require

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG")
# What is refused before it is unpacked: a file of a megabyte can hold a picture that no memory does.
MOST_BYTES, MOST_PIXELS = 2**28, 2**26


def read_image(path: Path, fig_size: int | None, *, resize: bool = False, invert: bool = False) -> NDArray[np.uint8]:
    """A PNG or JPEG file as grey levels uint8 [fig_size, fig_size], bright on black as the training images are.

    Colours become grey as ITU-R BT.601 weighs them, 16 bits become 8; what is transparent becomes background; a
    photograph is turned as its camera says.

    Args:
      path: the file.
      fig_size: height and width that the network takes; None: any, the image is only looked at.
      resize: bring it to that size: the longer side fits, the shorter one is filled up with background on both sides,
        which is how Fashion-MNIST was made.
      invert: it is dark on white, and is to be bright on black.

    Raises:
      ValueError: no file, none of the two formats, damaged or cut off, larger than can be sensible, an animation, or of
        another size and not to be resized. One line that says what was given and what is allowed.
    """
    allowed = f"a {' or '.join(FORMATS)} file"
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"image {path}: {error.strerror}; allowed: {allowed}") from None
    require(len(content) <= MOST_BYTES, f"image {path}", f"of more than {MOST_BYTES:,} bytes", "up to that")
    size = "any size" if fig_size is None else f"{fig_size} x {fig_size}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the picture is told about, say; its size is looked at here
        try:
            image = _opened(content)
            width, height = image.size
            pixels = width * height
            frames = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
        except Exception as error:  # whatever a decoder raises of bytes that it was not made for
            raise ValueError(f"image {path}: {_why(error)}; allowed: {allowed}") from None
        given = f"{width} x {height}"
        require(pixels <= MOST_PIXELS, f"image {path}", given, f"up to {MOST_PIXELS:,} pixels")
        require(frames == 1, f"image {path}", f"an animation of {frames} pictures", "one picture")
        fits = fig_size is None or resize or (width, height) == (fig_size, fig_size)
        require(fits, f"image {path}", given, f"{size}, or any size with --resize")
        try:
            grey = _grey(_opened(content), background=255 if invert else 0)
        except Exception as error:  # likewise
            raise ValueError(f"image {path}: {_why(error)}; allowed: {allowed}, whole") from None
    if fig_size is not None and resize:
        grey = _resized(grey, fig_size, background=255 if invert else 0)
    levels = np.asarray(grey)
    return 255 - levels if invert else levels


def _opened(content: bytes) -> Image.Image:
    from PIL import Image

    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.format == "PNG":
        # Its check sums, which reading the pixels leaves unread.
        image.verify()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    return image


def _grey(image: Image.Image, background: int) -> Image.Image:
    """Mode L, turned upright, on that background."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), over).convert("L")
    return image.convert("L") if image.mode in ("1", "L", "RGB") else image.convert("RGB").convert("L")


def _resized(grey: Image.Image, fig_size: int, background: int) -> Image.Image:
    from PIL import Image

    scale = fig_size / max(grey.size)
    width, height = (max(1, round(side * scale)) for side in grey.size)
    square = Image.new("L", (fig_size, fig_size), background)
    small = grey.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(small, ((fig_size - width) // 2, (fig_size - height) // 2))
    return square


def _why(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image of these formats"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return f"damaged ({error or type(error).__name__})"
