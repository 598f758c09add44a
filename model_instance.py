"""The life of one registered model: its state, its engine while it has one, and the requests it holds.

Rule 1: one table of transitions, one writer, _become(). Nothing beside it says in which state a model is.
Rule 2: a load or an unload belongs to its own task. Whoever asked for it may leave; it goes on for the others.
Rule 3: the lock covers load and unload of one model. It is never held while generating.
Rule 4: `requests` counts those waiting and running. It goes down when the engine is done, not when the client has read.
Rule 5: a model that is evicted finishes what it has begun; what arrives meanwhile waits until it is loaded again. A
        model that is unloaded takes nothing new.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from engine.config import ModelSpec, Settings
from engine.errors import (
    EngineError,
    LoadAborted,
    LoadFailed,
    ModelBusy,
    ModelNotLoaded,
    ModelUnloading,
    NoRoom,
    QueueFull,
)
from engine.generation import Generation
from engine.loading import Loading
from engine.memory import Estimate
from engine.metrics import ModelMetrics
from engine.placement import Occupant
from engine.types import GenerationRequest, ModelFacts, Question
from engine.worker import Engine
from model_room import Room
from model_state import TRANSITIONS, ModelState, Step, UnloadMode, UnloadReport

log = logging.getLogger("models")

_PACE_WEIGHT = 0.2  # of a new measurement in the running average of the time between two answers


@dataclass(eq=False, slots=True)
class _Ticket:
    """A request's place in the count. Its keep_alive becomes the model's, in seconds; None: the usual."""

    keep_alive: float | None = None
    arrived: float = 0.0


# Starts the engine of a model. Further arguments: what is told when the engine ends by itself, what hears of the
# load's progress, and what counts.
StartEngine = Callable[[ModelSpec, Callable[[EngineError], None], Loading, ModelMetrics], Engine]


@dataclass(frozen=True, slots=True)
class Services:
    """What all models need from outside. `settings` are asked for at every use: they may change.

    estimate: what a model will take; it may block. measure_memory: bytes that this process holds.
    """

    start_engine: StartEngine
    estimate: Callable[[ModelSpec], Estimate]
    measure_memory: Callable[[], int]
    settings: Callable[[], Settings]


class ModelInstance:
    """One registered model."""

    def __init__(self, spec: ModelSpec, services: Services, room: Room, metrics: ModelMetrics) -> None:
        self.spec = spec
        self.state = ModelState.UNLOADED
        self.facts: ModelFacts | None = None
        self.estimate: Estimate | None = None
        self.error: EngineError | None = None
        self.load_seconds = 0.0
        self.created = int(time.time())
        self.metrics = metrics
        self.step = Step("waiting")
        self._listeners: list[Callable[[Step], None]] = []
        self._services = services
        self._room = room
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._leave_task: asyncio.Task[UnloadReport] | None = None
        self._held: dict[_Ticket, None] = {}  # waiting for the model to be loaded
        self._served: dict[_Ticket, None] = {}  # the engine's
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()  # no more patience with running requests
        self._last_used = self._resident_since = time.monotonic()
        self._pace = 0.0
        self._keep_alive: float | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._expires_at: float | None = None

    def __repr__(self) -> str:
        return f"<ModelInstance {self.spec.key} {self.state.name} requests={self.requests}>"

    # -- what is known of it --------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Its name in requests."""
        return self.spec.key

    @property
    def status(self) -> str:
        """The state's public name; a model whose last load failed, or whose engine died, is "failed"."""
        if self.state is ModelState.EVICTING:
            return ModelState.DRAINING.value
        return "failed" if self.state is ModelState.UNLOADED and self.error else self.state.value

    @property
    def requests(self) -> int:
        """Requests that wait or run."""
        return len(self._held) + len(self._served)

    @property
    def running(self) -> int:
        """Requests that have a place in the batch."""
        return min(len(self._served), self.spec.max_running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place, or for the model."""
        return self.requests - self.running

    @property
    def reserved_bytes(self) -> int:
        """Memory that it may take."""
        return self._room.reserved_by(self)

    @property
    def expires_in(self) -> float | None:
        """Seconds until it is unloaded if no request comes; None: never, or not while it has requests."""
        return None if self._expires_at is None else max(0.0, self._expires_at - time.monotonic())

    @property
    def is_leaving(self) -> bool:
        """Whether it is on its way out."""
        return self.state in (ModelState.EVICTING, ModelState.DRAINING)

    @property
    def waiting_since(self) -> float | None:
        """When the oldest request that waits for it to be loaded came."""
        return next(iter(self._held)).arrived if self._held else None

    def occupant(self, bytes: int) -> Occupant:
        """How it stands in the room."""
        is_ready = self.state is ModelState.READY
        return Occupant(
            self,
            bytes,
            is_pinned=self.spec.pin,
            is_busy=self.requests > 0 or not is_ready,
            is_movable=is_ready,
            last_used=self._last_used,
            resident_since=self._resident_since,
        )

    # -- requests -------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, keep_alive: float | None = None) -> Generation:
        """Queue a request, loading the model first if need be, and wait until the engine has it.

        keep_alive: seconds that the model stays after this request, instead of its ttl.

        Raises:
            QueueFull: as many requests wait as may.
            ModelNotLoaded: it would have to be loaded, and requests do not load models here.
            LoadFailed, LoadAborted, NoRoom, ModelUnloading, EngineStopped
        """
        ticket = self._enter(keep_alive)
        try:
            engine = await self._engine_for(ticket)
            generation = engine.submit(request)
        except BaseException as error:
            self._exit(ticket)
            self.metrics.requests[
                "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
            ] += 1
            raise
        if generation.is_done:
            self._finish(ticket, generation)
        else:
            generation.on_done = lambda: self._finish(ticket, generation)
        return generation

    async def ask(self, question: Question) -> Any:
        """What the model's tokenizer says, the model being loaded first. Raises as generate(), and PromptRejected."""
        ticket = self._enter(None)
        try:
            return await (await self._engine_for(ticket)).ask(question)
        finally:
            self._exit(ticket)

    def _enter(self, keep_alive: float | None) -> _Ticket:
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.key)
        if self.requests >= self.spec.max_running + self.spec.max_waiting:
            raise QueueFull(self.key, self.spec.max_waiting, max(1.0, self._pace))
        if self.state in (ModelState.UNLOADED, ModelState.EVICTING) and not self._services.settings().load_on_demand:
            raise ModelNotLoaded(self.key)
        ticket = _Ticket(keep_alive, time.monotonic())
        if self.state is ModelState.READY:
            self._serve(ticket)
        else:
            self._held[ticket] = None
            self._room.look()  # a load without a request behind it is now one with
        return ticket

    async def _engine_for(self, ticket: _Ticket) -> Engine:
        """The engine that serves this request."""
        while ticket in self._held:
            await self._loaded()
        if self._engine is None:
            raise ModelUnloading(self.key)
        return self._engine

    def _serve(self, ticket: _Ticket) -> None:
        self._served[ticket] = None
        self._keep_alive = ticket.keep_alive
        self._idle.clear()
        self._set_expiry(math.inf)

    def _exit(self, ticket: _Ticket) -> None:
        self._held.pop(ticket, None)
        if ticket not in self._served:
            return
        del self._served[ticket]
        self._last_used = time.monotonic()
        if not self._served:
            self._idle.set()
            self._await_expiry()
            self._room.look()

    def _finish(self, ticket: _Ticket, generation: Generation) -> None:
        """The engine is done with a request."""
        since = time.monotonic() - max(self._last_used, ticket.arrived)
        self._pace += _PACE_WEIGHT * (since - self._pace)
        self._exit(ticket)
        self.metrics.note(generation.outcome, generation.usage)

    # -- loading --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model unless it is loaded; joins a load that runs already.

        Raises:
            LoadFailed, LoadAborted, NoRoom, ModelUnloading
        """
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.key)
        if self.state is not ModelState.READY:
            await self._loaded()

    async def _loaded(self) -> None:
        if self._load_task is None or self._load_task.done():
            self._load_task = asyncio.create_task(self._load())
            self._load_task.add_done_callback(_look_at)  # those who waited may all have left
        await asyncio.shield(self._load_task)

    async def _load(self) -> None:
        async with _abortable(self.key), self._lock:
            if self.state is ModelState.READY:
                return
            started = time.monotonic()
            self._become(ModelState.LOADING)
            self._tell(Step("waiting"))
            try:
                self.estimate = await asyncio.to_thread(self._services.estimate, self.spec)
                await self._room.claim(self, self.estimate.total)
                self._engine = await self._started_engine()
            except BaseException as error:
                outcome = _outcome(error)
                self.metrics.loads[outcome] += 1
                self.error = _failure(self.key, error) if outcome == "failed" else None
                self._become(ModelState.UNLOADED)
                self._room.release(self)
                raise
            self._settle_in(time.monotonic() - started)

    async def _started_engine(self) -> Engine:
        """An engine that has loaded the model; stopped again if that can't be."""
        loop = asyncio.get_running_loop()
        loading = Loading(self.key, lambda *step: _call(loop, self._tell, Step(*step)))
        engine = self._services.start_engine(self.spec, self._lose_engine, loading, self.metrics)
        try:
            self.facts = await engine.started()
        except BaseException:
            loading.abort()
            await asyncio.shield(engine.stop())
            raise
        return engine

    def _settle_in(self, seconds: float) -> None:
        """The model is there: everybody who waited for it is its guest now."""
        assert self.facts is not None and self.estimate is not None
        self.error, self.load_seconds = None, seconds
        self.metrics.loads["loaded"] += 1
        self.metrics.load.observe(seconds)
        self._last_used = self._resident_since = time.monotonic()
        self._cut.clear()
        self._become(ModelState.READY)
        for ticket in self._held:
            self._serve(ticket)
        self._held.clear()
        self._await_expiry()
        self._room.resize(self, self.facts.weight_bytes + self.estimate.cache + self.estimate.activations)

    @contextmanager
    def heard_by(self, listener: Callable[[Step], None]) -> Iterator[None]:
        """Let somebody hear of the steps of a load."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _tell(self, step: Step) -> None:
        self.step = step
        for listener in list(self._listeners):
            listener(step)

    # -- leaving --------------------------------------------------------------------------------------------------

    async def unload(self, mode: UnloadMode, patience: float | None = None) -> UnloadReport:
        """Unload the model. drain: after its last request (at most `patience` seconds, then the rest is aborted);
        abort: now, a load that is under way included; reject: only if it has no request and is not being loaded.

        Raises:
            ModelBusy: mode is reject and there are requests, or a load.
        """
        if mode == "reject" and (self.requests or self.state is ModelState.LOADING):
            raise ModelBusy(self.key, self.requests)
        return await asyncio.shield(asyncio.create_task(self._unload(mode, patience)))

    async def close(self, patience: float) -> None:
        """Unload for good: a load is called off, running requests get `patience` seconds."""
        await self._abort_load()
        await self.unload("drain", patience)

    def evict(self) -> None:
        """Make the model leave after its last request; what arrives from now on waits for its return."""
        self._leave(ModelState.EVICTING, "evict")

    async def _unload(self, mode: UnloadMode, patience: float | None) -> UnloadReport:
        if mode == "abort" or self.is_leaving:
            await self._abort_load()
        elif self.state is ModelState.LOADING:
            await asyncio.gather(self._loaded(), return_exceptions=True)
        if self.state is ModelState.EVICTING:
            self._become(ModelState.DRAINING)
        if self.state is ModelState.READY:
            self._leave(ModelState.DRAINING, mode)
        if self.state is not ModelState.DRAINING or not self._leave_task:
            return UnloadReport(0, 0, 0, 0.0)
        if mode == "abort":
            self._cut.set()
        elif patience is not None:
            timer = asyncio.get_running_loop().call_later(patience, self._cut.set)
            self._leave_task.add_done_callback(lambda _: timer.cancel())
        return await asyncio.shield(self._leave_task)

    def _leave(self, state: ModelState, reason: str) -> None:
        """Start leaving, at once."""
        self.metrics.unloads[reason] += 1
        self._set_expiry(math.inf)
        self._become(state)
        self._leave_task = asyncio.create_task(self._left())

    async def _left(self) -> UnloadReport:
        async with self._lock:
            started, at_start = time.monotonic(), len(self._served)
            cut, idle = asyncio.create_task(self._cut.wait()), asyncio.create_task(self._idle.wait())
            await asyncio.wait({cut, idle}, return_when=asyncio.FIRST_COMPLETED)
            cut.cancel()
            idle.cancel()
            aborted = len(self._served)
            before = self._services.measure_memory()
            if self._engine:
                await self._engine.stop()
            freed = max(0, before - self._services.measure_memory())
            self._vacate()
            return UnloadReport(at_start - aborted, aborted, freed, time.monotonic() - started)

    def _vacate(self) -> None:
        """The engine has ended, and with it the model's memory."""
        self._engine = self.facts = None
        self._cut.clear()
        self._set_expiry(math.inf)
        if self.state is not ModelState.UNLOADED:
            self._become(ModelState.UNLOADED)
        self._room.release(self)

    async def _abort_load(self) -> None:
        """Call a load off and wait until it has ended."""
        if self._load_task and not self._load_task.done():
            await asyncio.sleep(0)  # a task that was never begun could not say why it ended
            if not self._load_task.cancelling():
                self._load_task.cancel()
            await asyncio.gather(asyncio.shield(self._load_task), return_exceptions=True)

    def _lose_engine(self, error: EngineError) -> None:
        """The engine has ended by itself."""
        if self.state is ModelState.READY:
            self.error = error
            self._vacate()

    def _become(self, state: ModelState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.key}: {self.state.name} can't become {state.name}")
        log.info("transition", extra={"fields": {"model": self.key, "from": self.state.value, "to": state.value}})
        self.state = state

    # -- the end of its time --------------------------------------------------------------------------------------

    def _await_expiry(self) -> None:
        """From now on the model is idle."""
        usual = self._services.settings().ttl if self.spec.ttl is None else self.spec.ttl
        if self.state is ModelState.READY and not self._served and not self.spec.pin:
            self._set_expiry(usual if self._keep_alive is None else self._keep_alive)

    def _set_expiry(self, seconds: float) -> None:
        if self._expiry:
            self._expiry.cancel()
        self._expiry = self._expires_at = None
        if seconds < math.inf:
            self._expires_at = time.monotonic() + seconds
            self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self.state is ModelState.READY and not self._served:
            self._leave(ModelState.EVICTING, "idle")


@asynccontextmanager
async def _abortable(key: str) -> AsyncIterator[None]:
    """Whoever waits for a load that was cancelled must not take that for a cancellation of its own."""
    try:
        yield
    except asyncio.CancelledError:
        raise LoadAborted(key) from None


def _look_at(task: asyncio.Task[None]) -> None:
    """Take note of how a task ended, so that nothing complains that nobody did."""
    if not task.cancelled():
        task.exception()


def _outcome(error: BaseException) -> str:
    """How a load ended. Only one that failed says something about the model."""
    if isinstance(error, asyncio.CancelledError | LoadAborted):
        return "aborted"
    return "refused" if isinstance(error, NoRoom) else "failed"


def _failure(key: str, error: BaseException) -> EngineError:
    return error if isinstance(error, EngineError) else LoadFailed(key, f"{type(error).__name__}: {error}")


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call on the loop, from any thread; nothing to do if the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
