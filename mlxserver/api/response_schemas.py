"""JSON schemas of all answers, by name."""

from __future__ import annotations

from mlxserver.api.anthropic.response_schemas import ANTHROPIC_SCHEMAS
from mlxserver.api.native.rerank import RERANK_SCHEMAS
from mlxserver.api.native.response_schemas import NATIVE_SCHEMAS
from mlxserver.api.ollama.schemas import OLLAMA_SCHEMAS
from mlxserver.api.openai.embeddings import EMBEDDINGS_SCHEMAS
from mlxserver.api.openai.response_schemas import OPENAI_SCHEMAS
from mlxserver.api.openai.responses.schemas import RESPONSES_SCHEMAS
from mlxserver.api.schema.response_shapes import Schema

RESPONSE_SCHEMAS: dict[str, Schema] = {
    **OPENAI_SCHEMAS,
    **RESPONSES_SCHEMAS,
    **EMBEDDINGS_SCHEMAS,
    **RERANK_SCHEMAS,
    **ANTHROPIC_SCHEMAS,
    **OLLAMA_SCHEMAS,
    **NATIVE_SCHEMAS,
}
