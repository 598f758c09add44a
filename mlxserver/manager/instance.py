"""One registered model, as the server sees it: what is known of it, and the requests that it answers.

How it is loaded and how it leaves is in manager/lifecycle.py, who waits and who runs in manager/queue.py.

Rule: `requests` counts those waiting and running. It goes down when the engine is done, not when the client has read.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import ModelFailed, ModelNotLoaded, ModelUnloading, QueueFull
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import GenerationRequest, Question
from mlxserver.engine.worker.engine import Engine
from mlxserver.engine.worker.generation import Generation
from mlxserver.manager.lifecycle import Lifecycle
from mlxserver.manager.loading import Services
from mlxserver.manager.memory_budget import MemoryBudget
from mlxserver.manager.queue import Lease
from mlxserver.manager.states import ModelState


class ModelInstance(Lifecycle):
    """One registered model."""

    def __init__(self, spec: ModelSpec, services: Services, memory: MemoryBudget, metrics: ModelMetrics) -> None:
        super().__init__(spec, services, memory, metrics)
        self.created = int(time.time())

    def __repr__(self) -> str:
        return f"<ModelInstance {self.spec.key} {self.state.name} requests={self.requests}>"

    # -- what is known of it --------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """The state's public name."""
        state = ModelState.DRAINING if self.state is ModelState.EVICTING else self.state
        return str(state.value)

    @property
    def failure_reason(self) -> str | None:
        """Why the model failed, or how long its engine has been stuck; None while all is well."""
        if self.is_stalled and self._engine:
            return f"The engine of model {self.key!r} has made no step for {self._engine.stalled_for:.0f} s."
        return str(self.error) if self.error else None

    @property
    def is_stalled(self) -> bool:
        """Whether the engine has been at one step for longer than any takes."""
        return self._engine is not None and self._engine.stalled_for > self._services.settings().wedged_after

    @property
    def requests(self) -> int:
        """RequestQueue that wait or run."""
        return len(self._requests)

    @property
    def running(self) -> int:
        """RequestQueue that have a place in the batch."""
        return min(self._requests.served, self.spec.max_running)

    @property
    def waiting(self) -> int:
        """RequestQueue that wait for a place, or for the model."""
        return self.requests - self.running

    @property
    def reserved_bytes(self) -> int:
        """Memory that it may take."""
        return self._memory.reserved_by(self)

    @property
    def expires_in(self) -> float | None:
        """Seconds until it is unloaded if no request comes; None: never, or not while it has requests."""
        return self._idle_timer.remaining

    # -- requests -------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, keep_alive: float | None = None) -> Generation:
        """Queue a request, loading the model first if need be, and wait until the engine has it.

        keep_alive: seconds that the model stays after this request, instead of its ttl.

        Raises:
            QueueFull: as many requests wait as may.
            ModelNotLoaded: it would have to be loaded, and requests do not load models here.
            PromptRejected: it asks for what this model can't be held to.
            ModelFailed: it has failed several times, and it is too early to try again.
            LoadFailed, LoadAborted, NoRoom, ModelUnloading, EngineStopped
        """
        try:
            lease, generation = await self._begin(request, keep_alive)
        except BaseException as error:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
            self.metrics.requests[outcome] += 1
            raise
        if generation.is_done:
            self._finish(lease, generation)
        else:
            generation.on_done = lambda: self._finish(lease, generation)
        return generation

    async def ask(self, question: Question) -> Any:
        """What the model's tokenizer says, the model being loaded first. Raises as generate(), and PromptRejected."""
        lease = self._enter(None)
        try:
            return await (await self._engine_for(lease)).ask(question)
        finally:
            self._exit(lease)

    async def _begin(self, request: GenerationRequest, keep_alive: float | None) -> tuple[Lease, Generation]:
        lease = self._enter(keep_alive)
        try:
            engine = await self._engine_for(lease)
            return lease, engine.submit(await engine.preprocess(request))
        except BaseException:
            self._exit(lease)
            raise

    def _enter(self, keep_alive: float | None) -> Lease:
        if self.state is ModelState.DRAINING:
            raise ModelUnloading(self.key)
        if self.requests >= self.spec.max_running + self.spec.max_waiting:
            raise QueueFull(self.key, self.spec.max_waiting, max(1.0, self._requests.pace))
        is_absent = self.state in (ModelState.UNLOADED, ModelState.FAILED, ModelState.EVICTING)
        if is_absent and not self._services.settings().load_on_demand:
            raise ModelNotLoaded(self.key)
        if self.state is ModelState.FAILED and (seconds := self._backoff.remaining):
            raise ModelFailed(self.key, str(self.error), seconds)
        lease = Lease(keep_alive)
        if self.state is ModelState.READY:
            self._requests.serve(lease)
            self._idle_timer.cancel()
        else:
            self._requests.hold(lease)
            self._memory.reconsider()  # a load without a request behind it is now one with
        return lease

    async def _engine_for(self, lease: Lease) -> Engine:
        """The engine that serves this request."""
        while self._requests.is_held(lease):
            await self._loaded()
        if self._engine is None:
            raise ModelUnloading(self.key)
        return self._engine

    def _exit(self, lease: Lease) -> None:
        if self._requests.leave(lease):
            self.restart_idle_timer()
            self._memory.reconsider()

    def _finish(self, lease: Lease, generation: Generation) -> None:
        """The engine is done with a request."""
        self._requests.note_answer(lease)
        self._exit(lease)
        if generation.usage:
            self._backoff.forget()
        self.metrics.note(generation.outcome, generation.usage)
