"""How an engine goes on after a step that failed. Runs on the engine thread.

Rule 1: the requests at work end with the error; those that wait for a place go on with a fresh batch.
Rule 2: where memory ran out, nobody ends at first: all that was computed is dropped, and everybody goes on from where
        they were. Only a request that was the youngest at work for the second time ends.
Rule 3: everybody whom the batch has lost is told, too: no request is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.errors import EngineError, OutOfMemory, StepFailed
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.worker.batch import Batch
from mlxserver.engine.worker.faults import is_out_of_memory
from mlxserver.engine.worker.tracker import StepOutputs, TrackedRequest, Tracker

MOST_IN_A_ROW = 3  # steps that may fail without one between them that brought a token


class Recovery:
    """What becomes of the requests of one engine. `free` gives the memory of what was dropped back, `tell` takes what
    those are to be told whom a failure concerns.
    """

    def __init__(
        self, tracked: Tracker, free: Callable[[], None], tell: Callable[[StepOutputs], None], metrics: ModelMetrics
    ) -> None:
        self._tracker = tracked
        self._free = free
        self._tell = tell
        self._metrics = metrics
        self._in_a_row = 0

    @property
    def has_given_up(self) -> bool:
        """Whether so many steps failed in a row that a fresh batch is of no use."""
        return self._in_a_row >= MOST_IN_A_ROW

    def note_progress(self) -> None:
        """A step has brought tokens."""
        self._in_a_row = 0

    def after(self, cause: Exception, batch: Batch) -> None:
        """Make the batch fresh after a call of it that failed, and tell those who waited for it.

        If that fails, too, the thread ends, and tells everybody else.
        """
        waiting = batch.waiting()
        at_work = self._tracker.not_among(waiting)
        if is_out_of_memory(cause):
            self._metrics.faults["out_of_memory"] += 1
            error: EngineError = OutOfMemory(self._metrics.key)
            ending = _sacrificed(at_work or self._tracker.not_among(()))
        else:
            self._metrics.faults["step"] += 1
            self._in_a_row += 1
            error = StepFailed(self._metrics.key, f"{type(cause).__name__}: {cause}")
            ending = at_work
        gone = {sequence_id for tracked in ending for sequence_id in tracked.open_sequences}
        unpublished = batch.restart(self._tracker.sequence_ids - gone)
        self._end(ending, error)
        told, finished = self._tracker.publish(unpublished)
        self._tell(told)
        batch.remove(finished)
        self._free()
        self._end(self._tracker.not_among(batch.waiting()), error)

    def _end(self, requests: list[TrackedRequest], error: EngineError) -> None:
        for request in requests:
            self._tracker.forget(request.generation)
        self._tell([(request.generation, [], True, error) for request in requests])


def _sacrificed(tracked: list[TrackedRequest]) -> list[TrackedRequest]:
    """The youngest, if it was spared before; else nobody, and it is spared."""
    if not tracked:
        return []
    youngest = max(tracked, key=lambda tracked: tracked.submitted)
    was_spared, youngest.is_spared = youngest.is_spared, True
    return [youngest] if was_spared else []
