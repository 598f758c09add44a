"""When a model that failed may be tried again."""

from __future__ import annotations

import time

LONGEST = 60.0  # seconds


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
            self._until = time.monotonic() + min(LONGEST, 2.0 ** min(self._failures - 2, 10))

    def forget(self) -> None:
        """It works, or somebody sees to it."""
        self._failures, self._until = 0, 0.0
