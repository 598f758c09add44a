"""Request queue of one model: its leases, and since when it has had none.

Invariants
1. A lease waits until the model is loaded; then it is admitted to the engine. Both count as requests.
2. A lease is removed when the engine is done with the request, not when the client has read the answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

_PACE_WEIGHT = 0.2  # of a new measurement in the running average of the time between two answers


@dataclass(eq=False, slots=True)
class Lease:
    """A request's claim on its model. Times by time.monotonic().

    idle_timeout: seconds that the model stays loaded after this request; None: as its settings have it.
    """

    idle_timeout: float | None = None
    arrived: float = field(default_factory=time.monotonic)


class RequestQueue:
    """Leases of one model. Times by time.monotonic(). pace: running average of the seconds between two answers."""

    def __init__(self) -> None:
        self.last_used = time.monotonic()
        self.pace = 0.0
        self._idle_timeout: float | None = None  # of the lease admitted last
        self._waiting: dict[Lease, None] = {}
        self._admitted: dict[Lease, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._admitted)

    @property
    def num_admitted(self) -> int:
        """Number of requests that the engine has."""
        return len(self._admitted)

    @property
    def waiting_since(self) -> float | None:
        """Arrival of the oldest request that waits for the model; None without one."""
        return next(iter(self._waiting)).arrived if self._waiting else None

    def add(self, lease: Lease) -> None:
        """Let a request wait for the model to be loaded."""
        self._waiting[lease] = None

    def admit(self, lease: Lease) -> None:
        """Admit a request to the engine."""
        self._waiting.pop(lease, None)
        self._admitted[lease] = None
        self._idle_timeout = lease.idle_timeout
        self._idle.clear()

    def admit_waiting(self) -> None:
        """Admit what waited for the model, which has been loaded. Its idle timeout is as its settings have it again."""
        self.note_use()
        self._idle_timeout = None
        for lease in list(self._waiting):
            self.admit(lease)

    def remove(self, lease: Lease) -> bool:
        """End a lease. Whether the engine has become idle by that; a lease that is not in here changes nothing."""
        self._waiting.pop(lease, None)
        if lease not in self._admitted:
            return False
        del self._admitted[lease]
        self.note_use()
        if not self._admitted:
            self._idle.set()
        return not self._admitted

    def note_use(self) -> None:
        """Count the model as used up to now."""
        self.last_used = time.monotonic()

    def idle_left(self, usual: float) -> float:
        """Seconds until the model has been idle for the timeout of the last lease, or for the usual one; inf while the
        engine has a request.
        """
        if self._admitted:
            return math.inf
        timeout = usual if self._idle_timeout is None else self._idle_timeout
        return max(0.0, self.last_used + timeout - time.monotonic())

    def note_answer(self, lease: Lease) -> None:
        """Measure the pace by a request that was answered completely. Call it before remove()."""
        seconds = time.monotonic() - max(self.last_used, lease.arrived)
        self.pace += _PACE_WEIGHT * (seconds - self.pace)

    async def drained(self, deadline: asyncio.Event) -> int:
        """Wait until the engine has no request left, or for the deadline. Number of requests that it still has then."""
        waiting = {asyncio.create_task(event.wait()) for event in (self._idle, deadline)}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return self.num_admitted
