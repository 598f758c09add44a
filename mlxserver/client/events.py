"""What an answer is made of: the JSON of a stream or of a whole answer, as typed events. Pure.

Rule 1: a stream is any number of Reasoning, Content and ToolCall pieces, then one Finished; or it raises StreamBroken.
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
    """A piece of the thinking."""

    text: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A piece of the call number `index`. id and name come with its first piece, arguments is JSON text in pieces."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. `usage` is None when the server does not tell it."""

    reason: str
    usage: Usage | None = None
    at: float = 0.0


Piece = Reasoning | Content | ToolCall
Event = Piece | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the pieces that a stream of it would have given, and its end."""

    pieces: tuple[Piece, ...]
    finished: Finished

    @property
    def events(self) -> tuple[Event, ...]:
        """All of it, as a stream would have given it."""
        return (*self.pieces, self.finished)

    @property
    def reasoning(self) -> str:
        """The thinking; empty when there was none."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Reasoning))

    @property
    def content(self) -> str:
        """The answer's text."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Content))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls, each whole."""
        return tuple(piece for piece in self.pieces if isinstance(piece, ToolCall))


class ChunkReader:
    """The chunks of one stream, in: events, out."""

    def __init__(self) -> None:
        self._reason = ""
        self._usage: Usage | None = None

    def read(self, payload: str, at: float) -> list[Event]:
        """The events in the data of one server-sent event. Raises StreamBroken for an error event and for no JSON."""
        chunk = parse(payload)
        if not isinstance(chunk, dict):
            raise StreamBroken(f"the server sent {payload[:80]!r} where a JSON object was expected.")
        if chunk.get("error"):
            raise stream_error(chunk["error"])
        self._usage = read_usage(chunk.get("usage")) or self._usage
        events: list[Event] = []
        for choice in _first(chunk):
            self._reason = text(choice.get("finish_reason")) or self._reason
            events += pieces(mapping(choice.get("delta")), at)
        return events

    def finish(self, at: float) -> Finished:
        """The last event, at the end of the stream. Raises StreamBroken when no finish_reason came before it."""
        if not self._reason:
            raise StreamBroken("the stream ended without a finish_reason.")
        return Finished(self._reason, self._usage, at)


def read_answer(body: dict[str, Any], at: float) -> Answer:
    """The wire's whole answer. Raises StreamBroken when it holds no choice."""
    for choice in _first(body):
        finished = Finished(text(choice.get("finish_reason")), read_usage(body.get("usage")), at)
        return Answer(tuple(pieces(mapping(choice.get("message")), at)), finished)
    raise StreamBroken("the server sent an answer without a choice.")


def pieces(delta: dict[str, Any], at: float) -> Iterator[Piece]:
    """The pieces in a delta, or in a whole message, without the empty ones."""
    if reasoning := text(delta.get("reasoning_content")) or text(delta.get("reasoning")):
        yield Reasoning(reasoning, at)
    if content := text(delta.get("content")):
        yield Content(content, at)
    for place, call in enumerate(mappings(delta.get("tool_calls"))):
        function = mapping(call.get("function"))
        # A whole message numbers its calls by their place alone.
        index = count(call.get("index", place))
        yield ToolCall(index, text(call.get("id")), text(function.get("name")), text(function.get("arguments")), at)


def read_usage(usage: Any) -> Usage | None:
    """The wire's usage object; None when there is none."""
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
