"""Tokenizer worker of a model: renders prompts, compiles grammars and answers tokenize requests off the engine thread.

Rule 1: each engine has a worker of its own, so that one model's long prompts delay no other model.
Rule 2: one task at a time: a tokenizer has modes, which are switched per prompt.
Rule 3: the worker holds nothing of the batch, and after end() nothing of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from mlxserver.engine.errors import EngineError, EngineStopped
from mlxserver.engine.requests import EngineRequest, Question
from mlxserver.engine.worker.faults import request_failure, without_frames

T = TypeVar("T")

Preprocess = Callable[[EngineRequest], EngineRequest]
Answer = Callable[[Question], Any]


class _Functions(NamedTuple):
    preprocess: Preprocess
    answer: Answer


class TokenizerWorker:
    """Runs a runner's preprocess() and answer(); begin() and end() are called on the engine thread."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._executor = ThreadPoolExecutor(1, f"tokenizer-{key}")
        self._functions: _Functions | None = None
        self._end: EngineError = EngineStopped(key, "it has not begun")  # why there are no functions

    def begin(self, preprocess: Preprocess, answer: Answer) -> None:
        """Serve a model."""
        self._functions = _Functions(preprocess, answer)

    def end(self, error: EngineError) -> None:
        """Release the model; callers that still wait, and later ones, get the error."""
        self._end = error  # first: the worker reads it once there are no functions
        self._functions = None
        self._executor.shutdown(wait=False)

    async def preprocess(self, request: EngineRequest) -> EngineRequest:
        """The request with its prompt rendered and its grammar compiled. Raises PromptRejected, EngineStopped."""
        return await self._run(lambda functions: functions.preprocess(request))

    async def answer(self, question: Question) -> Any:
        """The answer to a question about prompts and tokens. Raises PromptRejected, EngineStopped."""
        return await self._run(lambda functions: functions.answer(question))

    async def _run(self, task: Callable[[_Functions], T]) -> T:
        try:
            running = asyncio.get_running_loop().run_in_executor(self._executor, self._run_here, task)
        except RuntimeError:  # the executor is shut down
            raise without_frames(self._end) from None
        return await running

    def _run_here(self, task: Callable[[_Functions], T]) -> T:
        if (functions := self._functions) is None:
            raise without_frames(self._end)
        try:
            return task(functions)
        except BaseException as error:
            raise request_failure(self._key, error) from None
