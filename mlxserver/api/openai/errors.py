"""Error envelope of OpenAI's API; the server's own endpoints use it, too."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import orjson

from mlxserver.api.dialect import Api, Failure

# OpenAI's names of the fields of an engine request.
FIELD_NAMES = {
    "prompt.conversation": "messages",
    "prompt.template_kwargs": "chat_template_kwargs",
    "prompt.template_kwargs.reasoning_effort": "reasoning_effort",
    "format.schema": "response_format",
    "sampling.logit_bias": "logit_bias",
}


def error_object(failure: Failure) -> dict[str, Any]:
    """The envelope as an object. Text from outside (a file's name) may hold surrogates, which JSON has no form for."""
    error = {
        "message": failure.message.encode(errors="backslashreplace").decode(),
        "type": f"{failure.kind}_error",
        "param": wire_param(failure.param),
        "code": failure.code,
    }
    return {"error": error} | ({"projection": asdict(failure.projection)} if failure.projection else {})


def envelope(failure: Failure) -> bytes:
    """The envelope as JSON."""
    return orjson.dumps(error_object(failure))


def wire_param(field: str | None) -> str | None:
    """The parameter that a client gave for a field. A place in a message or tool is in the client's words already."""
    return field and FIELD_NAMES.get(field, field)


OPENAI = Api("openai", envelope, "Error")
