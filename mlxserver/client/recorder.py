"""Recordings of streamed answers, for measuring: the bytes of a bare connection, each read with its arrival time.

Rule 1: a recording stores bytes and times at the moment the system delivers them, and does nothing else; parsing comes
        afterwards. So the figures of one stream do not depend on how many others there are.
Rule 2: a request is encoded before it is sent, and its recording starts when it is written: neither encoding nor
        connecting is part of a latency.
Rule 3: each request has a connection of its own, which ends with the answer, so servers of HTTP/1.0 and of HTTP/1.1
        are measured alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import httptools
from yarl import URL

from mlxserver.client.errors import StreamBroken, api_error
from mlxserver.client.events import Event, Finished
from mlxserver.client.stream import StreamReader

Reads = list[tuple[float, bytes]]


@dataclass(frozen=True, slots=True)
class Recording:
    """HTTP response with the arrival time of each read. Times are in seconds of time.perf_counter().

    start: when the request was written. end: when the connection ended. failure: why it ended early, None if it
    did not. connecting: seconds that the connection took before start.
    """

    start: float
    reads: tuple[tuple[float, bytes], ...]
    end: float
    failure: str | None = None
    connecting: float = 0.0

    def events(self) -> list[Event]:
        """Parse the response: all events, Finished as the last. Raises ApiError, StreamBroken."""
        reply = _Reply()
        try:
            for at, received in self.reads:
                reply.feed(received, at)
        except httptools.HttpParserError as error:
            raise StreamBroken(f"the server did not speak HTTP ({error}).") from error
        if not reply.status:
            raise StreamBroken(self.failure or "the connection ended before the head of a response.")
        if reply.status >= 400:
            raise api_error(reply.status, b"".join(body for _, body in reply.reads).decode(errors="replace"))
        if self.failure:
            raise StreamBroken(self.failure)
        reader = StreamReader()
        events = [event for at, received in reply.reads for event in reader.feed(received, at)]
        if reply.is_cut and not any(isinstance(event, Finished) for event in events[-1:]):
            raise StreamBroken("the connection was lost.")
        return [*events, *reader.end(self.end)]


# A request that is encoded and ready: sends it and returns the recording. Raises ServerUnreachable.
PreparedRequest = Callable[[], Coroutine[Any, Any, Recording]]


async def record(url: URL, request: bytes, *, connect: float | None, read: float | None) -> Recording:
    """Send an encoded request and record the response.

    connect: seconds that connecting may take; read: seconds that the connection may be silent; None for no limit.
    Raises OSError when there is no connection.
    """
    loop, began = asyncio.get_running_loop(), perf_counter()
    is_secure = True if url.scheme == "https" else None
    async with asyncio.timeout(connect):
        _, recorder = await loop.create_connection(_Recorder, url.host or "", url.port or 80, ssl=is_secure)
    connecting = perf_counter() - began
    recorder.transport.write(request)
    start = perf_counter()
    try:
        failure = await recorder.wait(read)
    finally:
        recorder.transport.abort()
    return Recording(start, tuple(recorder.reads), perf_counter(), failure, connecting)


class _Recorder(asyncio.Protocol):
    """Storage of the received bytes until the connection ends."""

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
        """Wait for the end of the connection. silence: seconds without a byte that end the wait, None for no limit.

        Returns why the response is not complete, None if the server closed the connection.
        """
        count = -1
        while not self._ended.done():
            if count == len(self.reads):
                return f"nothing came for {silence:g} s."
            count = len(self.reads)
            await asyncio.wait({self._ended}, timeout=silence)
        error = self._ended.result()
        return f"the connection was lost ({error})." if error else None


class _Reply:
    """HTTP response being parsed: its status, the reads of its body, and whether a chunked body lacks its end."""

    def __init__(self) -> None:
        self.status = 0
        self.reads: Reads = []
        self.is_cut = False
        self._at = 0.0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, received: bytes, at: float) -> None:
        self._at = at
        self._parser.feed_data(received)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self.is_cut |= name.lower() == b"transfer-encoding" and value.lower() == b"chunked"

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self.reads.append((self._at, body))

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_cut = False


def encode_post(url: URL, headers: Mapping[str, str], body: bytes) -> bytes:
    """Encode a POST of JSON, head and body, on a connection that ends with its response."""
    fields = {
        "Host": url.authority,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    lines = [f"POST {url.raw_path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii") + body
