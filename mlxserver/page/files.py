"""Files of the page, by the exact names that it asks for. No folder is ever looked into for a request.

Rule: what is not in the table does not exist, whatever lies beside the files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

SCRIPT, STYLE, HTML, SVG = "text/javascript", "text/css", "text/html", "image/svg+xml"
INDEX = "index.html"
TYPES = MappingProxyType(
    {
        INDEX: HTML,
        "icon.svg": SVG,
        "style.css": STYLE,
        **dict.fromkeys(
            (
                "answer.js",
                "api.js",
                "app.js",
                "bench.js",
                "charts.js",
                "chat.js",
                "compare.js",
                "conversation.js",
                "dialogs.js",
                "dom.js",
                "library.js",
                "live.js",
                "overview.js",
                "pictures.js",
                "requests.js",
                "scroll.js",
                "settings.js",
                "theme.js",
            ),
            SCRIPT,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file: its bytes, its media type, and a tag that changes with its bytes."""

    content: bytes
    media: str
    tag: str


@cache
def page_file(name: str) -> PageFile:
    """A file of the table. Raises KeyError."""
    media = TYPES[name]
    content = files("mlxserver.page").joinpath("static", name).read_bytes()
    return PageFile(content, f"{media}; charset=utf-8", f'"{hashlib.sha256(content).hexdigest()[:20]}"')
