"""What an answer waits for, how long it has taken, and how many tokens have come: the text of a status line. Pure."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from mlxserver.client.events import Event, Finished
from mlxserver.client.models import Wait
from mlxserver.client.views import format_progress

TICK = 0.5  # seconds between two drawings of the line


class Waiting:
    """State of one answer since its request was sent. now: the clock, in seconds."""

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self._now = now
        self._start = now()
        self._step: Wait | None = None
        self._tokens = 0

    def take_progress(self, step: Wait) -> None:
        """Note the progress of what the answer waits for."""
        self._step = step

    def take(self, event: Event) -> None:
        """Count an event: a delta is a token, or several that make no text alone."""
        self._tokens += not isinstance(event, Finished)

    def __str__(self) -> str:
        seconds = f"{int(self._now() - self._start)} s"
        if self._tokens:
            return f"about {self._tokens} token{'' if self._tokens == 1 else 's'} · {seconds}"
        return f"{format_progress(self._step) if self._step else 'Waiting for the answer'} · {seconds}"
