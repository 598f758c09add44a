"""Those who wait for an engine's thread. Used on the event loop.

Rule: who was taken in is told how it ended, by the thread or, once that has ended or is stuck, by fail_all(). It does
      not matter what the thread was at, nor whether it ever began with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlxserver.engine.errors import EngineError, EngineStopped
from mlxserver.engine.events import Event
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.tracker import Delivery


class Subscribers:
    """The generations that one engine has not done with."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._generations: set[Generation] = set()
        self._is_over = False

    def refuse_if_over(self) -> None:
        """Raise EngineStopped once everybody has been told of the end: nobody else would be."""
        if self._is_over:
            raise EngineStopped(self._key, "it has ended")

    def add(self, generation: Generation) -> None:
        """Take in a request. Raises EngineStopped."""
        self.refuse_if_over()
        self._generations.add(generation)

    def deliver(
        self,
        generation: Generation,
        events: Iterable[Event] = (),
        is_done: bool = False,
        error: EngineError | None = None,
    ) -> None:
        """Give a generation what the thread says to it."""
        generation.deliver(events, is_done, error)
        if generation.is_done:
            self._generations.discard(generation)

    def deliver_all(self, outputs: Iterable[Delivery]) -> None:
        """Give each what the thread says to it."""
        for delivery in outputs:
            self.deliver(*delivery)

    def fail_all(self, error: EngineError) -> None:
        """Tell everybody that nothing more will come."""
        self._is_over = True
        for generation in list(self._generations):
            self.deliver(generation, error=error)
