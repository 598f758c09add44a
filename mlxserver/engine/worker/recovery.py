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
from mlxserver.engine.worker.tracker import Job, Jobs, Outbox

MOST_IN_A_ROW = 3  # steps that may fail without one between them that brought a token


class Recovery:
    """What becomes of the requests of one engine. `free` gives the memory of what was dropped back, `tell` takes what
    those are to be told whom a failure concerns.
    """

    def __init__(
        self, jobs: Jobs, free: Callable[[], None], tell: Callable[[Outbox], None], metrics: ModelMetrics
    ) -> None:
        self._jobs = jobs
        self._free = free
        self._tell = tell
        self._metrics = metrics
        self._in_a_row = 0

    @property
    def is_in_vain(self) -> bool:
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
        at_work = self._jobs.beyond(waiting)
        if is_out_of_memory(cause):
            self._metrics.faults["out_of_memory"] += 1
            error: EngineError = OutOfMemory(self._metrics.key)
            ending = _sacrificed(at_work or self._jobs.beyond(()))
        else:
            self._metrics.faults["step"] += 1
            self._in_a_row += 1
            error = StepFailed(self._metrics.key, f"{type(cause).__name__}: {cause}")
            ending = at_work
        gone = {row_id for job in ending for row_id in job.open_rows}
        untold = batch.restart(self._jobs.row_ids - gone)
        self._end(ending, error)
        told, finished = self._jobs.publish(untold)
        self._tell(told)
        batch.remove(finished)
        self._free()
        self._end(self._jobs.beyond(batch.waiting()), error)

    def _end(self, jobs: list[Job], error: EngineError) -> None:
        for job in jobs:
            self._jobs.forget(job.generation)
        self._tell([(job.generation, [], True, error) for job in jobs])


def _sacrificed(jobs: list[Job]) -> list[Job]:
    """The youngest, if it was spared before; else nobody, and it is spared."""
    if not jobs:
        return []
    youngest = max(jobs, key=lambda job: job.submitted)
    was_spared, youngest.is_spared = youngest.is_spared, True
    return [youngest] if was_spared else []
