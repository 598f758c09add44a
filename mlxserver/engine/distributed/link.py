"""Link between two ranks: a connection that carries JSON objects, in order, in each direction.

Rule 1: each side sends at least four messages within the time limit. A longer silence ends the link like the loss of
        the connection does, so receive() never waits longer than the limit for a dead peer.
Rule 2: a message that is too long is refused before it is read.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import orjson

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")
_MAX_BYTES = 256 << 20  # of a message; a prompt of ten million tokens is shorter
_HEARTBEATS = 4  # within the time limit


class LinkLost(Exception):
    """The peer is gone, or silent."""


class Link:
    """One end of a connection. `limit` in seconds. Messages may be sent from any thread, and are received on one."""

    def __init__(self, connection: socket.socket, limit: float) -> None:
        connection.settimeout(limit)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._limit = limit
        self._sending = threading.Lock()
        self._closed = threading.Event()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises LinkLost."""
        body = orjson.dumps(message)
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise LinkLost(self._reason(error)) from None

    def receive(self) -> Message:
        """The next message. Raises LinkLost."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _MAX_BYTES:
            raise LinkLost(f"a message of {length} bytes came; expected at most {_MAX_BYTES}")
        try:
            message = orjson.loads(self._exactly(length))
        except ValueError as error:
            raise LinkLost(f"a message is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise LinkLost(f"a {type(message).__name__} came; expected an object")
        return message

    def heartbeat(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Send heartbeats with the state of this side until the link is closed."""
        threading.Thread(target=self._heartbeat, args=(state,), name="rank-heartbeat", daemon=True).start()

    def finish(self) -> None:
        """Half-close: stop sending, keep receiving. Raises LinkLost."""
        self._closed.set()
        try:
            self._connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise LinkLost(self._reason(error)) from None

    def close(self) -> None:
        """End the connection. A pending receive() raises LinkLost."""
        self._closed.set()
        with suppress(OSError):  # the peer was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _heartbeat(self, state: Callable[[], Mapping[str, Any]]) -> None:
        try:
            while not self._closed.wait(self._limit / _HEARTBEATS):
                self.send({"kind": "heartbeat", **state()})
        except LinkLost:  # receive() raises it, too
            return

    def _exactly(self, size: int) -> bytearray:
        received = bytearray()
        try:
            while len(received) < size:
                part = self._connection.recv(min(size - len(received), 1 << 20))
                if not part:
                    raise LinkLost("the connection was closed")
                received += part
        except OSError as error:
            raise LinkLost(self._reason(error)) from None
        return received

    def _reason(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"no message for {self._limit:g} s"
        return error.strerror or str(error)
