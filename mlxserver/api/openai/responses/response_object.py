"""The response object: what a request asked for, with the state of its answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlxserver.api.openai.responses.ids import new_id
from mlxserver.api.openai.responses.request import ResponseRequest
from mlxserver.engine.events import Usage
from mlxserver.engine.requests import NO_LIMIT

Status = Literal["in_progress", "completed", "incomplete", "failed"]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ResponseObject:
    """Maker of one response's objects. is_stored: whether it is kept."""

    def __init__(self, request: ResponseRequest, *, is_stored: bool) -> None:
        self.id = new_id("resp")
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": None if request.token_limit == NO_LIMIT else request.token_limit,
            "metadata": request.metadata,
            "model": request.model,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": _reasoning(request),
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": is_stored,
            "temperature": request.temperature,
            "text": request.text.wire,
            "tool_choice": request.tool_choice.wire,
            "tools": request.tools.wire,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p,
            "truncation": request.truncation,
            "user": request.user,
        }

    def at(
        self,
        status: Status,
        output: Sequence[Mapping[str, Any]] = (),
        *,
        usage: Usage | None = None,
        error: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The response in a state. usage: of one that is over."""
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(output),
            "usage": usage and usage_object(usage),
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts. Cached tokens are among the input's, reasoning tokens among the output's."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _reasoning(request: ResponseRequest) -> dict[str, str | None]:
    stated = request.switches
    effort = "none" if stated.is_on is False else stated.effort
    summary = request.reasoning.summary if request.reasoning else None
    return {"effort": effort if effort in EFFORTS else None, "summary": summary}
