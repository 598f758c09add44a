"""The thread on which an engine's tokenizer does what would hold up the streams: prompts, grammars, questions.

Rule 1: each engine has a thread of its own for it, so that one model's long prompts hold up no other model.
Rule 2: one thing after the other: a tokenizer has modes, which are switched for each prompt.
Rule 3: nothing of the batch is held here, and after end() nothing of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from mlxserver.engine.errors import EngineStopped
from mlxserver.engine.requests import GenerationRequest, Question
from mlxserver.engine.worker.faults import request_failure

T = TypeVar("T")

Preprocess = Callable[[GenerationRequest], GenerationRequest]
Answer = Callable[[Question], Any]


class _Work(NamedTuple):
    preprocess: Preprocess
    answer: Answer


class TokenizerWorker:
    """Formats an engine's requests and answers questions; begin() and end() are called on the engine's thread."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._thread = ThreadPoolExecutor(1, f"clerk-{key}")
        self._work: _Work | None = None

    def begin(self, preprocess: Preprocess, answer: Answer) -> None:
        """The model is there."""
        self._work = _Work(preprocess, answer)

    def end(self) -> None:
        """The model goes; whoever still waits gets EngineStopped."""
        self._work = None
        self._thread.shutdown(wait=False)

    async def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its prompt formatted and its grammar compiled. Raises PromptRejected, EngineStopped."""
        return await self._do(lambda work: work.preprocess(request))

    async def answer(self, question: Question) -> Any:
        """What the tokenizer says. Raises PromptRejected, EngineStopped."""
        return await self._do(lambda work: work.answer(question))

    async def _do(self, task: Callable[[_Work], T]) -> T:
        try:
            doing = asyncio.get_running_loop().run_in_executor(self._thread, self._do_here, task)
        except RuntimeError:  # the executor takes nothing any more
            raise EngineStopped(self._key, "it has ended") from None
        return await doing

    def _do_here(self, task: Callable[[_Work], T]) -> T:
        if (work := self._work) is None:
            raise EngineStopped(self._key, "it has ended")
        try:
            return task(work)
        except BaseException as error:
            raise request_failure(self._key, error) from None
