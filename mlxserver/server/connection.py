"""Connection of one client: adds to uvicorn's protocol the limits and the error responses that it lacks.

Rule 1: each part of an exchange has a time limit: the head of a request, the rest of a body after its response, and the
        client's reading of a response. The limit of a body is in server/body.py.
Rule 2: bytes that are no HTTP get an error response, unless another response is being sent.
        Pipelined requests are not read: the connection closes after the response, and the client sends them again.
        A queue of them would hide a disconnect.
Rule 3: a connection beyond the limit takes the place of an idle one. Where there is none, its first request gets a 503;
        those far beyond the limit are closed at once.
Rule 4: a client that sends FIN after its request gets its response. The FIN of one that has closed its socket looks the
        same, but its system resets the connection at the next bytes. Until that shows, bytes are sent: interim
        responses, and heartbeats once a stream has begun.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlxserver.api.dialect import Failure
from mlxserver.api.endpoints import encode_failure
from mlxserver.config.http import HttpSettings
from mlxserver.server.errors import failure_response
from mlxserver.server.event_stream import DIRECT

log = logging.getLogger("server")

MAX_HEAD = 64 << 10  # bytes before a request's body
SEND_BUFFER = 128 << 10  # bytes of a response that the system buffers for a client; its default is megabytes
SPARE = 64  # connections beyond the limit that get a response before they are closed
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"  # which every client of HTTP/1.1 skips, also if it did not ask for it
PROBE_INTERVALS = (0.25, 4.0)  # seconds: between the first two probes, and at most; each is twice the one before
LINGER = 1.0  # seconds in which the rest of a body is read after a response that did not wait for it


class PipelinedRequest(Exception):
    """A request arrived before the response to the one before it was complete."""


class Timer:
    """Timer of one action."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, action: Callable[[], None]) -> None:
        """(Re)arm the timer."""
        self.stop()
        self._handle = self._loop.call_later(seconds, action)

    def stop(self) -> None:
        """Disarm the timer."""
        if self._handle:
            self._handle.cancel()
            self._handle = None

    @property
    def is_running(self) -> bool:
        """Whether it is armed."""
        return self._handle is not None


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits."""

    def __init__(self, settings: HttpSettings, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._settings = settings
        self._receive_timer = Timer(self.loop)  # of a head, or of the rest of a body
        self._send_timer = Timer(self.loop)  # of a response
        self._probe_timer = Timer(self.loop)  # of a client that has sent FIN
        self._expects_head = True  # a head comes next, or is arriving
        self._head_bytes = 0  # of a head, or of the framing around the parts of a body
        self._discards_input = False

    # -- received -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a connection, or refuse it."""
        super().connection_made(transport)  # type: ignore[arg-type]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        excess = len(self.connections) - self._settings.max_connections
        if excess > SPARE:
            self.transport.abort()
            return
        if excess > 0:
            self._take_place()
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parse bytes. A head that gets too long is refused, and so is a trailer."""
        if self._discards_input:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._discards_input or self.transport.is_closing():
            return
        if self._head_bytes > MAX_HEAD:
            self._refuse(431, f"The head of the request is longer than {MAX_HEAD} bytes, the limit of this server.")
        elif self._expects_head and not self._receive_timer.is_running and not self._is_responding:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Start the application. Raises PipelinedRequest, which the parser reports as invalid HTTP."""
        if self._is_responding:
            raise PipelinedRequest
        self._receive_timer.stop()
        self._expects_head, self._head_bytes = False, 0
        self.scope["extensions"] = {DIRECT: {"writer": self}}
        super().on_headers_complete()
        if self.cycle.keep_alive:
            timeout = b"timeout=%d" % self._settings.idle_connection_timeout
            self.cycle.default_headers = [*self.cycle.default_headers, (b"keep-alive", timeout)]

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        self._receive_timer.stop()
        self._expects_head, self._head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP."""
        self._refuse(400, "This is not a valid HTTP/1.1 request.")

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on with a response whose request is complete (rule 4). Whether to keep the connection open."""
        if not (self._is_responding and self._expects_head) or self.scope["http_version"] != "1.1":
            return False  # HTTP/1.0 has no responses before the last one
        self._close_after_response()
        self._probe(PROBE_INTERVALS[0])
        return True

    # -- sent -----------------------------------------------------------------------------------------------------

    def can_write(self) -> bool:
        """Whether write_part() can be called: the response has begun, in chunks, and its client reads."""
        cycle = self.cycle
        if not cycle.response_started or cycle.response_complete or cycle.disconnected or self.flow.write_paused:
            return False
        return bool(cycle.chunked_encoding)

    def write_part(self, part: bytes) -> None:
        """Write a part of the body of a response, not empty, as the cycle's send() does."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def on_response_complete(self) -> None:
        """Watch the rest of a response that the transport has in full. An unread body is read for LINGER seconds."""
        super().on_response_complete()
        if not self._expects_head:
            self._receive_timer.start(LINGER, self.transport.close)
        self._watch_rest()

    def pause_writing(self) -> None:
        """Limit the time in which a slow client must read on."""
        super().pause_writing()
        self._send_timer.start(self._settings.send_timeout, self._drop)

    def resume_writing(self) -> None:
        """Resume after a slow client has read on."""
        super().resume_writing()
        self._send_timer.stop()
        self._watch_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Disarm the timers, however the connection ended."""
        self._receive_timer.stop()
        self._send_timer.stop()
        self._probe_timer.stop()
        super().connection_lost(exc)

    # -- limits ---------------------------------------------------------------------------------------------------

    @property
    def _is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_idle(self) -> bool:
        """Whether it waits for its next request, of which nothing has arrived."""
        return self.timeout_keep_alive_task is not None and not self.transport.is_closing()

    def _take_place(self) -> None:
        """Close an idle connection, or else refuse the requests of this one."""
        idle = next((each for each in self.connections if isinstance(each, Connection) and each._is_idle), None)
        if idle:
            idle.transport.close()
        else:
            self.app = refuse_connection  # type: ignore[assignment]

    def _close_after_response(self) -> None:
        self.cycle.keep_alive = False
        self.cycle.default_headers = [header for header in self.cycle.default_headers if header[0] != b"keep-alive"]

    def _probe(self, interval: float) -> None:
        """Drop a client that has reset the connection. Have bytes sent, for which one that is gone resets it."""
        if self.transport.is_closing() or not self._is_responding:
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        if self.cycle.response_started:
            self.cycle.message_event.set()  # an empty message, for which a stream sends a heartbeat
        else:
            self.transport.write(PROBE)
        self._probe_timer.start(interval, lambda: self._probe(min(2 * interval, PROBE_INTERVALS[1])))

    def _await_head(self) -> None:
        seconds = self._settings.header_timeout
        message = f"The head of the request took longer than {seconds:g} seconds, the limit of this server."
        self._receive_timer.start(seconds, lambda: self._refuse(408, message))

    def _watch_rest(self) -> None:
        """Limit the time in which the client must read the rest of a response; a closed connection waits for it."""
        if not self._is_responding and self.transport.get_write_buffer_size():
            self._send_timer.start(self._settings.send_timeout, self._drop_rest)

    def _drop_rest(self) -> None:
        if self.transport.is_closing() or self.flow.write_paused:
            self._drop()
        else:
            self._watch_rest()

    def _drop(self) -> None:
        log.info("A client was dropped: it did not read for %g seconds", self._settings.send_timeout)
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Send an error response, unless another response is being sent, and close the connection."""
        if self._is_responding and self._expects_head:
            self._discards_input = True
            self._close_after_response()
            return
        log.info("%s", message)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw(status, message))
        self.transport.close()
        self._send_timer.start(self._settings.send_timeout, self._drop_rest)


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Application of a connection beyond the limit."""
    failure = Failure("The server has as many connections as it takes.", "server", code="overloaded")
    response = failure_response(scope, 503, failure, {"Retry-After": "1", "Connection": "close"})
    await response(scope, receive, send)


def _raw(status: int, message: str) -> bytes:
    body = encode_failure("", Failure(message, "invalid_request"))
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
