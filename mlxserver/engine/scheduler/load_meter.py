"""Load meter of one scheduler: step times, and requests that hold a slot, for other threads to read."""

from __future__ import annotations

import time
from collections import abc, deque
from collections.abc import Collection
from statistics import median

from mlxserver.engine.metrics import EngineLoad
from mlxserver.engine.sequence import Sequence

_STEPS_MEASURED = 15  # whose median is a step's time: some of them wait for a compilation


class LoadMeter:
    """Writes `load`. assumed: seconds per decode step until one is measured."""

    def __init__(self, assumed: float) -> None:
        self.load = EngineLoad()
        self._requests: dict[int, int] = {}  # sequence id -> id of its request's first sequence
        self._steps = deque([assumed], maxlen=_STEPS_MEASURED)
        self._median = assumed
        self._began: float | None = None  # the step under way, by time.monotonic()
        self._ended = 0.0  # the step before it

    def insert(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add the sequences of one request."""
        self._requests |= {sequence.id: sequences[0].id for sequence in sequences}
        self.load.is_busy = True

    def remove(self, sequence_ids: Collection[int]) -> None:
        """Remove sequences; unknown ids are ignored. update() afterwards."""
        for sequence_id in sequence_ids:
            self._requests.pop(sequence_id, None)

    def update(self, decoding: abc.Sequence[int], prefilling: abc.Sequence[int], *, is_busy: bool) -> None:
        """Write the load, from the ids of the sequences with a slot; when the batch changes, not at every step."""
        self.load.is_busy = is_busy
        self.load.num_running = len({self._requests[sequence_id] for sequence_id in (*decoding, *prefilling)})
        self.load.step_seconds = self._median if decoding else 0.0
        if not decoding:
            self._began = None  # the step under way, if any, has lost its sequences

    def begin_step(self, launched: float) -> None:
        """A step was launched then; the device begins with it when the step before has ended."""
        self._began = max(launched, self._ended)

    def delay_step(self) -> None:
        """The device begins only now with the step under way, if there is one."""
        if self._began is not None:
            self._began = time.monotonic()

    def end_step(self) -> None:
        """The tokens of the step under way are there, now or since an earlier call."""
        if self._began is not None:
            self._ended = time.monotonic()
            self._steps.append(self._ended - self._began)
            self.load.step_seconds = self._median = median(self._steps)
            self._began = None
