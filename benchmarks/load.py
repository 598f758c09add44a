"""The load generator: chat requests over HTTP in a closed loop, every byte stamped with its arrival.

Rule 1: while a load runs, nothing happens per arrival but storing bytes and time; reading them comes afterwards.
Rule 2: each request has a connection of its own and ends with it, so both kinds of server are read alike.
Rule 3: a request that fails is a record with an error, never an exception.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from benchmarks.stats import Record
from benchmarks.wire import Event, Reply, Segment, read_reply

HOST = "127.0.0.1"
REQUEST_TIMEOUT = 900.0
# mlx_lm.server listens with a backlog of 5: a burst of connections would wait for TCP to try again after a second,
# and its figures would tell about that instead of the engine.
CONNECT_INTERVAL = 0.002


@dataclass(frozen=True, slots=True)
class Job:
    """One streamed chat request."""

    model: str
    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The HTTP request."""
        body = json.dumps(
            {
                "model": self.model,
                "messages": list(self.messages),
                "max_tokens": self.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self.sampling,
            }
        ).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\n"
            f"Host: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was sent and received: times as in Record, and why it broke off, if it did."""

    sent: float
    connected: float
    ended: float
    segments: tuple[Segment, ...]
    failure: str | None = None


class _Recorder(asyncio.Protocol):
    """Stores what arrives until the connection ends."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.segments.append(Segment(perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(exc)


class LoadGenerator:
    """Sends requests to one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connecting = asyncio.Lock()

    async def run(self, jobs: Sequence[Job], clients: int) -> list[Record]:
        """Send all jobs, `clients` at a time, each client its next one as soon as its last one ended."""
        waiting = [job.encode() for job in reversed(jobs)]
        exchanges: list[Exchange] = []

        async def client() -> None:
            while waiting:
                exchanges.append(await self._exchange(waiting.pop()))

        await asyncio.gather(*(client() for _ in range(clients)))
        records = [read_record(exchange) for exchange in exchanges]
        if failed := [record.error for record in records if record.error]:
            print(
                f"{len(failed)} of {len(records)} requests failed, the first: {failed[0]}", file=sys.stderr, flush=True
            )
        return records

    async def send(self, job: Job) -> Record:
        """Send one request and read its answer."""
        return read_record(await self._exchange(job.encode()))

    async def _exchange(self, request: bytes) -> Exchange:
        async with self._connecting:
            await asyncio.sleep(CONNECT_INTERVAL)
        sent = perf_counter()
        loop = asyncio.get_running_loop()
        try:
            transport, recorder = await loop.create_connection(_Recorder, HOST, self._port)
        except OSError as error:
            return Exchange(sent, 0.0, perf_counter(), (), f"connecting: {error}")
        connected = perf_counter() - sent
        transport.write(request)
        try:
            failure = await asyncio.wait_for(recorder.ended, REQUEST_TIMEOUT)
        except TimeoutError:
            failure = TimeoutError(f"no end within {REQUEST_TIMEOUT:.0f} s")
        finally:
            transport.abort()
        return Exchange(sent, connected, perf_counter(), tuple(recorder.segments), str(failure) if failure else None)


def read_record(exchange: Exchange) -> Record:
    """Read what a request gave. Tokens are the usage's, or else the pieces of text."""
    error = exchange.failure
    try:
        reply = read_reply(exchange.segments)
        events = _decode_events(reply)
    except ValueError as invalid:
        return _record(exchange, [], error or str(invalid))
    if reply.status != 200:
        error = f"status {reply.status}: {reply.body[:300].decode(errors='replace')}"
    elif not reply.events or reply.events[-1].data != b"[DONE]":
        error = error or f"the stream broke off: {reply.body[-300:].decode(errors='replace')}"
    return _record(exchange, events, error)


def _decode_events(reply: Reply) -> list[tuple[Event, dict[str, Any]]]:
    return [(event, json.loads(event.data)) for event in reply.events if event.data != b"[DONE]"]


def _record(exchange: Exchange, events: Sequence[tuple[Event, dict[str, Any]]], error: str | None) -> Record:
    texts = [(event.at, text) for event, chunk in events if (text := _text(chunk))]
    usage: Mapping[str, Any] = next((chunk["usage"] for _, chunk in reversed(events) if chunk.get("usage")), {})
    return Record(
        sent=exchange.sent,
        ended=exchange.ended,
        arrivals=tuple(at for at, _ in texts),
        tokens=usage.get("completion_tokens", len(texts)),
        text="".join(text for _, text in texts),
        prompt_tokens=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        connected=exchange.connected,
        error=error,
    )


def _text(chunk: Mapping[str, Any]) -> str:
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta", {})
        return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    return ""
