"""The end of a model's time without requests."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Expiry:
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
