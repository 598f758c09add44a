"""Timers of one model: when it may be loaded again after failures, and when it has been idle for too long."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

LONGEST_BACKOFF = 60.0  # seconds


class Backoff:
    """After the first failure at once; after each further one in 1, 2, 4, ... seconds, until something succeeds."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0  # by time.monotonic()

    @property
    def remaining(self) -> float:
        """Seconds until then."""
        return max(0.0, self._until - time.monotonic())

    def note_failure(self) -> None:
        """It has failed once more."""
        self._failures += 1
        if self._failures > 1:
            self._until = time.monotonic() + min(LONGEST_BACKOFF, 2.0 ** min(self._failures - 2, 10))

    def forget(self) -> None:
        """It works, or somebody sees to it."""
        self._failures, self._until = 0, 0.0


class IdleTimer:
    """Calls `act` on the event loop when its time has come. It never does until it is set."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._timer: asyncio.TimerHandle | None = None
        self._moment = math.inf  # by time.monotonic()

    @property
    def remaining(self) -> float | None:
        """Seconds until then; None: never."""
        return None if self._moment == math.inf else max(0.0, self._moment - time.monotonic())

    def set(self, seconds: float) -> None:
        """Let it be in so many seconds, instead of whenever it was to be; inf: never."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._moment = time.monotonic() + seconds
        if seconds < math.inf:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._act)

    def cancel(self) -> None:
        """Let it never be."""
        self.set(math.inf)
