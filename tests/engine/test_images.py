"""Decoding of images: the pixels of every kind of file that is taken, and a refusal for each that is not."""

import io
import random
import resource
import struct
import sys

import numpy as np
import pytest
from PIL import Image as pillow

from mlxserver.engine import images
from mlxserver.engine.conversation import Image
from mlxserver.engine.errors import PromptRejected
from tests.support.images import (
    BLUE,
    RED,
    SUFFIXES,
    WHITE,
    animated,
    file_of,
    gif_head,
    half,
    hostile_images,
    png,
    png_bomb,
    webp_header,
)

PLACE = "messages[0].content[1].image_url"


def decode(data, detail="auto"):
    return images.decode(Image(data, PLACE, detail=detail))


def is_near(pixel, colour):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 4


def shows(picture, left=RED, right=BLUE):
    """Whether a picture is RGB, and has these colours on its left and its right."""
    width, height = picture.size
    pixels = [picture.getpixel((at, height // 2)) for at in (width // 4, width * 3 // 4)]
    return picture.mode == "RGB" and is_near(pixels[0], left) and is_near(pixels[1], right)


def refusal(data, detail="auto"):
    with pytest.raises(PromptRejected) as failure:
        decode(data, detail)
    assert failure.value.param == PLACE
    assert str(failure.value).startswith(f"The image '{PLACE}' ")
    return str(failure.value)


GREYS = half(0, 255, mode="L")
DEEP = pillow.fromarray(np.repeat([[0x1234] * 16 + [0xF0F0] * 16], 16, axis=0).astype(np.uint16))
PALETTE = half(0, 1, mode="P")
PALETTE.putpalette([*RED, *BLUE])
PICTURES = {
    **{format.lower(): (file_of(half(), format), RED, BLUE) for format in SUFFIXES if format != "JPEG"},
    "jpeg": (file_of(half(), "JPEG", quality=95, subsampling=0), (254, 0, 0), (0, 0, 254)),
    "progressive jpeg": (
        file_of(half(), "JPEG", quality=95, subsampling=0, progressive=True),
        (254, 0, 0),
        (0, 0, 254),
    ),
    "lossless webp": (file_of(half(), "WEBP", lossless=True), RED, BLUE),
    "grey jpeg": (file_of(GREYS, "JPEG"), (0, 0, 0), WHITE),
    "cmyk jpeg": (file_of(half((0, 0, 0, 0), (0, 0, 0, 255), mode="CMYK"), "JPEG"), WHITE, (0, 0, 0)),
    "grey png": (file_of(GREYS), (0, 0, 0), WHITE),
    "png of one bit": (file_of(half(0, 1, mode="1")), (0, 0, 0), WHITE),
    "png of 16 bits": (file_of(DEEP), (0x12,) * 3, (0xF0,) * 3),
    "palette": (file_of(PALETTE), RED, BLUE),
    "palette with a transparent colour": (file_of(PALETTE, transparency=1), RED, WHITE),
    "gif with a transparent colour": (file_of(PALETTE, "GIF", transparency=0), WHITE, BLUE),
    "rgb with a transparent colour": (file_of(half(), transparency=RED), WHITE, BLUE),
    "alpha": (file_of(half((*RED, 255), (*BLUE, 0), mode="RGBA")), RED, WHITE),
    "half alpha": (file_of(half((*RED, 128), (*BLUE, 255), mode="RGBA")), (255, 127, 127), BLUE),
    "grey with alpha": (file_of(half((0, 255), (0, 0), mode="LA")), (0, 0, 0), WHITE),
    "webp with alpha": (file_of(half((*RED, 255), (*BLUE, 0), mode="RGBA"), "WEBP", lossless=True), RED, WHITE),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_its_colours_whatever_its_file(name):
    data, left, right = PICTURES[name]
    picture = decode(data)
    assert picture.size == (32, 16)
    assert shows(picture, left, right)
    assert images.size(Image(data, PLACE)) == (32, 16)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_picture_is_seen_upright(format, orientation):
    """The sensor's picture is turned as a camera that is held in each of the eight ways turns it."""
    turns = {
        1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"],
        5: ["TRANSPOSE"], 6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"],
    }  # fmt: skip
    scene = half(size=(64, 32))
    scene.paste((0, 255, 0), (0, 0, 64, 16))  # green above, red and blue below
    sensor = scene
    for turn in turns[orientation]:
        sensor = sensor.transpose(getattr(pillow.Transpose, turn))
    exif = pillow.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    picture = decode(file_of(sensor, format, exif=exif, **options))
    assert picture.size == (64, 32)
    pixels = [picture.getpixel(at) for at in ((16, 4), (16, 28), (48, 28))]
    assert all(is_near(pixel, colour) for pixel, colour in zip(pixels, [(0, 255, 0), RED, BLUE], strict=True))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40])
def test_damaged_exif_data_do_not_cost_the_picture(exif):
    assert shows(decode(file_of(half(), "PNG", exif=exif)))


def test_an_orientation_that_does_not_exist_is_none():
    exif = pillow.Exif()
    exif[0x0112] = 77
    assert shows(decode(file_of(half(), exif=exif)))


def test_the_further_pictures_of_a_phones_jpeg_are_not_an_animation():
    first, depth = half(), pillow.new("RGB", (32, 16))
    data = file_of(first, "MPO", save_all=True, append_images=[depth])
    assert decode(data).size == (32, 16)


def test_low_detail_is_a_small_picture_and_another_one_for_caches():
    data = png(size=(2048, 1024))
    assert decode(data, "low").size == (512, 256)
    assert decode(data, "high").size == decode(data).size == (2048, 1024)
    digests = {detail: Image(data, detail=detail).digest for detail in ("auto", "low", "high")}
    assert digests["auto"] == digests["high"] != digests["low"]


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 200), (200, 1)])
def test_a_tiny_picture_is_enlarged_until_processors_can_take_it(size):
    picture = decode(png(RED, size=size))
    assert min(picture.size) == images.MIN_SIDE
    assert picture.getpixel((0, 0)) == RED


def test_a_still_gif_or_webp_of_one_frame_is_a_picture():
    assert decode(animated("GIF", [RED])).getpixel((8, 8)) == RED
    assert is_near(decode(animated("WEBP", [RED])).getpixel((8, 8)), RED)


SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
OTHERS = {
    "empty": (b"", "is empty"),
    "svg": (SVG, "is an SVG drawing"),
    "svg without a head": (b"<svg onload='x'/>", "is an SVG drawing"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "is a HEIC, AVIF or video file"),
    "avif": (file_of(half(), "AVIF") if "AVIF" in pillow.SAVE else b"\0\0\0\x1cftypavif", "is a HEIC, AVIF or video"),
    "tiff": (file_of(half(), "TIFF"), "is a TIFF image"),
    "ico": (file_of(half(), "ICO"), "is no image of a known format"),
    "ppm": (file_of(half(), "PPM"), "is no image of a known format"),
    "eps": (file_of(half(), "EPS"), "is no image of a known format"),
    "pdf": (b"%PDF-1.7\n" + bytes(64), "is a PDF document"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "is text, not an image"),
    "json": (b'{"error": "not found"}', "is text, not an image"),
    "zeros": (bytes(1000), "is no image of a known format"),
    "noise": (random.Random(1).randbytes(1000), "is no image of a known format"),
    "animated gif": (animated("GIF"), "is animated"),
    "animated webp": (animated("WEBP"), "is animated"),
    "animated png": (animated("PNG"), "is animated"),
    "20,000 x 20,000": (png_bomb(20_000, 20_000), "pixels"),
    "9,000 x 9,000": (png_bomb(9000, 9000), "has 9000 x 9000 pixels, above the limit"),
    "12,000 x 12,000": (png_bomb(12_000, 12_000), "pixels"),
    "png as large as its header can say": (png_bomb(2**31 - 1, 2**31 - 1)[:8000], "pixels"),
    "a long line": (png_bomb(60_000, 1), "has 60000 x 1 pixels; a side may be 200 times"),
    **{
        f"webp {kind.decode().strip()}": (webp_header(16_000, 16_000, kind), "has 16000 x 16000 pixels")
        for kind in (b"VP8X", b"VP8L", b"VP8 ")
    },
    "gif of a large screen": (gif_head((65_535, 65_535), (9, 9)), "pixels"),
    "gif of a large frame": (gif_head((9, 9), (12_000, 12_000)), "pixels"),
    "bmp bomb": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 30_000, 30_000, 1, 24, 0) + bytes(100), "pixels"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_still_picture_of_a_fair_size_is_refused_with_what_it_is(name):
    data, what = OTHERS[name]
    assert what in refusal(data)


def peak_bytes():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_200_hostile_images_are_each_refused_or_right_and_nothing_grows():
    files = [*hostile_images(), *[data for data, _ in OTHERS.values()]]
    assert len(files) >= 200
    before = peak_bytes()
    seen = [outcome(data) for data in files]
    first = peak_bytes()
    assert first - before < 200 << 20  # no bomb was decoded: the smallest has 240 MB of pixels
    assert [outcome(data) for data in files] == seen
    assert peak_bytes() - first < 16 << 20
    assert seen.count("refused") > len(files) // 2


def outcome(data):
    try:
        picture = decode(data)
    except PromptRejected as refused:
        assert refused.param == PLACE
        return "refused"
    assert picture.mode == "RGB"
    assert picture.width * picture.height <= images.MAX_PIXELS
    return "seen"


def test_a_truncated_file_is_never_half_a_picture():
    for format in SUFFIXES:
        data = file_of(pillow.effect_noise((96, 64), 80).convert("RGB"), format)
        for share in (0.3, 0.6, 0.9):
            assert "is damaged or cut short" in refusal(data[: int(len(data) * share)]), (format, share)


def test_the_name_of_a_file_decides_nothing():
    """Pictures are found by their content: a JPEG that is called PNG on the wire is a JPEG."""
    file = io.BytesIO(file_of(half(), "JPEG"))
    file.name = "x.svg"
    assert decode(file.getvalue()).size == (32, 16)
