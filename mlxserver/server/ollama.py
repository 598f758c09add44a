"""Handlers of Ollama's endpoints that do not generate: about models, and what answers at the root."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mlxserver.api.ollama import models
from mlxserver.api.ollama.errors import LINES
from mlxserver.api.ollama.models import OllamaCopyRequest, OllamaDeleteRequest, OllamaShowRequest
from mlxserver.api.ollama.names import key_of, names_of
from mlxserver.api.ollama.pull import SUCCESS, OllamaPullRequest, PullEncoder
from mlxserver.api.schema import parameters
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import ValidationFailed
from mlxserver.api.schema.validators import check_key
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.description import Description
from mlxserver.engine.errors import ModelNotFound
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.description import describe
from mlxserver.engine.loading.library.scan import LocalModel
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.pulls import OnStep, Pulled
from mlxserver.server.body import ignored_headers, read_body
from mlxserver.server.errors import json_response
from mlxserver.server.keys import Permission, require
from mlxserver.server.load_events import LoadResponse
from mlxserver.server.model_status import local_status, model_status, seen_with
from mlxserver.server.models import unless_stalled
from mlxserver.server.page import index_response
from mlxserver.server.pull_response import PullResponse
from model_manager import ModelManager

RUNNING = "Ollama is running"  # what programs look for

R = TypeVar("R", bound=parameters.Request)


class OllamaHandlers:
    """Handlers by the names of their endpoints."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._limits = Limits.of(manager.settings)
        self._descriptions: dict[str, Description] = {}  # by source; of those whose files are here

    async def root(self, request: Request) -> Response:
        """GET /."""
        takes_page = "text/html" in request.headers.get("accept", "") and self._manager.settings.page
        response = index_response(request, self._manager) if takes_page else PlainTextResponse(RUNNING)
        response.headers["Vary"] = "Accept"
        return response

    async def ollama_version(self, request: Request) -> Response:
        """GET /api/version."""
        return json_response(models.version())

    async def ollama_tags(self, request: Request) -> Response:
        """GET /api/tags: registered models, and those of the library."""
        library = self._manager.library
        library.refresh_soon()
        instances = self._manager.instances
        described = await self._describe(instances)
        names = [(name, each) for each in instances for name in (each.key, *each.copied_aliases)]
        listed = [(name, model_status(each), described[each.key]) for name, each in names]
        listed += [(each.key, local_status(each, self._manager), description_of(each)) for each in library.unregistered]
        return json_response(models.tags(listed))

    async def ollama_ps(self, request: Request) -> Response:
        """GET /api/ps."""
        loaded = [each for each in self._manager.instances if each.is_loaded]
        described = await self._describe(loaded)
        statuses = [(model_status(each), described[each.key]) for each in loaded]
        return json_response(models.running(statuses, time.time()))

    async def ollama_show(self, request: Request) -> Response:
        """POST /api/show."""
        asked, headers = await self._read(OllamaShowRequest, request)
        instance = self._known(*names_of(asked.asked))
        described = await self._describe([instance])
        defaults = sorted(instance.spec.defaults.items())
        status = seen_with(request.state.permission, model_status(instance))
        body = models.shown(status, described[instance.key], defaults)
        return json_response(body, headers=headers)

    async def ollama_pull(self, request: Request) -> Response | LoadResponse | PullResponse:
        """POST /api/pull. A model that is known is there already; to pull or register another one takes an admin key.

        One of the hub is downloaded and registered, any other source is registered and loaded.
        """
        asked, headers = await self._read(OllamaPullRequest, request)
        encoder = PullEncoder(asked.source)
        try:
            instance = self._known(*names_of(asked.asked))
        except ModelNotFound:
            require(request, Permission.NAME_FILES if sources.is_path(asked.source) else Permission.MANAGE)
        else:
            lines = encoder.start() + encoder.loaded(model_status(instance))
            return Response(lines, media_type=LINES) if asked.stream else json_response(SUCCESS, headers=headers)
        sources.check(asked.source)
        interval = self._manager.settings.heartbeat_interval
        if sources.is_repository(asked.source):
            pull = partial(self._pull, asked.spec)
            return PullResponse(pull, encoder, interval, headers, streams=asked.stream)
        if asked.stream:
            return LoadResponse(
                lambda report: self._manager.load(asked.spec, on_progress=report), interval, encoder, headers
            )
        await self._manager.load(asked.spec)
        return json_response(SUCCESS, headers=headers)

    async def _pull(self, spec: ModelSpec, on_step: OnStep) -> Pulled:
        """Pull a model of the hub, and register it under the name that was asked for."""
        pulled = await self._manager.pulls.pull(spec.source, on_step)
        found = self._manager.library.meant_by(spec.key)
        if found is None or found.key != spec.key:
            self._manager.register(spec)
        return pulled

    def _known(self, *names: str) -> ModelInstance:
        """The model with one of these names, registered from the library if it is in there. Raises ModelNotFound."""
        found = self._manager.library.meant_by(*names)
        return self._manager.library.instance(found) if found else self._manager.instance(*names)

    async def ollama_copy(self, request: Request) -> Response:
        """POST /api/copy."""
        asked, headers = await self._read(OllamaCopyRequest, request)
        destination = check_key(key_of(asked.destination), "destination")
        self._manager.copy(self._manager.instance(*names_of(asked.source)), destination)
        return Response(headers=headers)

    async def ollama_delete(self, request: Request) -> Response:
        """DELETE /api/delete."""
        asked, headers = await self._read(OllamaDeleteRequest, request)
        names = names_of(asked.asked)
        instance = self._known(*names)
        configured = {spec.key for spec in self._manager.settings.models}
        if copied := {*names}.intersection(instance.copied_aliases):
            instance.forget_alias(copied.pop())
        elif not {instance.key, *instance.aliases}.intersection(names) or instance.key in configured:
            raise ValidationFailed(f"'{names[0]}' is in the server's configuration, and is removed there.", "model")
        else:
            await self._delete(request, instance)
        return Response(headers=headers)

    async def _delete(self, request: Request, instance: ModelInstance) -> None:
        """Unload and forget a model; the files of one that was pulled, or that is in the library, are removed, too."""
        local = self._manager.library.with_source(instance.spec.source)
        if local and (local.place == "huggingface" or local.key == instance.key):
            require(request, Permission.NAME_FILES)
            await self._manager.library.delete(instance.key, force=True)
        if instance.key in self._manager.keys:
            await unless_stalled(instance, self._manager.forget(instance.key))

    async def _describe(self, instances: list[ModelInstance]) -> dict[str, Description]:
        """What the files of models state, by key."""
        wanted = {each.spec.source for each in instances} - self._descriptions.keys()
        found = await asyncio.gather(*(asyncio.to_thread(describe, source) for source in wanted))
        read = dict(zip(wanted, found, strict=True))
        self._descriptions |= {source: description for source, description in read.items() if description.architecture}
        known = read | self._descriptions
        return {each.key: known[each.spec.source] for each in instances}

    async def _read(self, schema: type[R], request: Request) -> tuple[R, dict[str, str]]:
        """The request, and the headers that name its ignored parameters."""
        asked = parameters.parse(schema, await read_body(request, self._manager.settings), self._limits)
        return asked, ignored_headers(request, asked.ignored)


def description_of(model: LocalModel) -> Description:
    """What is known of a model of the library without reading more of it."""
    facts = model.facts
    return Description(
        architecture=facts.architecture if facts else "",
        parameters=facts.parameters if facts else 0,
        quantization=facts.quantization if facts else "",
        context=facts.context_length or 0 if facts else 0,
        stored_bytes=model.size_bytes,
        modified=model.modified,
    )
