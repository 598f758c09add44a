"""OpenAI's names of the fields of an engine request, for the `param` of an error."""

from __future__ import annotations

NAMES = {
    "conversation": "messages",
    "template_kwargs": "chat_template_kwargs",
    "template_kwargs.reasoning_effort": "reasoning_effort",
    "format": "response_format",
    "sampling.logit_bias": "logit_bias",
}


def wire_param(field: str) -> str:
    """The parameter that a client gave for a field. A place in a message or tool is in the client's words already."""
    return NAMES.get(field, field)
