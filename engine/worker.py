"""One thread that owns one loaded model.

Rule 1: every MLX call for the model (load, step, free) happens on this thread.
Rule 2: only plain data (engine/types.py) crosses to the event loop, in one hand-over a step.
Rule 3: however the thread ends, everybody waiting is told. Nobody waits on a dead engine.
Rule 4: a place is free when the engine is done, not when the reader has read.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from engine.errors import EngineError, EngineStopped, LoadFailed, RequestFailed
from engine.generation import Generation
from engine.jobs import Job, Jobs, Runtime
from engine.metrics import ModelMetrics
from engine.types import Accepted, GenerationRequest, ModelFacts, Question

log = logging.getLogger("engine")


@dataclass(frozen=True, slots=True)
class _Submit:
    generation: Generation


@dataclass(frozen=True, slots=True)
class _Cancel:
    generation: Generation


@dataclass(frozen=True, slots=True)
class _Ask:
    question: Question
    answer: asyncio.Future[Any]


class _Stop:
    """The thread is to end now."""


_Message = _Submit | _Cancel | _Ask | _Stop


class Joinable(Protocol):
    """Work that runs elsewhere."""

    def join(self) -> None:
        """Wait until it has ended."""


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Begin the work on a thread of its own."""
    thread = threading.Thread(target=work, name=name)
    thread.start()
    return thread


class Engine:
    """Starts the thread, hands requests over, stops it. Used on one event loop.

    `build` loads the model and returns its runtime; `free` releases memory after the runtime is dropped; both run on
    the thread. `on_death` is called on the event loop when the thread ends by itself. `start` finds the thread.
    """

    def __init__(
        self,
        key: str,
        build: Callable[[], Runtime],
        *,
        free: Callable[[], None] = lambda: None,
        stream: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_death: Callable[[EngineError], None] = lambda error: None,
        metrics: ModelMetrics | None = None,
        start: Callable[[Callable[[], None], str], Joinable] = start_thread,
    ) -> None:
        self._key = key
        self._build = build
        self._free = free
        self._stream = stream
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._started: asyncio.Future[ModelFacts] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._jobs = Jobs(metrics or ModelMetrics(key))
        self._row_ids = count()
        self._is_stopping = False
        self._thread = start(self._run, f"engine-{key}")

    # -- the event loop's side ------------------------------------------------------------------------------------

    async def started(self) -> ModelFacts:
        """Wait until the model is loaded. Raises LoadFailed; EngineStopped if it has ended since."""
        facts = await asyncio.shield(self._started)
        self._refuse_if_ended()
        return facts

    def submit(self, request: GenerationRequest) -> Generation:
        """Hand a request over; its first event tells whether it was accepted."""
        generation = Generation(request, self._cancel)
        self._inbox.put(_Submit(generation))
        if self._ended.is_set():
            generation.deliver([], error=EngineStopped(self._key, "it has ended"))
        return generation

    async def ask(self, question: Question) -> Any:
        """The answer to a question that needs the model's tokenizer. Raises PromptRejected, EngineStopped."""
        self._refuse_if_ended()
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._inbox.put(_Ask(question, answer))
        return await answer

    async def stop(self) -> None:
        """End the thread and wait for it. Generations that still run get EngineStopped."""
        self._is_stopping = True
        self._inbox.put(_Stop())
        await self._ended.wait()
        self._thread.join()

    def _cancel(self, generation: Generation) -> None:
        self._inbox.put(_Cancel(generation))

    def _refuse_if_ended(self) -> None:
        if self._ended.is_set():
            raise EngineStopped(self._key, "it has ended")

    # -- the thread's side ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The life of the thread. The one place that catches everything: here the thread ends."""
        error: EngineError = EngineStopped(self._key, "the model was unloaded")
        try:
            with self._stream():
                self._live()
        except EngineError as cause:
            error = _without_frames(cause)
        except BaseException as cause:
            log.exception("engine of %r died", self._key)
            error = EngineStopped(self._key, f"{type(cause).__name__}: {cause}")
        finally:
            self._release()
            self._call_loop(self._end, error)

    def _live(self) -> None:
        runtime = self._load()
        self._call_loop(self._started.set_result, runtime.facts)
        batch = runtime.batch
        try:
            while self._take_messages(runtime):
                outbox, finished = self._jobs.publish(batch.decode())
                if outbox:
                    self._call_loop(_deliver_all, outbox)
                if finished:
                    batch.remove(finished)
                batch.prefill()
        finally:
            batch.close()

    def _load(self) -> Runtime:
        try:
            return self._build()
        except EngineError:
            raise
        except Exception as cause:
            log.exception("%r could not be loaded", self._key)
            raise LoadFailed(self._key, f"{type(cause).__name__}: {cause}") from None

    def _release(self) -> None:
        try:
            self._free()
        except Exception:  # nobody must wait on because of it
            log.exception("the memory of %r could not be released", self._key)

    def _take_messages(self, runtime: Runtime) -> bool:
        """Act on what the event loop asks for; waits while there is nothing to generate. False: the end."""
        for message in self._messages(wait=runtime.batch.is_empty()):
            match message:
                case _Submit(generation):
                    self._admit(runtime, generation)
                case _Cancel(generation):
                    runtime.batch.remove(self._jobs.forget(generation))
                    self._call_loop(generation.deliver, [], True)
                case _Ask(question, answer):
                    self._answer(runtime, question, answer)
                case _Stop():
                    return False
        return True

    def _messages(self, wait: bool) -> Iterator[_Message]:
        try:
            yield self._inbox.get(block=wait)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _admit(self, runtime: Runtime, generation: Generation) -> None:
        try:
            choices = runtime.prepare(generation.request, self._row_ids)
        except Exception as error:
            self._call_loop(generation.deliver, [], True, self._failure(error))
            return
        prompt_tokens = len(choices[0][0].tokens)
        self._jobs.add(Job(generation, prompt_tokens), choices)
        runtime.batch.insert([row for row, _ in choices])
        self._call_loop(generation.deliver, [Accepted(prompt_tokens)])

    def _answer(self, runtime: Runtime, question: Question, answer: asyncio.Future[Any]) -> None:
        try:
            self._call_loop(_settle, answer, runtime.answer(question), None)
        except Exception as error:
            self._call_loop(_settle, answer, None, self._failure(error))

    def _failure(self, error: Exception) -> EngineError:
        """What the one caller whom an error concerns is told."""
        if isinstance(error, EngineError):
            return _without_frames(error)
        log.error("a request to %r failed", self._key, exc_info=error)
        return RequestFailed(self._key, f"{type(error).__name__}: {error}")

    def _call_loop(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            log.debug("the event loop closed before the engine of %r", self._key)

    def _end(self, error: EngineError) -> None:
        """The thread's last word, on the event loop: everybody who still waits is told."""
        self._ended.set()
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # whoever waits gets it; nobody waiting is no fault
        for generation in self._jobs.clear():
            generation.deliver([], error=error)
        for message in self._messages(wait=False):
            if isinstance(message, _Submit):
                message.generation.deliver([], error=error)
            elif isinstance(message, _Ask):
                _settle(message.answer, None, error)
        if not self._is_stopping:
            self._on_death(error)


def _without_frames(error: EngineError) -> EngineError:
    """The error without its traceback, whose frames would keep the model's memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _deliver_all(outbox: list[tuple[Generation, list[Any], bool]]) -> None:
    for generation, events, is_done in outbox:
        generation.deliver(events, is_done)


def _settle(answer: asyncio.Future[Any], value: Any, error: EngineError | None) -> None:
    if answer.done():
        return
    if error:
        answer.set_exception(error)
    else:
        answer.set_result(value)
