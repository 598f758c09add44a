"""How one model comes and goes: its state, and its engine while it has one.

Rule 1: one table of transitions, one writer, _become(). Nothing beside it says in which state a model is.
Rule 2: a load or an unload belongs to its own task. Whoever asked for it may leave; it goes on for the others.
Rule 3: the lock covers load and unload of one model. It is never held while generating.
Rule 4: a model that is evicted finishes what it has begun; what arrives meanwhile waits until it is loaded again. A
        model that is unloaded takes nothing new.
Rule 5: a model that failed has nothing left in memory. The next request loads it again; after several failures in a
        row only when some time has gone by. Somebody who asks for the load itself need not wait.
Rule 6: a model that is no longer registered is not loaded again, whoever still holds it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineError, ModelBusy, ModelUnloading
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import ModelFacts
from mlxserver.engine.worker.engine import Engine
from mlxserver.manager.eviction import Resident
from mlxserver.manager.loading import (
    ProgressFeed,
    Services,
    abortable,
    failure,
    outcome,
    retrieve_exception,
    started_engine,
)
from mlxserver.manager.memory_budget import MemoryBudget
from mlxserver.manager.queue import RequestQueue
from mlxserver.manager.states import TRANSITIONS, ModelState, Step, UnloadMode, UnloadReport
from mlxserver.manager.timers import Backoff, IdleTimer

log = logging.getLogger("models")

STOP_PATIENCE = 5.0  # seconds that an engine gets to tell its readers itself that it ends


class Lifecycle:
    """The comings and goings of one model. manager/instance.py adds the requests that it answers meanwhile."""

    def __init__(self, spec: ModelSpec, services: Services, memory: MemoryBudget, metrics: ModelMetrics) -> None:
        self.spec = spec
        self.state = ModelState.UNLOADED
        self.facts: ModelFacts | None = None
        self.estimate: Estimate | None = None
        self.error: EngineError | None = None
        self.load_seconds = 0.0
        self.is_retired = False  # it is no longer registered
        self.metrics = metrics
        self._services = services
        self._memory = memory
        self._requests = RequestQueue()
        self._steps = ProgressFeed()
        self._idle_timer = IdleTimer(self._expire)
        self._backoff = Backoff()
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self._load_task: asyncio.Task[None] | None = None
        self._leave_task: asyncio.Task[UnloadReport] | None = None
        self._cut = asyncio.Event()  # no more patience with running requests
        self._resident_since = time.monotonic()

    @property
    def key(self) -> str:
        """Its name in requests."""
        return self.spec.key

    # -- how it stands in the memory --------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """Whether it is on its way out."""
        return self.state in (ModelState.EVICTING, ModelState.DRAINING)

    @property
    def is_absent(self) -> bool:
        """Whether it is neither there nor on its way."""
        return self.state in (ModelState.UNLOADED, ModelState.FAILED) and not self._coming

    @property
    def _coming(self) -> asyncio.Task[None] | None:
        """The load that is under way, or about to be."""
        return None if self._load_task is None or self._load_task.done() else self._load_task

    @property
    def waiting_since(self) -> float | None:
        """When the oldest request that waits for it to be loaded came."""
        return self._requests.waiting_since

    def resident(self, bytes: int) -> Resident:
        """How it stands in the memory."""
        is_ready = self.state is ModelState.READY
        return Resident(
            self,
            bytes,
            is_pinned=self.spec.pin,
            is_busy=len(self._requests) > 0 or not is_ready,
            is_movable=is_ready,
            last_used=self._requests.last_used,
            resident_since=self._resident_since,
        )

    # -- loading --------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model unless it is loaded; joins a load that runs already.

        Raises LoadFailed, LoadAborted, NoRoom, ModelUnloading.
        """
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.key)
        if self.state is not ModelState.READY:
            await self._loaded()

    @property
    def step(self) -> Step:
        """How far the load is that runs, or that was the last."""
        return self._steps.latest

    def reporting_to(self, listener: Callable[[Step], None]) -> AbstractContextManager[None]:
        """Let somebody hear of the steps of a load."""
        return self._steps.reporting_to(listener)

    async def _loaded(self) -> None:
        if not (load := self._coming):
            load = self._load_task = asyncio.create_task(self._load())
            load.add_done_callback(retrieve_exception)  # those who waited may all have left
        await asyncio.shield(load)

    async def _load(self) -> None:
        async with abortable(self.key), self._lock:
            if self.state is ModelState.READY:
                return
            if self.is_retired:
                raise ModelUnloading(self.key)
            started = time.monotonic()
            self._become(ModelState.LOADING)
            self._steps.tell(Step("waiting"))
            try:
                self.estimate = await asyncio.to_thread(self._services.estimate, self.spec)
                await self._memory.reserve(self, self.estimate.total)
                self._engine, self.facts = await started_engine(
                    self.spec, self._services, self._steps, self.metrics, self._lose_engine
                )
            except BaseException as error:
                self._fail_to_load(error)
                raise
            self._settle_in(time.monotonic() - started)

    def _fail_to_load(self, error: BaseException) -> None:
        how = outcome(error)
        self.metrics.loads[how] += 1
        if not isinstance(error, EngineError | asyncio.CancelledError):
            log.error("A load met what nobody expected", exc_info=error)
        if how == "failed":
            self._fail(failure(self.key, error))
        else:
            log.warning("load %s", how, extra={"fields": {"model": self.key, "cause": str(error) or None}})
            self._become(ModelState.UNLOADED)
        self._memory.release(self)

    def _fail(self, error: EngineError) -> None:
        """Note what went wrong."""
        self.error = error
        self._backoff.note_failure()
        fields = {"model": self.key, "cause": " ".join(str(error).split()), "again_in": round(self._backoff.remaining)}
        log.error("failed", extra={"fields": fields})
        self._become(ModelState.FAILED)

    def _settle_in(self, seconds: float) -> None:
        """The model is there."""
        assert self.facts is not None and self.estimate is not None
        self.load_seconds = seconds
        self.metrics.loads["loaded"] += 1
        self.metrics.load.observe(seconds)
        self._requests.last_used = self._resident_since = time.monotonic()
        self._cut.clear()
        self._become(ModelState.READY)
        self._requests.keep_alive = None  # what it was in an earlier life
        self._requests.serve_held()
        self.restart_idle_timer()
        self._memory.resize(self, self.facts.weight_bytes + self.estimate.cache + self.estimate.activations)

    # -- leaving --------------------------------------------------------------------------------------------------

    async def unload(self, mode: UnloadMode, patience: float | None = None) -> UnloadReport:
        """Unload the model. drain: after its last request, and a load under way (at most `patience` seconds, then the
        rest is aborted); abort: now; reject: only without requests and a load, else it raises ModelBusy.
        """
        return await asyncio.shield(self.start_unload(mode, patience))

    def start_unload(self, mode: UnloadMode, patience: float | None = None) -> asyncio.Task[UnloadReport]:
        """As unload(), which goes on by itself. Raises ModelBusy at once."""
        if mode == "reject" and (self._requests or self._coming):
            raise ModelBusy(self.key, len(self._requests))
        return asyncio.create_task(self._unload(mode, patience))

    async def close(self, patience: float) -> None:
        """Unload for good: a load is called off, running requests get `patience` seconds."""
        await self._abort_load()
        await self.unload("drain", patience)

    def evict(self) -> None:
        """Make the model leave after its last request; what arrives from now on waits for its return."""
        self._leave(ModelState.EVICTING, "evict")

    async def _unload(self, mode: UnloadMode, patience: float | None) -> UnloadReport:
        started = time.monotonic()
        is_over = mode == "abort" or self.is_leaving
        if (load := self._coming) and not is_over:
            is_over = not (await asyncio.wait({load}, timeout=patience))[0]
        if is_over:
            await self._abort_load()
        if self.state is ModelState.EVICTING:
            self._become(ModelState.DRAINING)
        if self.state is ModelState.READY:
            self._leave(ModelState.DRAINING, mode)
        if self.state is ModelState.FAILED:
            self._backoff.forget()
            self._become(ModelState.UNLOADED)
        if self.state is not ModelState.DRAINING or not self._leave_task:
            return UnloadReport(0, 0, 0, 0.0)
        if mode == "abort":
            self._cut.set()
        elif patience is not None:
            left = max(0.0, started + patience - time.monotonic())
            timer = asyncio.get_running_loop().call_later(left, self._cut.set)
            self._leave_task.add_done_callback(lambda _: timer.cancel())
        return await asyncio.shield(self._leave_task)

    def _leave(self, state: ModelState, reason: str) -> None:
        """Start leaving, at once."""
        self.metrics.unloads[reason] += 1
        self._idle_timer.cancel()
        self._become(state)
        self._leave_task = asyncio.create_task(self._left())

    async def _left(self) -> UnloadReport:
        async with self._lock:
            started, at_start = time.monotonic(), self._requests.served
            aborted = await self._requests.ended(self._cut)
            before = self._services.memory_now()
            try:
                if self._engine:
                    await self._engine.stop(STOP_PATIENCE)
            except Exception:
                log.exception("The engine of model %r did not end well", self.key)
            finally:
                self._become(ModelState.UNLOADED)
                self._vacate()
            after = self._services.memory_now()
            freed = max(0, before - after) if before and after else 0
            return UnloadReport(at_start - aborted, aborted, freed, time.monotonic() - started)

    def _vacate(self) -> None:
        """The engine has ended, and with it the model's memory."""
        self._engine = self.facts = None
        self._cut.clear()
        self._idle_timer.cancel()
        self._memory.release(self)

    async def _abort_load(self) -> None:
        """Call a load off and wait until it has ended."""
        if load := self._coming:
            await asyncio.sleep(0)  # a task that was never begun could not say why it ended
            if not load.cancelling():
                load.cancel()
            await asyncio.gather(asyncio.shield(load), return_exceptions=True)

    def _lose_engine(self, error: EngineError) -> None:
        """The engine has ended by itself."""
        if self.state is ModelState.READY:
            self._fail(error)
            self._vacate()

    def _become(self, state: ModelState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.key}: {self.state.name} can't become {state.name}")
        log.info("transition", extra={"fields": {"model": self.key, "from": self.state.value, "to": state.value}})
        self.state = state
        if state is not ModelState.FAILED:
            self.error = None

    # -- the end of its time --------------------------------------------------------------------------------------

    def restart_idle_timer(self) -> None:
        """See when the model leaves, if it is idle: it has become so, or its settings have changed."""
        if self.state is not ModelState.READY or self._requests.served:
            return
        usual = self._services.settings().ttl if self.spec.ttl is None else self.spec.ttl
        seconds = usual if self._requests.keep_alive is None else self._requests.keep_alive
        idle = time.monotonic() - self._requests.last_used
        self._idle_timer.set(math.inf if self.spec.pin else max(0.0, seconds - idle))

    def _expire(self) -> None:
        if self.state is ModelState.READY and not self._requests.served:
            self._leave(ModelState.EVICTING, "idle")
