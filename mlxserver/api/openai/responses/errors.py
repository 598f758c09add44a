"""Errors of the responses API: OpenAI's envelope, with the names that fields have here."""

from __future__ import annotations

from dataclasses import replace

from mlxserver.api.dialect import Api, Failure
from mlxserver.api.openai.errors import envelope

FIELD_NAMES = {
    "prompt.conversation": "input",
    "prompt.template_kwargs.reasoning_effort": "reasoning.effort",
    "format.schema": "text.format.schema",
}
# Codes of a response that failed, by those of failures; of any other failure it is SERVER_ERROR. Codex looks for the
# first, which OpenAI sends, although its types do not have it.
CODES = {"context_length_exceeded": "context_length_exceeded", "queue_full": "rate_limit_exceeded"}
SERVER_ERROR = "server_error"


def renamed(failure: Failure) -> Failure:
    """The failure with the parameter that a client gave here."""
    return replace(failure, param=FIELD_NAMES.get(failure.param or "", failure.param))


def response_error(failure: Failure) -> dict[str, str]:
    """The error of a response that failed."""
    code = CODES.get(failure.code or "", "invalid_prompt" if failure.kind == "invalid_request" else SERVER_ERROR)
    return {"code": code, "message": failure.message.encode(errors="backslashreplace").decode()}


RESPONSES = Api("openai", lambda failure: envelope(renamed(failure)), "Error", ends_with_done=False)
