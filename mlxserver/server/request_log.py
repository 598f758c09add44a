"""Request log: one line per request, and the id that it is known by.

Rule 1: the id comes from the client (X-Request-Id) or is made here; the response has it in a header, under both names
        that clients look for.
Rule 2: the line is written when the response has ended, however it ended.
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
MAX_PATH = 200  # characters of a path in the log
QUIET_PATHS = {"/health", "/health/ready", "/metrics"}  # polled; logged at the level debug


@dataclass(slots=True)
class RequestRecord:
    """Record of one request. Times in seconds, by time.monotonic()."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    dialect: str | None = None
    model: str | None = None
    generations: list[Generation] = field(default_factory=list)

    def fields(self) -> Iterator[tuple[str, Any]]:
        """Fields of the log line."""
        yield from (("id", self.id), ("method", self.method), ("path", self.path[:MAX_PATH]), ("status", self.status))
        yield "seconds", round(time.monotonic() - self.started, 4)
        if self.dialect:
            yield "dialect", self.dialect
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


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def note_generation(model: str, generation: Generation) -> None:
    """Add a generation, and the model that runs it, to the record of the current request."""
    if record := _current.get():
        record.model = model
        record.generations.append(generation)


def note_dialect(dialect: str) -> None:
    """Add the dialect to the record of the current request."""
    if record := _current.get():
        record.dialect = dialect


def has_response() -> bool:
    """Whether the head of the response to the current request has been sent."""
    record = _current.get()
    return record is not None and record.status is not None


def request_id() -> str | None:
    """The id of the current request; None outside of any."""
    record = _current.get()
    return record.id if record else None


class RequestLog:
    """ASGI middleware that writes the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then write its line."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"])
        _current.set(record)

        async def note_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                ids = [(name, record.id.encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        try:
            await self._app(scope, receive, note_and_send)
        finally:
            level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
            log.log(level, "request", extra={"fields": dict(record.fields())})
        return None


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid4().hex
