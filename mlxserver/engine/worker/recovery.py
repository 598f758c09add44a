"""Recovery of an engine from a step that failed. Runs on the engine thread.

Rule 1: the running requests end with the error; the waiting ones go on with a fresh batch.
Rule 2: where memory ran out, no request ends at first: all KV cache is dropped, and every request resumes where it was.
        Only a request that was the youngest at work for the second time ends.
Rule 3: requests whose sequences the batch has lost end with the error, too: none is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable

from mlxserver.engine.errors import EngineError, OutOfMemory, StepFailed
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.worker.batch import Batch
from mlxserver.engine.worker.faults import is_out_of_memory
from mlxserver.engine.worker.tracker import StepOutputs, TrackedRequest, Tracker

MOST_IN_A_ROW = 3  # steps that may fail without one in between that brought a token


class Recovery:
    """Decides which requests of one engine end after a fault. `free` returns dropped memory to the system, `deliver`
    hands outputs to the event loop.
    """

    def __init__(
        self, tracker: Tracker, free: Callable[[], None], deliver: Callable[[StepOutputs], None], metrics: ModelMetrics
    ) -> None:
        self._tracker = tracker
        self._free = free
        self._deliver = deliver
        self._metrics = metrics
        self._in_a_row = 0

    @property
    def has_given_up(self) -> bool:
        """Whether so many steps failed in a row that a fresh batch is of no use."""
        return self._in_a_row >= MOST_IN_A_ROW

    def note_progress(self) -> None:
        """Reset the count of failed steps: one has brought tokens."""
        self._in_a_row = 0

    def after(self, cause: Exception, batch: Batch) -> None:
        """Restart the batch after a call of it that failed, and end the requests that can't go on.

        If that fails as well, the thread ends, and with it all requests.
        """
        at_work = self._tracker.not_among(batch.waiting())
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
        outputs, finished = self._tracker.publish(unpublished)
        self._deliver(outputs)
        batch.remove(finished)
        self._free()
        self._end(self._tracker.not_among(batch.waiting()), error)

    def _end(self, requests: list[TrackedRequest], error: EngineError) -> None:
        for request in requests:
            self._tracker.forget(request.generation)
        self._deliver([(request.generation, [], True, error) for request in requests])


def _sacrificed(requests: list[TrackedRequest]) -> list[TrackedRequest]:
    """The youngest, if it was spared before; else none, and it is spared."""
    if not requests:
        return []
    youngest = max(requests, key=lambda request: request.submitted)
    was_spared, youngest.is_spared = youngest.is_spared, True
    return [youngest] if was_spared else []
