"""Server-sent events: encoder and decoder of the framing (WHATWG HTML, section 9.2).

Rule 1: of an event only the data is read, and comments where a callback takes them; event names, ids and retry times
        are skipped.
Rule 2: any cut of the bytes gives the same payloads.
Rule 3: an incomplete event at the end of a stream is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LINE_BREAK = re.compile(rb"\r\n|\r|\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def encode(payload: bytes, event: str = "") -> bytes:
    """One event, with its name if it has one. Line breaks of the payload arrive as line feeds."""
    name = b"event: %b\n" % event.encode() if event else b""
    return name + b"".join(b"data: %b\n" % line for line in LINE_BREAK.split(payload)) + b"\n"


def comment(text: str) -> bytes:
    """A comment, which event readers skip: keeps a connection alive, or carries text for a person."""
    return b"".join(b": %b\n" % line for line in LINE_BREAK.split(text.encode())) + b"\n"


DONE = encode(b"[DONE]")


class SSEDecoder:
    """Decoder of a stream: bytes in, payloads of complete events out. on_comment is called with each comment line."""

    def __init__(self, on_comment: Callable[[str], None] = lambda _: None) -> None:
        self._on_comment = on_comment
        self._rest = b""
        self._data: list[str] = []
        self._skipped_start = BYTE_ORDER_MARK
        self._after_return = False

    def feed(self, chunk: bytes) -> list[str]:
        """Payloads of the events that this chunk completes; the final "[DONE]" is one of them."""
        if not chunk:
            return []
        if self._after_return:
            chunk = chunk.removeprefix(b"\n")
        self._after_return = chunk.endswith(b"\r")
        *lines, self._rest = LINE_BREAK.split(self._rest + chunk)
        return [payload for line in lines if (payload := self._take(line)) is not None]

    def _take(self, line: bytes) -> str | None:
        """Take one line; returns the payload at the blank line that ends an event with data."""
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
