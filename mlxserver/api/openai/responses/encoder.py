"""Encoder of a response, whole or as a stream of events.

Rule 1: each event has a type and the next sequence number. The first is response.created, the last one of
        response.completed, response.incomplete and response.failed.
Rule 2: a response that is over, but has not failed, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from mlxserver.api.dialect import Failure, WaitProgress
from mlxserver.api.openai.responses.errors import response_error
from mlxserver.api.openai.responses.open_items import StreamEvent
from mlxserver.api.openai.responses.output import Output
from mlxserver.api.openai.responses.response_object import ResponseObject
from mlxserver.api.openai.responses.tools import ToolSet
from mlxserver.engine.events import Event, Usage

Keep = Callable[[Mapping[str, Any]], None]


class ResponseEncoder:
    """Encoder of one response. keep: takes the response once it is over."""

    content_type = "text/event-stream; charset=utf-8"

    def __init__(self, response: ResponseObject, tools: ToolSet) -> None:
        self._response = response
        self._output = Output(tools)
        self.keep: Keep = lambda response: None
        self._number = 0

    def start(self, prompt_tokens: int) -> bytes:
        """Events that a response begins with, unless a heartbeat came first."""
        return self._begin() or b""

    def event(self, event: Event, choice: int) -> bytes:
        """Events that an event becomes."""
        return self._encode(self._output.feed(event))

    def end(self, usage: Usage) -> bytes:
        """The event with the whole response."""
        response = self._over(usage)
        return self._encode([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, failure: Failure) -> bytes:
        """The event with the error, and with what there is of the output."""
        response = self._response.at("failed", self._output.all_items, error=response_error(failure))
        return self._begin() + self._encode([{"type": "response.failed", "response": response}])

    def heartbeat(self, progress: WaitProgress | None) -> bytes:
        """response.in_progress once more: comments do not count as a sign of life with every client."""
        return self._begin() or self._encode([self._state("in_progress")])

    def complete(self, choices: Sequence[Sequence[Event]], usage: Usage) -> bytes:
        """The whole response."""
        for event in choices[0]:
            for _ in self._output.feed(event):
                pass
        return orjson.dumps(self._over(usage))

    def _begin(self) -> bytes:
        """The first events; nothing where they have been sent."""
        return b"" if self._number else self._encode([self._state("created"), self._state("in_progress")])

    def _state(self, name: str) -> StreamEvent:
        return {"type": f"response.{name}", "response": self._response.at("in_progress")}

    def _over(self, usage: Usage) -> dict[str, Any]:
        status = "incomplete" if self._output.is_cut else "completed"
        response = self._response.at(status, self._output.items, usage=usage)  # type: ignore[arg-type]
        self.keep(response)
        return response

    def _encode(self, events: Iterable[StreamEvent]) -> bytes:
        return b"".join([self._encode_one(event) for event in events])

    def _encode_one(self, event: StreamEvent) -> bytes:
        event["sequence_number"] = self._number
        self._number += 1
        # JSON has no line breaks, so an event is two lines.
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
