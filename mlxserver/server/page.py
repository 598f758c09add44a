"""Handlers of the page in the browser: its files, its session, Markdown, and the feed of what happens.

Rule: a file is one of a fixed table (page/files.py), with a policy that lets no script, style or image of elsewhere in.
"""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mlxserver.api.dialect import Failure
from mlxserver.api.native.benchmark import BenchmarkRequest
from mlxserver.api.native.page import RenderRequest, SessionRequest, rendered_texts, session_object
from mlxserver.api.schema import parameters
from mlxserver.page.files import INDEX, PageFile, page_file
from mlxserver.page.markdown import render_texts
from mlxserver.server.auth import SESSION_COOKIE
from mlxserver.server.benchmark import BenchmarkResponse
from mlxserver.server.body import read_body
from mlxserver.server.errors import failure_response, json_response
from mlxserver.server.keys import SESSION_SECONDS, Keys, Permission
from mlxserver.server.live import LiveFeed
from mlxserver.server.live_response import LiveResponse
from mlxserver.server.request_history import RequestHistory
from model_manager import ModelManager

MAX_KEY_BODY = 8 << 10  # bytes, because clients without a key may send it
ANY_ADDRESS, LOOPBACK = ("0.0.0.0", "::"), "127.0.0.1"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageHandlers:
    """Handlers by the names of their endpoints."""

    def __init__(self, manager: ModelManager, history: RequestHistory) -> None:
        self._history = history
        self._manager = manager
        self._feed = LiveFeed(manager)
        self._benchmarking = asyncio.Lock()
        self._rendering = asyncio.Semaphore(1)  # one thread at most takes the interpreter from the streams

    async def page_file(self, request: Request) -> Response:
        """GET /page/{name}."""
        try:
            return file_response(request, self._manager, page_file(request.path_params["name"]))
        except KeyError:
            raise HTTPException(404) from None

    async def events(self, request: Request) -> LiveResponse:
        """GET /v1/events."""
        return LiveResponse(self._feed, self._manager)

    async def list_requests(self, request: Request) -> Response:
        """GET /v1/requests."""
        found = self._history.summaries(request.query_params.get("after", ""))
        return json_response(
            {"object": "list", "data": found.requests, "cursor": found.cursor, "is_whole": found.is_whole}
        )

    async def retrieve_request(self, request: Request) -> Response:
        """GET /v1/requests/{id}."""
        found = self._history.trace(request.path_params["id"])
        if found is None:
            message = "No such request is known here; the last few hundred are."
            return failure_response(request.scope, 404, Failure(message, "not_found", "id", "request_not_found"))
        return json_response(found)

    async def render(self, request: Request) -> Response:
        """POST /v1/render."""
        asked = parameters.parse(RenderRequest, await read_body(request, self._manager.settings))
        async with self._rendering:
            html = await asyncio.to_thread(render_texts, asked.texts)
        return json_response(rendered_texts(html))

    async def benchmark(self, request: Request) -> Response | BenchmarkResponse:
        """POST /v1/benchmark."""
        asked = parameters.parse(BenchmarkRequest, await read_body(request, self._manager.settings))
        options = asked.options
        for key in asked.models:
            self._manager.instance(key)
        if self._benchmarking.locked():
            failure = Failure(
                "A benchmark is running; one runs at a time.", "invalid_request", code="benchmark_running"
            )
            return failure_response(request.scope, 409, failure)
        settings, keys = self._manager.settings, request.state.keys
        host = LOOPBACK if settings.host in ANY_ADDRESS else settings.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{request.scope['server'][1]}/v1"
        key = keys.session(request.state.client) or "none"
        return BenchmarkResponse(options, url, key, settings.heartbeat_interval, self._benchmarking)

    async def session(self, request: Request) -> Response:
        """GET /page/session."""
        permission, settings = request.state.permission, self._manager.settings
        state = session_object(
            needs_key=settings.has_keys,
            may_generate=permission >= Permission.GENERATE,
            may_manage=permission >= Permission.MANAGE,
        )
        return json_response(state, headers={"Cache-Control": "no-store"})

    async def open_session(self, request: Request) -> Response:
        """POST /page/session: a key becomes a cookie that scripts can't read."""
        body = await read_body(request, self._manager.settings, MAX_KEY_BODY)
        asked = parameters.parse(SessionRequest, body)
        keys: Keys = request.state.keys
        permission, client = keys.identify(b"", asked.key.encode())
        if permission is None:
            failure = Failure("The server does not know this key.", "authentication", code="invalid_api_key")
            return failure_response(request.scope, 401, failure)
        request.state.permission = permission
        response = await self.session(request)
        if token := keys.session(client):
            is_secure = request.headers.get("x-forwarded-proto") == "https"
            response.set_cookie(
                SESSION_COOKIE, token, SESSION_SECONDS, path="/", httponly=True, samesite="strict", secure=is_secure
            )
        return response

    async def close_session(self, request: Request) -> Response:
        """DELETE /page/session: what is left without it."""
        keys: Keys = request.state.keys
        request.state.permission = keys.identify(b"")[0] or Permission.LOOK
        response = await self.session(request)
        response.delete_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="strict")
        return response


def index_response(request: Request, manager: ModelManager) -> Response:
    """The page itself."""
    return file_response(request, manager, page_file(INDEX))


def file_response(request: Request, manager: ModelManager, file: PageFile) -> Response:
    """The response with a file; without a body where the browser has it. Raises HTTPException if there is no page."""
    if not manager.settings.page:
        raise HTTPException(404)
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media)
