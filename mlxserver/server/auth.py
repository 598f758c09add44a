"""Authentication and authorization, as ASGI middleware: host names, origins, keys.

Rule 1: a request is refused for the name it calls the server by, then for the page it comes from, then for its key, and
        then because the server stops. Nothing of its body is read before, and no refusal depends on the path; only the
        envelope does, which is that of the path's dialect.
Rule 2: /health needs no key, only a right host name. The files of the page need none, nor does the path that a session
        begins at.
Rule 3: a session cookie counts only in requests of the page itself: a browser marks those from elsewhere, and what
        changes something has a header that no other page can send.
Rule 4: what an authenticated request may do is in its state, `permission`, and whose it is `client` (server/keys.py).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxserver.api.dialect import Failure
from mlxserver.config.http import is_loopback
from mlxserver.config.settings import Settings
from mlxserver.page.files import TYPES
from mlxserver.server.errors import failure_response
from mlxserver.server.keys import Keys, Permission
from model_manager import ModelManager

OPEN_PATHS = {"/health"}
SESSION_PATH = "/page/session"
SESSION_COOKIE = "mlx_session"
PAGE_HEADER = "x-mlx-page"  # of the page's requests that change something
OWN_SITES = (None, "same-origin", "none")  # Sec-Fetch-Site: of older browsers, of the page, of the address bar
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
METHODS = "GET, POST, DELETE, OPTIONS"
PREFLIGHT_MAX_AGE = "86400"  # seconds that a browser may cache the response to a preflight
RETRY_AFTER = "5"  # seconds: another server takes over, or this one is started again
EXPOSED_HEADERS = "X-Request-Id, Request-Id, Retry-After, X-Ignored-Parameters"


class Auth:
    """Middleware. Settings are read from the manager at every request: a reload may change them."""

    def __init__(self, app: ASGIApp, manager: ModelManager) -> None:
        self._app = app
        self._manager = manager
        self._host = manager.settings.host
        self._is_local = is_loopback(self._host)
        self._cached_keys: tuple[Settings, Keys] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        headers, settings = Headers(scope=scope), self._manager.settings
        origin = headers.get("origin")
        if origin is not None and _is_allowed(origin, settings):
            send = _readable_by(origin, send)
        response = self._check_names(scope, headers, settings) or _preflight(scope, headers, settings)
        await (response or self._check_key(scope, headers, settings) or self._app)(scope, receive, send)

    def _check_names(self, scope: Scope, headers: Headers, settings: Settings) -> Response | None:
        """Refuse pages of other sites: neither DNS rebinding nor another origin reaches the server."""
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._is_ours(host, settings):
            message = f"This server is not known as {host[:100]!r}; see --allow-host."
            return _forbidden(scope, message, "host_not_allowed")
        if origin is not None and not _is_allowed(origin, settings) and _netloc(origin) != host:
            message = f"Pages of {origin[:100]!r} may not use this server; see --allow-origin."
            return _forbidden(scope, message, "origin_not_allowed")
        return None

    def _is_ours(self, host: str, settings: Settings) -> bool:
        """Whether the name is one of this server's: beyond loopback any is, unless some are listed."""
        if not settings.allow_host and not self._is_local:
            return True
        name = hostname(host)
        return name in LOOPBACK_NAMES or name in {hostname(each) for each in (self._host, *settings.allow_host)}

    def _check_key(self, scope: Scope, headers: Headers, settings: Settings) -> Response | None:
        path, keys = scope["path"], self._keys(settings)
        given = [headers.get(name, "").encode("latin-1") for name in ("authorization", "x-api-key")]
        permission, client = keys.identify(*given)
        if permission is None and (token := _session(scope, headers)):
            permission, client = keys.identify_session(token)
        if permission is None and path not in OPEN_PATHS and not _is_of_page(scope, headers, settings):
            message = "A valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY."
            failure = Failure(message, "authentication", code="invalid_api_key")
            return failure_response(scope, 401, failure, {"WWW-Authenticate": "Bearer"})
        known = Permission.LOOK if permission is None else permission
        state = {"permission": known, "client": client, "keys": keys}
        scope.setdefault("state", {}).update(state)
        if self._manager.is_closing and path not in OPEN_PATHS:
            failure = Failure("The server is stopping. Try again later.", "server", code="stopping")
            return failure_response(scope, 503, failure, {"Retry-After": RETRY_AFTER, "Connection": "close"})
        return None

    def _keys(self, settings: Settings) -> Keys:
        if self._cached_keys is None or self._cached_keys[0] is not settings:
            self._cached_keys = settings, Keys(settings, self._host)
        return self._cached_keys[1]


def _session(scope: Scope, headers: Headers) -> bytes:
    """The session token of a request of the page; empty without one."""
    is_safe = scope["method"] in ("GET", "HEAD") or PAGE_HEADER in headers
    if not is_safe or headers.get("sec-fetch-site") not in OWN_SITES:
        return b""
    return cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "").encode("latin-1", "replace")


def _is_of_page(scope: Scope, headers: Headers, settings: Settings) -> bool:
    """Whether a request is for a file of the page, or for a session."""
    path = scope["path"]
    if not settings.page:
        return False
    if path == SESSION_PATH:
        return True
    is_file = path == "/" and "text/html" in headers.get("accept", "")
    is_file = is_file or path.removeprefix("/page/") in TYPES
    return is_file and scope["method"] in ("GET", "HEAD")


def hostname(host: str) -> str:
    """The name in a Host header, without port, brackets and the root's dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host
    if name.count(":") == 1:
        name = name.partition(":")[0]
    return name.lower().rstrip(".")


def _netloc(origin: str) -> str:
    """Host and port of an origin; empty where there is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_allowed(origin: str, settings: Settings) -> bool:
    return origin in settings.allow_origin or "*" in settings.allow_origin


def _preflight(scope: Scope, headers: Headers, settings: Settings) -> Response | None:
    """The response to a CORS preflight of an allowed page; None for any other request."""
    if scope["method"] != "OPTIONS" or "access-control-request-method" not in headers:
        return None
    if not _is_allowed(headers.get("origin", ""), settings):
        return None
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
            "Access-Control-Max-Age": PREFLIGHT_MAX_AGE,
        },
    )


def _readable_by(origin: str, send: Send) -> Send:
    """Let pages of this origin read the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_headers


def _forbidden(scope: Scope, message: str, code: str) -> Response:
    return failure_response(scope, 403, Failure(message, "permission", code=code))
