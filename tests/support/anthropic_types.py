"""Strict checks of Anthropic's answers, by the types of its SDK, without unknown fields, and the published schemas."""

import functools
import json

from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import BaseModel, TypeAdapter

from mlxserver.api.sse import SSEDecoder
from tests.support.published import check

adapter = functools.cache(TypeAdapter)  # to build one takes long


def unknown_fields(value, place=""):
    """The places of fields that the SDK's types do not have."""
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.model_extra or ())
        for name in type(value).model_fields:
            yield from unknown_fields(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, f"{place}[{index}]")


def checked(answer, type_, schema):
    """The answer as the SDK's type."""
    made = adapter(type_).validate_python(check(answer, schema))
    assert list(unknown_fields(made)) == []
    return made


def checked_message(answer):
    return checked(answer, Message, "Message")


def checked_error(answer):
    return checked(answer, ErrorResponse, "AnthropicError").error


def checked_events(body):
    """The events of a whole stream, each of which has its type as its name; pings are left out."""
    names = [line.removeprefix("event: ") for line in body.decode().splitlines() if line.startswith("event: ")]
    payloads = [json.loads(payload) for payload in SSEDecoder().feed(body)]
    assert names == [payload["type"] for payload in payloads]
    for payload in payloads:
        check(payload, "AnthropicError" if payload["type"] == "error" else "MessageStreamEvent")
    shown = [payload for payload in payloads if payload["type"] not in ("ping", "error")]
    return [checked(payload, RawMessageStreamEvent, "MessageStreamEvent") for payload in shown]
