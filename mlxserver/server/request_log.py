"""Request log: one line per request, and the id that it is known by.

Rule 1: the id comes from the client (X-Request-Id) or is made here; the response has it in a header, under both names
        that clients look for.
Rule 2: the line is written when the response has ended, however it ended.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxserver.api.dialect import Failure
from mlxserver.api.schema.parameters import abbreviate
from mlxserver.engine.events import Delta, Event
from mlxserver.engine.worker.generation import Generation
from mlxserver.server.request_history import RequestHistory, RequestRecord

log = logging.getLogger("requests")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
MAX_PATH = 200  # characters of a path in the log
MAX_AGENT = 120  # characters of a client's name that are kept
MAX_MODEL = 120  # characters of what a request names as its model that are kept
MAX_TEXT = 32_768  # characters of a prompt, and of an answer, that are kept
QUIET_PATHS = {"/health", "/health/ready", "/metrics"}  # polled; logged at the level debug


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def note_model(model: str, *, is_loaded: bool) -> None:
    """Add the model that the current request is for, and is prepared for from now on, to its record."""
    if record := _current.get():
        record.model, record.is_load_awaited = model, not is_loaded
        record.asked = time.monotonic()


def note_named_model(name: object) -> None:
    """Add what the current request names as its model to its record: one line, and not long, whatever it is."""
    if (record := _current.get()) and name is not None:
        text = name[:MAX_MODEL] if isinstance(name, str) else abbreviate(name)
        record.model = (text if text.isprintable() else repr(text))[:MAX_MODEL]


def note_generation(generation: Generation) -> None:
    """Add a generation to the record of the current request."""
    if record := _current.get():
        record.generations.append(generation)
        record.submitted.append(time.monotonic())


def note_error(failure: Failure) -> None:
    """Add an error to the record of the current request. Of one that may quote the request only where it occurred is
    kept, unless the request's texts are.
    """
    if record := _current.get():
        quotes = failure.kind == "invalid_request" and failure.code is None and record.prompt is None
        place = f" for its '{failure.param}'" if failure.param else ""
        record.error = f"The request was refused{place}." if quotes else failure.message


def note_client(key_id: str) -> None:
    """Add the id of the client's key to the record of the current request."""
    if record := _current.get():
        record.key_id = key_id


def note_prompt(body: bytes) -> None:
    """Keep the texts of the current request, its body and its answer."""
    if record := _current.get():
        record.prompt, record.answer = body[:MAX_TEXT].decode(errors="replace"), ""


def note_events(events: Iterable[Event]) -> None:
    """Add the text of events to the record of the current request, if its texts are kept."""
    record = _current.get()
    if record and record.answer is not None and len(record.answer) < MAX_TEXT:
        text = "".join(event.text for event in events if isinstance(event, Delta) and event.index == 0)
        record.answer += text[: MAX_TEXT - len(record.answer)]


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

    def __init__(self, app: ASGIApp, history: RequestHistory | None = None) -> None:
        self._app = app
        self._history = history or RequestHistory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, then write its line."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = RequestRecord(_request_id(scope), scope["method"], scope["path"], *_client(scope))
        _current.set(record)
        self._history.begin(record)

        async def note_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                ids = [(name, record.id.encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        try:
            await self._app(scope, receive, note_and_send)
        finally:
            self._history.end(record)
            is_quiet = record.path in QUIET_PATHS or record.path.startswith("/page/")
            level = logging.DEBUG if is_quiet else logging.INFO
            log.log(level, "request", extra={"fields": dict(_fields(record))})
        return None


def _fields(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    """Fields of the log line."""
    yield from (("id", record.id), ("method", record.method), ("path", record.path[:MAX_PATH]))
    yield from (("status", record.status), ("seconds", round(time.monotonic() - record.started, 4)))
    if record.dialect:
        yield "dialect", record.dialect
    if not record.generations:
        return
    yield "model", record.model
    yield "outcome", record.generations[-1].outcome
    if usages := [generation.usage for generation in record.generations if generation.usage]:
        yield "prompt_tokens", sum(usage.prompt_tokens for usage in usages)
        yield "cached_tokens", sum(usage.cached_tokens for usage in usages)
        yield "completion_tokens", sum(usage.completion_tokens for usage in usages)
        yield "queue_seconds", round(max(usage.timings.queue for usage in usages), 4)
        yield "ttft_seconds", round(max(usage.timings.queue + usage.timings.prompt for usage in usages), 4)


def _client(scope: Scope) -> tuple[str, str]:
    """The program that the client states, and its address."""
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    return agent.decode("latin-1")[:MAX_AGENT], (scope.get("client") or ("",))[0]


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid4().hex
