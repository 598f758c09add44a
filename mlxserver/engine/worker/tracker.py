"""Open generations on the engine thread: which sequences belong to which, and what their tokens mean.

Rule 1: the tokens of one step become one list of outputs; a generation is done when its last choice is.
Rule 2: a fault in the output or the constraint of one generation ends that generation alone.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Event, Finish, Timings, Usage
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.faults import GuardedConstraint, GuardedImages, request_failure
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.runner import Output

# Generation, its events, whether these are the last, and the error that it ended with, if any.
Delivery = tuple[Generation, list[Event], bool, EngineError | None]
StepOutputs = list[Delivery]


@dataclass(slots=True)
class TrackedRequest:
    """One generation on the engine thread. Times by time.monotonic().

    is_spared: memory ran out while it was the youngest at work.
    """

    generation: Generation
    prompt_tokens: int
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    cached_tokens: int = 0
    outputs: list[Output] = field(default_factory=list)
    open_sequences: set[int] = field(default_factory=set)
    is_spared: bool = False

    def usage(self) -> Usage:
        """Token counts and times at the end."""
        return Usage(
            self.prompt_tokens,
            sum(output.completion_tokens for output in self.outputs),
            sum(output.reasoning_tokens for output in self.outputs),
            self.cached_tokens,
            Timings(
                queue=self.started - self.submitted,
                prompt=self.first_token - self.started,
                generation=time.monotonic() - self.first_token,
            ),
        )

    def note(self, token: SampledToken, now: float) -> float:
        """Record a token's time, and with the first one that of the slot. Returns the seconds since the last token."""
        if not self.first_token:
            self.first_token = self.last_token = now
            self.started, self.cached_tokens = token.started or self.submitted, token.cached_tokens
        waited, self.last_token = now - self.last_token, now
        return waited


class Tracker:
    """Open generations of one engine, by sequence."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._sequences: dict[int, tuple[TrackedRequest, Output]] = {}
        self._faults: list[tuple[int, BaseException]] = []  # of the sequences' constraints and images

    @property
    def sequence_ids(self) -> set[int]:
        """Ids of all open sequences."""
        return set(self._sequences)

    def add(self, tracked: TrackedRequest, choices: abc.Sequence[tuple[Sequence, Output]]) -> list[Sequence]:
        """Add a generation with the sequences of its choices. Returns the sequences to insert into the batch."""
        for sequence, output in choices:
            tracked.outputs.append(output)
            tracked.open_sequences.add(sequence.id)
            self._sequences[sequence.id] = (tracked, output)
        return [self._attached(sequence, tracked.generation) for sequence, _ in choices]

    def forget(self, generation: Generation) -> list[int]:
        """Remove a generation; returns the ids of its open sequences."""
        sequence_ids = [id for id, (tracked, _) in self._sequences.items() if tracked.generation is generation]
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
        return sequence_ids

    def not_among(self, sequence_ids: Collection[int]) -> list[TrackedRequest]:
        """The requests that have an open sequence which is not one of these."""
        found = (tracked for id, (tracked, _) in self._sequences.items() if id not in sequence_ids)
        return list({id(tracked): tracked for tracked in found}.values())

    def publish(self, tokens: Iterable[SampledToken]) -> tuple[StepOutputs, list[int]]:
        """Events of one step's tokens for the event loop, and the ids of the sequences that have ended."""
        step = _Step()
        now = time.monotonic()
        for token in tokens:
            if found := self._sequences.get(token.sequence_id):
                self._read(token, *found, now, step)
        for sequence_id, error in self._faults:
            if found := self._sequences.get(sequence_id):
                self._fail(found[0], error, step)
        self._faults.clear()
        return step.outputs, step.finished

    def _read(self, token: SampledToken, tracked: TrackedRequest, output: Output, now: float, step: _Step) -> None:
        """Add the events of a token."""
        self._metrics.generated_tokens += 1
        if (waited := tracked.note(token, now)) and output.completion_tokens:
            self._metrics.inter_token.observe(waited)
        try:
            events = list(output.feed(token))
        except BaseException as error:
            self._fail(tracked, error, step)
            return
        is_done = False
        if events and isinstance(events[-1], Finish):
            step.finished.append(token.sequence_id)
            self._sequences.pop(token.sequence_id, None)
            tracked.open_sequences.discard(token.sequence_id)
            is_done = not tracked.open_sequences
            if is_done:
                events.append(tracked.usage())
        if events:
            step.outputs.append((tracked.generation, events, is_done, None))

    def _fail(self, tracked: TrackedRequest, error: BaseException, step: _Step) -> None:
        """End a generation that failed."""
        self._metrics.faults["request"] += 1
        step.finished += self.forget(tracked.generation)
        step.outputs.append((tracked.generation, [], True, request_failure(self._metrics.key, error)))

    def _attached(self, sequence: Sequence, generation: Generation) -> Sequence:
        """The sequence as the batch gets it: it reports its progress, and a fault of its constraint or its images."""
        constraint = sequence.constraint and GuardedConstraint(sequence.id, sequence.constraint, self._faults)
        images = sequence.images and GuardedImages(sequence.id, sequence.images, self._faults)
        return replace(sequence, constraint=constraint, images=images, progress=generation.prompt)


@dataclass(slots=True)
class _Step:
    """Outputs of one step, and the ids of the sequences that ended in it."""

    outputs: StepOutputs = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
