"""Rerank: the request, the dialect, and the answer of POST /v1/rerank, in the form of Jina and Cohere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import orjson

from mlxserver.api.dialect import Call, UnstreamedEncoder
from mlxserver.api.openai.embeddings import MAX_TEXTS
from mlxserver.api.openai.generation import ModelRequest, keep_alive_parameter
from mlxserver.api.schema.limits import Limits
from mlxserver.api.schema.parameters import Parameter, ValidationFailed, invalid, parse
from mlxserver.api.schema.response_shapes import COUNT, NUMBER, TEXT, Schema, each, exactly, one_of
from mlxserver.config.settings import Settings
from mlxserver.engine.events import Event, Relevance, Usage
from mlxserver.engine.requests import RerankRequest as EngineRerankRequest

_TEXT: dict[str, Any] = {"type": "string"}
_TEXT_OBJECT: dict[str, Any] = {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}
DOCUMENTS: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_TEXTS,
    "items": {"anyOf": [_TEXT, _TEXT_OBJECT]},
}
RERANK_SCHEMAS: dict[str, Schema] = {
    "Rerank": exactly(
        object=one_of("list"),
        model=TEXT,
        results=each(
            exactly(
                index=COUNT,
                relevance_score=NUMBER | {"minimum": 0, "maximum": 1},
                document_=exactly(text=TEXT),
            )
        ),
        usage=exactly(prompt_tokens=COUNT, total_tokens=COUNT),
        meta=exactly(tokens=exactly(input_tokens=COUNT)),
    )
}


def check_query(value: Any, param: str) -> str:
    """A text that is not empty. Raises ValidationFailed."""
    text = _text(value, param)
    if not text:
        raise invalid(param, value, "a non-empty string")
    return text


def check_documents(value: Any, param: str) -> tuple[str, ...]:
    """Every document. Raises ValidationFailed."""
    if isinstance(value, list) and len(value) > MAX_TEXTS:
        raise ValidationFailed(f"'{param}' has {len(value)} documents. Expected at most {MAX_TEXTS}.", param)
    if not isinstance(value, list) or not value:
        raise invalid(param, value, "a non-empty list of strings or of objects with a 'text'")
    return tuple(_text(item, f"{param}[{index}]") for index, item in enumerate(value))


def _text(value: Any, param: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise invalid(param, value, "a string or an object with a 'text'")
    return text


class RerankRequest(ModelRequest):
    """POST /v1/rerank."""

    __no_effect__: ClassVar[Mapping[str, str]] = {
        "user": "it names the end user to the provider",
        "priority": "it orders requests of one account",
        "max_chunks_per_doc": "a document is scored as a whole",
    }

    query: str = Parameter(
        object,
        "What is searched for: a text, or an object with a `text`.",
        required=True,
        check=check_query,
        shape={"anyOf": [_TEXT | {"minLength": 1}, _TEXT_OBJECT]},
    )
    documents: tuple[str, ...] = Parameter(
        object, "Texts, or objects with a `text`.", required=True, check=check_documents, shape=DOCUMENTS
    )
    top_n: int | None = Parameter(int, "Most results; by default one per document.", ge=1)
    return_documents: bool = Parameter(bool, "Repeat each document in its result.", default=False)
    instruction: str | None = Parameter(str, "What makes a document relevant, for a reranker that reads one.")
    truncate: bool = Parameter(
        bool, "Cut a document that is too long beside the query, instead of refusing it.", default=False
    )
    max_tokens_per_doc: int | None = Parameter(
        int, "Tokens that documents are cut to, and to what the model takes.", ge=1
    )
    keep_alive: float | None = keep_alive_parameter()


class RerankDialect:
    """Dialect of POST /v1/rerank."""

    def __init__(self, settings: Settings) -> None:
        self._limits = Limits.of(settings)

    def parse(self, body: bytes) -> Call:
        """Read a request for scores. Raises ValidationFailed."""
        request = parse(RerankRequest, body, self._limits)
        asked = EngineRerankRequest(
            request.query,
            request.documents,
            instruction=request.instruction,
            truncates=request.truncate,
            max_document_tokens=request.max_tokens_per_doc,
        )
        encoder = RerankEncoder(request.model, request.top_n, request.documents if request.return_documents else ())
        return Call(request.model, [asked], encoder, idle_timeout=request.keep_alive, ignored=request.ignored)


class RerankEncoder(UnstreamedEncoder):
    """Encoder of one answer. top_n: most results, None for all. documents: to be repeated, or none."""

    def __init__(self, model: str, top_n: int | None, documents: Sequence[str]) -> None:
        self._model = model
        self._top_n = top_n
        self._documents = documents

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """The results, the most relevant first; equal ones in the order of the documents."""
        found = [event for events in choices for event in events if isinstance(event, Relevance)]
        found.sort(key=lambda each: (-each.score, each.index))
        answer = {
            "object": "list",
            "model": self._model,
            "results": [self._result(each) for each in found[: self._top_n]],
            "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
            "meta": {"tokens": {"input_tokens": usage.prompt_tokens}},
        }
        return orjson.dumps(answer)

    def _result(self, relevance: Relevance) -> dict[str, Any]:
        result: dict[str, Any] = {"index": relevance.index, "relevance_score": relevance.score}
        if self._documents:
            result["document"] = {"text": self._documents[relevance.index]}
        return result
