"""The application on uvicorn: its middleware, its connections, and its shutdown.

Rule 1: from outside to inside: request log (request_log.py), Interruptible, auth (auth.py), application (app.py).
Rule 2: the first signal drains. New requests get 503; running ones have `shutdown_timeout` to finish, then they are
        ended with an error; then all is released.
Rule 3: from then on signals have their usual effect: another one ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from mlxserver.api.dialect import Failure
from mlxserver.manager.reload import Reload
from mlxserver.server.app import App, ReloadSettings
from mlxserver.server.auth import Auth
from mlxserver.server.connection import Connection
from mlxserver.server.errors import failure_response
from mlxserver.server.request_history import RequestHistory
from mlxserver.server.request_log import RequestLog, has_response
from model_manager import ModelManager

log = logging.getLogger("server")

SEND_GRACE = 2  # seconds that responses get to be sent once their generations are ended at the shutdown
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn with an orderly shutdown: a signal stops it, and the process then ends with status 0."""

    def __init__(self, manager: ModelManager, reload: ReloadSettings) -> None:
        settings, history = manager.settings, RequestHistory()
        super().__init__(
            uvicorn.Config(
                RequestLog(Interruptible(Auth(App(manager, reload, history), manager)), history),
                http=partial(Connection, settings),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=settings.idle_connection_timeout,  # type: ignore[arg-type]  # seconds of any kind
                timeout_graceful_shutdown=SEND_GRACE,
            )
        )
        self._manager = manager
        self._reload = reload
        self._reloading: asyncio.Future[Reload] | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, finish or end running ones, then stop listening and wait until responses are sent."""
        await self._manager.close(self._manager.settings.shutdown_timeout)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving, without raising them again afterwards."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._handle_stop)
        loop.add_signal_handler(signal.SIGHUP, self._handle_reload)
        yield

    def _handle_stop(self) -> None:
        self.should_exit = True
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def _handle_reload(self) -> None:
        """Read the settings again. Wrong ones change nothing."""
        self._reloading = asyncio.ensure_future(self._reload())
        self._reloading.add_done_callback(_log_failure)


class Interruptible:
    """ASGI middleware: a response that uvicorn cancels at the end of the shutdown makes no traceback in the log, and a
    client that has no headers yet gets a 503.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not has_response():
                failure = Failure("The server has stopped.", "server", code="stopping")
                await failure_response(scope, 503, failure)(scope, receive, send)


def _log_failure(reloading: asyncio.Future[Reload]) -> None:
    if not reloading.cancelled() and (error := reloading.exception()):
        log.error("The settings were not reloaded: %s", error)
