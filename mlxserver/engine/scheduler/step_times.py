"""Times of the steps of one decode batch: plain ones, verifying ones, and what a break of the pipeline costs.

A plain step is launched before the tokens of the one before it are read, so that the device always has work. A
verifying step needs these tokens first: the device waits until it is launched, and again for the plain step behind it.
So plain steps take longer until the pipeline is full again. What they take longer is the cost of the break, and no part
of the verifying steps in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from mlxserver.engine.scheduler.speculation_controller import SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan

_FULL = 2  # plain steps in a row, of which the second is launched before the tokens of the first are read


class StepTimes:
    """Measures steps, from the return of the tokens of one to that of the next, and notes them in the controller."""

    def __init__(self, controller: SpeculationController) -> None:
        self._controller = controller
        self.pause()

    def pause(self) -> None:
        """Something else is computed before the next step, whose duration is no sample then."""
        self._returned: float | None = None  # when the last step's tokens were returned, by perf_counter()
        self._num_plain = 0  # in a row
        self._num_breaks: int | None = None  # since the pipeline was full; None: it is, or it is not known when it was
        self._plain_seconds = 0.0  # of plain steps since then

    @property
    def is_read(self) -> bool:
        """Whether the tokens of the last step have been read: it was a verifying one."""
        return self._returned is not None and not self._num_plain

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The block waits for the tokens of the step before: time of that step, not of the next one."""
        started = perf_counter()
        yield
        waited = perf_counter() - started
        if self._returned is not None:
            self._returned += waited
        if self._num_plain >= _FULL:
            self._num_breaks, self._plain_seconds = 0, 0.0
        if self._num_breaks is not None:
            self._num_breaks += bool(self._num_plain)
            self._plain_seconds += waited
        self._num_plain = 0

    def note_plain(self, sequences: int) -> None:
        """Measure a plain step of so many sequences."""
        seconds = self._lap()
        self._num_plain += 1
        if seconds is None:
            return
        self._plain_seconds += seconds
        if self._num_plain < _FULL:
            return
        if self._num_breaks is None:
            self._controller.costs(sequences).note_plain(seconds)
        else:
            self._controller.costs(sequences).note_breaks(self._num_breaks, self._plain_seconds)
            self._num_breaks = None

    def note_verifying(self, sequences: int, plan: Plan) -> None:
        """Measure a verifying step of so many sequences, its drafts included."""
        self._controller.note_verified(sequences, plan, self._lap())
        self._num_plain = 0

    def _lap(self) -> float | None:
        """Seconds since the last step; None if they are not known."""
        before, self._returned = self._returned, perf_counter()
        return None if before is None else self._returned - before
