"""Messages from the event loop to an engine thread.

Rule: an idle thread waits here and nowhere else, so that the mailbox knows since when the thread has been busy.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlxserver.engine.worker.generation import Generation


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate an answer."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a generation."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Barrier:
    """Call `passed` when all that came before is done: what ended before has left the batch."""

    passed: Callable[[], None]


class Stop:
    """End the thread."""


Message = Submit | Cancel | Barrier | Stop


class Mailbox:
    """Messages to one thread, in order. put() may be called from any other thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._taken: float | None = None

    @property
    def stalled_for(self) -> float:
        """Seconds since the thread last took messages; 0 while it waits for one, and before the first take()."""
        taken = self._taken
        return 0.0 if taken is None else time.monotonic() - taken

    def put(self, message: Message) -> None:
        """Add a message."""
        self._queue.put(message)

    def take(self, wait: bool, seconds: float | None = None) -> Iterator[Message]:
        """All messages that are there; with `wait`, waits for the first one, for so many seconds at most."""
        self._taken = None if wait else time.monotonic()
        try:
            message = self._queue.get(block=wait, timeout=seconds)
            self._taken = time.monotonic()
            yield message
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            self._taken = self._taken or time.monotonic()
