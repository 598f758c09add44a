"""POST /api/embed and /api/embeddings: the requests, the dialects and the answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from mlxserver.api.dialect import Call, UnstreamedEncoder
from mlxserver.api.ollama.names import names_of
from mlxserver.api.ollama.options import OPTIONS, Options, check_options
from mlxserver.api.openai.embeddings import vectors
from mlxserver.api.openai.generation import ModelRequest, keep_alive_parameter
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, invalid, parse
from mlxserver.config.settings import Settings
from mlxserver.engine.events import Event, Usage
from mlxserver.engine.requests import EmbeddingRequest, TextPrompt

INPUT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def check_input(value: Any, param: str) -> tuple[str, ...]:
    """The texts. Raises ValidationFailed."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise invalid(param, value, "a string or a list of strings")
    return tuple(texts)


class VectorRequest(ModelRequest):
    """What both share."""

    options: Options | None = Parameter(object, "Options of the model.", check=check_options, shape=OPTIONS)
    keep_alive: float | None = keep_alive_parameter()


class OllamaEmbedRequest(VectorRequest):
    """POST /api/embed."""

    input: tuple[str, ...] = Parameter(object, "Texts.", required=True, check=check_input, shape=INPUT)
    truncate: bool = Parameter(bool, "Cut a text that is longer than the context.", default=True)
    dimensions: int | None = Parameter(int, "Length of the embeddings.", ge=1)


class OllamaEmbeddingsRequest(VectorRequest):
    """POST /api/embeddings."""

    prompt: str = Parameter(str, "A text.", default="")


class OllamaEmbedDialect:
    """Dialect of POST /api/embed. A call without a text loads the model."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a request. Raises ValidationFailed."""
        request = parse(OllamaEmbedRequest, body, self._limits)
        texts = tuple(map(TextPrompt, request.input)) if request.input != ("",) else ()
        asked = EmbeddingRequest(texts, request.dimensions, truncates=request.truncate)
        return _call(request, [asked] if texts else [], _EmbedEncoder(request.model))


class OllamaEmbeddingsDialect:
    """Dialect of POST /api/embeddings. A call without a text loads the model."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a request. Raises ValidationFailed."""
        request = parse(OllamaEmbeddingsRequest, body, self._limits)
        text = TextPrompt(request.prompt)
        asked = EmbeddingRequest((text,), truncates=True, origin="prompt")
        return _call(request, [asked] if request.prompt else [], _EmbeddingEncoder())


class _EmbedEncoder(UnstreamedEncoder):
    """Encoder of one answer of /api/embed."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._started = time.monotonic()

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """The vectors, in the order of the texts, and the time in nanoseconds."""
        answer = {
            "model": self._model,
            "embeddings": [np.frombuffer(vector, "<f4") for vector in vectors(choices)],
            "total_duration": int(1e9 * (time.monotonic() - self._started)),
            "prompt_eval_count": usage.prompt_tokens,
        }
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


class _EmbeddingEncoder(UnstreamedEncoder):
    """Encoder of one answer of /api/embeddings."""

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """The vector; an empty one where there was no text."""
        found = [np.frombuffer(vector, "<f4") for vector in vectors(choices)]
        return orjson.dumps({"embedding": found[0] if found else []}, option=orjson.OPT_SERIALIZE_NUMPY)


def _call(request: VectorRequest, asked: Sequence[EmbeddingRequest], encoder: UnstreamedEncoder) -> Call:
    name, *other_names = names_of(request.model)
    return Call(name, asked, encoder, idle_timeout=request.keep_alive, ignored=request.ignored, other_names=other_names)
