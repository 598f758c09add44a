"""One thread that owns one loaded model, and the handles by which the event loop talks to it.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from engine.errors import EngineError, EngineStopped, LoadFailed, RequestFailed
from engine.types import Accepted, Batch, Event, Finish, GenerationRequest, ModelFacts, Row, RowToken, Usage

log = logging.getLogger("engine")


class Output(Protocol):
    """What turns the tokens of one choice into events (engine/output.py)."""

    completion_tokens: int
    reasoning_tokens: int

    def feed(self, token: int) -> Iterable[Event]:
        """The events that a token brings; its Finish is the last of all."""


class Runtime(Protocol):
    """A loaded model as the thread uses it (engine/runtime.py)."""

    @property
    def batch(self) -> Batch:
        """Where its rows are decoded."""

    @property
    def facts(self) -> ModelFacts:
        """What is known of it."""

    def prepare(self, request: GenerationRequest) -> tuple[tuple[int, ...], int, Output]:
        """Prompt tokens, most tokens to generate, and the output stream. Raises PromptRejected."""


class Generation:
    """One request's events, read on the event loop. close() it, however reading ended.

    `on_done` is called once, on the event loop, when the engine has no more work for it.
    """

    def __init__(self, request: GenerationRequest, cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self.is_done = False
        self.on_done: Callable[[], None] = lambda: None
        self._cancel = cancel
        self._events: list[Event] = []
        self._error: EngineError | None = None
        self._wake: asyncio.Future[None] | None = None

    async def accepted(self) -> Accepted:
        """Wait for the engine's first word. Raises the EngineError that it may be."""
        while not (self._events or self._error):
            await self._arrival()
        if not self._events and self._error:
            raise self._error
        first = self._events.pop(0)
        assert isinstance(first, Accepted)
        return first

    async def events(self) -> list[Event]:
        """Wait for all events that have arrived since the last call; empty at the end. Raises EngineError."""
        while not self._events:
            if self._error:
                raise self._error
            if self.is_done:
                return []
            await self._arrival()
        arrived, self._events = self._events, []
        return arrived

    def close(self) -> None:
        """Tell the engine that nobody reads on. Idempotent."""
        if not self.is_done:
            self._cancel(self)

    def deliver(self, events: Iterable[Event], is_done: bool = False, error: EngineError | None = None) -> None:
        """Take what the engine sends; called on the event loop."""
        if self.is_done:
            return
        self._events.extend(events)
        self._error = error
        if is_done or error:
            self.is_done = True
            self.on_done()
        if self._wake and not self._wake.done():
            self._wake.set_result(None)

    async def _arrival(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake


@dataclass(slots=True)
class _Choice:
    """The engine thread's side of a generation."""

    generation: Generation
    output: Output
    prompt_tokens: int
    cached_tokens: int = 0

    def usage(self) -> Usage:
        """Token counts at the end."""
        return Usage(
            self.prompt_tokens, self.output.completion_tokens, self.output.reasoning_tokens, self.cached_tokens
        )


@dataclass(frozen=True, slots=True)
class _Submit:
    generation: Generation


@dataclass(frozen=True, slots=True)
class _Cancel:
    generation: Generation


class _Stop:
    """The thread is to end now."""


class Engine:
    """Starts the thread, hands requests over, stops it. Used on one event loop.

    `build` loads the model and returns its runtime; `free` releases memory after the runtime is dropped; both run on
    the thread. `on_death` is called on the event loop when the thread ends by itself.
    """

    def __init__(
        self,
        key: str,
        build: Callable[[], Runtime],
        *,
        free: Callable[[], None] = lambda: None,
        stream: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_death: Callable[[EngineError], None] = lambda error: None,
    ) -> None:
        self._key = key
        self._build = build
        self._free = free
        self._stream = stream
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._started: asyncio.Future[ModelFacts] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._choices: dict[int, _Choice] = {}
        self._row_ids = count()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine-{key}")
        self._thread.start()

    # -- the event loop's side ------------------------------------------------------------------------------------

    async def started(self) -> ModelFacts:
        """Wait until the model is loaded. Raises LoadFailed; EngineStopped if it has ended since."""
        facts = await asyncio.shield(self._started)
        if self._ended.is_set():
            raise EngineStopped(self._key, "it has ended")
        return facts

    def submit(self, request: GenerationRequest) -> Generation:
        """Hand a request over; its first event tells whether it was accepted."""
        generation = Generation(request, self._cancel)
        self._inbox.put(_Submit(generation))
        if self._ended.is_set():
            generation.deliver([], error=EngineStopped(self._key, "it has ended"))
        return generation

    async def stop(self) -> None:
        """End the thread and wait for it. Generations that still run get EngineStopped."""
        self._is_stopping = True
        self._inbox.put(_Stop())
        await self._ended.wait()
        self._thread.join()

    def _cancel(self, generation: Generation) -> None:
        self._inbox.put(_Cancel(generation))

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
        try:
            while self._take_messages(runtime):
                self._publish(runtime.batch, runtime.batch.decode())
                runtime.batch.prefill()
        finally:
            runtime.batch.close()

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
                    self._forget(runtime.batch, generation)
                case _Stop():
                    return False
        return True

    def _messages(self, wait: bool) -> Iterator[_Submit | _Cancel | _Stop]:
        try:
            yield self._inbox.get(block=wait)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _admit(self, runtime: Runtime, generation: Generation) -> None:
        request = generation.request
        try:
            tokens, max_tokens, output = runtime.prepare(request)
        except EngineError as error:
            self._call_loop(generation.deliver, [], True, _without_frames(error))
            return
        except Exception as error:
            log.exception("a request to %r could not be prepared", self._key)
            failure = RequestFailed(self._key, f"{type(error).__name__}: {error}")
            self._call_loop(generation.deliver, [], True, failure)
            return
        row_id = next(self._row_ids)
        self._choices[row_id] = _Choice(generation, output, len(tokens))
        runtime.batch.insert(Row(row_id, tokens, request.sampling, max_tokens))
        self._call_loop(generation.deliver, [Accepted(len(tokens))])

    def _forget(self, batch: Batch, generation: Generation) -> None:
        row_ids = [row_id for row_id, choice in self._choices.items() if choice.generation is generation]
        batch.remove(row_ids)
        for row_id in row_ids:
            del self._choices[row_id]
        self._call_loop(generation.deliver, [], True)

    def _publish(self, batch: Batch, tokens: list[RowToken]) -> None:
        """Turn one step's tokens into events and hand them over at once."""
        outbox: list[tuple[Generation, list[Event], bool]] = []
        finished: list[int] = []
        for token in tokens:
            choice = self._choices.get(token.row_id)
            if choice is None:
                continue
            choice.cached_tokens = token.cached_tokens
            events = list(choice.output.feed(token.token))
            is_done = bool(events) and isinstance(events[-1], Finish)
            if is_done:
                finished.append(token.row_id)
                events.append(choice.usage())
            if events:
                outbox.append((choice.generation, events, is_done))
        if outbox:
            self._call_loop(_deliver_all, outbox)
        if finished:
            batch.remove(finished)
            for row_id in finished:
                del self._choices[row_id]

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
        for choice in self._choices.values():
            choice.generation.deliver([], error=error)
        self._choices.clear()
        for message in self._messages(wait=False):
            if isinstance(message, _Submit):
                message.generation.deliver([], error=error)
        if not self._is_stopping:
            self._on_death(error)


def _without_frames(error: EngineError) -> EngineError:
    """The error without its traceback, whose frames would keep the model's memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _deliver_all(outbox: list[tuple[Generation, list[Event], bool]]) -> None:
    for generation, events, is_done in outbox:
        generation.deliver(events, is_done)
