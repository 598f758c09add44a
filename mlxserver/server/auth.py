"""Who is let in: an ASGI application around the one that answers.

Rule 1: a request is refused for the name it calls the server by, then for the page it comes from, then for its key, and
        then because the server stops. Nothing of it is read before, and no refusal depends on the path.
Rule 2: /health is for all_instances who calls the server by its name.
Rule 3: what a request that was let in may do is in its state, `right` (server/keys.py).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxserver.api import responses
from mlxserver.config.http import is_loopback
from mlxserver.config.settings import Settings
from mlxserver.server.errors import json_response
from mlxserver.server.keys import Keys, Right
from model_manager import ModelManager

OPEN_PATHS = {"/health"}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
METHODS = "GET, POST, OPTIONS"
DAY = "86400"  # seconds that a browser may keep the answer to its preflight
RETRY_AFTER = "5"  # seconds: another server takes over, or this one is started again
EXPOSED = "X-Request-Id, Retry-After, X-Ignored-Parameters"


class Gate:
    """The manager has the settings, which may change, and tells when the server stops."""

    def __init__(self, app: ASGIApp, manager: ModelManager) -> None:
        self._app = app
        self._manager = manager
        self._host = manager.settings.host
        self._known: tuple[Settings, Keys] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer it."""
        headers, settings = Headers(scope=scope), self._manager.settings
        origin = headers.get("origin")
        if origin is not None and _is_allowed(origin, settings):
            send = _readable_by(origin, send)
        answer = self._check_names(headers, settings) or _preflight(scope, headers, settings)
        await (answer or self._check_key(scope, headers, settings) or self._app)(scope, receive, send)

    def _check_names(self, headers: Headers, settings: Settings) -> Response | None:
        """A page of another site must not reach the server: neither by its own name for it, nor across origins."""
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_ours(host, settings):
            return _refused(403, f"This server is not known as {host[:100]!r}; see --allow-host.", "host_not_allowed")
        if origin is not None and not _is_allowed(origin, settings) and _place(origin) != host:
            message = f"Pages of {origin[:100]!r} may not use this server; see --allow-origin."
            return _refused(403, message, "origin_not_allowed")
        return None

    def _is_ours(self, host: str, settings: Settings) -> bool:
        """Whether the name is one of this server's. On an address that others reach, any is, unless some are listed."""
        if not settings.allow_host and not is_loopback(self._host):
            return True
        name = hostname(host)
        return name in LOOPBACK_NAMES or name in {hostname(each) for each in (self._host, *settings.allow_host)}

    def _check_key(self, scope: Scope, headers: Headers, settings: Settings) -> Response | None:
        is_open = scope["path"] in OPEN_PATHS
        right = self._keys(settings).right(headers.get("authorization", "").encode("latin-1"))
        if right is None and not is_open:
            message = "A valid API key is needed: Authorization: Bearer KEY."
            body = responses.error(message, "authentication_error", code="invalid_api_key")
            return json_response(body, 401, {"WWW-Authenticate": "Bearer"})
        scope.setdefault("state", {})["right"] = Right.LOOK if right is None else right
        if self._manager.is_closing and not is_open:
            body = responses.error("The server is stopping. Try again later.", "server_error", code="stopping")
            return json_response(body, 503, {"Retry-After": RETRY_AFTER, "Connection": "close"})
        return None

    def _keys(self, settings: Settings) -> Keys:
        if self._known is None or self._known[0] is not settings:
            self._known = settings, Keys(settings, self._host)
        return self._known[1]


def hostname(host: str) -> str:
    """The name in a Host header, without port, brackets and the root's dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host
    if name.count(":") == 1:
        name = name.partition(":")[0]
    return name.lower().rstrip(".")


def _place(origin: str) -> str:
    """Host and port of an origin; empty where there is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_allowed(origin: str, settings: Settings) -> bool:
    return origin in settings.allow_origin or "*" in settings.allow_origin


def _preflight(scope: Scope, headers: Headers, settings: Settings) -> Response | None:
    """What a browser wants to hear before it lets a request of an allowed page go. None: it asks for something else."""
    if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
        return None
    if not _is_allowed(headers.get("origin", ""), settings):
        return None
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
            "Access-Control-Max-Age": DAY,
        },
    )


def _readable_by(origin: str, send: Send) -> Send:
    """Let pages of this origin read the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = EXPOSED
            headers.add_vary_header("Origin")
        await send(message)

    return sending


def _refused(status: int, message: str, code: str) -> Response:
    return json_response(responses.error(message, "permission_error", code=code), status)
