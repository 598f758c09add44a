"""Handler of every endpoint that generates, whatever its dialect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request

from mlxserver.api.dialect import Dialect
from mlxserver.server.body import ignored_headers, read_body
from mlxserver.server.request_log import note_client, note_dialect, note_prompt
from mlxserver.server.streaming import GenerationResponse
from model_manager import ModelManager

Handler = Callable[[Request], Awaitable[Any]]


def generate(dialect: Dialect, manager: ModelManager, label: str = "") -> Handler:
    """The handler of one dialect: parse the body, resolve the model, respond with what it generates.

    label: the dialect in metrics and in the request log.
    """
    settings = manager.settings

    async def handle(request: Request) -> GenerationResponse:
        note_dialect(label)
        note_client(request.state.client)
        body = await read_body(request, settings)
        if manager.settings.log_contents:
            note_prompt(body)
        call = dialect.parse(body)
        if call.for_client:
            call = call.for_client(call, request.state.client)
        headers = ignored_headers(request, call.ignored)
        return GenerationResponse(
            manager.resolve(call.model, *call.other_names),
            call.limited(manager.settings.default_max_tokens),  # a reload may have changed it
            headers,
            max_unread=settings.max_unread_events,
            heartbeat_interval=manager.settings.heartbeat_interval,  # likewise
            dialect=label,
        )

    return handle
