"""What came over the socket, with its arrival times -> status and server-sent events, each with its own time. Pure.

Rule 1: nothing is parsed while a load runs; transcripts are read afterwards, so the generator costs next to nothing.
Rule 2: an event arrives when its last byte does, however the bytes were cut.
Rule 3: events are separated by an empty line of line feeds, as all OpenAI-compatible servers send them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

SEPARATOR = b"\n\n"


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes as one read gave them; `at` is in seconds of time.perf_counter."""

    at: float
    data: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """The data of one server-sent event, and when it was complete."""

    at: float
    data: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response, read to the end of its connection. Comments are not events."""

    status: int
    body: bytes
    events: tuple[Event, ...]


def read_reply(segments: Sequence[Segment]) -> Reply:
    """Read one response, chunked or ended by the connection. Raises ValueError if its head is not complete."""
    raw = b"".join(segment.data for segment in segments)
    head, found, _ = raw.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not found or not status or not status[0].isdigit():
        raise ValueError(f"The connection ended after {len(raw)} bytes, expected a whole response head")
    start = len(head) + len(found)
    chunked = b"transfer-encoding: chunked" in head.lower()
    spans = list(_chunk_spans(raw, start)) if chunked else [(start, len(raw))]
    body = b"".join(raw[begin:end] for begin, end in spans)
    arrivals = _Arrivals(segments, spans)
    return Reply(int(status[0]), body, tuple(_read_events(body, arrivals)))


def _chunk_spans(raw: bytes, position: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk's content; what is cut off at the end counts as far as it came."""
    while (line_end := raw.find(b"\r\n", position)) >= 0:
        size = int(raw[position:line_end].split(b";")[0], 16)
        if size == 0:
            return
        begin = line_end + 2
        yield begin, min(begin + size, len(raw))
        position = begin + size + 2


class _Arrivals:
    """When the byte at a position of the body came."""

    def __init__(self, segments: Sequence[Segment], spans: Sequence[tuple[int, int]]) -> None:
        self._times = [segment.at for segment in segments]
        self._ends = list(accumulate(len(segment.data) for segment in segments))
        self._spans = spans
        self._span_ends = list(accumulate(end - begin for begin, end in spans))

    def at(self, position: int) -> float:
        span = bisect_right(self._span_ends, position)
        from_span_end = self._span_ends[span] - position
        return self._times[bisect_right(self._ends, self._spans[span][1] - from_span_end)]


def _read_events(body: bytes, arrivals: _Arrivals) -> Iterator[Event]:
    position = 0
    while (end := body.find(SEPARATOR, position)) >= 0:
        lines = body[position:end].split(b"\n")
        fields = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        if fields:
            yield Event(arrivals.at(end + len(SEPARATOR) - 1), b"\n".join(fields))
        position = end + len(SEPARATOR)
