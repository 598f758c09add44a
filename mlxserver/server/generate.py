"""Handler of every endpoint that generates, whatever its dialect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request

from mlxserver.api.dialect import Dialect
from mlxserver.api.schema.parameters import ValidationFailed
from mlxserver.engine.errors import EngineError
from mlxserver.engine.requests import EngineRequest, GenerationRequest
from mlxserver.server.body import ignored_headers, read_body
from mlxserver.server.image_urls import ImageUrls
from mlxserver.server.request_log import note_client, note_dialect, note_named_model, note_prompt
from mlxserver.server.streaming import GenerationResponse
from model_manager import ModelManager

MAX_VALUES = 100_000  # commas and opening brackets of a refused body that is read for its model

Handler = Callable[[Request], Awaitable[Any]]


def generate(dialect: Dialect, manager: ModelManager, images: ImageUrls, label: str = "") -> Handler:
    """The handler of one dialect: parse the body, resolve the model, respond with what it generates.

    label: the dialect in metrics and in the request log.
    """
    settings = manager.settings

    async def prepare(request: EngineRequest) -> EngineRequest:
        if not isinstance(request, GenerationRequest):
            return request
        prompt = await images.fetch(request.prompt, manager.settings)  # a reload may have changed them
        return request if prompt is request.prompt else replace(request, prompt=prompt)

    async def handle(request: Request) -> GenerationResponse:
        note_dialect(label)
        note_client(request.state.client)
        body = await read_body(request, settings)
        if manager.settings.log_contents:
            note_prompt(body)
        try:
            call = dialect.parse(body)
        except (ValidationFailed, EngineError):
            note_named_model(_model_in(body))
            raise
        note_named_model(call.model)
        if call.for_client:
            call = call.for_client(call, request.state.client)
        headers = ignored_headers(request, call.ignored)
        return GenerationResponse(
            manager.resolve(call.model, *call.other_names),
            call.limited(manager.settings.default_max_tokens),  # likewise
            headers,
            max_unread=settings.max_unread_events,
            heartbeat_interval=manager.settings.heartbeat_interval,  # likewise
            dialect=label,
            prepare=prepare,
        )

    return handle


def _model_in(body: bytes) -> object:
    """What a body that was refused names as its model; None if it names none, or may have been refused for its size."""
    if sum(body.count(mark) for mark in b",[{") > MAX_VALUES:
        return None
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return content.get("model") if isinstance(content, dict) else None
