"""Pictures of images: a file as a client sent it becomes the pixels that a processor takes, or a refusal with a reason.

Rule 1: a file's header is judged before its pixels are decoded, so that a small file can't ask for much memory.
Rule 2: whatever a file holds, decode() returns a picture or raises PromptRejected.
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image as pillow
from PIL import ImageFile, UnidentifiedImageError

from mlxserver.engine.conversation import Image
from mlxserver.engine.errors import PromptRejected

MAX_PIXELS: Final = 64 * 2**20
"""Pixels of an image at most: the cameras of phones take 50 million."""
MAX_RATIO: Final = 200
"""Longer side to the shorter one at most, which is the bound of processors."""
MIN_SIDE: Final = 4
"""Sides below this many pixels are enlarged: processors take three of them, or one, for the colour channels."""
LOW_SIDE: Final = 512
"""The longer side of an image in pixels at most where its `detail` is "low"."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXPECTED: Final = "expected a PNG, JPEG, WebP, GIF or BMP image"
_ANIMATED: Final = ("PNG", "WEBP", "GIF")  # the further pictures of a JPEG file are previews and depths of the first
_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: pillow.Transpose.FLIP_LEFT_RIGHT,
    3: pillow.Transpose.ROTATE_180,
    4: pillow.Transpose.FLIP_TOP_BOTTOM,
    5: pillow.Transpose.TRANSPOSE,
    6: pillow.Transpose.ROTATE_270,
    7: pillow.Transpose.TRANSVERSE,
    8: pillow.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the orientation in its EXIF data."""


def decode(image: Image) -> pillow.Image:
    """The picture of an image: mode RGB, upright, transparent parts over white, no larger than its detail asks for.

    Raises PromptRejected, with the image's origin as its param: the file is empty, damaged, animated or too large, or
    its content (not its name) is of another format.
    """
    try:
        picture = _opened(image)
        picture.load()
        return _sized(_upright(_rgb(picture), _orientation(picture)), image.detail)
    except PromptRejected:
        raise
    except Exception as error:  # decoders fail in many ways on hostile files, with errors of any type
        raise _rejected(image, f"is damaged or cut short ({_first_line(error)})") from error


def size(image: Image) -> tuple[int, int]:
    """Width and height in pixels as they are in the file, from its header alone. Raises PromptRejected as decode()."""
    try:
        return _opened(image).size
    except PromptRejected:
        raise
    except Exception as error:
        raise _rejected(image, f"is damaged or cut short ({_first_line(error)})") from error


def _opened(image: Image) -> ImageFile.ImageFile:
    """The file with its header read and judged."""
    if not image.data:
        raise _rejected(image, "is empty")
    if image.data[:4] == b"RIFF":  # Pillow's decoder of WebP takes memory for the pixels as it opens a file
        _check_size(image, *_webp_size(image.data))
    try:
        picture = pillow.open(io.BytesIO(image.data), formats=FORMATS)
    except UnidentifiedImageError:
        raise _rejected(image, _other_format(image.data)) from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise _rejected(image, f"has more than {MAX_PIXELS} pixels, the limit", "send a smaller one") from None
    _check_size(image, *picture.size)
    if picture.format in _ANIMATED and getattr(picture, "is_animated", False):
        raise _rejected(image, "is animated", "send one of its pictures")
    return picture


def _check_size(image: Image, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _rejected(image, f"has {width} x {height} pixels, above the limit of {MAX_PIXELS}", "send a smaller one")
    if max(width, height) > MAX_RATIO * max(1, min(width, height)):
        raise _rejected(
            image, f"has {width} x {height} pixels", f"a side may be {MAX_RATIO} times as long as the other one"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas from the header of a WebP file (RFC 9649), (0, 0) where it has none."""
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def _rgb(picture: pillow.Image) -> pillow.Image:
    """The picture in 8 bits of red, green and blue, over white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits of grey; convert() would cut them off instead of scaling them
        return pillow.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        pixels = picture.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: pillow.Image) -> int:
    """The orientation in the EXIF data, 1 (upright) where there is none that can be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data are no reason to refuse a picture; their reader fails in many ways
        return 1


def _upright(picture: pillow.Image, orientation: int) -> pillow.Image:
    method = _UPRIGHT.get(orientation)
    return picture if method is None else picture.transpose(method)


def _sized(picture: pillow.Image, detail: str) -> pillow.Image:
    """The picture within LOW_SIDE where the detail is low, and with no side below MIN_SIDE."""
    if detail == "low":
        picture.thumbnail((LOW_SIDE, LOW_SIDE))
    if (shorter := min(picture.size)) >= MIN_SIDE:
        return picture
    width, height = (side * MIN_SIDE // shorter for side in picture.size)
    return picture.resize((width, height), pillow.Resampling.NEAREST)


def _other_format(data: bytes) -> str:
    """What a file is that is no picture of FORMATS."""
    head = data[:1024].lstrip().lower()
    if data[4:8] == b"ftyp":
        return "is a HEIC, AVIF or video file"
    if b"<svg" in head:
        return "is an SVG drawing"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        return "is text, not an image"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "is a TIFF image"
    if data.startswith(b"%PDF"):
        return "is a PDF document"
    return "is no image of a known format, or damaged"


def _rejected(image: Image, fault: str, help: str = EXPECTED) -> PromptRejected:
    return PromptRejected(f"The image '{image.origin}' {fault}; {help}.", image.origin)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:100] or type(error).__name__
