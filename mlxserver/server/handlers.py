"""One handler an endpoint (api/endpoints.py): read the request, ask the manager, word the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mlxserver.api import model_responses, openapi, responses, schemas
from mlxserver.api.endpoints import ENDPOINTS, Endpoint
from mlxserver.engine.errors import ModelNotFound, ModelStalled
from mlxserver.engine.loading import sources
from mlxserver.engine.requests import ApplyTemplate, Detokenize, TextPrompt, Tokenize
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.reload import Reload
from mlxserver.server import health, translation
from mlxserver.server.body import read_body
from mlxserver.server.chat import ChatForm
from mlxserver.server.completions import TextForm
from mlxserver.server.errors import json_response
from mlxserver.server.keys import Right, demand
from mlxserver.server.load_events import LoadStream
from mlxserver.server.metrics import EXPOSITION_TYPE, exposition
from mlxserver.server.streaming import Answer
from model_manager import ModelManager

log = logging.getLogger("server")

TITLE, VERSION = "Multi-Model MLX Server", "1.0.0"
SHOWN_IGNORED = 32  # names that one header has memory for
STALL_INTERVAL = 1.0  # seconds between two looks at whether an engine is stuck

R = TypeVar("R", bound=schemas.Request)
T = TypeVar("T")

Handler = Callable[[Request], Awaitable[Any]]


class Handlers:
    """What the server does, by the names of its endpoints."""

    def __init__(self, manager: ModelManager, reload: Callable[[], Awaitable[Reload]]) -> None:
        self._manager = manager
        self._settings = manager.settings
        self._bounds = translation.limits(manager.settings)
        self._reload = reload

    def routes(self) -> list[Route]:
        """A route for every endpoint."""
        return [
            Route(each.path.replace("{key}", "{key:path}"), self._handler(each), methods=[each.method])
            for each in ENDPOINTS
        ]

    def _handler(self, endpoint: Endpoint) -> Handler:
        handler: Handler = getattr(self, endpoint.name)
        return managing(handler) if endpoint.manages else handler

    async def chat_completions(self, request: Request) -> Answer:
        """POST /v1/chat/completions."""
        asked, headers = await self._read(schemas.ChatCompletionRequest, request)
        return Answer(
            self._manager.resolve(asked.model),
            [translation.chat_request(asked)],
            ChatForm(asked, self._settings.reasoning_format),
            streams=asked.stream,
            keep_alive=asked.keep_alive,
            headers=headers,
            most_unread=self._settings.max_unread_events,
        )

    async def completions(self, request: Request) -> Answer:
        """POST /v1/completions."""
        asked, headers = await self._read(schemas.CompletionRequest, request)
        instance = self._manager.resolve(asked.model)
        echoes = []
        for prompt in asked.prompt if asked.echo else ():
            echoes.append(prompt if isinstance(prompt, str) else await instance.ask(Detokenize(prompt)))
        return Answer(
            instance,
            translation.completion_requests(asked),
            TextForm(asked, echoes),
            streams=asked.stream,
            keep_alive=asked.keep_alive,
            headers=headers,
            most_unread=self._settings.max_unread_events,
        )

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        models = [translation.model(instance) for instance in self._manager.instances]
        return json_response(model_responses.model_list(models))

    async def retrieve_model(self, request: Request) -> Response:
        """GET /v1/models/{key}."""
        return json_response(translation.model(self._manager.instance(request.path_params["key"])))

    async def load_model(self, request: Request) -> Response | LoadStream:
        """POST /v1/models/load."""
        asked, headers = await self._read(schemas.LoadRequest, request)
        if asked.adapter is not None or sources.is_path(asked.model):
            demand(request, Right.NAME_FILES)
        sources.check(asked.model)
        spec = translation.model_spec(asked)
        if asked.stream:
            return LoadStream(
                lambda on_progress: self._manager.load(spec, replaces=asked.replace, on_progress=on_progress)
            )
        instance = await self._manager.load(spec, replaces=asked.replace)
        return json_response(translation.loaded(instance), headers=headers)

    async def unload_model(self, request: Request) -> Response:
        """POST /v1/models/unload."""
        asked, headers = await self._read(schemas.UnloadRequest, request)
        try:
            instance = self._manager.instance(asked.key)
        except ModelNotFound as error:
            error.param = "key"
            raise
        unload = self._manager.forget if asked.forget else self._manager.unload
        report = await unless_stalled(instance, unload(asked.key, asked.mode, asked.timeout))
        unloaded = model_responses.unloaded(
            asked.key, completed=report.completed, aborted=report.aborted, freed_bytes=report.freed_bytes
        )
        return json_response(unloaded, headers=headers)

    async def reload_models(self, request: Request) -> Response:
        """POST /v1/models/reload."""
        return json_response(model_responses.reloaded(**asdict(await self._reload())))

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(exposition(self._manager), media_type=EXPOSITION_TYPE)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        asked, headers = await self._read(schemas.TokenizeRequest, request)
        instance = self._manager.resolve(asked.model)
        prompt = TextPrompt(asked.prompt or "")
        question = Tokenize(prompt if asked.messages is None else translation.chat_prompt(asked, asked.messages))
        tokens = await instance.ask(question)
        context_length = instance.facts.context_length if instance.facts else None
        return json_response(responses.tokens(tokens, context_length), headers=headers)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        asked, headers = await self._read(schemas.DetokenizeRequest, request)
        text = await self._manager.resolve(asked.model).ask(Detokenize(asked.tokens))
        return json_response(responses.prompt(text), headers=headers)

    async def apply_template(self, request: Request) -> Response:
        """POST /apply-template."""
        asked, headers = await self._read(schemas.ApplyTemplateRequest, request)
        prompt = translation.chat_prompt(asked, asked.messages)
        text = await self._manager.resolve(asked.model).ask(ApplyTemplate(prompt))
        return json_response(responses.prompt(text), headers=headers)

    async def health(self, request: Request) -> Response:
        """GET /health."""
        is_told_all = request.state.right >= Right.GENERATE
        return json_response(health.life(self._manager, VERSION, is_told_all=is_told_all))

    async def ready(self, request: Request) -> Response:
        """GET /health/ready."""
        status, body = health.readiness(self._manager, request.query_params.get("model"))
        return json_response(body, status)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(self._document)

    async def docs(self, request: Request) -> Response:
        """GET /docs."""
        return HTMLResponse(openapi.page(self._document))

    @cached_property
    def _document(self) -> dict[str, Any]:
        return openapi.document(ENDPOINTS, TITLE, VERSION)

    async def _read(self, schema: type[R], request: Request) -> tuple[R, dict[str, str]]:
        """The request, and the headers that its answer is to have: the parameters that were ignored, if any."""
        ignored: list[str] | None = [] if self._settings.unknown_parameters == "ignore" else None
        asked = schemas.parse(schema, await read_body(request, self._settings), ignored, self._bounds)
        if not ignored:
            return asked, {}
        names = ", ".join(quote(name[:64], safe="", errors="replace") for name in ignored[:SHOWN_IGNORED])
        log.warning("%s: ignored unknown parameters: %s", request.scope["path"], names)
        return asked, {"x-ignored-parameters": names}


async def unless_stalled(instance: ModelInstance, work: Coroutine[Any, Any, T]) -> T:
    """What the work on a model gives. It goes on by itself once the model's engine is stuck.

    Raises:
        ModelStalled
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left who is told
    while not (await asyncio.wait({task}, timeout=STALL_INTERVAL))[0]:
        if instance.is_stalled:
            raise ModelStalled(instance.key, str(instance.failure_reason))
    return task.result()


def managing(handler: Handler) -> Handler:
    """The handler, for those who may manage models."""

    async def guarded(request: Request) -> Any:
        demand(request, Right.MANAGE)
        return await handler(request)

    return guarded
