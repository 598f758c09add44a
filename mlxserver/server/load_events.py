"""A load that is told as it goes, as server-sent events.

Rule 1: what fails before the first step has its status; what fails later is the last event.
Rule 2: a client that leaves does not end the load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import orjson
from starlette.types import Receive, Scope, Send

from mlxserver.api import sse
from mlxserver.engine.errors import EngineError
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import LoadProgress
from mlxserver.server import translation
from mlxserver.server.errors import error_body

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
LEAST_INTERVAL = 0.1  # seconds between two events of one stage


class LoadStream:
    """The response to a load that streams. `load` starts it, given what hears of its steps."""

    def __init__(self, load: Callable[[Callable[[LoadProgress], None]], Awaitable[ModelInstance]]) -> None:
        self._load = load
        self._latest: LoadProgress | None = None
        self._stepped = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell the steps, then how it ended."""
        loading = asyncio.ensure_future(self._load(self._note))
        loading.add_done_callback(lambda _: self._stepped.set())
        await self._stepped.wait()
        if loading.done() and loading.exception():
            await loading
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while not loading.done():
            self._stepped.clear()
            if self._latest:
                await send(_event({"event": "progress", **translation.progress(self._latest)}))
            await self._stepped.wait()
            await asyncio.wait({loading}, timeout=LEAST_INTERVAL)
        try:
            last = translation.loaded(await loading)
        except EngineError as error:
            last = error_body(error)[1]
        await send({**_event(last), "more_body": False})

    def _note(self, step: LoadProgress) -> None:
        self._latest = step
        self._stepped.set()


def _event(content: object) -> dict[str, object]:
    return {"type": "http.response.body", "body": sse.encode(orjson.dumps(content)), "more_body": True}
