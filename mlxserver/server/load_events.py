"""Response to a streamed load: its progress, in whatever form its API has.

Rule 1: what fails before the first step and the first heartbeat has its status; what fails later is the last event.
Rule 2: a disconnect of the client does not end the load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from starlette.types import Receive, Scope, Send

from mlxserver.api.dialect import LoadEncoder
from mlxserver.engine.errors import EngineError
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import LoadProgress
from mlxserver.server.errors import failure_of
from mlxserver.server.event_stream import EventStream
from mlxserver.server.model_status import model_status, progress

MIN_INTERVAL = 0.1  # seconds between two events


class LoadResponse:
    """The response to one load. `load` runs it and calls its argument at every step. heartbeat_interval: seconds."""

    def __init__(
        self,
        load: Callable[[Callable[[LoadProgress], None]], Awaitable[ModelInstance]],
        heartbeat_interval: float,
        encoder: LoadEncoder,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._load = load
        self._heartbeat_interval = heartbeat_interval
        self._encoder = encoder
        self._headers = {"content-type": encoder.content_type, "cache-control": "no-cache", **headers}
        self._latest: LoadProgress | None = None
        self._stepped = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the steps, then the outcome."""
        loading = asyncio.ensure_future(self._load(self._note))
        loading.add_done_callback(lambda _: self._stepped.set())
        async with EventStream(send, self._headers, self._heartbeat_interval, self._encoder.heartbeat) as stream:
            await self._stream(loading, stream)

    async def _stream(self, loading: asyncio.Future[ModelInstance], stream: EventStream) -> None:
        await self._stepped.wait()
        if loading.done() and loading.exception() and not stream.is_started:
            await loading
        await stream.start()
        if first := self._encoder.start():
            await stream.write(first)
        while not loading.done():
            self._stepped.clear()
            if self._latest:
                await stream.write(self._encoder.progress(progress(self._latest)))
            await self._stepped.wait()
            await asyncio.wait({loading}, timeout=MIN_INTERVAL)
        try:
            last = self._encoder.loaded(model_status(await loading))
        except EngineError as error:
            last = self._encoder.failed(failure_of(error)[1])
        await stream.end(last)

    def _note(self, step: LoadProgress) -> None:
        self._latest = step
        self._stepped.set()
