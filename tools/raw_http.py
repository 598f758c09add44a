"""HTTP/1.1 by the byte: what is sent is any bytes, what comes back is read strictly.

Rule: an exchange ends when the server closes the connection, or when it has given the number of answers asked for.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

HEAD_END = b"\r\n\r\n"
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Malformed(Exception):
    """What came back is no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """One connection. Every wait ends after `patience` seconds, with TimeoutError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float) -> None:
        self._reader, self._writer = reader, writer
        self._patience = patience

    @classmethod
    async def connect(cls, port: int, patience: float = 30.0) -> Wire:
        """A connection to this machine's port."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26), patience)

    async def send(self, data: bytes) -> None:
        """Send, as far as the server takes it: one that has answered and hung up takes no more."""
        self._writer.write(data)
        try:
            async with asyncio.timeout(self._patience):
                await self._writer.drain()
        except ConnectionError:
            return

    async def answer(self, *, has_body: bool = True) -> Answer | None:
        """The next answer; None if the server hung up instead. An answer to HEAD has no body. Raises Malformed."""
        async with asyncio.timeout(self._patience):
            try:
                head = await self._reader.readuntil(HEAD_END)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                if getattr(error, "partial", b""):
                    raise Malformed(f"half a head: {error}") from None
                return None
            return await self._answer(head, has_body)

    async def lines(self) -> bytes:
        """The next bytes, as they come; empty at the end."""
        async with asyncio.timeout(self._patience):
            return await self._reader.read(1 << 16)

    def hang_up(self) -> None:
        """Close the connection at once, whatever has not been read or sent."""
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
    """The bytes of an ordinary request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body
