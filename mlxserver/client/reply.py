"""One model's answer as far as it came, and asking for it.

Rule: a reply can be read at any moment; it only grows. One that was stopped or failed keeps what came.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from mlxserver.client.api import ChatClient, Message
from mlxserver.client.errors import ClientError
from mlxserver.client.events import Content, Event, Finished, Reasoning
from mlxserver.client.progress import Progress
from mlxserver.client.stats import Timing, timing
from mlxserver.client.status import figures


@dataclass
class Reply:
    """What came of one answer. start: when it was asked for, in seconds of perf_counter.

    progress: how far the load of its model was, if it had to wait for one.
    """

    model: str
    start: float = 0.0
    events: list[Event] = field(default_factory=list)
    reasoning: str = ""
    content: str = ""
    error: ClientError | None = None
    progress: Progress | None = None

    def add(self, event: Event) -> None:
        """Take one event in."""
        self.events.append(event)
        if isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, Content):
            self.content += event.text

    @property
    def finished(self) -> Finished | None:
        """The answer's end; None before it, and for one that failed or was stopped."""
        return self.events[-1] if self.events and isinstance(self.events[-1], Finished) else None

    @property
    def timing(self) -> Timing | None:
        """The figures of a whole answer."""
        return timing(self.start, self.events) if self.finished else None

    @property
    def outcome(self) -> str:
        """The finish reason, or what there is in its place."""
        if self.finished:
            return self.finished.reason
        return "failed" if self.error else "stopped"

    def to_object(self) -> dict[str, Any]:
        """The reply for JSON."""
        answer = {
            "model": self.model,
            "content": self.content,
            "reasoning_content": self.reasoning or None,
            "finish_reason": self.finished.reason if self.finished else None,
            "error": str(self.error) if self.error else None,
        }
        return {**answer, **figures(self.timing)} if self.timing else answer


async def ask(
    client: ChatClient,
    reply: Reply,
    messages: Sequence[Message],
    *,
    stream: bool = True,
    on_event: Callable[[Event], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **params: Any,
) -> None:
    """Fill a reply, and tell each event. Without `stream` all of them come at the end. Raises as ChatClient does."""

    def take_progress(step: Progress) -> None:
        reply.progress = step
        on_progress(step)

    reply.start = perf_counter()
    try:
        if not stream:
            answer = await client.complete(messages, reply.model, **params)
            for event in answer.events:
                reply.add(event)
                on_event(event)
            return
        async with aclosing(client.stream(messages, reply.model, on_progress=take_progress, **params)) as events:
            async for event in events:
                reply.add(event)
                on_event(event)
    except ClientError as error:
        reply.error = error
        raise
