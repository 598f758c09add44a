"""Error envelope of Anthropic's API. It has no field for the parameter that is wrong: the message names it."""

from __future__ import annotations

from typing import Any

import orjson

from mlxserver.api.dialect import Api, Failure, FailureKind

TYPES: dict[FailureKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "rate_limit": "rate_limit_error",
    "server": "api_error",
}
TYPES_BY_CODE = {"request_too_large": "request_too_large", "overloaded": "overloaded_error"}


# Anthropic's names of the fields of an engine request.
FIELD_NAMES = {
    "prompt.conversation": "messages",
    "prompt.template_kwargs": "thinking",
    "prompt.template_kwargs.reasoning_effort": "output_config.effort",
    "format.schema": "output_config.format.schema",
    "sampling.logit_bias": "logit_bias",
}


def error_object(failure: Failure) -> dict[str, Any]:
    """The envelope as an object. Text from outside (a file's name) may hold surrogates, which JSON has no form for."""
    param = FIELD_NAMES.get(failure.param or "", failure.param)
    message = failure.message if param is None or param in failure.message else f"{param}: {failure.message}"
    error = {
        "type": TYPES_BY_CODE.get(failure.code or "", TYPES[failure.kind]),
        "message": message.encode(errors="backslashreplace").decode(),
    }
    return {"type": "error", "error": error, "request_id": failure.request_id}


def envelope(failure: Failure) -> bytes:
    """The envelope as JSON."""
    return orjson.dumps(error_object(failure))


ANTHROPIC = Api("anthropic", envelope, "AnthropicError", header="anthropic-version", ends_with_done=False)
