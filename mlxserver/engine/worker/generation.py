"""Events of one request, as the event loop reads them.

Rule: events are delivered on the event loop, in order, once; on_done is called after the last of them. While none wait
      to be read, `take` may have them at once, which spares a task its turn per token; the last ones wait to be read.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence

from mlxserver.engine.errors import EngineError, ReaderTooSlow
from mlxserver.engine.events import (
    Accepted,
    Event,
    Finish,
    PrefillProgress,
    PromptProgress,
    QueuePosition,
    Usage,
)
from mlxserver.engine.requests import EngineRequest


class Generation:
    """Events of one request, read on the event loop. close() it, however reading ended.

    `on_done` is called once, on the event loop, when the engine has no more work for the request. `position` counts its
    place in the engine's queue. `take` is given events as they are delivered; False leaves them to be read.
    """

    def __init__(
        self,
        request: EngineRequest,
        cancel: Callable[[Generation], None],
        position: Callable[[Generation], int] = lambda generation: 0,
    ) -> None:
        self.request = request
        self.prompt = PromptProgress()
        self.is_done = False
        self.outcome = "cancelled"  # a finish reason or an error's name, once it is done
        self.usage: Usage | None = None  # of a complete answer, once it is done
        self.first_token: float | None = None  # when its first event after Accepted came, by time.monotonic()
        self.on_done: Callable[[], None] = lambda: None
        self.most_unread = sys.maxsize  # events that may wait to be read, before it fails with ReaderTooSlow
        self.take: Callable[[Sequence[Event]], bool] | None = None
        self._cancel = cancel
        self._position = position
        self._events: list[Event] = []
        self._error: EngineError | None = None
        self._wake: asyncio.Future[None] | None = None

    @property
    def progress(self) -> QueuePosition | PrefillProgress | None:
        """How far its prompt is; None once it is processed, and where it is not known."""
        state = self.prompt.state
        return QueuePosition(self._position(self)) if isinstance(state, QueuePosition) else state

    async def accepted(self) -> Accepted:
        """Wait for the first event. Raises the EngineError that came instead."""
        while not (self._events or self._error):
            await self._arrival()
        if not self._events and self._error:
            raise self._error
        first = self._events.pop(0)
        assert isinstance(first, Accepted)
        return first

    async def events(self) -> list[Event]:
        """Wait for all events that have arrived since the last call; empty at the end. Raises EngineError."""
        while not self._events:
            if self._error:
                raise self._error
            if self.is_done:
                return []
            await self._arrival()
        arrived, self._events = self._events, []
        return arrived

    def close(self) -> None:
        """Cancel the request unless it is done. Idempotent."""
        self.take = None
        if not self.is_done:
            self._cancel(self)

    def deliver(self, events: Sequence[Event], is_done: bool = False, error: EngineError | None = None) -> None:
        """Add events of the engine; called on the event loop."""
        if self.is_done:
            return
        if self.first_token is None and events and not isinstance(events[-1], Accepted):
            self.first_token = time.monotonic()
        is_last = is_done or error or self._error
        if self.take and not (self._events or is_last) and self.take(events):
            return
        self._events.extend(events)
        self._error = self._error or error
        if is_done or error:
            self.is_done = True
            self._conclude()
            self.on_done()
        elif len(self._events) > self.most_unread and not self._error:
            self._error = ReaderTooSlow(self.most_unread)
            self.close()
        if self._wake and not self._wake.done():
            self._wake.set_result(None)

    def _conclude(self) -> None:
        """Record outcome and usage."""
        if self._error:
            self.outcome = type(self._error).__name__
        elif self._events and isinstance(self._events[-1], Usage):
            self.usage = self._events[-1]
            self.outcome = next(event.reason for event in reversed(self._events) if isinstance(event, Finish))

    async def _arrival(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake
