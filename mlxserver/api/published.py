"""JSON schemas of all answers of all APIs, by name: what the OpenAPI document publishes."""

from __future__ import annotations

from mlxserver.api.ollama.schemas import OLLAMA_SCHEMAS
from mlxserver.api.response_schemas import RESPONSE_SCHEMAS, Schema

PUBLISHED_SCHEMAS: dict[str, Schema] = {**RESPONSE_SCHEMAS, **OLLAMA_SCHEMAS}
