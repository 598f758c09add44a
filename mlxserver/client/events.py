"""Typed events of an answer, parsed from the JSON of a stream or of a whole answer. Pure.

Rule 1: a stream is any number of Reasoning, Content and ToolCall deltas, then one Finished; or it raises StreamBroken.
Rule 2: `at` is when the bytes of an event were read, in seconds of time.perf_counter(). Events of one read share it.
Rule 3: an answer has one choice. Of a server that sends more, only the first is read.
Rule 4: reasoning is read from `reasoning_content` and from `reasoning`, whichever the server uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlxserver.client.errors import StreamBroken, stream_error
from mlxserver.client.wire import count, mapping, mappings, parse, text


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Delta of the reasoning."""

    text: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Content:
    """Delta of the content."""

    text: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Delta of tool call number `index`. id and name come with its first delta, arguments is JSON text in parts."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """End of a complete answer. `usage` is None if the server sends none."""

    reason: str
    usage: Usage | None = None
    at: float = 0.0


Delta = Reasoning | Content | ToolCall
Event = Delta | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """Whole answer: the deltas that its stream would have had, and its end."""

    deltas: tuple[Delta, ...]
    finished: Finished

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, as its stream would have had them."""
        return (*self.deltas, self.finished)

    @property
    def reasoning(self) -> str:
        """The reasoning; empty if there was none."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, Reasoning))

    @property
    def content(self) -> str:
        """The text of the answer."""
        return "".join(delta.text for delta in self.deltas if isinstance(delta, Content))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls, each whole."""
        return tuple(delta for delta in self.deltas if isinstance(delta, ToolCall))


class ChunkReader:
    """Parser of the chunks of one stream: payloads in, events out."""

    def __init__(self) -> None:
        self._reason = ""
        self._usage: Usage | None = None

    def read(self, payload: str, at: float) -> list[Event]:
        """The events in one payload of the stream. Raises StreamBroken for an error and for what is no JSON object."""
        chunk = parse(payload)
        if not isinstance(chunk, dict):
            raise StreamBroken(f"the server sent {payload[:80]!r} where a JSON object was expected.")
        if chunk.get("error"):
            raise stream_error(chunk["error"])
        self._usage = read_usage(chunk.get("usage")) or self._usage
        events: list[Event] = []
        for choice in _first(chunk):
            self._reason = text(choice.get("finish_reason")) or self._reason
            events += read_deltas(mapping(choice.get("delta")), at)
        return events

    def finish(self, at: float) -> Finished:
        """The last event, at the end of the stream. Raises StreamBroken if no finish_reason came before it."""
        if not self._reason:
            raise StreamBroken("the stream ended without a finish_reason.")
        return Finished(self._reason, self._usage, at)


def read_answer(body: dict[str, Any], at: float) -> Answer:
    """Parse a whole answer. Raises StreamBroken if it has no choice."""
    for choice in _first(body):
        finished = Finished(text(choice.get("finish_reason")), read_usage(body.get("usage")), at)
        return Answer(tuple(read_deltas(mapping(choice.get("message")), at)), finished)
    raise StreamBroken("the server sent an answer without a choice.")


def read_deltas(message: dict[str, Any], at: float) -> Iterator[Delta]:
    """Parse a chunk's delta or a whole message: its deltas, without the empty ones."""
    if reasoning := text(message.get("reasoning_content")) or text(message.get("reasoning")):
        yield Reasoning(reasoning, at)
    if content := text(message.get("content")):
        yield Content(content, at)
    for position, call in enumerate(mappings(message.get("tool_calls"))):
        function = mapping(call.get("function"))
        # The calls of a whole message have no index field.
        index = count(call.get("index", position))
        yield ToolCall(index, text(call.get("id")), text(function.get("name")), text(function.get("arguments")), at)


def read_usage(usage: Any) -> Usage | None:
    """Parse a usage object; None if there is none."""
    if not isinstance(usage, dict):
        return None
    return Usage(
        prompt_tokens=count(usage.get("prompt_tokens")),
        completion_tokens=count(usage.get("completion_tokens")),
        reasoning_tokens=count(mapping(usage.get("completion_tokens_details")).get("reasoning_tokens")),
        cached_tokens=count(mapping(usage.get("prompt_tokens_details")).get("cached_tokens")),
    )


def _first(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    return [choice for choice in mappings(chunk.get("choices")) if count(choice.get("index")) == 0][:1]
