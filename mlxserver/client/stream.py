"""Parser of an answer's stream: from the bytes of its body to events. Pure.

Rule 1: an event's time is that of the read whose bytes completed it.
Rule 2: the progress of what an answer waits for comes in comments and is no event: it precedes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mlxserver.api.sse import SSEDecoder
from mlxserver.client.events import ChunkReader, Event, Finished
from mlxserver.client.models import Wait, read_comment

END_OF_STREAM = "[DONE]"


class StreamReader:
    """Parser of one stream: bytes in, events out. The last event is Finished; what is fed after it is ignored.

    on_progress: called with the progress of what the answer waits for.
    """

    def __init__(self, on_progress: Callable[[Wait], None] = lambda _: None) -> None:
        self._on_progress = on_progress
        self._decoder = SSEDecoder(self._take_comment)
        self._chunks = ChunkReader()
        self._has_begun = self._is_finished = False

    def feed(self, received: bytes, at: float) -> Iterator[Event]:
        """The events that these bytes complete. Raises StreamBroken, after the events before the fault."""
        for payload in self._decoder.feed(received):
            if self._is_finished:
                return
            if payload == END_OF_STREAM:
                yield self._finish(at)
            else:
                for event in self._chunks.read(payload, at):
                    self._has_begun = True
                    yield event

    def end(self, at: float) -> Iterator[Event]:
        """The last event, at the end of the connection. Raises StreamBroken if the answer is not complete."""
        if not self._is_finished:
            yield self._finish(at)

    def _take_comment(self, comment: str) -> None:
        if not self._has_begun and (progress := read_comment(comment)):
            self._on_progress(progress)

    def _finish(self, at: float) -> Finished:
        finished = self._chunks.finish(at)
        self._is_finished = True
        return finished
