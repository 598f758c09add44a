"""The form in which an answer is sent: engine events in, the wire's bytes or JSON out. Pure.

Rule 1: a form is asked for its opening, then for a chunk for every event but Usage, then for its closing; or, for a
        whole answer, once with all events by choice.
Rule 2: both ways the client gets the same text.
Rule 3: choices are numbered over all prompts of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlxserver.api import responses, schemas
from mlxserver.api.openai.chunks import ChunkEncoder
from mlxserver.engine.events import Delta, Event, Finish, ToolCallDelta, Usage
from mlxserver.server import translation

THINK_START, THINK_END = "<think>\n", "\n</think>\n\n"


class Form(ABC):
    """How one kind of request is answered.

    head begins the whole answer; the encoder has that of the chunks. is_inline: reasoning is a part of the text.
    """

    def __init__(
        self, request: schemas.GeneratingRequest, head: dict[str, Any], encoder: ChunkEncoder, *, is_inline: bool
    ) -> None:
        self._include_usage = request.include_usage
        self._counts_pieces = request.counts_pieces
        self._head = head
        self._encoder = encoder
        self._inline = InlineReasoning() if is_inline else None
        self._prompt_tokens = 0
        self._pieces = 0

    def opening(self, prompt_tokens: int) -> bytes:
        """What a stream begins with."""
        self._prompt_tokens = prompt_tokens
        self._count()
        return self._opening()

    def chunk(self, event: Event, choice: int) -> bytes:
        """What an event adds to a stream."""
        self._pieces += not isinstance(event, Finish)
        self._count()
        if self._inline is None:
            return self._piece(event, choice)
        return b"".join(self._piece(part, choice) for part in self._inline.feed(event, choice))

    def closing(self, usage: Usage) -> bytes:
        """What a stream ends with, before [DONE]: the counts, where they were asked for."""
        if not self._include_usage:
            return b""
        return self._encoder.usage(translation.usage(usage), translation.timings(usage))

    def whole(self, choices: Sequence[Sequence[Event]], usage: Usage) -> dict[str, Any]:
        """The whole answer, from the events of each choice."""
        told = [self._choice(self._placed(events, index), index) for index, events in enumerate(choices)]
        return responses.completion(self._head, told, translation.usage(usage), translation.timings(usage))

    @abstractmethod
    def _opening(self) -> bytes: ...

    @abstractmethod
    def _piece(self, event: Event, choice: int) -> bytes: ...

    @abstractmethod
    def _choice(self, events: Sequence[Event], index: int) -> dict[str, Any]: ...

    def _placed(self, events: Sequence[Event], index: int) -> Sequence[Event]:
        if self._inline is None:
            return events
        return [part for event in events for part in self._inline.feed(event, index)]

    def _count(self) -> None:
        if self._counts_pieces:
            self._encoder.count(responses.usage(self._prompt_tokens, self._pieces))


class InlineReasoning:
    """Reasoning as content between tags, choice by choice. Reasoning that was cut short stays open."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def feed(self, event: Event, choice: int) -> Iterator[Event]:
        """The event with its reasoning in the content."""
        match event:
            case Delta(text, "reasoning"):
                start = "" if choice in self._open else THINK_START
                self._open.add(choice)
                yield replace(event, text=start + text, channel="content")
            case Delta() | ToolCallDelta() if choice in self._open:
                self._open.discard(choice)
                yield Delta(THINK_END)
                yield event
            case _:
                yield event


def text_of(events: Sequence[Event], channel: str = "content") -> str:
    """All text of a channel."""
    return "".join(event.text for event in events if isinstance(event, Delta) and event.channel == channel)


def finish_reason(events: Sequence[Event]) -> str:
    """How a choice ended."""
    return next(event.reason for event in events if isinstance(event, Finish))


def new_head(request: schemas.GeneratingRequest, id: str, object: str, created: int) -> dict[str, Any]:
    """What an answer to a request begins with."""
    return responses.head(id, object, request.model, created, translation.FINGERPRINT)
