"""Images of a question: out of files and the clipboard, as the parts of a message that OpenAI's API takes."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxserver.client.errors import FileUnusable

Part = Mapping[str, Any]
Content = str | Sequence[Part]

MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}
EXPECTED = "it is no PNG, JPEG, WebP, GIF or BMP image"
CLIPBOARD = "the clipboard"
TIMEOUT = 10.0  # seconds that a clipboard's tool may take
TOOLS: tuple[tuple[str, ...], ...] = (
    ("pngpaste", "-"),
    ("wl-paste", "--no-newline", "--type", "image/png"),
    ("xclip", "-selection", "clipboard", "-target", "image/png", "-out"),
)
OSASCRIPT = (
    "on run argv",
    "write (the clipboard as «class PNGf») to (open for access POSIX file (item 1 of argv) with write permission)",
    "end run",
)


def read_image(path: Path) -> Part:
    """The image of a file. Raises FileUnusable."""
    try:
        return image_part(path.expanduser().read_bytes())
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise FileUnusable(str(path), cause or str(error)) from error


def paste_image() -> Part:
    """The image in the clipboard. Raises FileUnusable, also where the machine has no tool that reads it."""
    try:
        return image_part(_clipboard())
    except (OSError, ValueError, subprocess.SubprocessError):
        raise FileUnusable(CLIPBOARD, "there is no image in it") from None


def image_part(data: bytes) -> Part:
    """The part that shows an image. Raises ValueError for what is none."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        raise ValueError(EXPECTED)
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def content_of(text: str, images: Sequence[Part]) -> Content:
    """The content of a message: the text alone, or behind its images."""
    return [*images, {"type": "text", "text": text}] if images else text


def image_urls(content: object) -> Iterator[str]:
    """The URLs of the images in a message's content, in order."""
    for part in content if isinstance(content, list | tuple) else ():
        if isinstance(part, Mapping) and part.get("type") == "image_url":
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, Mapping) else given
            if isinstance(url, str):
                yield url


def describe(part: Part) -> str:
    """An image in a few words: its type and its size."""
    head, _, data = next(image_urls([part]), "").partition(",")
    kind = head.partition("/")[2].partition(";")[0].upper()
    return f"{kind}, {max(1, len(data) * 3 // 4 // 1000)} kB"


def _clipboard() -> bytes:
    """The clipboard's image as a file. Raises FileUnusable where there is no tool, and what running it raises."""
    tools = [tool for tool in TOOLS if shutil.which(tool[0])]
    for tool in tools:
        if pasted := subprocess.run(tool, capture_output=True, check=False, timeout=TIMEOUT).stdout:
            return pasted
    if not shutil.which("osascript"):
        if tools:
            return b""
        names = ", ".join(tool[0] for tool in TOOLS)
        raise FileUnusable(CLIPBOARD, f"this machine has none of the tools that read images from it ({names})")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        script = [word for line in OSASCRIPT for word in ("-e", line)]
        subprocess.run(("osascript", *script, str(path)), capture_output=True, check=True, timeout=TIMEOUT)
        return path.read_bytes()
