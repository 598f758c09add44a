"""Embeddings: the request, the dialect, and the answer of POST /v1/embeddings.

Rule: checked texts are those of completions' prompts: a list, each item a string or a tuple of token ids.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import orjson

from mlxserver.api.dialect import Call, UnstreamedEncoder
from mlxserver.api.openai.completions import TOKEN_IDS, TOKENS, BarePrompt, check_tokens
from mlxserver.api.openai.generation import ModelRequest, keep_alive_parameter
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid, parse
from mlxserver.api.schema.response_shapes import COUNT, NUMBER, TEXT, Schema, each, exactly, one_of
from mlxserver.config.settings import Settings
from mlxserver.engine.events import Embedding, Event, Usage
from mlxserver.engine.requests import EmbeddingRequest, TextPrompt, TokenPrompt

MAX_TEXTS = 2048
_LIST: dict[str, Any] = {"type": "array", "minItems": 1, "maxItems": MAX_TEXTS}
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
INPUT: dict[str, Any] = {
    "anyOf": [
        _TEXT,
        _LIST | {"items": _TEXT},
        TOKENS | {"minItems": 1},
        _LIST | {"items": TOKENS | {"minItems": 1}},
    ]
}
PROMPT_NAMES = {  # of sentence-transformers, by the names that other APIs have for the two sides of a search
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}
EMBEDDINGS_SCHEMAS: dict[str, Schema] = {
    "EmbeddingList": exactly(
        object=one_of("list"),
        model=TEXT,
        data=each(exactly(object=one_of("embedding"), index=COUNT, embedding={"anyOf": [each(NUMBER), TEXT]})),
        usage=exactly(prompt_tokens=COUNT, total_tokens=COUNT),
    )
}


def check_texts(value: Any, param: str) -> list[BarePrompt]:
    """Every text. Raises ValidationFailed."""
    expected = f"a non-empty string, {TOKEN_IDS}, or a list of either"
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [check_tokens(value, param)]
    if isinstance(value, list) and len(value) > MAX_TEXTS:
        raise ValidationFailed(f"'{param}' has {len(value)} texts. Expected at most {MAX_TEXTS}.", param)
    if isinstance(value, str) and value:
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid(param, value, expected)
    return [_text(item, f"{param}[{index}]") for index, item in enumerate(value)]


def _text(value: Any, param: str) -> BarePrompt:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise invalid(param, value, f"a non-empty string or {TOKEN_IDS}")
    return check_tokens(value, param)


class EmbeddingsRequest(ModelRequest):
    """POST /v1/embeddings."""

    input: list[BarePrompt] = Parameter(
        object, "Texts or token ids, one or a list of them.", required=True, check=check_texts, shape=INPUT
    )
    encoding_format: Literal["float", "base64"] = Parameter(
        str,
        "How vectors are written: as numbers, or as base64 of little-endian float32.",
        default="float",
        enum=["float", "base64"],
    )
    dimensions: int | None = Parameter(
        int, "Leading values of each vector to keep, for models that are trained for it.", ge=1
    )
    truncate: bool = Parameter(
        bool, "Cut a text that is longer than the model takes, instead of refusing it.", default=False
    )
    prompt_name: str | None = Parameter(str, "Name of the checkpoint's prompt to put before each text.")
    input_type: str | None = Parameter(
        str,
        "Side of a search that the texts are on, whose prompt is put before them if the checkpoint has one.",
        enum=[*PROMPT_NAMES],
    )
    keep_alive: float | None = keep_alive_parameter()


class EmbeddingsDialect:
    """Dialect of POST /v1/embeddings."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a request for embeddings. Raises ValidationFailed."""
        request = parse(EmbeddingsRequest, body, self._limits)
        embedding = EmbeddingRequest(
            tuple(TextPrompt(text) if isinstance(text, str) else TokenPrompt(text) for text in request.input),
            dimensions=request.dimensions,
            truncates=request.truncate,
            prompt_name=request.prompt_name or PROMPT_NAMES.get(request.input_type or ""),
            requires_prompt=request.prompt_name is not None,
        )
        encoder = EmbeddingsEncoder(request.model, in_base64=request.encoding_format == "base64")
        return Call(request.model, [embedding], encoder, idle_timeout=request.keep_alive, ignored=request.ignored)


class EmbeddingsEncoder(UnstreamedEncoder):
    """Encoder of one answer of OpenAI's API."""

    def __init__(self, model: str, *, in_base64: bool) -> None:
        self._model = model
        self._in_base64 = in_base64

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """The vectors, in the order of the texts."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(vector)}
            for index, vector in enumerate(vectors(choices))
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        answer = {"object": "list", "model": self._model, "data": data, "usage": counts}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    def _written(self, vector: bytes) -> str | np.ndarray[Any, Any]:
        return base64.b64encode(vector).decode() if self._in_base64 else np.frombuffer(vector, "<f4")


def vectors(choices: Sequence[Sequence[Event]]) -> list[bytes]:
    """The vectors of an answer, in the order of the texts."""
    return [event.vector for events in choices for event in events if isinstance(event, Embedding)]
