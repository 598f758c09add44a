"""Response to GET /v1/events: a stream without an end of its own.

Rule: it ends when the client disconnects, and when the server stops, of which it sends an event.
"""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from mlxserver.api import sse
from mlxserver.server.event_stream import EventStream, until_disconnect
from mlxserver.server.live import LiveFeed, stopping
from model_manager import ModelManager

MAX_SILENCE = 10.0  # seconds; a page takes twice as long without a byte for a lost connection

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class LiveResponse:
    """The response to one reader."""

    def __init__(self, feed: LiveFeed, manager: ModelManager) -> None:
        self._feed = feed
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the reader leaves or the server stops."""
        interval = silence(self._manager.settings.heartbeat_interval)
        async with EventStream(send, HEADERS, interval, lambda: sse.comment("keep-alive")) as stream:
            await until_disconnect(receive, self._send(stream), stream.beat)

    async def _send(self, stream: EventStream) -> None:
        with self._feed.reading():
            seen = 0
            while following := await self._feed.next(seen):
                seen, event = following
                await stream.write(event)
        await stream.end(stopping())


def silence(heartbeat_interval: float) -> float:
    """Seconds without a byte before a reader gets a heartbeat, also where other streams have none."""
    return min(heartbeat_interval or MAX_SILENCE, MAX_SILENCE)
