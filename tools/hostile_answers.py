"""Judge of answers to hostile requests: their shape, by the schemas of the endpoint that was asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jsonschema import Draft202012Validator

from mlxserver.api import openapi
from mlxserver.api.endpoint import Endpoint
from mlxserver.api.endpoints import ENDPOINTS
from mlxserver.api.schema.response_shapes import named
from tools.raw_http import Answer

LONGEST_ERROR = 4096  # characters; the list of a request's parameters is in some
LAST_EVENTS = ("message_stop", "response.completed", "response.incomplete")  # of streams without [DONE]
STREAMS = ("text/event-stream", "application/x-ndjson")
DOCUMENT = openapi.document(ENDPOINTS, "", "")
VALIDATORS = {
    name: Draft202012Validator({**named(name), "components": DOCUMENT["components"]})
    for name in DOCUMENT["components"]["schemas"]
}


def fault_of(answer: Answer, has_body: bool, endpoint: Endpoint | None) -> str | None:
    """The fault of an answer; None if it has none. endpoint: that surely answered, None if it is not known.

    Raises ValueError, KeyError for a body that is no JSON, or lacks what all of its kind have.
    """
    if answer.status >= 500:
        return f"a {answer.status}"
    if not has_body or answer.status == 204:
        return None
    kind = answer.headers.get("content-type", "")
    if answer.status >= 400:
        is_early = answer.status == 408  # perhaps before the path was read
        return _fault_of_error(json.loads(answer.body), None if is_early else endpoint)
    if kind.startswith(STREAMS):
        return _fault_of_stream([*_events(answer.body)], endpoint)
    if kind == "application/json":
        content = json.loads(answer.body)
        shapes = [endpoint.response, *endpoint.others] if endpoint else []
        return _fault_of_shape(content, [shape for shape in shapes if shape])
    return None


def _events(body: bytes) -> Iterator[bytes]:
    """The data of events, or the lines; comments and names of events are left out."""
    for line in body.splitlines():
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ")
        elif line.startswith(b"{"):
            yield line


def _fault_of_stream(events: Sequence[bytes], endpoint: Endpoint | None) -> str | None:
    if not events:
        return "a stream without an event"
    if fault := _fault_of_end(events[-1], endpoint):
        return fault
    shapes = [endpoint.chunk] if endpoint and endpoint.chunk else []
    return next(filter(None, (_fault_of_shape(json.loads(event), shapes) for event in events[:-1])), None)


def _fault_of_end(last: bytes, endpoint: Endpoint | None) -> str | None:
    """The fault of a stream's last event: [DONE], the last of its kind, or an error."""
    if last == b"[DONE]":
        return None
    content = json.loads(last)
    if isinstance(content, dict) and content.get("type") == "response.failed":
        return "a response that failed" if content["response"]["error"]["code"] == "server_error" else None
    fields = content if isinstance(content, dict) else {}
    if fields.get("type") in LAST_EVENTS or fields.get("done") is True or fields.get("status") == "success":
        return _fault_of_shape(content, [each.chunk for each in _possible(endpoint) if each.chunk])
    return _fault_of_error(content, endpoint)


def _fault_of_error(content: object, endpoint: Endpoint | None) -> str | None:
    if _fault_of_shape(content, [each.api.error_schema for each in _possible(endpoint)]):
        return "no error in the shape of the API"
    return None if len(json.dumps(content)) <= LONGEST_ERROR else "an error that echoes a long value"


def _possible(endpoint: Endpoint | None) -> Iterable[Endpoint]:
    return ENDPOINTS if endpoint is None else (endpoint,)


def _fault_of_shape(content: Any, names: Sequence[str]) -> str | None:
    """The fault of a content that has none of these schemas; any will do where there are no names."""
    if not names or any(VALIDATORS[name].is_valid(content) for name in names):
        return None
    error = next(VALIDATORS[names[0]].iter_errors(content))
    return f"not in the shape of {names[0]}: {error.json_path} {error.message[:200]}"
