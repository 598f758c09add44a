"""What a model's load needs, what is told of it on the way, and how it ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import EngineError, LoadAborted, LoadFailed, NoRoom
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.loading.progress import Loading
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import ModelFacts
from mlxserver.engine.worker.engine import Engine
from mlxserver.manager.states import Step

log = logging.getLogger("models")

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

    def memory_now(self) -> int | None:
        """Bytes that this process holds; None if that can't be told, which must not keep a model from leaving."""
        try:
            return self.measure_memory()
        except Exception as error:
            log.warning("The memory of the process is not known: %s", error)
            return None


class ProgressFeed:
    """The steps of one model's loads, for whoever listens."""

    def __init__(self) -> None:
        self.latest = Step("waiting")
        self._listeners: list[Callable[[Step], None]] = []

    def tell(self, step: Step) -> None:
        """A load has come so far."""
        self.latest = step
        for listener in list(self._listeners):
            listener(step)

    @contextmanager
    def reporting_to(self, listener: Callable[[Step], None]) -> Iterator[None]:
        """Let somebody hear of them."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


async def started_engine(
    spec: ModelSpec,
    services: Services,
    steps: ProgressFeed,
    metrics: ModelMetrics,
    on_death: Callable[[EngineError], None],
) -> tuple[Engine, ModelFacts]:
    """An engine that has loaded the model; stopped again if that can't be. Raises LoadFailed, EngineStopped."""
    loop = asyncio.get_running_loop()
    loading = Loading(spec.key, lambda *step: _call(loop, steps.tell, Step(*step)))
    engine = services.start_engine(spec, on_death, loading, metrics)
    try:
        return engine, await engine.started()
    except BaseException:
        loading.abort()
        await asyncio.shield(engine.stop())
        raise


@asynccontextmanager
async def abortable(key: str) -> AsyncIterator[None]:
    """Raise only EngineErrors. Above all, whoever waits for a load that was cancelled must not take that for a
    cancellation of its own.
    """
    try:
        yield
    except asyncio.CancelledError:
        raise LoadAborted(key) from None
    except BaseException as error:
        raise failure(key, error)  # noqa: B904  (it may be the same)


def outcome(error: BaseException) -> Literal["aborted", "refused", "failed"]:
    """How a load ended. Only one that failed says something about the model."""
    if isinstance(error, asyncio.CancelledError | LoadAborted):
        return "aborted"
    return "refused" if isinstance(error, NoRoom) else "failed"


def failure(key: str, error: BaseException) -> EngineError:
    """The error of a load that failed, in the engine's words."""
    return error if isinstance(error, EngineError) else LoadFailed(key, f"{type(error).__name__}: {error}")


def retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Take note of how a task ended, so that nothing complains that nobody did."""
    if not task.cancelled():
        task.exception()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call on the loop, from any thread; nothing to do if the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
