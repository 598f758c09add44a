"""Endpoints of responses."""

from __future__ import annotations

from mlxserver.api.endpoint import Endpoint
from mlxserver.api.openai.responses.dialect import ResponsesDialect
from mlxserver.api.openai.responses.errors import RESPONSES
from mlxserver.api.openai.responses.request import ResponseRequest

ENDPOINTS = (
    Endpoint(
        "responses",
        "POST",
        "/v1/responses",
        "Answer an input, and keep the response.",
        "Response",
        ResponseRequest,
        "ResponseEvent",
        ResponsesDialect,
        api=RESPONSES,
        dialect_name="responses",
    ),
    Endpoint("retrieve_response", "GET", "/v1/responses/{id}", "A response that is kept.", "Response", api=RESPONSES),
    Endpoint("delete_response", "DELETE", "/v1/responses/{id}", "Forget a response.", "DeletedResponse", api=RESPONSES),
    Endpoint(
        "list_input_items",
        "GET",
        "/v1/responses/{id}/input_items",
        "The items that a response was made from, the last ones first; ?order=asc, limit, after.",
        "ItemList",
        api=RESPONSES,
    ),
)
