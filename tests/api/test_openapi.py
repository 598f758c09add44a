"""The published description is valid, complete, and made of what validates."""

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.openapi import document, page
from mlxserver.api.response_schemas import RESPONSE_SCHEMAS
from mlxserver.api.schema.parameters import json_schema
from mlxserver.server.library import LibraryHandlers
from mlxserver.server.models import ModelHandlers
from mlxserver.server.ollama import OllamaHandlers
from mlxserver.server.ops import OpsHandlers
from mlxserver.server.page import PageHandlers
from mlxserver.server.responses import ResponseHandlers

ROOMS = (ModelHandlers, LibraryHandlers, OpsHandlers, OllamaHandlers, PageHandlers, ResponseHandlers)
DOCUMENT = document(ENDPOINTS, "Title & more", "1.0")


def test_the_document_is_openapi_3_1():
    OpenAPIV31SpecValidator(DOCUMENT).validate()


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_every_endpoint_has_a_handler_and_is_described(endpoint):
    handlers = [getattr(room, endpoint.name) for room in ROOMS if hasattr(room, endpoint.name)]
    assert len(handlers) == (0 if endpoint.dialect else 1)
    operation = DOCUMENT["paths"][endpoint.path][endpoint.method.lower()]
    assert operation["summary"]
    for schema in (endpoint.response, endpoint.chunk):
        assert schema is None or schema in RESPONSE_SCHEMAS
    if endpoint.request:
        described = DOCUMENT["components"]["schemas"][endpoint.request.__name__]
        assert described == json_schema(endpoint.request)
        assert all(field["description"] for field in described["properties"].values())


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_every_schema_is_one(name):
    jsonschema.Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][name])


def test_the_page_shows_every_parameter_and_needs_nothing_else():
    shown = page(DOCUMENT)
    assert "<title>Title &amp; more</title>" in shown
    for endpoint in ENDPOINTS:
        assert endpoint.path in shown
        for name in endpoint.request.__fields__ if endpoint.request else ():
            assert f"<code>{name}</code>" in shown
    assert not any(word in shown for word in ("http://", "https://", "<script", "src="))
