"""Handlers of endpoints for operation: health, metrics and the API's description."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mlxserver import __version__
from mlxserver.api import openapi
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.native.cache import cache_usage
from mlxserver.server import health
from mlxserver.server.errors import json_response
from mlxserver.server.keys import Permission
from mlxserver.server.metrics import EXPOSITION_TYPE, exposition
from model_manager import ModelManager

TITLE = "Multi-Model MLX Server"


class OpsHandlers:
    """Handlers by the names of their endpoints."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager

    async def health(self, request: Request) -> Response:
        """GET /health."""
        shows_models = request.state.permission >= Permission.GENERATE
        return json_response(health.liveness(self._manager, __version__, shows_models=shows_models))

    async def ready(self, request: Request) -> Response:
        """GET /health/ready."""
        status, body = health.readiness(self._manager, request.query_params.get("model"))
        return json_response(body, status)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(exposition(self._manager), media_type=EXPOSITION_TYPE)

    async def cache(self, request: Request) -> Response:
        """GET /v1/cache."""
        return json_response(cache_usage(await asyncio.to_thread(self._manager.cache_usage)))

    async def clear_cache(self, request: Request) -> Response:
        """POST /v1/cache/clear."""
        await self._manager.clear_cache()
        return await self.cache(request)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(self._document)

    async def docs(self, request: Request) -> Response:
        """GET /docs."""
        return HTMLResponse(openapi.page(self._document))

    @cached_property
    def _document(self) -> dict[str, Any]:
        return openapi.document(ENDPOINTS, TITLE, __version__)
