"""The registry of models, and the life of each.

ModelManager holds one ModelInstance a key. An instance has its own lock, its own bounded queue and its own engine
thread (engine/worker.py).

Rule 1: one table of transitions, one writer, _become(). Nothing beside it says in which state a model is.
Rule 2: a load or an unload belongs to its own task. Whoever asked for it may leave; it goes on for the others.
Rule 3: the lock covers load and unload of one model. It is never held while generating.
Rule 4: `requests` counts those waiting and running. It goes down when the engine is done, not when the client has read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from engine.config import ModelSpec
from engine.errors import (
    EngineError,
    ModelBusy,
    ModelExists,
    ModelNotFound,
    ModelUnloading,
    QueueFull,
)
from engine.types import GenerationRequest, ModelFacts
from engine.worker import Engine, Generation

log = logging.getLogger("models")

UnloadMode = Literal["drain", "abort", "reject"]


class ModelState(Enum):
    """Where a model is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "loaded"
    DRAINING = "draining"


TRANSITIONS = {
    ModelState.UNLOADED: {ModelState.LOADING},
    ModelState.LOADING: {ModelState.READY, ModelState.UNLOADED},  # load failed
    ModelState.READY: {ModelState.DRAINING, ModelState.UNLOADED},  # engine died
    ModelState.DRAINING: {ModelState.UNLOADED},
}


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """What an unload did with the requests that were in progress, and what it gave back."""

    completed: int
    aborted: int
    freed_bytes: int
    seconds: float


# Starts the engine of a model; the second argument is told when the engine ends by itself.
StartEngine = Callable[[ModelSpec, Callable[[EngineError], None]], Engine]


class ModelInstance:
    """One registered model: its state, its engine while it has one, and the requests it holds."""

    def __init__(self, spec: ModelSpec, start_engine: StartEngine, measure_memory: Callable[[], int]) -> None:
        self.spec = spec
        self.state = ModelState.UNLOADED
        self.facts: ModelFacts | None = None
        self.error: EngineError | None = None
        self.load_seconds = 0.0
        self.requests = 0
        self.created = int(time.time())
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self._loading: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._start_engine = start_engine
        self._measure_memory = measure_memory

    def __repr__(self) -> str:
        return f"<ModelInstance {self.spec.key} {self.state.name} requests={self.requests}>"

    @property
    def status(self) -> str:
        """The state's public name; a model whose last load failed, or whose engine died, is "failed"."""
        return "failed" if self.state is ModelState.UNLOADED and self.error else self.state.value

    @property
    def running(self) -> int:
        """Requests that have a place in the batch."""
        return min(self.requests, self.spec.max_running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self.requests - self.running

    async def load(self) -> None:
        """Load the model unless it is loaded; joins a load that runs already. Raises LoadFailed, ModelUnloading."""
        if self.state is ModelState.READY:
            return
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.spec.key)
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
        await asyncio.shield(self._loading)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Queue a request, loading the model first if need be, and wait until the engine has accepted it.

        Raises:
            QueueFull: as many requests wait as may.
            PromptRejected, LoadFailed, ModelUnloading, EngineStopped
        """
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.spec.key)
        if self.requests >= self.spec.max_running + self.spec.max_waiting:
            raise QueueFull(self.spec.key, self.spec.max_waiting)
        self._enter()
        try:
            await self.load()
            if self._engine is None:
                raise ModelUnloading(self.spec.key)
            generation = self._engine.submit(request)
        except BaseException:
            self._exit()
            raise
        if generation.is_done:
            self._exit()
        else:
            generation.on_done = self._exit
        return generation

    async def unload(self, mode: UnloadMode, patience: float | None = None) -> UnloadReport:
        """Unload the model. drain: after its last request (at most `patience` seconds, then the rest is aborted);
        abort: now; reject: only if it has no request.

        Raises:
            ModelBusy: mode is reject and there are requests.
        """
        if mode == "reject" and self.requests:
            raise ModelBusy(self.spec.key, self.requests)
        return await asyncio.shield(asyncio.create_task(self._unload(mode, patience)))

    def _become(self, state: ModelState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"{self.spec.key}: {self.state.name} can't become {state.name}")
        log.info("%s: %s -> %s", self.spec.key, self.state.value, state.value)
        self.state = state

    def _enter(self) -> None:
        self.requests += 1
        self._idle.clear()

    def _exit(self) -> None:
        self.requests -= 1
        if not self.requests:
            self._idle.set()

    async def _load(self) -> None:
        async with self._lock:
            if self.state is ModelState.READY:
                return
            started = time.monotonic()
            engine = self._start_engine(self.spec, self._lose_engine)  # first: without a thread there is no load
            self._become(ModelState.LOADING)
            try:
                self.facts = await engine.started()
            except EngineError as error:
                await engine.stop()
                self.error = error
                self._become(ModelState.UNLOADED)
                raise
            self._engine, self.error = engine, None
            self.load_seconds = time.monotonic() - started
            self._become(ModelState.READY)

    async def _unload(self, mode: UnloadMode, patience: float | None) -> UnloadReport:
        async with self._lock:
            if self.state is not ModelState.READY:
                return UnloadReport(0, 0, 0, 0.0)
            started, at_start = time.monotonic(), self.requests
            self._become(ModelState.DRAINING)
            if mode == "drain":
                await self._wait_until_idle(patience)
            aborted = self.requests
            before = self._measure_memory()
            await self._stop_engine()
            freed = max(0, before - self._measure_memory())
            return UnloadReport(at_start - aborted, aborted, freed, time.monotonic() - started)

    async def _wait_until_idle(self, patience: float | None) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), patience)
        except TimeoutError:
            log.warning("%s: %d requests outlast the drain of %s s", self.spec.key, self.requests, patience)

    async def _stop_engine(self) -> None:
        if self._engine:
            await self._engine.stop()
        self._engine = self.facts = None
        if self.state is not ModelState.UNLOADED:
            self._become(ModelState.UNLOADED)

    def _lose_engine(self, error: EngineError) -> None:
        """The engine has ended by itself."""
        if self.state is ModelState.READY:
            self._engine, self.facts, self.error = None, None, error
            self._become(ModelState.UNLOADED)


class ModelManager:
    """All models by key.

    `start_engine` makes the engine of a spec (engine/runtime.py in the server, a scripted one in tests);
    `measure_memory` tells the bytes that models hold in this process.
    """

    def __init__(
        self, specs: tuple[ModelSpec, ...], start_engine: StartEngine, measure_memory: Callable[[], int]
    ) -> None:
        self._start_engine = start_engine
        self._measure_memory = measure_memory
        self._instances: dict[str, ModelInstance] = {}
        for spec in specs:
            self.register(spec)

    @property
    def keys(self) -> list[str]:
        """Every registered key."""
        return list(self._instances)

    @property
    def instances(self) -> list[ModelInstance]:
        """Every registered model."""
        return list(self._instances.values())

    def instance(self, key: str) -> ModelInstance:
        """The model of this key. Raises ModelNotFound."""
        try:
            return self._instances[key]
        except KeyError:
            raise ModelNotFound(key, self.keys) from None

    def register(self, spec: ModelSpec) -> ModelInstance:
        """Make a model known without loading it. A spec that agrees with the known one is no change.

        Raises:
            ModelExists: the key has another source, or another adapter, type or context than one that is stated.
        """
        known = self._instances.get(spec.key)
        if known is None:
            known = self._instances[spec.key] = ModelInstance(spec, self._start_engine, self._measure_memory)
        elif _contradicts(spec, known.spec):
            raise ModelExists(spec.key, known.spec.source, spec.source)
        return known

    async def load(self, spec: ModelSpec) -> ModelInstance:
        """Register a model and load it; one that was unknown is forgotten again if that fails.

        Raises:
            ModelExists, LoadFailed, ModelUnloading
        """
        is_new = spec.key not in self._instances
        instance = self.register(spec)
        try:
            await instance.load()
        except EngineError:
            if is_new and instance.state is ModelState.UNLOADED:
                self._instances.pop(spec.key, None)
            raise
        return instance

    async def preload(self) -> None:
        """Load what is to be there at the start; one that fails is logged and does not stop the others."""
        wanted = [instance for instance in self.instances if instance.spec.preload]
        for instance, outcome in zip(
            wanted, await asyncio.gather(*(i.load() for i in wanted), return_exceptions=True), strict=True
        ):
            if isinstance(outcome, EngineError):
                log.error("%s", outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                log.info("%s: loaded in %.1f s", instance.spec.key, instance.load_seconds)

    async def close(self, patience: float) -> None:
        """Let running requests finish for `patience` seconds, then end every engine."""
        await asyncio.gather(*(instance.unload("drain", patience) for instance in self.instances))


def _contradicts(asked: ModelSpec, known: ModelSpec) -> bool:
    """Whether two specs can't be one model's. What `asked` leaves open agrees with anything."""
    stated = ((asked.adapter, known.adapter), (asked.type, known.type), (asked.context_length, known.context_length))
    return asked.source != known.source or any(want is not None and want != has for want, has in stated)
