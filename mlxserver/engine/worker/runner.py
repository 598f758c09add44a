"""The seam between an engine and a kind of model (runners/)."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from mlxserver.engine.events import Event
from mlxserver.engine.requests import EngineRequest, ModelFacts, Question
from mlxserver.engine.sequence import SampledToken, Sequence
from mlxserver.engine.worker.batch import Batch

PAUSE = object()  # of an idle step that could do nothing now


class Output(Protocol):
    """Turns the tokens of one choice into events."""

    @property
    def completion_tokens(self) -> int:
        """Number of tokens that were fed."""

    @property
    def reasoning_tokens(self) -> int:
        """Number of those that were reasoning."""

    def feed(self, token: SampledToken) -> Iterable[Event]:
        """The events of a token; Finish is the last of all."""


class Runner(Protocol):
    """A loaded model as its engine uses it.

    `preprocess` and `answer` are called on the tokenizer worker and must not hold the batch, whose memory is freed
    before that thread ends; everything else belongs to the engine thread.
    """

    @property
    def facts(self) -> ModelFacts:
        """Facts of the loaded model."""

    @property
    def batch(self) -> Batch:
        """The batch in which its sequences run."""

    @property
    def idle_steps(self) -> Iterator[object]:
        """Work for idle moments, one short step per step of the iterator. The batch is empty before and after each.

        The next step comes a moment later behind one that gives PAUSE.
        """

    @property
    def preprocess(self) -> Callable[[EngineRequest], EngineRequest]:
        """Does the slow part of prepare(): renders the prompt, compiles the grammar. Raises PromptRejected."""

    @property
    def answer(self) -> Callable[[Question], Any]:
        """Answers a question about prompts and tokens. Raises PromptRejected."""

    def prepare(self, request: EngineRequest, ids: Iterator[int]) -> abc.Sequence[tuple[Sequence, Output]]:
        """A sequence and its output per choice; those of a text model share one prompt. Raises PromptRejected."""
