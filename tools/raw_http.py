"""Raw HTTP/1.1 connections: any bytes are sent, and answers are parsed strictly."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

HEAD_END = b"\r\n\r\n"
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Malformed(Exception):
    """The received bytes are no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Whole answer. headers: names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """Connection to a server. Every wait raises TimeoutError after `max_wait` seconds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_wait: float) -> None:
        self._reader, self._writer = reader, writer
        self._max_wait = max_wait

    @classmethod
    async def connect(cls, port: int, max_wait: float = 30.0) -> Wire:
        """Connect to a port of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26), max_wait)

    async def send(self, data: bytes) -> None:
        """Send bytes. A server that has answered and closed the connection may leave some unread."""
        self._writer.write(data)
        try:
            async with asyncio.timeout(self._max_wait):
                await self._writer.drain()
        except ConnectionError:
            return

    async def answer(self, *, has_body: bool = True) -> Answer | None:
        """The next answer; None if the server closed the connection. has_body: False for HEAD. Raises Malformed."""
        async with asyncio.timeout(self._max_wait):
            try:
                head = await self._reader.readuntil(HEAD_END)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                if getattr(error, "partial", b""):
                    raise Malformed(f"half a head: {error}") from None
                return None
            return await self._answer(head, has_body)

    async def lines(self) -> bytes:
        """The next bytes as they arrive; empty at the end."""
        async with asyncio.timeout(self._max_wait):
            return await self._reader.read(1 << 16)

    def hang_up(self) -> None:
        """Close the connection at once, with whatever is unread or unsent."""
        self._writer.transport.abort()

    async def _answer(self, head: bytes, has_body: bool) -> Answer:
        first, *lines = head.removesuffix(HEAD_END).split(b"\r\n")
        if not (match := STATUS_LINE.match(first)):
            raise Malformed(f"no status line: {first[:100]!r}")
        status = int(match[1])
        pairs = [line.decode("latin-1").partition(": ") for line in lines]
        headers = {name.lower(): value for name, _, value in pairs}
        if status == HTTPStatus.CONTINUE:
            return await self._answer(await self._reader.readuntil(HEAD_END), has_body)
        is_empty = not has_body or status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        return Answer(status, headers, b"" if is_empty else await self._body(headers))

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self._reader.readexactly(int(headers["content-length"]))
        body = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return body


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Encode an ordinary request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body
