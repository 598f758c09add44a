"""Generations that wait for an engine thread. Used on the event loop.

Rule: every generation that was added is notified of its end, by the thread or, once that has ended or is stalled, by
      fail_all(); whatever the thread was doing, and whether or not it had begun with the generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Event, QueuePosition
from mlxserver.engine.worker.faults import without_frames
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.tracker import Delivery


class Subscribers:
    """The open generations of one engine."""

    def __init__(self) -> None:
        self._generations: dict[Generation, None] = {}  # in the order of their arrival
        self._end: EngineError | None = None

    def refuse_if_over(self) -> None:
        """Raise the error of fail_all() once that was called: a later generation would never be notified."""
        if self._end:
            raise without_frames(self._end)

    def add(self, generation: Generation) -> None:
        """Add a generation. Raises the error of fail_all()."""
        self.refuse_if_over()
        self._generations[generation] = None

    def position(self, generation: Generation) -> int:
        """Place of a generation among those that wait for a slot, from 1."""
        earlier = takewhile(lambda each: each is not generation, self._generations)
        return 1 + sum(isinstance(each.prompt.state, QueuePosition) for each in earlier)

    def deliver(
        self,
        generation: Generation,
        events: Sequence[Event] = (),
        is_done: bool = False,
        error: EngineError | None = None,
    ) -> None:
        """Deliver events, an error, or the end to a generation."""
        generation.deliver(events, is_done, error)
        if generation.is_done:
            self._generations.pop(generation, None)

    def deliver_all(self, outputs: Iterable[Delivery]) -> None:
        """Deliver the outputs of a step."""
        for delivery in outputs:
            self.deliver(*delivery)

    def fail_all(self, error: EngineError) -> None:
        """End all open generations with an error, and refuse new ones."""
        self._end = error
        for generation in list(self._generations):
            self.deliver(generation, error=error)
