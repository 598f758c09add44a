"""Load of one model: what it needs from outside, its steps and their progress, and how it ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import EngineError, LoadAborted, LoadFailed, NoRoom
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.loading.progress import Loading
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import ModelFacts
from mlxserver.engine.worker.engine import Engine
from mlxserver.manager.memory_budget import Reservation
from mlxserver.manager.states import LoadProgress

log = logging.getLogger("models")

QUIET = 5.0  # seconds of a load until its progress is logged
LONGEST_QUIET = 60.0  # seconds between two such lines

# Starts the engine of a model. Its further arguments: called when the engine ends by itself; takes the load's progress;
# the model's counters.
StartEngine = Callable[[ModelSpec, Callable[[EngineError], None], Loading, ModelMetrics], Engine]


@dataclass(frozen=True, slots=True)
class Services:
    """What all models need from outside. `settings` are read at every use: a reload changes them.

    estimate: memory that a model will take; it may block. measure_memory: bytes that this process holds. specs: of all
    registered models, by key.
    """

    start_engine: StartEngine
    estimate: Callable[[ModelSpec], Estimate]
    measure_memory: Callable[[], int]
    settings: Callable[[], Settings]
    specs: Callable[[], Mapping[str, ModelSpec]] = dict

    def with_drafter(self, spec: ModelSpec) -> ModelSpec:
        """The spec with that of its draft model, if it has one. Raises LoadFailed."""
        if spec.draft is None:
            return spec
        registered = self.specs()
        if spec.draft == spec.key:
            raise LoadFailed(spec.key, f"its draft {spec.draft!r} is the model itself; expected a smaller one")
        if (drafter := registered.get(spec.draft)) is None:
            others = ", ".join(sorted(key for key in registered if key != spec.key)) or "no other model"
            raise LoadFailed(spec.key, f"its draft {spec.draft!r} is not registered; there is {others}")
        if drafter.draft is not None:
            raise LoadFailed(spec.key, f"its draft {spec.draft!r} has a draft itself, {drafter.draft!r}")
        if spec.shard or drafter.shard:
            raise LoadFailed(spec.key, f"ranks share it, or its draft {spec.draft!r}: neither can have the other")
        return replace(spec, drafter=drafter)

    def memory_now(self) -> int | None:
        """Bytes that this process holds; None if they can't be measured, which must not stop an unload."""
        try:
            return self.measure_memory()
        except Exception as error:
            log.warning("The memory of the process is not known: %s", error)
            return None


class Loader:
    """Loads one model: estimates its memory, reserves it and starts the engine.

    estimate and seconds: of the last load. progress: of the load that is under way, or of the last one.
    """

    def __init__(self, services: Services, reservation: Reservation, metrics: ModelMetrics) -> None:
        self.estimate: Estimate | None = None
        self.seconds = 0.0
        self.progress = LoadProgress("waiting")
        self._services = services
        self._reservation = reservation
        self._metrics = metrics
        self._listeners: list[Callable[[LoadProgress], None]] = []

    async def load(self, spec: ModelSpec, on_death: Callable[[EngineError], None]) -> tuple[Engine, ModelFacts, int]:
        """The engine of the model, its facts, and the bytes to reserve for it now that its weights are in memory.

        on_death is called on the event loop if the engine ends by itself.

        Raises:
            NoRoom, LoadAborted, LoadFailed, EngineStopped, and whatever the estimate raises
        """
        started = time.monotonic()
        self._report(LoadProgress("waiting"))
        ticker = asyncio.create_task(self._log_progress(spec.key))
        try:
            spec = self._services.with_drafter(spec)
            spec, self.estimate = self._widened(spec, await asyncio.to_thread(self._services.estimate, spec))
            await self._reservation.acquire(self.estimate.total)
            engine, facts = await self._started_engine(spec, on_death)
        finally:
            ticker.cancel()
        self.seconds = time.monotonic() - started
        self._metrics.load.observe(self.seconds)
        kv_bytes = self.estimate.cache if facts.reserved_kv_bytes is None else facts.reserved_kv_bytes
        return engine, facts, facts.weight_bytes + kv_bytes + self.estimate.activations

    def _widened(self, spec: ModelSpec, estimate: Estimate) -> tuple[ModelSpec, Estimate]:
        """Both with the weights in 16 bits, where that is faster and most of the free memory stays free."""
        wide = replace(estimate, weights=estimate.widened, widened=0)
        if not estimate.widened or not self._reservation.leaves_room(wide.total):
            return spec, estimate
        return replace(spec, weights="bfloat16", is_widened=True), wide

    async def _started_engine(
        self, spec: ModelSpec, on_death: Callable[[EngineError], None]
    ) -> tuple[Engine, ModelFacts]:
        """An engine that has loaded the model; it is stopped again if that fails."""
        loop = asyncio.get_running_loop()
        loading = Loading(spec.key, lambda *progress: _call(loop, self._report, LoadProgress(*progress)))
        engine = self._services.start_engine(spec, on_death, loading, self._metrics)
        try:
            return engine, await engine.started()
        except BaseException:
            loading.abort()
            await asyncio.shield(engine.stop())
            raise

    async def _log_progress(self, key: str) -> None:
        """Log the progress of a load that takes long, again after twice the time."""
        pause, began = QUIET, time.monotonic()
        while True:
            await asyncio.sleep(pause)
            step, seconds = self.progress, time.monotonic() - began
            done = {"done": step.done, "total": step.total} if step.total else {}
            fields = {"model": key, "stage": step.stage, **done, "seconds": round(seconds)}
            log.info("load in progress", extra={"fields": fields})
            pause = min(2 * pause, LONGEST_QUIET)

    @contextmanager
    def reporting_to(self, listener: Callable[[LoadProgress], None]) -> Iterator[None]:
        """Call the listener with the progress of loads."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _report(self, progress: LoadProgress) -> None:
        self.progress = progress
        for listener in list(self._listeners):
            listener(progress)


@asynccontextmanager
async def abortable(key: str) -> AsyncIterator[None]:
    """Raise only EngineErrors: a caller must not mistake the cancellation of the load that it awaits for its own."""
    try:
        yield
    except asyncio.CancelledError:
        raise LoadAborted(key) from None
    except BaseException as error:
        raise failure(key, error)  # noqa: B904  (it may be the same)


def outcome(error: BaseException) -> Literal["aborted", "refused", "failed"]:
    """How a load ended. Only "failed" is a fault of the model."""
    if isinstance(error, asyncio.CancelledError | LoadAborted):
        return "aborted"
    return "refused" if isinstance(error, NoRoom) else "failed"


def failure(key: str, error: BaseException) -> EngineError:
    """The EngineError of a load that failed."""
    return error if isinstance(error, EngineError) else LoadFailed(key, f"{type(error).__name__}: {error}")


def retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Retrieve a task's exception, so that asyncio does not log it as never retrieved."""
    if not task.cancelled():
        task.exception()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call on the event loop, from any thread; does nothing once the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
