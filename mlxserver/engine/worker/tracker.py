"""The engine thread's side of the generations that run: which rows they have, and what those rows said.

Rule 1: one step's tokens become one outputs; a generation is done when its last choice is.
Rule 2: what goes wrong with one generation, in its output or its constraint, ends that one alone.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Event, Finish, Timings, Usage
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import GenerationRequest, ModelFacts, Question
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.batch import Batch
from mlxserver.engine.worker.faults import GuardedConstraint, request_failure
from mlxserver.engine.worker.generation import Generation

# To whom, what, whether that is the last of it, and the error that it ended with, if any.
Delivery = tuple[Generation, list[Event], bool, EngineError | None]
StepOutputs = list[Delivery]


class Output(Protocol):
    """What turns the tokens of one choice into events."""

    @property
    def completion_tokens(self) -> int:
        """Tokens fed."""

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that were reasoning."""

    def feed(self, token: SampledToken) -> Iterable[Event]:
        """The events that a token brings; its Finish is the last of all."""


class Runtime(Protocol):
    """A loaded model as the thread uses it (runners/builder.py)."""

    @property
    def batch(self) -> Batch:
        """Where its rows are decoded."""

    @property
    def facts(self) -> ModelFacts:
        """What is known of it."""

    @property
    def preprocess(self) -> Callable[[GenerationRequest], GenerationRequest]:
        """Does what of prepare() takes long, on any thread; holds nothing of the batch. Raises PromptRejected."""

    def prepare(self, request: GenerationRequest, sequence_ids: Iterator[int]) -> abc.Sequence[tuple[Sequence, Output]]:
        """A row and its output stream for each choice; all rows share one prompt. Raises PromptRejected."""

    @property
    def answer(self) -> Callable[[Question], Any]:
        """Says what the tokenizer says, on any thread; holds nothing of the batch. Raises PromptRejected."""


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
        """Note when a token came; the first tells how the prompt went. Gives the seconds since the step before."""
        if not self.first_token:
            self.first_token = self.last_token = now
            self.started, self.cached_tokens = token.started or self.submitted, token.cached_tokens
        waited, self.last_token = now - self.last_token, now
        return waited


class Tracker:
    """All generations of one engine, by row."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._rows: dict[int, tuple[TrackedRequest, Output]] = {}
        self._faults: list[tuple[int, BaseException]] = []  # of the rows' constraints

    @property
    def sequence_ids(self) -> set[int]:
        """The rows of all that is not done."""
        return set(self._rows)

    def add(self, tracked: TrackedRequest, choices: abc.Sequence[tuple[Sequence, Output]]) -> list[Sequence]:
        """Take a generation with the rows of its choices. Gives the rows as the batch is to have them."""
        for row, output in choices:
            tracked.outputs.append(output)
            tracked.open_sequences.add(row.id)
            self._rows[row.id] = (tracked, output)
        return [self._guarded(row) for row, _ in choices]

    def forget(self, generation: Generation) -> list[int]:
        """Drop a generation; the ids of the rows it still had."""
        sequence_ids = [
            sequence_id for sequence_id, (tracked, _) in self._rows.items() if tracked.generation is generation
        ]
        for sequence_id in sequence_ids:
            self._rows.pop(sequence_id, None)
        return sequence_ids

    def not_among(self, sequence_ids: Collection[int]) -> list[TrackedRequest]:
        """Those that have a row which is not one of these."""
        return _distinct(tracked for sequence_id, (tracked, _) in self._rows.items() if sequence_id not in sequence_ids)

    def publish(self, tokens: abc.Sequence[SampledToken]) -> tuple[StepOutputs, list[int]]:
        """What one step's tokens mean: events for the event loop, and the rows that have ended."""
        outputs: StepOutputs = []
        finished: list[int] = []
        now = time.monotonic()
        for token in tokens:
            if found := self._rows.get(token.sequence_id):
                self._read(token, *found, now, outputs, finished)
        for sequence_id, error in self._faults:
            if found := self._rows.get(sequence_id):
                self._fail(found[0], error, outputs, finished)
        self._faults.clear()
        return outputs, finished

    def _read(
        self,
        token: SampledToken,
        tracked: TrackedRequest,
        output: Output,
        now: float,
        outputs: StepOutputs,
        finished: list[int],
    ) -> None:
        """Add what a token means."""
        if waited := tracked.note(token, now):
            self._metrics.inter_token.observe(waited)
        try:
            events = list(output.feed(token))
        except BaseException as error:
            self._fail(tracked, error, outputs, finished)
            return
        is_done = False
        if events and isinstance(events[-1], Finish):
            finished.append(token.sequence_id)
            self._rows.pop(token.sequence_id, None)
            tracked.open_sequences.discard(token.sequence_id)
            is_done = not tracked.open_sequences
            if is_done:
                events.append(tracked.usage())
        if events:
            outputs.append((tracked.generation, events, is_done, None))

    def _fail(self, tracked: TrackedRequest, error: BaseException, outputs: StepOutputs, finished: list[int]) -> None:
        """End a generation because of its own fault."""
        self._metrics.faults["request"] += 1
        finished += self.forget(tracked.generation)
        outputs.append((tracked.generation, [], True, request_failure(self._metrics.key, error)))

    def _guarded(self, row: Sequence) -> Sequence:
        if row.constraint is None:
            return row
        return replace(row, constraint=GuardedConstraint(row.id, row.constraint, self._faults))


def _distinct(tracked: Iterable[TrackedRequest]) -> list[TrackedRequest]:
    return list({id(tracked): tracked for tracked in tracked}.values())
