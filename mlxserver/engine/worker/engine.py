"""One thread that owns one loaded model.

Rule 1: every MLX call for the model (load, step, free) happens on this thread.
Rule 2: only plain data (engine/types.py) crosses to the event loop, in one hand-over a step.
Rule 3: however the thread ends, everybody waiting is told. Nobody waits on a dead engine.
Rule 4: a place is free when the engine is done, not when the reader has read.
Rule 5: a fault ends what it concerns and nothing more: a request, a step (worker/recovery.py), the thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from typing import Any, Protocol

from mlxserver.engine.errors import EngineError, EngineStopped, EngineUnloaded, LoadFailed
from mlxserver.engine.events import Accepted
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import GenerationRequest, ModelFacts, Question
from mlxserver.engine.worker.batch import Batch
from mlxserver.engine.worker.faults import request_failure, without_frames
from mlxserver.engine.worker.generation import Generation
from mlxserver.engine.worker.mailbox import Cancel, Mailbox, Stop, Submit
from mlxserver.engine.worker.recovery import MOST_IN_A_ROW, Recovery
from mlxserver.engine.worker.subscribers import Subscribers
from mlxserver.engine.worker.tokenizer_worker import TokenizerWorker
from mlxserver.engine.worker.tracker import Runtime, StepOutputs, TrackedRequest, Tracker

log = logging.getLogger("engine")


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
        self._mailbox = Mailbox()
        self._started: asyncio.Future[ModelFacts] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._subscribers = Subscribers(key)
        metrics = metrics or ModelMetrics(key)
        self._tracker = Tracker(metrics)
        self._recovery = Recovery(self._tracker, self._release, self._hand_over, metrics)
        self._tokenizer_worker = TokenizerWorker(key)
        self._sequence_ids = count()
        self._is_stopping = False
        self._thread = start(self._run, f"engine-{key}")

    # -- the event loop's side ------------------------------------------------------------------------------------

    async def started(self) -> ModelFacts:
        """Wait until the model is loaded. Raises LoadFailed; EngineStopped if it has ended since."""
        facts = await asyncio.shield(self._started)
        self._subscribers.refuse_if_over()
        return facts

    async def preprocess(self, request: GenerationRequest) -> GenerationRequest:
        """Do what of a request would hold up the streams of others. Raises PromptRejected, EngineStopped."""
        return await self._tokenizer_worker.preprocess(request)

    def submit(self, request: GenerationRequest) -> Generation:
        """Hand a request over; its first event tells whether it was accepted."""
        generation = Generation(request, self._cancel)
        try:
            self._subscribers.add(generation)
        except EngineStopped as error:
            generation.deliver([], error=error)
        else:
            self._mailbox.put(Submit(generation))
        return generation

    async def ask(self, question: Question) -> Any:
        """The answer to a question that needs the model's tokenizer. Raises PromptRejected, EngineStopped."""
        return await self._tokenizer_worker.answer(question)

    @property
    def stalled_for(self) -> float:
        """Seconds that the step under way has taken; 0 while there is nothing to do, and while the model loads."""
        return self._mailbox.busy_for

    async def stop(self, patience: float | None = None) -> None:
        """End the thread and wait for it. Generations that still run get EngineStopped, after `patience` seconds even
        if the thread makes no step in which it could tell them.
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
        """The thread's last word: everybody who still waits is told."""
        self._ended.set()
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # whoever waits gets it; nobody waiting is no fault
        self._subscribers.fail_all(error)
        if not self._is_stopping:
            self._on_death(error)

    # -- the thread's side ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The life of the thread. The one place that catches everything: here the thread ends."""
        error: EngineError = EngineUnloaded(self._key)
        try:
            with self._stream():
                self._live()
        except EngineError as cause:
            error = without_frames(cause)
        except BaseException as cause:
            log.exception("engine of %r died", self._key)
            error = EngineStopped(self._key, f"{type(cause).__name__}: {cause}")
        finally:
            self._tokenizer_worker.end()  # or the tokenizer would stay as long as somebody has an answer of this engine
            self._release()
            self._call_loop(self._end, error)

    def _live(self) -> None:
        runtime = self._load()
        self._tokenizer_worker.begin(runtime.preprocess, runtime.answer)
        self._call_loop(self._started.set_result, runtime.facts)
        batch = runtime.batch
        try:
            while self._take_messages(runtime):
                self._attempt(batch, self._step)
        finally:
            batch.close()

    def _attempt(self, batch: Batch, work: Callable[[Batch], None]) -> None:
        """Have the batch do something. If that fails, go on with a fresh one, unless that has not helped either."""
        try:
            work(batch)
            return
        except EngineError:  # the batch itself says that there is no going on
            raise
        except Exception as error:
            log.exception("a step of %r failed", self._key)
            cause = without_frames(error)  # they hold what was computed
        self._recovery.after(cause, batch)
        if self._recovery.has_given_up:
            raise EngineStopped(
                self._key, f"{MOST_IN_A_ROW} steps in a row failed, the last with {type(cause).__name__}: {cause}"
            )

    def _step(self, batch: Batch) -> None:
        if tokens := batch.decode():
            self._recovery.note_progress()
        outputs, finished = self._tracker.publish(tokens)
        self._hand_over(outputs)
        if finished:
            batch.remove(finished)
        batch.prefill()

    def _forget(self, batch: Batch, generation: Generation) -> None:
        if rows := self._tracker.forget(generation):
            self._attempt(batch, lambda batch: batch.remove(rows))

    def _hand_over(self, outputs: StepOutputs) -> None:
        if outputs:
            self._call_loop(self._subscribers.deliver_all, outputs)

    def _load(self) -> Runtime:
        try:
            return self._build()
        except EngineError:
            raise
        except BaseException as cause:
            log.exception("%r could not be loaded", self._key)
            raise LoadFailed(self._key, f"{type(cause).__name__}: {cause}") from None

    def _release(self) -> None:
        try:
            self._free()
        except Exception:  # nobody must wait on because of it
            log.exception("the memory of %r could not be released", self._key)

    def _take_messages(self, runtime: Runtime) -> bool:
        """Act on what the event loop asks for; waits while there is nothing to generate. False: the end."""
        for message in self._mailbox.take(wait=runtime.batch.is_empty()):
            match message:
                case Submit(generation):
                    self._admit(runtime, generation)
                case Cancel(generation):
                    try:
                        self._forget(runtime.batch, generation)
                    finally:  # the thread may end over it, and it has forgotten whom to tell
                        self._call_loop(self._subscribers.deliver, generation, [], True)
                case Stop():
                    return False
        return True

    def _admit(self, runtime: Runtime, generation: Generation) -> None:
        try:
            choices = runtime.prepare(generation.request, self._sequence_ids)
            tracked = TrackedRequest(generation, len(choices[0][0].tokens))
            runtime.batch.insert(self._tracker.add(tracked, choices))
        except BaseException as error:
            failure = request_failure(self._key, error)
            try:
                self._forget(runtime.batch, generation)
            finally:
                self._call_loop(self._subscribers.deliver, generation, [], True, failure)
            return
        self._call_loop(self._subscribers.deliver, generation, [Accepted(tracked.prompt_tokens)])

    def _call_loop(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to be told
            log.debug("the event loop closed before the engine of %r", self._key)
