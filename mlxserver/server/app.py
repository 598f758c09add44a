"""The application on uvicorn: what surrounds it, how it is stopped, and what its connections may do.

Rule 1: from outside to inside: the request's line in the log (access.py), who is let in (gate.py), what is answered.
Rule 2: the first signal drains. New requests get 503; those that run have `shutdown_timeout` to finish, then they are
        ended and told so; then all is released.
Rule 3: from then on signals have their usual effect: another one ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from turboapi import APIRouter, TurboAPI

from mlxserver import __version__
from mlxserver.api import responses
from mlxserver.manager.reload import Reload
from mlxserver.server.auth import Gate
from mlxserver.server.connection import Connection
from mlxserver.server.errors import exception_handlers, json_response
from mlxserver.server.handlers import TITLE, Handlers
from mlxserver.server.request_log import Access
from model_manager import ModelManager

log = logging.getLogger("server")

LAST_WORDS = 2  # seconds that answers get to leave once their generations are ended at the shutdown
STOPPING = (signal.SIGINT, signal.SIGTERM)

Reloading = Callable[[], Awaitable[Reload]]


class App(TurboAPI):  # type: ignore[misc]  # turboapi has no types
    """Application that answers requests which were let in.

    It builds the Starlette application itself: TurboAPI 0.2.8 passes `on_startup`, which Starlette 1.x does not take.
    """

    def __init__(self, manager: ModelManager, reload: Reloading) -> None:
        self.router = APIRouter()  # of routes that are added later; those of the handlers are Starlette's
        self.title, self.description, self.version = TITLE, "", __version__
        # The pages that TurboAPI would add do not work; /openapi.json and /docs are handlers.
        self.openapi_url = self.docs_url = self.redoc_url = self.openapi_generator = None
        self.app = Starlette(routes=Handlers(manager, reload).routes(), exception_handlers=exception_handlers())
        self.app.router.redirect_slashes = False


class Server(uvicorn.Server):
    """uvicorn, with an orderly end: a signal stops it, and the process then ends with status 0."""

    def __init__(self, manager: ModelManager, reload: Reloading) -> None:
        settings = manager.settings
        super().__init__(
            uvicorn.Config(
                Interruptible(Access(Gate(App(manager, reload), manager))),
                http=partial(Connection, settings),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self._manager = manager
        self._reload = reload
        self._reloading: asyncio.Future[Reload] | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, end what is old, then stop listening and wait for the last answers to leave."""
        await self._manager.close(self._manager.settings.shutdown_timeout)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals while serving, without raising them again afterwards."""
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            loop.add_signal_handler(number, self._handle_stop)
        loop.add_signal_handler(signal.SIGHUP, self._handle_reload)
        yield

    def _handle_stop(self) -> None:
        self.should_exit = True
        for number in STOPPING:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def _handle_reload(self) -> None:
        """Read the settings again, because of a signal. Wrong ones change nothing."""
        self._reloading = asyncio.ensure_future(self._reload())
        self._reloading.add_done_callback(_log_failure)


class Interruptible:
    """An ASGI application around another one: an answer that uvicorn cancels at last deserves no traceback in the log;
    who waits for it is told.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        is_begun = False

        async def noting(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not is_begun:
                body = responses.error("The server has stopped.", "server_error", code="stopping")
                await json_response(body, 503)(scope, receive, send)


def _log_failure(reloading: asyncio.Future[Reload]) -> None:
    if not reloading.cancelled() and (error := reloading.exception()):
        log.error("The settings were not reloaded: %s", error)
