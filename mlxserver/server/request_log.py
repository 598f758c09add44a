"""One line in the log for each request, and the id that it is known by.

Rule 1: the id comes from the client (X-Request-Id) or is made here; it goes back in the answer's header.
Rule 2: the line is written when the answer has ended, however it ended.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxserver.engine.worker.generation import Generation

log = logging.getLogger("requests")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
SHOWN_PATH = 200  # characters
QUIET = {"/health", "/health/ready", "/metrics"}  # asked all the time; logged at the level debug


@dataclass(slots=True)
class Story:
    """What there is to tell of one request. Times in seconds, by time.monotonic()."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    model: str | None = None
    generations: list[Generation] = field(default_factory=list)

    def fields(self) -> Iterator[tuple[str, Any]]:
        """What the line says."""
        yield from (("id", self.id), ("method", self.method), ("path", self.path[:SHOWN_PATH]), ("status", self.status))
        yield "seconds", round(time.monotonic() - self.started, 4)
        if not self.generations:
            return
        yield "model", self.model
        yield "outcome", self.generations[-1].outcome
        if usages := [generation.usage for generation in self.generations if generation.usage]:
            yield "prompt_tokens", sum(usage.prompt_tokens for usage in usages)
            yield "cached_tokens", sum(usage.cached_tokens for usage in usages)
            yield "completion_tokens", sum(usage.completion_tokens for usage in usages)
            yield "queue_seconds", round(max(usage.timings.queue for usage in usages), 4)
            yield "ttft_seconds", round(max(usage.timings.queue + usage.timings.prompt for usage in usages), 4)


_current: ContextVar[Story | None] = ContextVar("story", default=None)


def note_generation(model: str, generation: Generation) -> None:
    """Tell which model answers the current request, and with what."""
    if story := _current.get():
        story.model = model
        story.generations.append(generation)


class Access:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and write its line."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        story = Story(_request_id(scope), scope["method"], scope["path"])
        _current.set(story)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                story.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", story.id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            level = logging.DEBUG if story.path in QUIET else logging.INFO
            log.log(level, "request", extra={"fields": dict(story.fields())})
        return None


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid4().hex
