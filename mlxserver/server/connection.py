"""One client's connection: what uvicorn's protocol leaves without a limit or without an error object.

Rule 1: each part of an exchange has its time: the head of a request, what comes of a body after its answer, and the
        reading of an answer. The body's own time is server/handlers.py's.
Rule 2: what is no HTTP is told so in an error object, like everything else, unless an answer is under way already.
        What comes after the request that is being answered is not read: the connection ends with the answer, and who
        sent the next request early sends it again. A queue of them would hide that the client has left.
Rule 3: connections beyond the limit are told so at their first request; those far beyond it are closed unheard.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mlxserver.api import responses
from mlxserver.config.http import HttpSettings
from mlxserver.server.errors import json_response

log = logging.getLogger("server")

MAX_HEAD = 64 << 10  # bytes before a request's body
SEND_BUFFER = 128 << 10  # bytes of an answer that the system holds for a client; by itself it would hold megabytes
SPARE = 64  # connections beyond the limit that are answered before they are closed
LINGER = 1.0  # seconds in which the rest of a body is read that its answer did not wait for


class EarlyRequest(Exception):
    """A request has come while another one is being answered."""


class Timer:
    """Does one thing later, unless it is stopped or started again before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, action: Callable[[], None]) -> None:
        """Do this after so many seconds, and nothing that was to be done before."""
        self.stop()
        self._handle = self._loop.call_later(seconds, action)

    def stop(self) -> None:
        """Do nothing."""
        if self._handle:
            self._handle.cancel()
            self._handle = None

    @property
    def is_running(self) -> bool:
        """Whether there is something to be done."""
        return self._handle is not None


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits."""

    def __init__(self, settings: HttpSettings, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._settings = settings
        self._arrival = Timer(self.loop)  # of a head, or of the rest of a body
        self._departure = Timer(self.loop)  # of an answer
        self._is_between = True  # bodies: a head comes next, or is coming
        self._head_bytes = 0  # of a head, or of what surrounds the parts of a body
        self._is_deaf = False

    # -- what arrives ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection, or turn it away."""
        super().connection_made(transport)  # type: ignore[arg-type]
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        excess = len(self.connections) - self._settings.max_connections
        if excess > SPARE:
            self.transport.abort()
            return
        if excess > 0:
            self.app = turn_away  # type: ignore[assignment]
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in. A head that gets too long is refused, and so is a trailer."""
        if self._is_deaf:
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_deaf or self.transport.is_closing():
            return
        if self._head_bytes > MAX_HEAD:
            self._refuse(431, f"The head of the request is longer than {MAX_HEAD} bytes, the limit of this server.")
        elif self._is_between and not self._arrival.is_running and not self._is_answering:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is there: the application takes over. Raises EarlyRequest, which the parser makes its own."""
        if self._is_answering:
            raise EarlyRequest
        self._arrival.stop()
        self._is_between, self._head_bytes = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body is there."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is there."""
        self._arrival.stop()
        self._is_between, self._head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP."""
        self._refuse(400, "This is not a valid HTTP/1.1 request.")

    # -- what leaves ----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer has been handed to the transport. Of a body that nobody waited for, a little more is read."""
        super().on_response_complete()
        if not self._is_between:
            self._arrival.start(LINGER, self.transport.close)
        self._watch_rest()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._departure.start(self._settings.send_timeout, self._drop)

    def resume_writing(self) -> None:
        """It has read on."""
        super().resume_writing()
        self._departure.stop()
        self._watch_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it, whoever made it."""
        self._arrival.stop()
        self._departure.stop()
        super().connection_lost(exc)

    # -- limits ---------------------------------------------------------------------------------------------------

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        seconds = self._settings.header_timeout
        message = f"The head of the request took longer than {seconds:g} seconds, the limit of this server."
        self._arrival.start(seconds, lambda: self._refuse(408, message))

    def _watch_rest(self) -> None:
        """A connection that is closed stays until the client has read the rest: not for ever."""
        if not self._is_answering and self.transport.get_write_buffer_size():
            self._departure.start(self._settings.send_timeout, self._drop_rest)

    def _drop_rest(self) -> None:
        if self.transport.is_closing() or self.flow.write_paused:
            self._drop()
        else:
            self._watch_rest()

    def _drop(self) -> None:
        log.info("A client was dropped: it did not read for %g seconds", self._settings.send_timeout)
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Say what is wrong, unless something else is being said, and hang up."""
        if self._is_answering and self._is_between:
            self._is_deaf, self.cycle.keep_alive = True, False
            return
        log.info("%s", message)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw(status, message))
        self.transport.close()
        self._departure.start(self._settings.send_timeout, self._drop_rest)


async def turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of a connection that is one too many."""
    body = responses.error("The server has as many connections as it takes.", "server_error", code="overloaded")
    await json_response(body, 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)


def _raw(status: int, message: str) -> bytes:
    body = orjson.dumps(responses.error(message, "invalid_request_error"))
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
