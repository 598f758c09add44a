"""Encoder of Ollama's answers: lines of JSON, or one object; of chats and of bare prompts.

Rule 1: what all lines of a stream share is encoded once; a delta costs one small join.
Rule 2: a call is one line, since its arguments are an object: it is sent when the model has written all of it.
Rule 3: the last line has `done`, its reason, token counts, and durations in nanoseconds; no other has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson

from mlxserver.api.dialect import Failure, WaitProgress
from mlxserver.api.ollama.errors import LINES, envelope
from mlxserver.api.openai.encoders import finish_reason, text_of
from mlxserver.api.openai.logprobs import chat_logprobs
from mlxserver.api.openai.tool_calls import tool_calls
from mlxserver.engine.conversation import UNREADABLE
from mlxserver.engine.events import Delta, Event, Finish, TokenLogprob, ToolCallDelta, Usage

NOT_DONE = b',"done":false'


def timestamp(seconds: float) -> str:
    """A time since 1970 in RFC 3339; inf is the last moment that there is."""
    moment = datetime.max if seconds == float("inf") else datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="microseconds") + "Z"


class LineEncoder:
    """Encoder of one answer. is_chat: its text is in a message. load_reason: of a call that generates nothing."""

    content_type = LINES

    def __init__(self, model: str, *, is_chat: bool, has_logprobs: bool = False, load_reason: str = "") -> None:
        head = orjson.dumps({"model": model, "created_at": timestamp(time.time())})[:-1]
        self._open = head + (b',"message":{"role":"assistant","content":' if is_chat else b',"response":')
        self._close = b"}" if is_chat else b""
        self._has_logprobs = has_logprobs
        self._is_load = bool(load_reason)
        self._reason = load_reason
        self._started = time.monotonic()
        self._call: _Call | None = None

    def start(self, prompt_tokens: int) -> bytes:
        """Nothing: the first line is that of the first event."""
        return b""

    def event(self, event: Event, choice: int) -> bytes:
        """Line of an event, behind that of the call before it."""
        match event:
            case Delta(text, "reasoning"):
                return self._finish_call() + self._line(b'"","thinking":' + orjson.dumps(text))
            case Delta(text, logprobs=tokens):
                return self._finish_call() + self._line(orjson.dumps(text), self._logprobs(tokens))
            case ToolCallDelta():
                return self._take(event)
            case Finish(reason):
                self._reason = reason
                return self._finish_call()
        return b""

    def end(self, usage: Usage) -> bytes:
        """Last line."""
        return self._line(b'""', self._done(usage))

    def failed(self, failure: Failure) -> bytes:
        """The error as the last line."""
        return envelope(failure) + b"\n"

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """Line without text: a line is all that every client takes."""
        return self._line(b'""')

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """Whole answer; without choices that of a load."""
        events = choices[0] if choices else ()
        text = orjson.dumps(text_of(events))
        if thinking := text_of(events, "reasoning"):
            text += b',"thinking":' + orjson.dumps(thinking)
        functions = [(call["id"], call["function"]) for call in tool_calls(events)]
        calls = [_Call(n, id, f["name"], f["arguments"]).json for n, (id, f) in enumerate(functions)]
        if calls:
            text += b',"tool_calls":[' + b",".join(calls) + b"]"
        self._reason = finish_reason(events) if events else self._reason
        tokens = [token for event in events if isinstance(event, Delta) for token in event.logprobs]
        return self._line(text, self._logprobs(tokens, ending=b"") + self._done(usage))

    def _line(self, text: bytes, ending: bytes = NOT_DONE) -> bytes:
        return b"".join((self._open, text, self._close, ending, b"}\n"))

    def _logprobs(self, tokens: Sequence[TokenLogprob], ending: bytes = NOT_DONE) -> bytes:
        if not self._has_logprobs:
            return ending
        return b',"logprobs":' + orjson.dumps(chat_logprobs(tokens)["content"]) + ending

    def _take(self, event: ToolCallDelta) -> bytes:
        """Line of the call before the one that an event adds to, if that is complete now."""
        line = b""
        if self._call is None or self._call.number != event.call:
            line = self._finish_call()
            self._call = _Call(event.call, event.id or "", event.name or "")
        self._call.arguments += event.arguments
        return line

    def _finish_call(self) -> bytes:
        if self._call is None:
            return b""
        call, self._call = self._call, None
        return self._line(b'"","tool_calls":[' + call.json + b"]")

    def _done(self, usage: Usage) -> bytes:
        total, times = time.monotonic() - self._started, usage.timings
        reason = "stop" if self._reason == "tool_calls" else self._reason
        fields: dict[str, object] = {"done": True, "done_reason": reason}
        if not self._is_load:
            fields |= {
                "total_duration": _nanoseconds(total),
                "load_duration": _nanoseconds(total - times.prompt - times.generation),  # the queue included
                "prompt_eval_count": usage.prompt_tokens,
                "prompt_eval_duration": _nanoseconds(times.prompt),
                "eval_count": usage.completion_tokens,
                "eval_duration": _nanoseconds(times.generation),
            }
        return b"," + orjson.dumps(fields)[1:-1]


@dataclass(slots=True)
class _Call:
    """A call that the model writes. arguments: JSON text."""

    number: int
    id: str
    name: str
    arguments: str = ""

    @property
    def json(self) -> bytes:
        """The call as JSON; arguments that are no JSON object are the text of the one that a template would get."""
        function = b'{"index":%d,"name":%b,"arguments":%b}'
        parts = (self.number, orjson.dumps(self.name), _object(self.arguments))
        return b'{"id":%b,"function":%b}' % (orjson.dumps(self.id), function % parts)


def _object(text: str) -> bytes:
    """The JSON object in a text, in one line; numbers of any size keep their digits."""
    try:
        value = json.loads(text) if text.strip() else {}
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # cut by max_tokens; NaN; half of a surrogate pair
        pass
    return orjson.dumps({UNREADABLE: text})


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
