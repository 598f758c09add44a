"""Handlers of endpoints about models: list, load, unload, reload, and questions to their tokenizers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mlxserver.api.anthropic.errors import ANTHROPIC
from mlxserver.api.anthropic.models import model_info, model_page
from mlxserver.api.anthropic.prompt import CountTokensRequest, token_count
from mlxserver.api.endpoints import api_of
from mlxserver.api.model_status import ModelStatus
from mlxserver.api.native.apply_template import ApplyTemplateRequest, rendered
from mlxserver.api.native.load import LoadEvents, LoadRequest, loaded
from mlxserver.api.native.pin import PinRequest, pinned
from mlxserver.api.native.reload import reloaded
from mlxserver.api.native.tokenize import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from mlxserver.api.native.unload import UnloadRequest, unloaded
from mlxserver.api.openai.models import model_card, model_list
from mlxserver.api.schema import parameters
from mlxserver.api.schema.limits import Limits
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import ModelNotFound, ModelStalled
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.library.scan import LocalModel
from mlxserver.engine.requests import ApplyTemplate, Detokenize, Tokenize
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.reload import Reload
from mlxserver.server.body import ignored_headers, read_body
from mlxserver.server.errors import json_response
from mlxserver.server.image_urls import ImageUrls
from mlxserver.server.keys import Permission, require
from mlxserver.server.load_events import LoadResponse
from mlxserver.server.model_status import local_status, model_status, seen_with
from model_manager import ModelManager

STALL_INTERVAL = 1.0  # seconds between two checks of whether an engine is stalled

R = TypeVar("R", bound=parameters.Request)
T = TypeVar("T")
Q = TypeVar("Q", Tokenize, ApplyTemplate)


class ModelHandlers:
    """Handlers by the names of their endpoints. `reload` reads the settings again."""

    def __init__(self, manager: ModelManager, reload: Callable[[], Awaitable[Reload]], images: ImageUrls) -> None:
        self._manager = manager
        self._settings = manager.settings
        self._limits = Limits.of(manager.settings)
        self._reload = reload
        self._images = images

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models, as the client's API has it."""
        self._manager.library.refresh_soon()
        models = [model_status(instance, self._manager) for instance in self._manager.instances]
        models += [local_status(found, self._manager) for found in self._manager.library.unregistered]
        models = [seen_with(request.state.permission, model) for model in models]
        if api_of(request.scope["path"], request.headers) is ANTHROPIC:
            return json_response(model_page(models, request.query_params))
        return json_response(model_list(models))

    async def retrieve_model(self, request: Request) -> Response:
        """GET /v1/models/{key}, as the client's API has it."""
        model = seen_with(request.state.permission, self._status(request.path_params["key"]))
        is_anthropic = api_of(request.scope["path"], request.headers) is ANTHROPIC
        return json_response(model_info(model) if is_anthropic else model_card(model))

    def _status(self, name: str) -> ModelStatus:
        """Status of a registered model, or of one of the library. Raises ModelNotFound."""
        if found := self._manager.library.meant_by(name):
            return local_status(found, self._manager)
        return model_status(self._manager.instance(name), self._manager)

    async def load_model(self, request: Request) -> Response | LoadResponse:
        """POST /v1/models/load."""
        asked, headers = await self._read(LoadRequest, request)
        spec = self._spec(asked, request)
        if asked.stream:
            return LoadResponse(
                lambda report: self._manager.load(spec, replaces=asked.replace, on_progress=report),
                self._manager.settings.heartbeat_interval,
                LoadEvents(),
                headers,
            )
        instance = await self._manager.load(spec, replaces=asked.replace)
        return json_response(loaded(model_status(instance)), headers=headers)

    def _spec(self, asked: LoadRequest, request: Request) -> ModelSpec:
        """The model to load: a registered one by its key, one of the library by its name, or any other by its source.

        Raises Forbidden, SourceInvalid, ValidationFailed.
        """
        if asked.model in self._manager.keys and asked.key in (None, asked.model):
            if asked.adapter is not None:
                require(request, Permission.NAME_FILES)
            source = self._manager.instance(asked.model).spec.source
            return replace(asked.spec, key=asked.model, source=source)
        found = self._local(asked.model)
        if asked.adapter is not None or (found is None and sources.is_path(asked.model)):
            require(request, Permission.NAME_FILES)
        if found is None:
            sources.check(asked.model)
            return asked.spec
        aliases = dict.fromkeys((*self._manager.library.spec(found).aliases, *asked.aliases))
        return replace(asked.spec, key=asked.key or found.key, source=str(found.path), aliases=(*aliases,))

    def _local(self, source: str) -> LocalModel | None:
        """The model of the library that a source is a name of, unless it is an id that the hub has."""
        found = self._manager.library.find(source)
        return None if found and found.place == "huggingface" and source == found.key else found

    async def unload_model(self, request: Request) -> Response:
        """POST /v1/models/unload."""
        asked, headers = await self._read(UnloadRequest, request)
        try:
            instance = self._manager.instance(asked.key)
        except ModelNotFound as error:
            error.param = "key"
            raise
        unload = self._manager.forget if asked.forget else self._manager.unload
        report = await unless_stalled(instance, unload(asked.key, asked.mode, asked.timeout))
        body = unloaded(asked.key, completed=report.completed, aborted=report.aborted, freed_bytes=report.freed_bytes)
        return json_response(body, headers=headers)

    async def pin_model(self, request: Request) -> Response:
        """POST /v1/models/pin: until the settings are read again."""
        asked, headers = await self._read(PinRequest, request)
        instance = self._manager.instance(asked.key)
        instance.pin(asked.pin)
        return json_response(pinned(instance.key, is_pinned=instance.is_pinned), headers=headers)

    async def reload_models(self, request: Request) -> Response:
        """POST /v1/models/reload."""
        return json_response(reloaded(**asdict(await self._reload())))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        asked, headers = await self._read(TokenizeRequest, request)
        instance = self._manager.resolve(asked.model)
        tokens = await instance.ask(await self._with_images(instance, asked.question))
        context_length = instance.facts.context_length if instance.facts else None
        return json_response(tokenized(tokens, context_length), headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens."""
        asked, headers = await self._read(CountTokensRequest, request)
        instance = self._manager.resolve(asked.model)
        tokens = await instance.ask(await self._with_images(instance, Tokenize(asked.prompt)))
        return json_response(token_count(tokens), headers=headers)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        asked, headers = await self._read(DetokenizeRequest, request)
        text = await self._manager.resolve(asked.model).ask(Detokenize(asked.tokens))
        return json_response(detokenized(text), headers=headers)

    async def apply_template(self, request: Request) -> Response:
        """POST /apply-template."""
        asked, headers = await self._read(ApplyTemplateRequest, request)
        instance = self._manager.resolve(asked.model)
        question = ApplyTemplate(asked.chat_prompt(asked.messages))
        text = await instance.ask(await self._with_images(instance, question))
        return json_response(rendered(text), headers=headers)

    async def _with_images(self, instance: ModelInstance, question: Q) -> Q:
        """The question with its images' bytes, if the model may see them. Raises PromptRejected."""
        if not instance.may_see:
            return question
        prompt = await self._images.fetch(question.prompt, self._manager.settings)
        return replace(question, prompt=prompt)  # type: ignore[arg-type]

    async def _read(self, schema: type[R], request: Request) -> tuple[R, dict[str, str]]:
        """The request, and the headers that name its ignored parameters."""
        asked = parameters.parse(schema, await read_body(request, self._settings), self._limits)
        return asked, ignored_headers(request, asked.ignored)


async def unless_stalled(instance: ModelInstance, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work on a model. The work goes on in the background once the model's engine is stalled.

    Raises:
        ModelStalled
    """
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, if nothing awaits it
    while not (await asyncio.wait({task}, timeout=STALL_INTERVAL))[0]:
        if instance.is_stalled:
            raise ModelStalled(instance.key, str(instance.failure_reason))
    return task.result()
