"""POST /apply-template: the request and its answer."""

from __future__ import annotations

from typing import Any

from mlxserver.api.openai.chat import ChatPromptRequest


class ApplyTemplateRequest(ChatPromptRequest):
    """POST /apply-template."""


def rendered(text: str) -> dict[str, Any]:
    """Answer: the prompt as the chat template renders it."""
    return {"prompt": text}
