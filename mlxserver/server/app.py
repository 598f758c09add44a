"""The application: a route for every endpoint of the API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from turboapi import APIRouter, TurboAPI

from mlxserver import __version__
from mlxserver.api.dialect import Dialect
from mlxserver.api.endpoint import Endpoint
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.openai.responses.dialect import ResponsesDialect
from mlxserver.manager.reload import Reload
from mlxserver.server.errors import exception_handlers
from mlxserver.server.generate import Handler, generate
from mlxserver.server.image_urls import ImageUrls
from mlxserver.server.keys import Permission, require
from mlxserver.server.library import LibraryHandlers
from mlxserver.server.models import ModelHandlers
from mlxserver.server.ollama import OllamaHandlers
from mlxserver.server.ops import TITLE, OpsHandlers
from mlxserver.server.page import PageHandlers
from mlxserver.server.request_history import RequestHistory
from mlxserver.server.responses import ResponseHandlers
from model_manager import ModelManager

ReloadSettings = Callable[[], Awaitable[Reload]]


class App(TurboAPI):  # type: ignore[misc]  # turboapi has no types
    """Application behind auth.

    It builds the Starlette application itself: TurboAPI 0.2.8 passes `on_startup`, which Starlette 1.x does not take.
    """

    def __init__(
        self,
        manager: ModelManager,
        reload: ReloadSettings,
        history: RequestHistory | None = None,
        images: ImageUrls | None = None,
    ) -> None:
        self.router = APIRouter()  # of routes that are added later; those of the handlers are Starlette's
        self.title, self.description, self.version = TITLE, "", __version__
        # The pages that TurboAPI would add do not work; /openapi.json and /docs are handlers.
        self.openapi_url = self.docs_url = self.redoc_url = self.openapi_generator = None
        found = routes(manager, reload, history or RequestHistory(), images or ImageUrls())
        self.app = Starlette(routes=found, exception_handlers=exception_handlers())
        self.app.router.redirect_slashes = False


def routes(manager: ModelManager, reload: ReloadSettings, history: RequestHistory, images: ImageUrls) -> list[Route]:
    """A route for every endpoint; its handler has the endpoint's name, or is made from its dialect."""
    responses = ResponsesDialect(manager.settings)
    rooms = (
        ModelHandlers(manager, reload, images),
        LibraryHandlers(manager),
        ResponseHandlers(responses.store),
        OpsHandlers(manager),
        OllamaHandlers(manager),
        PageHandlers(manager, history),
    )
    shared: dict[type[Dialect], Dialect] = {ResponsesDialect: responses}  # by several endpoints

    def handler_of(endpoint: Endpoint) -> Handler:
        if endpoint.dialect:
            dialect = shared.get(endpoint.dialect) or endpoint.dialect(manager.settings)
            return generate(dialect, manager, images, endpoint.label)
        handler: Handler = next(getattr(each, endpoint.name) for each in rooms if hasattr(each, endpoint.name))
        return managing(handler) if endpoint.manages else handler

    return [Route(path_of(each), handler_of(each), methods=[each.method]) for each in ENDPOINTS]


def path_of(endpoint: Endpoint) -> str:
    """Path of an endpoint's route. Keys of models have slashes, and so may the ids that clients give requests."""
    path = endpoint.path.replace("{key}", "{key:path}")
    return path.replace("{id}", "{id:path}") if endpoint.name == "retrieve_request" else path


def managing(handler: Handler) -> Handler:
    """The handler, for clients that may manage models."""

    async def guarded(request: Request) -> Any:
        require(request, Permission.MANAGE)
        return await handler(request)

    return guarded
