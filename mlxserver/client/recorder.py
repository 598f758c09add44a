"""One streamed answer for measuring: a bare connection whose bytes are stored with the moment they came.

Rule 1: while a recording is taken nothing happens but storing bytes and times, at the moment the system hands them
        over; reading them comes afterwards. So the figures of one stream do not depend on how many others there are.
Rule 2: a recording begins when its request is written. Connecting is in no figure.
Rule 3: each request has a connection of its own, which ends with the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import httptools
from yarl import URL

from mlxserver.client.errors import StreamBroken, api_error
from mlxserver.client.events import Event
from mlxserver.client.stream import StreamReader

Reads = list[tuple[float, bytes]]


@dataclass(frozen=True, slots=True)
class Recording:
    """An HTTP answer as it came: when it was asked for, each read with its time, its end, and why it broke off.

    Times are seconds of time.perf_counter.
    """

    start: float
    reads: tuple[tuple[float, bytes], ...]
    end: float
    failure: str | None = None

    def events(self) -> list[Event]:
        """All of it, Finished as the last. Raises ApiError, StreamBroken."""
        reply = _Reply()
        try:
            for at, received in self.reads:
                reply.feed(received, at)
        except httptools.HttpParserError as error:
            raise StreamBroken(f"the server did not speak HTTP ({error}).") from error
        if reply.status >= 400:
            raise api_error(reply.status, b"".join(body for _, body in reply.reads).decode(errors="replace"))
        if self.failure:
            raise StreamBroken(self.failure)
        reader = StreamReader()
        events = [event for at, received in reply.reads for event in reader.feed(received, at)]
        return [*events, *reader.end(self.end)]


async def record(
    url: URL, headers: Mapping[str, str], body: bytes, *, connect: float | None, read: float | None
) -> Recording:
    """Post a request and record the answer. connect, read: seconds to wait for each, None for ever.

    Raises OSError when there is no connection.
    """
    loop = asyncio.get_running_loop()
    is_secure = True if url.scheme == "https" else None
    async with asyncio.timeout(connect):
        _, recorder = await loop.create_connection(_Recorder, url.host or "", url.port or 80, ssl=is_secure)
    recorder.transport.write(_head(url, headers, body) + body)
    start = perf_counter()
    try:
        failure = await recorder.wait(read)
    finally:
        recorder.transport.abort()
    return Recording(start, tuple(recorder.reads), perf_counter(), failure)


class _Recorder(asyncio.Protocol):
    """Stores what comes until the connection ends."""

    def __init__(self) -> None:
        self.reads: Reads = []
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.reads.append((perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(exc)

    async def wait(self, silence: float | None) -> str | None:
        """Wait for the end; why it was none, in words. silence: seconds without a byte that end it."""
        count = -1
        while not self._ended.done():
            if count == len(self.reads):
                return f"nothing came for {silence:g} s."
            count = len(self.reads)
            await asyncio.wait({self._ended}, timeout=silence)
        error = self._ended.result()
        return f"the connection was lost ({error})." if error else None


class _Reply:
    """An HTTP answer read by read: its status, and the reads of its body."""

    def __init__(self) -> None:
        self.status = 0
        self.reads: Reads = []
        self._at = 0.0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, received: bytes, at: float) -> None:
        self._at = at
        self._parser.feed_data(received)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.reads.append((self._at, body))


def _head(url: URL, headers: Mapping[str, str], body: bytes) -> bytes:
    fields = {
        "Host": url.authority,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [f"POST {url.raw_path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii")
