"""The one table from errors to statuses, and how an error is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlxserver.api import responses, schemas
from mlxserver.api.openai.field_names import wire_param
from mlxserver.api.schema.parameters import abbreviate
from mlxserver.config.errors import ConfigInvalid
from mlxserver.engine.errors import (
    ContextExceeded,
    EngineError,
    EngineStopped,
    EngineUnloaded,
    LoadAborted,
    LoadFailed,
    ModelBusy,
    ModelExists,
    ModelFailed,
    ModelNotFound,
    ModelNotLoaded,
    ModelReplaced,
    ModelStalled,
    ModelUnloading,
    NoRoom,
    OutOfMemory,
    PromptRejected,
    QueueFull,
    RankLost,
    ReaderTooSlow,
    SourceInvalid,
    StepFailed,
)
from mlxserver.server.keys import Forbidden

# The first row that fits: exception, status, OpenAI's error type, code.
ERRORS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (ModelNotFound, 404, "not_found_error", "model_not_found"),
    (ModelNotLoaded, 404, "not_found_error", "model_not_loaded"),
    (ContextExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (PromptRejected, 400, "invalid_request_error", None),
    (SourceInvalid, 400, "invalid_request_error", "invalid_source"),
    (ConfigInvalid, 400, "invalid_request_error", "invalid_settings"),
    (schemas.ValidationFailed, 400, "invalid_request_error", None),
    (Forbidden, 403, "permission_error", "admin_key_needed"),
    (ReaderTooSlow, 408, "invalid_request_error", "reader_too_slow"),
    (ModelExists, 409, "invalid_request_error", "model_exists"),
    (ModelReplaced, 409, "invalid_request_error", "model_replaced"),
    (ModelBusy, 409, "invalid_request_error", "model_busy"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (ModelUnloading, 503, "server_error", "model_unloading"),
    (ModelStalled, 503, "server_error", "model_wedged"),
    (LoadFailed, 503, "server_error", "load_failed"),
    (LoadAborted, 503, "server_error", "load_aborted"),
    (NoRoom, 507, "server_error", "insufficient_memory"),
    (OutOfMemory, 507, "server_error", "out_of_memory"),
    (ModelFailed, 503, "server_error", "model_failed"),
    (EngineUnloaded, 503, "server_error", "model_unloading"),
    (EngineStopped, 503, "server_error", "engine_stopped"),
    (RankLost, 503, "server_error", "rank_lost"),
    (StepFailed, 500, "server_error", "step_failed"),
    (EngineError, 500, "server_error", None),
)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and envelope of an error that a caller may meet."""
    status, kind, code = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    default_param = "model" if isinstance(error, SourceInvalid) else None
    param = wire_param(getattr(error, "param", default_param))
    body = responses.error(str(error), kind, param=param, code=getattr(error, "code", None) or code)
    if isinstance(error, NoRoom):
        body["projection"] = asdict(error.projection)
    return status, body


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def on_known_error(request: Request, error: Exception) -> Response:
    """Answer an error of the table."""
    status, body = error_body(error)
    retry_after = getattr(error, "retry_after", None)
    return json_response(body, status, {"Retry-After": str(max(1, round(retry_after)))} if retry_after else None)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: unknown path, wrong method, body too large."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=dict(error.headers or {}))
    path = abbreviate(request.scope["path"])
    message = {
        404: f"Unknown path: {request.method} {path}.",
        405: f"{path} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return json_response(responses.error(message, kind), error.status_code, dict(error.headers or {}))


async def on_departure(request: Request, error: Exception) -> None:
    """Say nothing to a client that left within its body."""


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Answer what nobody expected; the log has the traceback."""
    return json_response(responses.error("The server failed to process the request.", "server_error"), 500)


def exception_handlers() -> dict[Any, Any]:
    """What the application is to do with each exception."""
    known: dict[Any, Any] = {row[0]: on_known_error for row in ERRORS}
    return {**known, HTTPException: on_http_error, ClientDisconnect: on_departure, Exception: on_unexpected_error}
