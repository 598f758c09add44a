"""Server-sent events: the framing of a stream, both ways.

Rule 1: only the data of an event matters to us, and comments to those who ask; event names, ids and retry times are
        read over.
Rule 2: any cut of the bytes gives the same payloads.
Rule 3: an event that the stream ended in the middle of is no event.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LINE_BREAK = re.compile(rb"\r\n|\r|\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def encode(payload: bytes) -> bytes:
    """One event. Line breaks of the payload arrive as line feeds."""
    return b"".join(b"data: %b\n" % line for line in LINE_BREAK.split(payload)) + b"\n"


def comment(text: str) -> bytes:
    """A line that readers skip, to keep a connection alive or to tell a person something."""
    return b"".join(b": %b\n" % line for line in LINE_BREAK.split(text.encode())) + b"\n"


DONE = encode(b"[DONE]")


class SSEDecoder:
    """Bytes of a stream in, payloads of complete events out. on_comment: called with the text of each comment line."""

    def __init__(self, on_comment: Callable[[str], None] = lambda _: None) -> None:
        self._on_comment = on_comment
        self._rest = b""
        self._data: list[str] = []
        self._skipped_start = BYTE_ORDER_MARK
        self._after_return = False

    def feed(self, chunk: bytes) -> list[str]:
        """The payloads of the events that this chunk completes; the closing "[DONE]" is one of them."""
        if not chunk:
            return []
        if self._after_return:
            chunk = chunk.removeprefix(b"\n")
        self._after_return = chunk.endswith(b"\r")
        *lines, self._rest = LINE_BREAK.split(self._rest + chunk)
        return [payload for line in lines if (payload := self._take(line)) is not None]

    def _take(self, line: bytes) -> str | None:
        """Read one line; the payload if it is the blank one that ends an event with data."""
        line = line.removeprefix(self._skipped_start)
        self._skipped_start = b""
        if line:
            name, _, value = line.partition(b":")
            text = value.removeprefix(b" ").decode(errors="replace")
            if name == b"data":
                self._data.append(text)
            elif not name:
                self._on_comment(text)
            return None
        payload, self._data = self._data, []
        return "\n".join(payload) if payload else None
