"""OpenAI's names of the fields of an engine request, for the `param` of an error."""

from __future__ import annotations

NAMES = {
    "prompt.conversation": "messages",
    "prompt.template_kwargs": "chat_template_kwargs",
    "prompt.template_kwargs.reasoning_effort": "reasoning_effort",
    "format.schema": "response_format",
    "sampling.logit_bias": "logit_bias",
}


def wire_param(field: str | None) -> str | None:
    """The parameter that a client gave for a field. A place in a message or tool is in the client's words already."""
    return field and NAMES.get(field, field)
