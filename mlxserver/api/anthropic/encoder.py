"""Encoder of Anthropic's answers: the events of a stream, and whole messages.

Rule 1: a stream is message_start, its content blocks one after another, message_delta and message_stop. A ping may
        come anywhere, also before message_start; readers skip it.
Rule 2: a block is opened by its first delta and closed by the first of another block, or at the end.
Rule 3: the part of a delta that all deltas of a block share is encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import orjson

from mlxserver.api import sse
from mlxserver.api.anthropic.errors import envelope
from mlxserver.api.dialect import Failure, WaitProgress
from mlxserver.engine.conversation import ToolCall
from mlxserver.engine.events import Delta, Event, Finish, ToolCallDelta, Usage

SIGNATURE = "bWx4LXNlcnZlcg=="  # of reasoning: nothing is signed here, and clients drop a block without one
PING = sse.encode(b'{"type":"ping"}', "ping")
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessageEncoder:
    """Encoder of one answer. token_limit: the one that the request states, None where it has none."""

    content_type = "text/event-stream; charset=utf-8"

    def __init__(self, model: str, *, token_limit: int | None) -> None:
        self._model = model
        self._token_limit = token_limit
        self._id = f"msg_{uuid4().hex}"
        self._index = -1
        self._kind = ""  # of the open block; empty: none is open
        self._delta_start = b""
        self._finish = Finish("stop")

    def start(self, prompt_tokens: int) -> bytes:
        """message_start. How many tokens came from the cache is known at the end."""
        message = self._message([], None, None, usage_object(Usage(prompt_tokens, 0)))
        return _event("message_start", message=message)

    def event(self, event: Event, choice: int) -> bytes:
        """The delta of an event, in its block."""
        match event:
            case Delta(text, channel):
                return self._text("thinking" if channel == "reasoning" else "text", text)
            case ToolCallDelta(id=None):
                return self._delta(event.arguments)
            case ToolCallDelta():
                opened = self._close() + self._open(_call_block(event), "input_json_delta", "partial_json")
                return opened + (self._delta(event.arguments) if event.arguments else b"")
            case Finish():
                self._finish = event
                return self._close()
        return b""

    def end(self, usage: Usage) -> bytes:
        """message_delta with the reason and the token counts, and message_stop."""
        reason, stop = self._stop_reason(self._finish, usage)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return _event("message_delta", delta=delta, usage=usage_object(usage)) + _event("message_stop")

    def failed(self, failure: Failure) -> bytes:
        """Error envelope as the last event."""
        return sse.encode(envelope(failure), "error")

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """A ping."""
        return PING

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """Whole message."""
        (events,) = choices
        finish = next(event for event in events if isinstance(event, Finish))
        content = content_blocks(events)
        return orjson.dumps(self._message(content, *self._stop_reason(finish, usage), usage_object(usage)))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def _stop_reason(self, finish: Finish, usage: Usage) -> tuple[str, str | None]:
        """Why the answer ended, and the stop sequence that ended it."""
        match finish.reason:
            case "tool_calls":
                return "tool_use", None
            case "length":
                is_full = self._token_limit is not None and usage.completion_tokens < self._token_limit
                return "model_context_window_exceeded" if is_full else "max_tokens", None
        return ("end_turn", None) if finish.stop is None else ("stop_sequence", finish.stop)

    def _text(self, kind: str, text: str) -> bytes:
        if kind == self._kind:
            return self._delta(text)
        return self._close() + self._open(_text_block(kind), *DELTAS[kind]) + self._delta(text)

    def _open(self, block: dict[str, Any], delta: str, field: str) -> bytes:
        self._kind = block["type"]
        self._index += 1
        members = (self._index, delta.encode(), field.encode())
        self._delta_start = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%b","%b":' % members
        )
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, text: str) -> bytes:
        return b"%b%b}}\n\n" % (self._delta_start, orjson.dumps(text))

    def _close(self) -> bytes:
        """The end of the open block; that of reasoning has its signature before."""
        kind, self._kind = self._kind, ""
        if not kind:
            return b""
        signature = {"type": "signature_delta", "signature": SIGNATURE}
        signed = _event("content_block_delta", index=self._index, delta=signature) if kind == "thinking" else b""
        return signed + _event("content_block_stop", index=self._index)


def content_blocks(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Content blocks of a whole answer."""
    blocks: list[dict[str, Any]] = []
    calls: dict[int, tuple[dict[str, Any], list[str]]] = {}
    for event in events:
        match event:
            case Delta(text, channel):
                kind = "thinking" if channel == "reasoning" else "text"
                if not blocks or blocks[-1]["type"] != kind:
                    blocks.append(_text_block(kind, SIGNATURE))
                blocks[-1][kind] += text
            case ToolCallDelta(call, arguments):
                if call not in calls:
                    blocks.append(_call_block(event))
                    calls[call] = blocks[-1], []
                calls[call][1].append(arguments)
    for block, pieces in calls.values():
        block["input"] = ToolCall.of_text("", "", "".join(pieces)).arguments
    return blocks


def usage_object(usage: Usage) -> dict[str, Any]:
    """Token counts. Tokens from the cache are not among input_tokens; what is written into it is not counted apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _call_block(call: ToolCallDelta) -> dict[str, Any]:
    call_id = f"toolu_{(call.id or '').removeprefix('call_')}"
    return {"type": "tool_use", "id": call_id, "name": call.name, "input": {}}


def _text_block(kind: str, signature: str = "") -> dict[str, Any]:
    return {"type": kind, kind: ""} | ({"signature": signature} if kind == "thinking" else {})


def _event(name: str, **fields: Any) -> bytes:
    return sse.encode(orjson.dumps({"type": name, **fields}), name)
