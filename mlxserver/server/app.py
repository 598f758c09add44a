"""The application: a route for every endpoint of the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route
from turboapi import TurboAPI

from mlxserver.api.endpoints import ENDPOINTS, Endpoint
from mlxserver.manager.reload import Reload
from mlxserver.server.errors import exception_handlers
from mlxserver.server.generate import Handler, generate
from mlxserver.server.keys import Permission, require
from mlxserver.server.models import ModelHandlers
from mlxserver.server.ops import TITLE, OpsHandlers
from model_manager import ModelManager

ReloadSettings = Callable[[], Awaitable[Reload]]


def make_app(manager: ModelManager, reload: ReloadSettings) -> TurboAPI:
    """The application behind auth."""
    app = TurboAPI(
        title=TITLE,
        routes=routes(manager, reload),
        openapi_url=None,  # the route that turboapi 0.2.8 would add does not work; ours is one of the handlers
        exception_handlers=exception_handlers(),
    )
    app.app.router.redirect_slashes = False  # app.router is another one, which routes nothing
    return app


def routes(manager: ModelManager, reload: ReloadSettings) -> list[Route]:
    """A route for every endpoint; its handler has the endpoint's name, or is made from its dialect."""
    models, ops = ModelHandlers(manager, reload), OpsHandlers(manager)

    def handler_of(endpoint: Endpoint) -> Handler:
        if endpoint.dialect:
            return generate(endpoint.dialect(manager.settings), manager)
        handler: Handler = getattr(models, endpoint.name, None) or getattr(ops, endpoint.name)
        return managing(handler) if endpoint.manages else handler

    return [
        Route(each.path.replace("{key}", "{key:path}"), handler_of(each), methods=[each.method]) for each in ENDPOINTS
    ]


def managing(handler: Handler) -> Handler:
    """The handler, for clients that may manage models."""

    async def guarded(request: Request) -> Any:
        require(request, Permission.MANAGE)
        return await handler(request)

    return guarded
