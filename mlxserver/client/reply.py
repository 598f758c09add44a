"""Replies of models as far as they have come: to one request, or to the same one sent to several models.

Rule 1: a reply can be read at any moment; it only grows. One that was stopped or failed keeps what came.
Rule 2: of several models, one that fails keeps its error; the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from mlxserver.client.api import ChatClient, Message
from mlxserver.client.errors import ClientError
from mlxserver.client.events import Content, Event, Finished, Reasoning, Usage
from mlxserver.client.models import Wait
from mlxserver.client.stats import Timing, milliseconds, timing


@dataclass
class Reply:
    """Reply of one model. start: when the request was sent, in seconds of time.perf_counter().

    progress: of what the reply waits for, None without any.
    """

    model: str
    start: float = 0.0
    events: list[Event] = field(default_factory=list)
    reasoning: str = ""
    content: str = ""
    error: ClientError | None = None
    progress: Wait | None = None

    def add(self, event: Event) -> None:
        """Append one event."""
        self.events.append(event)
        if isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, Content):
            self.content += event.text

    @property
    def finished(self) -> Finished | None:
        """The last event of a whole reply; None before it, and for one that failed or was stopped."""
        return self.events[-1] if self.events and isinstance(self.events[-1], Finished) else None

    @property
    def timing(self) -> Timing | None:
        """The timing of a whole reply."""
        return timing(self.start, self.events) if self.finished else None

    @property
    def outcome(self) -> str:
        """The finish reason; else "failed" or "stopped"."""
        if self.finished:
            return self.finished.reason
        return "failed" if self.error else "stopped"

    def to_object(self) -> dict[str, Any]:
        """The reply for JSON: times in milliseconds."""
        reply: dict[str, Any] = {
            "model": self.model,
            "content": self.content,
            "reasoning_content": self.reasoning or None,
            "finish_reason": self.finished.reason if self.finished else None,
            "error": str(self.error) if self.error else None,
        }
        if timing := self.timing:
            reply |= {
                "ttft_ms": milliseconds(timing.ttft),
                "latency_ms": milliseconds(timing.latency),
                "tokens_per_second": timing.tokens_per_second,
                "usage": _usage_object(timing.usage),
            }
        return reply


async def ask(
    client: ChatClient,
    reply: Reply,
    messages: Sequence[Message],
    *,
    stream: bool = True,
    on_event: Callable[[Event], None] = lambda _: None,
    on_progress: Callable[[Wait], None] = lambda _: None,
    **params: Any,
) -> None:
    """Send a request and fill its reply. Without `stream` all events come at the end. Raises as ChatClient does.

    on_event, on_progress: called with each event of the reply, and with the progress of what it waits for.
    """

    def take_progress(step: Wait) -> None:
        reply.progress = step
        on_progress(step)

    async def whole() -> AsyncGenerator[Event, None]:
        for event in (await client.complete(messages, reply.model, **params)).events:
            yield event

    reply.start = perf_counter()
    answer = client.stream(messages, reply.model, on_progress=take_progress, **params) if stream else whole()
    try:
        async with aclosing(answer) as events:
            async for event in events:
                reply.add(event)
                on_event(event)
    except ClientError as error:
        reply.error = error
        raise


async def compare(
    client: ChatClient, replies: Sequence[Reply], messages: Sequence[Message], *, sequential: bool, **params: Any
) -> None:
    """Send the same messages to the model of each reply, all at once or one after the other. See rule 2."""

    async def fill(reply: Reply) -> None:
        with suppress(ClientError):
            await ask(client, reply, messages, **params)

    if not sequential:
        await asyncio.gather(*map(fill, replies))
        return
    for reply in replies:
        await fill(reply)


def _usage_object(usage: Usage | None) -> Mapping[str, int] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cached_tokens": usage.cached_tokens,
    }
