"""The thread on which an engine's tokenizer does what would hold up the streams: prompts, grammars, questions.

Rule 1: each engine has a thread of its own for it, so that one model's long prompts hold up no other model.
Rule 2: one thing after the other: a tokenizer has modes, which are switched for each prompt.
Rule 3: nothing of the batch is held here, and after end() nothing of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import EngineStopped
from engine.faults import request_failure
from engine.types import GenerationRequest, Question

Format = Callable[[GenerationRequest], GenerationRequest]
Answer = Callable[[Question], Any]


class Clerk:
    """Formats an engine's requests and answers questions; begin() and end() are called on the engine's thread."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._thread = ThreadPoolExecutor(1, f"clerk-{key}")
        self._work: tuple[Format, Answer] | None = None

    def begin(self, format: Format, answer: Answer) -> None:
        """The model is there."""
        self._work = format, answer

    def end(self) -> None:
        """The model goes; whoever still waits gets EngineStopped."""
        self._work = None
        self._thread.shutdown(wait=False)

    async def format(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its prompt formatted and its grammar compiled. Raises PromptRejected, EngineStopped."""
        formatted: GenerationRequest = await self._do(0, request)
        return formatted

    async def answer(self, question: Question) -> Any:
        """What the tokenizer says. Raises PromptRejected, EngineStopped."""
        return await self._do(1, question)

    async def _do(self, which: int, content: Any) -> Any:
        try:
            working = asyncio.get_running_loop().run_in_executor(self._thread, self._do_here, which, content)
        except RuntimeError:  # the executor takes nothing any more
            raise EngineStopped(self._key, "it has ended") from None
        return await working

    def _do_here(self, which: int, content: Any) -> Any:
        if (work := self._work) is None:
            raise EngineStopped(self._key, "it has ended")
        try:
            return work[which](content)
        except BaseException as error:
            raise request_failure(self._key, error) from None
