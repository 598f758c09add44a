"""The engine thread's side of the generations that run: which rows they have, and what those rows said.

Rule 1: one step's tokens become one outbox; a generation is done when its last choice is.
Rule 2: what goes wrong with one generation, in its output or its constraint, ends that one alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mlxserver.engine.errors import EngineError
from mlxserver.engine.events import Event, Finish, Timings, Usage
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import GenerationRequest, ModelFacts, Question
from mlxserver.engine.sequence import Row, RowToken
from mlxserver.engine.worker.batch import Batch
from mlxserver.engine.worker.faults import GuardedConstraint, request_failure
from mlxserver.engine.worker.generation import Generation

# To whom, what, whether that is the last of it, and the error that it ended with, if any.
Letter = tuple[Generation, list[Event], bool, EngineError | None]
Outbox = list[Letter]


class Output(Protocol):
    """What turns the tokens of one choice into events."""

    @property
    def completion_tokens(self) -> int:
        """Tokens fed."""

    @property
    def reasoning_tokens(self) -> int:
        """Those of them that were reasoning."""

    def feed(self, token: RowToken) -> Iterable[Event]:
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
    def format(self) -> Callable[[GenerationRequest], GenerationRequest]:
        """Does what of prepare() takes long, on any thread; holds nothing of the batch. Raises PromptRejected."""

    def prepare(self, request: GenerationRequest, row_ids: Iterator[int]) -> Sequence[tuple[Row, Output]]:
        """A row and its output stream for each choice; all rows share one prompt. Raises PromptRejected."""

    @property
    def answer(self) -> Callable[[Question], Any]:
        """Says what the tokenizer says, on any thread; holds nothing of the batch. Raises PromptRejected."""


@dataclass(slots=True)
class Job:
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
    open_rows: set[int] = field(default_factory=set)
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

    def note(self, token: RowToken, now: float) -> float:
        """Note when a token came; the first tells how the prompt went. Gives the seconds since the step before."""
        if not self.first_token:
            self.first_token = self.last_token = now
            self.started, self.cached_tokens = token.started or self.submitted, token.cached_tokens
        waited, self.last_token = now - self.last_token, now
        return waited


class Jobs:
    """All generations of one engine, by row."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._rows: dict[int, tuple[Job, Output]] = {}
        self._faults: list[tuple[int, BaseException]] = []  # of the rows' constraints

    @property
    def row_ids(self) -> set[int]:
        """The rows of all that is not done."""
        return set(self._rows)

    def add(self, job: Job, choices: Sequence[tuple[Row, Output]]) -> list[Row]:
        """Take a generation with the rows of its choices. Gives the rows as the batch is to have them."""
        for row, output in choices:
            job.outputs.append(output)
            job.open_rows.add(row.id)
            self._rows[row.id] = (job, output)
        return [self._guarded(row) for row, _ in choices]

    def forget(self, generation: Generation) -> list[int]:
        """Drop a generation; the ids of the rows it still had."""
        row_ids = [row_id for row_id, (job, _) in self._rows.items() if job.generation is generation]
        for row_id in row_ids:
            self._rows.pop(row_id, None)
        return row_ids

    def beyond(self, row_ids: Collection[int]) -> list[Job]:
        """Those that have a row which is not one of these."""
        return _distinct(job for row_id, (job, _) in self._rows.items() if row_id not in row_ids)

    def publish(self, tokens: Sequence[RowToken]) -> tuple[Outbox, list[int]]:
        """What one step's tokens mean: events for the event loop, and the rows that have ended."""
        outbox: Outbox = []
        finished: list[int] = []
        now = time.monotonic()
        for token in tokens:
            if found := self._rows.get(token.row_id):
                self._read(token, *found, now, outbox, finished)
        for row_id, error in self._faults:
            if found := self._rows.get(row_id):
                self._fail(found[0], error, outbox, finished)
        self._faults.clear()
        return outbox, finished

    def _read(self, token: RowToken, job: Job, output: Output, now: float, outbox: Outbox, finished: list[int]) -> None:
        """Add what a token means."""
        if waited := job.note(token, now):
            self._metrics.inter_token.observe(waited)
        try:
            events = list(output.feed(token))
        except BaseException as error:
            self._fail(job, error, outbox, finished)
            return
        is_done = False
        if events and isinstance(events[-1], Finish):
            finished.append(token.row_id)
            self._rows.pop(token.row_id, None)
            job.open_rows.discard(token.row_id)
            is_done = not job.open_rows
            if is_done:
                events.append(job.usage())
        if events:
            outbox.append((job.generation, events, is_done, None))

    def _fail(self, job: Job, error: BaseException, outbox: Outbox, finished: list[int]) -> None:
        """End a generation because of its own fault."""
        self._metrics.faults["request"] += 1
        finished += self.forget(job.generation)
        outbox.append((job.generation, [], True, request_failure(self._metrics.key, error)))

    def _guarded(self, row: Row) -> Row:
        if row.constraint is None:
            return row
        return replace(row, constraint=GuardedConstraint(row.id, row.constraint, self._faults))


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    return list({id(job): job for job in jobs}.values())
