"""The engine of one loaded model, as the event loop uses it. Its thread's side is in worker/engine_thread.py.

Rule 1: only plain data (engine/requests.py, engine/events.py) crosses between thread and event loop.
Rule 2: however the thread ends, every waiter gets an exception. No polling.
Rule 3: a slot is free when the engine is done, not when the reader has read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from mlxserver.engine.errors import EngineError, EngineStopped
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import EngineRequest, ModelFacts, Question
from mlxserver.engine.worker.engine_thread import EngineThread, EventLoopSide
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.mailbox import Barrier, Cancel, Mailbox, Stop, Submit
from mlxserver.engine.worker.runner import Runner
from mlxserver.engine.worker.subscribers import Subscribers
from mlxserver.engine.worker.thread_pool import Joinable, start_thread
from mlxserver.engine.worker.tokenizer_worker import TokenizerWorker


class Engine:
    """Starts the thread, submits requests, stops it. Used on one event loop.

    `build` loads the model and returns its runner; `free` releases memory after the runner is dropped; both run on the
    thread. `on_death` is called on the event loop when the thread ends by itself. `start` runs a function on a thread.
    """

    def __init__(
        self,
        key: str,
        build: Callable[[], Runner],
        *,
        free: Callable[[], None] = lambda: None,
        stream: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_death: Callable[[EngineError], None] = lambda error: None,
        metrics: ModelMetrics | None = None,
        start: Callable[[Callable[[], None], str], Joinable] = start_thread,
    ) -> None:
        self._key = key
        self._on_death = on_death
        self._mailbox = Mailbox()
        self._tokenizer_worker = TokenizerWorker(key)
        self._subscribers = Subscribers()
        loop = asyncio.get_running_loop()
        self._started: asyncio.Future[ModelFacts] = loop.create_future()
        self._ended = asyncio.Event()
        self._is_stopping = False
        here = EventLoopSide(key, loop.call_soon_threadsafe, self._subscribers, self._started.set_result, self._end)
        metrics = metrics or ModelMetrics(key)
        self._inside = EngineThread(key, build, free, stream, metrics, self._mailbox, self._tokenizer_worker, here)
        self._thread = start(self._inside.run, f"engine-{key}")

    async def started(self) -> ModelFacts:
        """Wait until the model is loaded. Raises LoadFailed; EngineStopped if the engine has ended since."""
        facts = await asyncio.shield(self._started)
        self._subscribers.refuse_if_over()
        return facts

    async def preprocess(self, request: EngineRequest) -> EngineRequest:
        """Do the slow part of a request's preparation off the engine thread. Raises PromptRejected, EngineStopped."""
        return await self._tokenizer_worker.preprocess(request)

    def submit(self, request: EngineRequest) -> Generation:
        """Submit a request; its first event is Accepted, or an error."""
        generation = Generation(request, self._cancel, self._subscribers.position)
        try:
            self._subscribers.add(generation)
        except EngineError as error:
            generation.deliver([], error=error)
        else:
            self._mailbox.put(Submit(generation))
        return generation

    async def ask(self, question: Question) -> Any:
        """The answer to a question about prompts and tokens. Raises PromptRejected, EngineStopped."""
        return await self._tokenizer_worker.answer(question)

    async def settled(self) -> None:
        """Wait until the generations that have ended have left the batch, and their KV cache is in the prefix cache."""
        settled = asyncio.Event()
        self._mailbox.put(Barrier(settled.set))
        waits = [asyncio.ensure_future(event.wait()) for event in (settled, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    @property
    def num_running(self) -> int:
        """Requests that hold at least one slot, prefilling or decoding. May be read on any thread."""
        return self._inside.load.num_running

    @property
    def stalled_for(self) -> float:
        """Seconds that the step under way has taken; 0 while the engine is idle, and while the model loads."""
        return self._mailbox.stalled_for

    async def stop(self, patience: float | None = None) -> None:
        """End the thread and wait for it. Open generations get EngineStopped, after `patience` seconds even if the
        thread is stalled.
        """
        self._is_stopping = True
        self._mailbox.put(Stop())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), patience)
        if not self._ended.is_set():
            self._subscribers.fail_all(EngineStopped(self._key, f"it has made no step for {self.stalled_for:.0f} s"))
            await self._ended.wait()
        self._thread.join()

    def _cancel(self, generation: Generation) -> None:
        self._mailbox.put(Cancel(generation))

    def _end(self, error: EngineError) -> None:
        """Notify all waiters of the thread's end."""
        self._ended.set()
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # retrieved here, for there may be no waiter
        self._subscribers.fail_all(error)
        if not self._is_stopping:
            self._on_death(error)
