"""Last requests that generated: what GET /v1/requests lists, and the trace of each.

Rule 1: the texts of prompts and answers are in here only while log_contents is set, and never more than MAX_TEXT. An
        error that may quote them is kept without them.
Rule 2: of a key there is a short digest of its id, which opens nothing.
Rule 3: a trace has MAX_SPANS spans at most, however many prompts its request had.
Rule 4: a reader that sends back its cursor gets what it has not seen; any other cursor gets everything.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mlxserver.engine.events import MAX_CHUNKS, Timings, Usage
from mlxserver.engine.worker.generation import Generation

MAX_REQUESTS = 500
MAX_SPANS = MAX_CHUNKS + 8  # all those of one prompt
CURSOR = re.compile(r"([0-9a-f]{8})\.([0-9]{1,18})")
DETAILS = ("spans", "prompt", "answer")  # of a trace, not of the list

Object = dict[str, Any]


@dataclass(slots=True)
class RequestRecord:
    """Record of one request. Times in seconds, by time.monotonic(), but `arrived`, since 1970.

    agent, address: what the client calls itself, and where it is. key_id: id of its key. model: its key, or what the
    request named, as long as no model is known for it. asked: when its model was known. is_load_awaited: the model was
    not loaded then. submitted: when the engine got each generation. prompt, answer: texts, where they are kept.
    """

    id: str
    method: str
    path: str
    agent: str = ""
    address: str = ""
    started: float = field(default_factory=time.monotonic)
    arrived: float = field(default_factory=time.time)
    ended: float | None = None
    status: int | None = None
    dialect: str | None = None
    model: str | None = None
    key_id: str = ""
    error: str | None = None
    asked: float | None = None
    is_load_awaited: bool = False
    submitted: list[float] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    prompt: str | None = None
    answer: str | None = None

    @property
    def until(self) -> float:
        """Its end; of one that runs, now."""
        return time.monotonic() if self.ended is None else self.ended

    @property
    def load_seconds(self) -> float:
        """Time that it waited for its model to be loaded."""
        if self.asked is None or not self.is_load_awaited:
            return 0.0
        return (self.submitted[0] if self.submitted else self.until) - self.asked

    @property
    def usages(self) -> list[Usage]:
        """Usage of its generations that are complete."""
        return [generation.usage for generation in self.generations if generation.usage]


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Requests, the newest first, and the cursor for those that end later. is_whole: nothing is left out of them."""

    requests: list[Object]
    cursor: str
    is_whole: bool


class RequestHistory:
    """Requests that run, and the last that have ended. Used on one event loop."""

    def __init__(self, most: int = MAX_REQUESTS) -> None:
        self._records: dict[int, RequestRecord] = {}
        self._ended: deque[Object] = deque(maxlen=most)
        self._process = secrets.token_hex(4)  # a cursor of another process counts otherwise
        self._number = 0  # of requests that have ended, those among them that are no longer here

    def begin(self, record: RequestRecord) -> None:
        """Add a request."""
        self._records[id(record)] = record

    def end(self, record: RequestRecord) -> None:
        """Keep what is shown of a request that has ended, if it was one that generates."""
        record.ended = time.monotonic()
        self._records.pop(id(record), None)
        if record.dialect:
            self._ended.append(trace(record))
            self._number += 1

    def summaries(self, cursor: str = "") -> RequestPage:
        """The requests that run, and those that have ended since a cursor."""
        match = CURSOR.fullmatch(cursor)
        seen = int(match[2]) if match and match[1] == self._process else 0
        missed = self._number - seen
        is_whole = not seen or not 0 <= missed <= len(self._ended)
        ended = islice(reversed(self._ended), len(self._ended) if is_whole else missed)
        found = [summary(record) for record in self._running_records]
        found += [{name: each[name] for name in each if name not in DETAILS} for each in ended]
        found.sort(key=lambda each: -float(each["arrived"]))
        return RequestPage(found, f"{self._process}.{self._number}", is_whole)

    def trace(self, id: str) -> Object | None:
        """The newest request with this id, with its timeline; None if there is none, or no more."""
        running = next((trace(record) for record in self._running_records if record.id == id), None)
        return running or next((each for each in reversed(self._ended) if each["id"] == id), None)

    @property
    def _running_records(self) -> list[RequestRecord]:
        return [record for record in self._records.values() if record.dialect]


def summary(record: RequestRecord) -> Object:
    """A request as the list has it. Times in seconds, None where they are not known."""
    usages = record.usages
    queue = max((usage.timings.queue for usage in usages), default=None)
    return {
        "id": record.id,
        "arrived": round(record.arrived, 3),
        "model": record.model,
        "dialect": record.dialect,
        "path": record.path,
        "client": record.agent,
        "address": record.address,
        "key": short_id(record.key_id),
        "status": record.status,
        "outcome": _outcome(record),
        "error": record.error,
        "seconds": round(record.until - record.started, 4),
        "load_seconds": _rounded(record.load_seconds),
        "queue_seconds": _rounded(queue),
        "ttft_seconds": _rounded(_ttft(record, usages)),
        "tokens_per_second": _rate(usages),
        "prompt_tokens": _total(usages, "prompt_tokens"),
        "cached_tokens": _total(usages, "cached_tokens"),
        "completion_tokens": _total(usages, "completion_tokens"),
        "reasoning_tokens": _total(usages, "reasoning_tokens"),
    }


def trace(record: RequestRecord) -> Object:
    """A request with the spans of its timeline, in seconds since its arrival, and its texts if they were kept."""
    spans = sorted(islice(_spans(record), MAX_SPANS), key=lambda span: (span["start"], span["end"]))
    return {**summary(record), "spans": spans, "prompt": record.prompt, "answer": record.answer}


def short_id(client: str) -> str | None:
    """What a key is shown as: the same for the same key, and of no use otherwise."""
    return hashlib.sha256(b"shown" + client.encode()).hexdigest()[:8] if client else None


def _outcome(record: RequestRecord) -> str:
    if record.ended is None:
        return "running" if record.generations else "waiting"
    if record.error:
        return "error"
    return record.generations[-1].outcome if record.generations else "cancelled"


def _spans(record: RequestRecord) -> Iterator[Object]:
    end = record.until - record.started
    begun = end if record.asked is None else record.asked - record.started
    yield _span("read", 0.0, begun)
    if record.asked is None:
        return
    submitted = [at - record.started for at in record.submitted] or [end]
    yield _span("load" if record.load_seconds else "prepare", begun, submitted[0])
    for start, generation in zip(submitted, record.generations, strict=False):
        yield from _engine_spans(generation, start, end, record.started)


def _engine_spans(generation: Generation, start: float, end: float, origin: float) -> Iterator[Object]:
    """Queue, chunks of the prompt, and decoding of one generation."""
    chunks = [(at - origin, done) for at, done in generation.prompt.chunks]
    usage = generation.usage
    timings = usage.timings if usage else None
    slot = min(end, start + timings.queue) if timings else min(chunks[0][0] if chunks else end, end)
    first = min(end, slot + timings.prompt) if timings else _first_token(generation, origin, end)
    yield _span("queue", start, slot)
    if first > slot:
        before, tokens = slot, 0
        for at, done in [*chunks, (first, None)]:
            if (at := min(max(at, before), first)) > before:
                count = None if done is None else done - tokens
                yield _span("prefill", before, at, count)
                before, tokens = at, tokens if done is None else done
    if end > first:
        last = _last_token(timings, first, end)
        yield _span("decode", first, last, usage.completion_tokens if usage else None)


def _first_token(generation: Generation, origin: float, end: float) -> float:
    at = generation.first_token
    return end if at is None else min(end, at - origin)


def _last_token(timings: Timings | None, first: float, end: float) -> float:
    return min(end, first + timings.generation) if timings else end


def _span(name: str, start: float, end: float, tokens: int | None = None) -> Object:
    return {"name": name, "start": round(start, 5), "end": round(max(start, end), 5), "tokens": tokens}


def _ttft(record: RequestRecord, usages: list[Usage]) -> float | None:
    """Seconds from the arrival of the request to its first token, the load of its model included."""
    if not usages or not record.submitted:
        return None
    timings = usages[0].timings
    return record.submitted[0] - record.started + timings.queue + timings.prompt


def _rate(usages: list[Usage]) -> float | None:
    tokens, seconds = sum(u.completion_tokens for u in usages), max((u.timings.generation for u in usages), default=0)
    return round((tokens - len(usages)) / seconds, 1) if seconds > 0 and tokens > len(usages) else None


def _total(usages: list[Usage], count: str) -> int | None:
    return sum(getattr(usage, count) for usage in usages) if usages else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
