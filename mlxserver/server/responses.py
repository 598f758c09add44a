"""Handlers of endpoints about responses that are kept."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from mlxserver.api.openai.responses.item_list import deleted, item_page
from mlxserver.api.openai.responses.store import ResponseStore
from mlxserver.api.schema.parameters import invalid
from mlxserver.server.errors import json_response


class ResponseHandlers:
    """Handlers by the names of their endpoints."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    async def retrieve_response(self, request: Request) -> Response:
        """GET /v1/responses/{id}."""
        stream = request.query_params.get("stream", "false")
        if stream != "false":
            raise invalid("stream", stream, "'false': a response that is kept is whole")
        stored = self._store.get(request.state.client, request.path_params["id"])
        return Response(stored.response, media_type="application/json")

    async def delete_response(self, request: Request) -> Response:
        """DELETE /v1/responses/{id}."""
        id = request.path_params["id"]
        self._store.delete(request.state.client, id)
        return json_response(deleted(id))

    async def list_input_items(self, request: Request) -> Response:
        """GET /v1/responses/{id}/input_items."""
        stored = self._store.get(request.state.client, request.path_params["id"])
        return json_response(item_page(stored.input_items, request.query_params))
