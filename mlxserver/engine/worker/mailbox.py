"""What the event loop asks of an engine thread.

Rule: the thread waits here, and nowhere else, while it has nothing to do. So this is where it shows since when it has
      been at something.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlxserver.engine.worker.generation import Generation


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate this."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this any more."""

    generation: Generation


class Stop:
    """The thread is to end now."""


Message = Submit | Cancel | Stop


class Mailbox:
    """Messages to one thread, in order. put() may be called from any other one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._taken: float | None = None

    @property
    def busy_for(self) -> float:
        """Seconds since the thread last looked in here; 0 while it waits here, and before its first look."""
        taken = self._taken
        return 0.0 if taken is None else time.monotonic() - taken

    def put(self, message: Message) -> None:
        """Add a message."""
        self._queue.put(message)

    def take(self, wait: bool) -> Iterator[Message]:
        """All messages that are there; waits for the first one, if told to."""
        self._taken = None if wait else time.monotonic()
        try:
            message = self._queue.get(block=wait)
            self._taken = time.monotonic()
            yield message
            while True:
                yield self._queue.get_nowait()
        except queue.Empty:
            return
