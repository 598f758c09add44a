"""Timers of one model: the backoff after failures, and the idle timer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0  # seconds


class Backoff:
    """Delay before a failed model is loaded for a request: none after the first failure, then 1, 2, 4, ... seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0  # by time.monotonic()

    @property
    def remaining(self) -> float:
        """Seconds until the next attempt."""
        return max(0.0, self._until - time.monotonic())

    def note_failure(self) -> None:
        """Count a failure in a row."""
        self._failures += 1
        if self._failures > 1:
            seconds = FIRST_BACKOFF * 2 ** min(self._failures - 2, 10)
            self._until = time.monotonic() + min(LONGEST_BACKOFF, seconds)

    def reset(self) -> None:
        """Start over: the model works, or it was unloaded on demand."""
        self._failures, self._until = 0, 0.0


class IdleTimer:
    """Calls `act` on the event loop when the time is over. Not armed until start()."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._timer: asyncio.TimerHandle | None = None
        self._end = math.inf  # by time.monotonic()

    @property
    def remaining(self) -> float | None:
        """Seconds left; None while the timer is not armed."""
        return None if self._end == math.inf else max(0.0, self._end - time.monotonic())

    def start(self, seconds: float) -> None:
        """(Re)arm the timer; inf disarms it."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._end = time.monotonic() + seconds
        if seconds < math.inf:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._act)
