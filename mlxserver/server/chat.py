"""Answers of /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlxserver.api import responses, schemas
from mlxserver.api.openai.chunks import ChatChunkEncoder
from mlxserver.engine.events import Delta, Event, Finish, ToolCallDelta
from mlxserver.server import translation
from mlxserver.server.forms import Form, finish_reason, new_head, text_of


class ChatForm(Form):
    """A chat completion. reasoning_format holds where the request does not say."""

    def __init__(self, request: schemas.ChatCompletionRequest, reasoning_format: schemas.ReasoningFormat) -> None:
        self._field = request.reasoning_format or reasoning_format
        self._n, self._has_logprobs = request.n, request.logprobs
        id, created = responses.completion_id("chatcmpl"), int(time.time())
        self._chat = ChatChunkEncoder(new_head(request, id, "chat.completion.chunk", created))
        head = new_head(request, id, "chat.completion", created)
        super().__init__(request, head, self._chat, is_inline=self._field == "inline")

    def _opening(self) -> bytes:
        return b"".join(self._chat.role(choice) for choice in range(self._n))

    def _piece(self, event: Event, choice: int) -> bytes:
        match event:
            case Delta(text, "reasoning"):
                return self._chat.reasoning(text, choice, self._field)
            case Delta(text) if not self._has_logprobs:
                return self._chat.content(text, choice)
            case Delta(text, logprobs=tokens):
                return self._chat.content(text, choice, translation.chat_logprobs(tokens))
            case ToolCallDelta(call, arguments, id, name):
                return self._chat.tool_call(call, arguments, choice, id=id, name=name)
            case Finish(reason):
                return self._chat.finish(reason, choice)
        return b""

    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]:
        content = [event for event in events if isinstance(event, Delta) and event.channel == "content"]
        reasoning = text_of(events, "reasoning")
        tokens = [token for delta in content for token in delta.logprobs]
        return responses.chat_choice(
            text_of(content),
            finish_reason(events),
            index=index,
            reasoning={self._field: reasoning} if reasoning else None,
            tool_calls=_tool_calls(events),
            logprobs=translation.chat_logprobs(tokens) if self._has_logprobs else None,
        )


def _tool_calls(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The calls of a choice, put together from their pieces."""
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, ToolCallDelta):
            call = calls.setdefault(event.call, responses.tool_call(event.id or "", event.name or "", ""))
            call["function"]["arguments"] += event.arguments
    return list(calls.values())
