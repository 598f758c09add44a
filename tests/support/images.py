"""Image files, made as they are needed."""

import io
import random
import struct
import zlib
from collections.abc import Iterator, Sequence

from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SUFFIXES = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


def half(left: object = RED, right: object = BLUE, size: tuple[int, int] = (32, 16), mode: str = "RGB") -> Image.Image:
    """A picture whose left half has one colour, and whose right half another."""
    picture = Image.new(mode, size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def file_of(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(*colours: object, size: tuple[int, int] = (32, 16)) -> bytes:
    """The PNG file of a picture in one colour, or with a left and a right half."""
    return file_of(half(*(colours * 2)[:2] if colours else (RED, BLUE), size=size))


def animated(format: str = "GIF", frames: Sequence[object] = (RED, BLUE)) -> bytes:
    """The file of an animation."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in frames]
    return file_of(pictures[0], format, save_all=True, append_images=pictures[1:], duration=50)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it has many pixels, and has the first of them: zeros, well compressed."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = packer.compress(bytes(min((width + 1) * height, 16 << 20))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_header(width: int, height: int, kind: bytes = b"VP8X") -> bytes:
    """The head of a WebP file that says it has so many pixels, and nothing after it."""
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + bytes(16)
    else:
        body = b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(16)
    return b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


def gif_head(screen: tuple[int, int], frame: tuple[int, int], disposal: int = 2) -> bytes:
    """A GIF file that says its screen and its frame are so large, with the first bytes of the frame."""
    control = b"\x21\xf9\x04" + bytes([disposal << 2 | 1, 0, 0, 0, 0])
    image = b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0\x08\x03\0\x01\x04\0"
    return b"GIF89a" + struct.pack("<HH", *screen) + b"\xf0\0\0" + bytes(6) + (control + image) * 2 + b";"


def hostile_images() -> Iterator[bytes]:
    """180 damaged files, the same at every run: cut short, with bytes changed, spliced, with wrong headers."""
    source = random.Random(19)
    noise = Image.effect_noise((96, 64), 80).convert("RGB")
    whole = {format: file_of(noise, format) for format in SUFFIXES}
    for data in whole.values():
        for share in (0.0, 0.01, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.999):
            yield data[: max(1, int(len(data) * share))]
        for _ in range(18):
            damaged = bytearray(data)
            for _ in range(source.choice([1, 3, 30])):
                damaged[source.randrange(min(len(damaged), source.choice([64, 10_000])))] = source.randrange(256)
            yield bytes(damaged)
    for head in whole.values():
        for tail in whole.values():
            yield head[:32] + tail[32:]
        yield head[:16] + source.randbytes(4000)
        yield head + source.randbytes(4000)
        yield head[:40] * 100
