"""Handlers of endpoints about the models on this machine and on the hub: list, search, pull, remove."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from mlxserver.api.native.library import deleted, library_list, search_results
from mlxserver.api.native.pull import PullEvents, PullRequest
from mlxserver.api.schema import parameters
from mlxserver.api.schema.limits import Limits
from mlxserver.engine.loading.hub_search import search
from mlxserver.engine.loading.pull import source_of
from mlxserver.server.body import ignored_headers, read_body
from mlxserver.server.errors import json_response
from mlxserver.server.keys import Permission, require
from mlxserver.server.model_status import local_status, remote_status, seen_with
from mlxserver.server.pull_response import PullResponse
from model_manager import ModelManager

DEFAULT_RESULTS, MOST_RESULTS = 20, 100


class LibraryHandlers:
    """Handlers by the names of their endpoints."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._limits = Limits.of(manager.settings)

    async def list_library(self, request: Request) -> Response:
        """GET /v1/library: searches the folders first, unless that was done a moment ago."""
        library, permission = self._manager.library, request.state.permission
        await library.refresh_if_old()
        models = (seen_with(permission, local_status(each, self._manager)) for each in library.models)
        return json_response(library_list(models))

    async def search_library(self, request: Request) -> Response:
        """GET /v1/library/search?q=WORDS&limit=N: models of the hub."""
        words, limit = request.query_params.get("q", "").strip(), request.query_params.get("limit", "")
        if not words:
            raise parameters.ValidationFailed("Missing required parameter: 'q'.", "q")
        if limit and not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MOST_RESULTS):
            raise parameters.invalid("limit", limit, f"a number from 1 to {MOST_RESULTS}")
        found = await asyncio.to_thread(search, words, int(limit or DEFAULT_RESULTS))
        return json_response(search_results(remote_status(each, self._manager) for each in found))

    async def pull_model(self, request: Request) -> PullResponse:
        """POST /v1/models/pull."""
        asked = parameters.parse(PullRequest, await read_body(request, self._manager.settings), self._limits)
        source = source_of(asked.model)
        return PullResponse(
            lambda on_step: self._manager.pulls.pull(source, on_step, force=asked.force),
            PullEvents(),
            self._manager.settings.heartbeat_interval,
            ignored_headers(request, asked.ignored),
            streams=asked.stream,
        )

    async def delete_model(self, request: Request) -> Response:
        """DELETE /v1/models/{key}: removes a model's files; ?force=true: of a loaded one, too."""
        require(request, Permission.NAME_FILES)
        key, force = request.path_params["key"], request.query_params.get("force", "false")
        if force not in ("true", "false"):
            raise parameters.invalid("force", force, "true or false")
        model = await self._manager.library.delete(key, force=force == "true")
        return json_response(deleted(model.key, model.size_bytes))
