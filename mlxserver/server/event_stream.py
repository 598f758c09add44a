"""Body of a streamed response, sent in parts, with heartbeats while there are none.

Rule 1: the headers leave with the first part, which may be a heartbeat.
Rule 2: the parts are sent one after another; a client that does not read gets no heartbeats.
Rule 3: what end() sends is the last.
Rule 4: a part for which nothing has to wait may go straight to the connection: one call, where send() is several
        coroutines of as many layers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, Self

from starlette.types import Message, Receive, Scope, Send

DIRECT = "mlxserver.direct"  # extension of an ASGI scope, with a DirectWriter as its "writer"


class DirectWriter(Protocol):
    """A connection that a streamed body can be written to at once (server/connection.py)."""

    def can_write(self) -> bool:
        """Whether a part can be written: the response has begun, and its client reads."""

    def write_part(self, part: bytes) -> None:
        """Write a part of the body."""


class EventStream:
    """Sends one stream; an async context manager, which sends its heartbeats.

    interval: seconds without a byte before a heartbeat is sent, 0 for none. direct: writer to the connection, if it has
    one.
    """

    def __init__(
        self,
        send: Send,
        headers: Mapping[str, str],
        interval: float,
        heartbeat: Callable[[], bytes],
        direct: DirectWriter | None = None,
    ) -> None:
        self.is_started = self._is_over = False
        self._send = send
        self._direct = direct
        self._headers = headers
        self._interval = interval
        self._heartbeat = heartbeat
        self._sending = asyncio.Lock()
        self._last_sent = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None  # of the next look at whether a heartbeat is due
        self._beating: asyncio.Task[None] | None = None  # the last heartbeat

    async def __aenter__(self) -> Self:
        self._look_in(self._interval)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stop_heartbeats()

    async def start(self) -> None:
        """Send the headers, unless they have been sent."""
        async with self._sending:
            await self._start()

    async def write(self, part: bytes) -> None:
        """Send a part of the body."""
        async with self._sending:
            await self._start()
            await self._send(body_part(part))
            self._last_sent = time.monotonic()

    def can_write(self) -> bool:
        """Whether write_now() can be called: nothing has to wait."""
        if self._direct is None or not self.is_started or self._is_over or self._sending.locked():
            return False
        return self._direct.can_write()

    def write_now(self, part: bytes) -> None:
        """Send a part of the body at once; can_write() beforehand."""
        assert self._direct
        self._direct.write_part(part)
        self._last_sent = time.monotonic()

    async def end(self, part: bytes) -> None:
        """Send the last part of the body."""
        await self._stop_heartbeats()
        async with self._sending:
            self._is_over = True
            await self._start()
            await self._send(body_part(part, is_last=True))

    async def beat(self) -> None:
        """Send a heartbeat, if the stream has begun and the client reads."""
        if self.is_started and not self._is_over and not self._sending.locked():
            await self.write(self._heartbeat())

    async def _start(self) -> None:
        if self.is_started:
            return
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.is_started = True

    def _look_in(self, seconds: float) -> None:
        if self._interval:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Send a heartbeat if one is due. A task of its own has it alone: most streams need none."""
        silence = time.monotonic() - self._last_sent
        if silence < self._interval:
            self._look_in(self._interval - silence)
        elif self._sending.locked():
            self._look_in(self._interval)
        else:
            self._beating = asyncio.create_task(self._send_heartbeat())

    async def _send_heartbeat(self) -> None:
        await self.write(self._heartbeat())
        self._look_in(self._interval)

    async def _stop_heartbeats(self) -> None:
        if self._beating:
            self._beating.cancel()
            (outcome,) = await asyncio.gather(self._beating, return_exceptions=True)
            self._beating = None
            if isinstance(outcome, Exception):
                raise outcome
        if self._timer:  # which a heartbeat may have set
            self._timer.cancel()
            self._timer = None


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, None], beat: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Do the work that responds; it is cancelled when the client disconnects. Raises what the work raises.

    beat: called at any other message of the connection, which asks for bytes (server/connection.py, rule 4).
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            if beat:
                await beat()

    responding, has_left = asyncio.current_task(), False
    assert responding

    def leave(leaving: asyncio.Task[None]) -> None:
        nonlocal has_left
        has_left = not leaving.cancelled()
        if has_left:
            leaving.exception()  # retrieved here: it ends the response, whatever it is
            responding.cancel()

    leaving = asyncio.create_task(wait_for_disconnect())
    leaving.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not has_left or responding.uncancel():  # the server stops
            raise
    finally:
        leaving.remove_done_callback(leave)
        leaving.cancel()


def direct_writer(scope: Scope) -> DirectWriter | None:
    """That of a request's connection, if it has one."""
    writer: DirectWriter | None = scope.get("extensions", {}).get(DIRECT, {}).get("writer")
    return writer


def body_part(body: bytes, is_last: bool = False) -> Message:
    """ASGI message with a part of a body."""
    return {"type": "http.response.body", "body": body, "more_body": not is_last}
