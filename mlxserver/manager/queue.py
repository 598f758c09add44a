"""The requests that one model holds, and since when it has had none.

Rule 1: a request is held while it waits for the model to be loaded; then it is served, by the engine. Both count.
Rule 2: it leaves when the engine is done with it, not when the client has read.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

_PACE_WEIGHT = 0.2  # of a new measurement in the running average of the time between two answers


@dataclass(eq=False, slots=True)
class Lease:
    """A request's place in the count. Its keep_alive becomes the model's, in seconds; None: the usual."""

    keep_alive: float | None = None
    arrived: float = field(default_factory=time.monotonic)


class RequestQueue:
    """Those of one model. Times by time.monotonic(); `pace` is in seconds from one answer to the next."""

    def __init__(self) -> None:
        self.last_used = time.monotonic()
        self.keep_alive: float | None = None  # of the request that was served last
        self.pace = 0.0
        self._held: dict[Lease, None] = {}
        self._served: dict[Lease, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._held) + len(self._served)

    @property
    def served(self) -> int:
        """How many are the engine's."""
        return len(self._served)

    @property
    def waiting_since(self) -> float | None:
        """When the oldest of those that wait for the model came; None without one."""
        return next(iter(self._held)).arrived if self._held else None

    def is_held(self, lease: Lease) -> bool:
        """Whether it waits for the model to be loaded."""
        return lease in self._held

    def hold(self, lease: Lease) -> None:
        """It has come, and waits for the model to be loaded."""
        self._held[lease] = None

    def serve(self, lease: Lease) -> None:
        """It is the engine's from now on."""
        self._held.pop(lease, None)
        self._served[lease] = None
        self.keep_alive = lease.keep_alive
        self._idle.clear()

    def serve_held(self) -> None:
        """The model is there: all_instances who waited for it is its guest now."""
        for lease in list(self._held):
            self.serve(lease)

    def leave(self, lease: Lease) -> bool:
        """It is over. Whether the engine has nothing left to do because of that; leaving twice changes nothing."""
        self._held.pop(lease, None)
        if lease not in self._served:
            return False
        del self._served[lease]
        self.last_used = time.monotonic()
        if not self._served:
            self._idle.set()
        return not self._served

    def note_answer(self, lease: Lease) -> None:
        """The engine has answered it; that tells how fast answers come."""
        since = time.monotonic() - max(self.last_used, lease.arrived)
        self.pace += _PACE_WEIGHT * (since - self.pace)

    async def ended(self, cut: asyncio.Event) -> int:
        """Wait until the engine has none left, or until `cut`. How many it still has then."""
        waiting = {asyncio.create_task(event.wait()) for event in (self._idle, cut)}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return self.served
