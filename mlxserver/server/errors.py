"""The one table from errors to statuses, and the responses to errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from mlxserver.api.dialect import Failure, FailureKind
from mlxserver.api.endpoints import encode_failure
from mlxserver.api.openai.responses.store import ResponseNotFound
from mlxserver.api.schema.parameters import ValidationFailed, abbreviate
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
    ModelLoaded,
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
    StepFailed,
)
from mlxserver.engine.loading.errors import DiskFull, HubUnavailable, SourceInvalid, TooLarge
from mlxserver.server.keys import Forbidden
from mlxserver.server.request_log import note_error, request_id

# The first row that fits: exception, status, kind, code.
ERRORS: tuple[tuple[type[Exception], int, FailureKind, str | None], ...] = (
    (ModelNotFound, 404, "not_found", "model_not_found"),
    (ModelNotLoaded, 404, "not_found", "model_not_loaded"),
    (ResponseNotFound, 404, "not_found", "response_not_found"),
    (ContextExceeded, 400, "invalid_request", "context_length_exceeded"),
    (PromptRejected, 400, "invalid_request", None),
    (HubUnavailable, 502, "server", "hub_unavailable"),
    (DiskFull, 507, "server", "disk_full"),
    (TooLarge, 507, "server", "model_too_large"),
    (SourceInvalid, 400, "invalid_request", "invalid_source"),
    (ConfigInvalid, 400, "invalid_request", "invalid_settings"),
    (ValidationFailed, 400, "invalid_request", None),
    (Forbidden, 403, "permission", "admin_key_needed"),
    (ReaderTooSlow, 408, "invalid_request", "reader_too_slow"),
    (ModelExists, 409, "invalid_request", "model_exists"),
    (ModelReplaced, 409, "invalid_request", "model_replaced"),
    (ModelLoaded, 409, "invalid_request", "model_loaded"),
    (ModelBusy, 409, "invalid_request", "model_busy"),
    (QueueFull, 429, "rate_limit", "queue_full"),
    (ModelUnloading, 503, "server", "model_unloading"),
    (ModelStalled, 503, "server", "model_wedged"),
    (LoadFailed, 503, "server", "load_failed"),
    (LoadAborted, 503, "server", "load_aborted"),
    (NoRoom, 507, "server", "insufficient_memory"),
    (OutOfMemory, 507, "server", "out_of_memory"),
    (ModelFailed, 503, "server", "model_failed"),
    (EngineUnloaded, 503, "server", "model_unloading"),
    (EngineStopped, 503, "server", "engine_stopped"),
    (RankLost, 503, "server", "rank_lost"),
    (StepFailed, 500, "server", "step_failed"),
    (EngineError, 500, "server", None),
)


def failure_of(error: Exception) -> tuple[int, Failure]:
    """Status and failure of an error of the table."""
    status, kind, code = next(row[1:] for row in ERRORS if isinstance(error, row[0]))
    param = getattr(error, "param", "model" if isinstance(error, SourceInvalid) else None)
    projection = error.projection if isinstance(error, NoRoom) else None
    code = getattr(error, "code", None) or code
    return status, Failure(str(error), kind, param, code, projection, request_id())


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def failure_response(scope: Scope, status: int, failure: Failure, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request that failed, in the envelope of the client's API."""
    note_error(failure)
    body = encode_failure(scope["path"], replace(failure, request_id=request_id()), Headers(scope=scope))
    return Response(body, status, headers, media_type="application/json")


async def on_known_error(request: Request, error: Exception) -> Response:
    """Respond to an error of the table."""
    status, failure = failure_of(error)
    retry_after = getattr(error, "retry_after", None)
    headers = {"Retry-After": str(max(1, round(retry_after)))} if retry_after else None
    return failure_response(request.scope, status, failure, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Respond to what the router refuses: unknown path, wrong method, body too large."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=dict(error.headers or {}))
    path = abbreviate(request.scope["path"])
    message = {
        404: f"Unknown path: {request.method} {path}.",
        405: f"{path} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    code = "request_too_large" if error.status_code == 413 else None
    failure = Failure(message, "not_found" if error.status_code == 404 else "invalid_request", code=code)
    return failure_response(request.scope, error.status_code, failure, dict(error.headers or {}))


async def on_disconnect(request: Request, error: Exception) -> None:
    """Send nothing to a client that disconnected while its body was read."""


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Respond to any other exception; the log has the traceback."""
    failure = Failure("The server failed to process the request.", "server")
    return failure_response(request.scope, 500, failure)


def exception_handlers() -> dict[Any, Any]:
    """Handlers by exception, as the application takes them."""
    known: dict[Any, Any] = {row[0]: on_known_error for row in ERRORS}
    return {**known, HTTPException: on_http_error, ClientDisconnect: on_disconnect, Exception: on_unexpected_error}
