"""Lifecycle of one model: its state, its engine, and the tasks that load and unload it.

Invariants
1. One table of transitions (manager/states.py) and one writer, _become(). No other flag holds a part of the state.
2. A load or an unload belongs to its own task. A caller that leaves does not end it.
3. The lock covers load and unload of one model. It is never held while generating.
4. A model that is evicted finishes its running requests; those that arrive meanwhile wait until it is loaded again. A
   model that is drained takes no new requests.
5. A failed model has nothing left in memory. The next request loads it again, after several failures in a row only
   once the backoff is over; an explicit load need not wait.
6. A retired model, which is no longer registered, is not loaded again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import EngineError, ModelBusy, ModelFailed, ModelNotLoaded, ModelUnloading
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import ModelFacts
from mlxserver.engine.worker.engine import Engine
from mlxserver.manager.loading import Loader, Services, abortable, failure, outcome, retrieve_exception
from mlxserver.manager.memory_budget import Reservation
from mlxserver.manager.queue import RequestQueue
from mlxserver.manager.states import TRANSITIONS, ModelState, UnloadMode, UnloadReport
from mlxserver.manager.timers import Backoff

log = logging.getLogger("models")

STOP_PATIENCE = 5.0  # seconds that an engine gets to end its generations itself


class Lifecycle:
    """State of one model, and its engine while it has one.

    on_transition is called after every change of the state. facts: of the engine. error: why the model failed, while
    its state is FAILED. ready_since: by time.monotonic().
    """

    def __init__(
        self,
        key: str,
        services: Services,
        queue: RequestQueue,
        reservation: Reservation,
        loader: Loader,
        metrics: ModelMetrics,
        on_transition: Callable[[], None],
    ) -> None:
        self.state = ModelState.UNLOADED
        self.engine: Engine | None = None
        self.facts: ModelFacts | None = None
        self.error: EngineError | None = None
        self.ready_since = time.monotonic()
        self.is_retired = False
        self.backoff = Backoff()
        self._key = key
        self._services = services
        self._queue = queue
        self._reservation = reservation
        self._loader = loader
        self._metrics = metrics
        self._on_transition = on_transition
        self._lock = asyncio.Lock()
        self._load_task: asyncio.Task[None] | None = None
        self._drain_task: asyncio.Task[UnloadReport] | None = None
        self._deadline = asyncio.Event()  # of the drain under way: its requests are not waited for any longer

    @property
    def is_absent(self) -> bool:
        """Whether the model is neither in memory nor about to be loaded."""
        return self.state in (ModelState.UNLOADED, ModelState.FAILED) and not self._pending_load

    def check_admission(self) -> None:
        """Refuse a request that this state can't serve. Raises ModelUnloading, ModelNotLoaded, ModelFailed."""
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self._key)
        needs_load = self.state in (ModelState.UNLOADED, ModelState.FAILED, ModelState.EVICTING)
        if needs_load and not self._services.settings().load_on_demand:
            raise ModelNotLoaded(self._key)
        if self.state is ModelState.FAILED and (seconds := self.backoff.remaining):
            raise ModelFailed(self._key, str(self.error), seconds)

    # -- load -----------------------------------------------------------------------------------------------------

    async def load(self, spec: ModelSpec) -> None:
        """Load the model unless it is loaded; joins a load that is under way.

        Raises:
            LoadFailed, LoadAborted, NoRoom, ModelUnloading
        """
        if self.state is ModelState.READY:
            return
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self._key)
        if not (load := self._pending_load):
            load = self._load_task = asyncio.create_task(self._load(spec))
            load.add_done_callback(retrieve_exception)  # every caller may have left
        await asyncio.shield(load)

    @property
    def _pending_load(self) -> asyncio.Task[None] | None:
        """Task of the load that is under way, or about to be."""
        return None if self._load_task is None or self._load_task.done() else self._load_task

    async def _load(self, spec: ModelSpec) -> None:
        async with abortable(self._key), self._lock:
            if self.is_retired:
                raise ModelUnloading(self._key)
            self._become(ModelState.LOADING)
            try:
                self.engine, self.facts, bytes = await self._loader.load(spec, self._lose_engine)
            except BaseException as error:
                self._note_failed_load(error)
                raise
            self._metrics.loads["loaded"] += 1
            self._become(ModelState.READY)
            self._reservation.resize(bytes)

    def _note_failed_load(self, error: BaseException) -> None:
        how = outcome(error)
        self._metrics.loads[how] += 1
        if not isinstance(error, EngineError | asyncio.CancelledError):
            log.error("A load met an unexpected error", exc_info=error)
        if how == "failed":
            self._fail(failure(self._key, error))
        else:
            log.warning("load %s", how, extra={"fields": {"model": self._key, "cause": str(error) or None}})
            self._become(ModelState.UNLOADED)
        self._reservation.release()

    # -- unload ---------------------------------------------------------------------------------------------------

    def start_drain(self, state: ModelState, reason: str) -> None:
        """Unload the model after its running requests.

        EVICTING: requests that arrive from now on wait until it is loaded again. DRAINING: they are refused.
        """
        self._metrics.unloads[reason] += 1
        self._become(state)
        self._deadline = asyncio.Event()
        self._drain_task = asyncio.create_task(self._drain())

    def start_unload(self, mode: UnloadMode, patience: float | None) -> asyncio.Task[UnloadReport]:
        """Start to unload the model; the task ends when that is done. Raises ModelBusy.

        drain: running requests have `patience` seconds to finish. abort: they are ended at once. reject: not at all
        while there are requests.
        """
        if mode == "reject" and len(self._queue):
            raise ModelBusy(self._key, len(self._queue))
        return asyncio.create_task(self._unload(mode, patience))

    async def close(self, patience: float) -> None:
        """Unload the model for good: a load is aborted, running requests get `patience` seconds."""
        await self._abort_load()
        await self.start_unload("drain", patience)

    async def _unload(self, mode: UnloadMode, patience: float | None) -> UnloadReport:
        started = time.monotonic()
        is_over = mode == "abort" or self.state.is_leaving
        if (load := self._pending_load) and not is_over:
            is_over = not (await asyncio.wait({load}, timeout=patience))[0]
        if is_over:
            await self._abort_load()
        if self.state is ModelState.EVICTING:
            self._become(ModelState.DRAINING)
        if self.state is ModelState.READY:
            self.start_drain(ModelState.DRAINING, mode)
        if self.state is ModelState.FAILED:
            self.backoff.reset()
            self._become(ModelState.UNLOADED)
        if self.state is not ModelState.DRAINING or not self._drain_task:
            return UnloadReport(0, 0, 0, 0.0)
        if mode == "abort":
            self._deadline.set()
        elif patience is not None:
            left = max(0.0, started + patience - time.monotonic())
            timer = asyncio.get_running_loop().call_later(left, self._deadline.set)
            self._drain_task.add_done_callback(lambda _: timer.cancel())
        return await asyncio.shield(self._drain_task)

    async def _drain(self) -> UnloadReport:
        """Wait for the running requests until the deadline, then stop the engine and release its memory."""
        async with self._lock:
            started, at_start = time.monotonic(), self._queue.num_admitted
            aborted = await self._queue.drained(self._deadline)
            before = self._services.memory_now()
            try:
                if self.engine:
                    await self.engine.stop(STOP_PATIENCE)
            except Exception:
                log.exception("The engine of model %r did not end well", self._key)
            finally:
                self._become(ModelState.UNLOADED)
                self._drop_engine()
            after = self._services.memory_now()
            freed = max(0, before - after) if before and after else 0
            return UnloadReport(at_start - aborted, aborted, freed, time.monotonic() - started)

    async def _abort_load(self) -> None:
        """Cancel a load and wait until it has ended."""
        if load := self._pending_load:
            await asyncio.sleep(0)  # a task that has not begun could not raise LoadAborted
            if not load.cancelling():
                load.cancel()
            await asyncio.gather(asyncio.shield(load), return_exceptions=True)

    # -- the state ------------------------------------------------------------------------------------------------

    def _lose_engine(self, error: EngineError) -> None:
        """The engine has ended by itself."""
        if self.state is ModelState.READY:
            self._fail(error)
            self._drop_engine()

    def _drop_engine(self) -> None:
        self.engine = self.facts = None
        self._reservation.release()

    def _fail(self, error: EngineError) -> None:
        self.backoff.note_failure()
        fields = {"model": self._key, "cause": " ".join(str(error).split()), "again_in": round(self.backoff.remaining)}
        log.error("failed", extra={"fields": fields})
        self._become(ModelState.FAILED, error)

    def _become(self, state: ModelState, error: EngineError | None = None) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self._key}: {self.state.name} can't become {state.name}")
        log.info("transition", extra={"fields": {"model": self._key, "from": self.state.value, "to": state.value}})
        self.state, self.error = state, error
        if state is ModelState.READY:
            self.ready_since = time.monotonic()
        self._on_transition()
