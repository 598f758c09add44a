"""POST /api/embed and /api/embeddings: the requests. No model makes embeddings yet, so both are refused."""

from __future__ import annotations

from typing import Any

from mlxserver.api.ollama.options import OPTIONS, Options, check_options
from mlxserver.api.openai.generation import KEEP_ALIVE, ModelRequest
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid
from mlxserver.api.schema.validators import check_keep_alive

INPUT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def check_input(value: Any, param: str) -> tuple[str, ...]:
    """The texts. Raises ValidationFailed."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise invalid(param, value, "a string or a list of strings")
    return tuple(texts)


class EmbeddingRequest(ModelRequest):
    """What both share."""

    options: Options | None = Parameter(object, "Options of the model.", check=check_options, shape=OPTIONS)
    keep_alive: float | None = Parameter(
        object,
        "How long the model stays loaded after this: seconds or a duration such as '5m'; below zero is for ever.",
        check=check_keep_alive,
        shape=KEEP_ALIVE,
    )


class OllamaEmbedRequest(EmbeddingRequest):
    """POST /api/embed."""

    input: tuple[str, ...] = Parameter(object, "Texts.", required=True, check=check_input, shape=INPUT)
    truncate: bool = Parameter(bool, "Cut a text that is longer than the context.", default=True)
    dimensions: int | None = Parameter(int, "Length of the embeddings.", ge=1)


class OllamaEmbeddingsRequest(EmbeddingRequest):
    """POST /api/embeddings."""

    prompt: str = Parameter(str, "A text.", default="")


def no_embeddings(model: str) -> ValidationFailed:
    """The refusal for a model that makes text."""
    return ValidationFailed(f"Model {model!r} makes text, and no embeddings.", "model")
