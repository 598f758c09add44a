"""One registered model, as the server and the manager see it: its parts, put together.

Invariant: `requests` counts those that wait and those that run. It falls when the engine is done with one, not when the
client has read the answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxserver.config.settings import Kind, ModelSpec
from mlxserver.engine.errors import ModelUnloading, QueueFull, SeesNoImages, WrongKind
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import Estimate
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.requests import ChatPrompt, EngineRequest, GenerationRequest, ModelFacts, Question
from mlxserver.engine.worker.engine import Engine
from mlxserver.engine.worker.generation import Generation
from mlxserver.manager.eviction import Resident
from mlxserver.manager.lifecycle import Lifecycle
from mlxserver.manager.loading import Loader, Services
from mlxserver.manager.memory_budget import MemoryBudget, Reservation
from mlxserver.manager.queue import Lease, RequestQueue
from mlxserver.manager.states import LoadProgress, ModelState, UnloadMode, UnloadReport
from mlxserver.manager.timers import IdleTimer


class ModelInstance:
    """One registered model. A reload may exchange its spec for one that differs in live settings alone.

    copied_aliases: names that it was given while the server runs, beside those of its spec.
    """

    def __init__(self, spec: ModelSpec, services: Services, memory: MemoryBudget, metrics: ModelMetrics) -> None:
        self.spec = spec
        self.metrics = metrics
        self.copied_aliases: tuple[str, ...] = ()
        self.created = int(time.time())
        self._known_kind = sources.known_kind(spec.source)
        self._settings = services.settings
        self._memory = memory
        self._queue = RequestQueue()
        self._idle_timer = IdleTimer(lambda: self._lifecycle.start_drain(ModelState.EVICTING, "idle"))
        self._reservation = Reservation(self, memory)
        self._loader = Loader(services, self._reservation, metrics)
        self._lifecycle = Lifecycle(
            spec.key, services, self._queue, self._reservation, self._loader, metrics, self._follow_transition
        )

    def __repr__(self) -> str:
        return f"<ModelInstance {self.key} {self.state.name} requests={self.requests}>"

    @property
    def key(self) -> str:
        """Name of the model in requests."""
        return self.spec.key

    @property
    def aliases(self) -> tuple[str, ...]:
        """More names of the model, patterns among them."""
        return (*self.spec.aliases, *self.copied_aliases)

    @property
    def state(self) -> ModelState:
        """State of the lifecycle."""
        return self._lifecycle.state

    @property
    def status(self) -> str:
        """Name of the state on the wire."""
        return self.state.public_name

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory, and stays there as far as is known."""
        return self.state is ModelState.READY

    @property
    def is_absent(self) -> bool:
        """Whether the model is neither in memory nor about to be loaded."""
        return self._lifecycle.is_absent

    @property
    def kind(self) -> Kind | None:
        """Kind of the model; None while its files do not tell it."""
        facts = self.facts
        return self.spec.kind or (facts.kind if facts else None) or self._known_kind

    @property
    def may_see(self) -> bool:
        """Whether the model sees images, or nothing is known of that yet."""
        return self.kind in (None, "vision")

    @property
    def facts(self) -> ModelFacts | None:
        """Facts of the loaded model; None without one."""
        return self._lifecycle.facts

    @property
    def estimate(self) -> Estimate | None:
        """Memory that the last load was expected to take; None before the first."""
        return self._loader.estimate

    @property
    def load_seconds(self) -> float:
        """Duration of the last load."""
        return self._loader.seconds

    @property
    def load_progress(self) -> LoadProgress:
        """Progress of the load that is under way, or of the last one."""
        return self._loader.progress

    @property
    def failure_reason(self) -> str | None:
        """Why the model failed, or for how long its engine has been stalled; None without a fault."""
        if self._engine and self.is_stalled:
            return f"The engine of model {self.key!r} has made no step for {self._engine.stalled_for:.0f} s."
        return str(self._lifecycle.error) if self._lifecycle.error else None

    @property
    def is_stalled(self) -> bool:
        """Whether the engine's current step takes longer than wedged_after."""
        return self._engine is not None and self._engine.stalled_for > self._settings().wedged_after

    @property
    def requests(self) -> int:
        """Number of requests that wait or run."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that hold a slot. The engine may count one that has just ended, and is none any more."""
        return min(self._engine.num_running, self._queue.num_admitted) if self._engine else 0

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot, or for the model."""
        return self.requests - self.running

    @property
    def pace(self) -> float:
        """Running average of the seconds between two answers."""
        return self._queue.pace

    @property
    def expires_in(self) -> float | None:
        """Seconds until the model is unloaded for being idle; None: never, or not while it has requests."""
        return self._idle_timer.remaining

    @property
    def _engine(self) -> Engine | None:
        return self._lifecycle.engine

    # -- requests -------------------------------------------------------------------------------------------------

    async def generate(
        self, request: EngineRequest, idle_timeout: float | None = None, dialect: str = ""
    ) -> Generation:
        """Queue a request, load the model if need be, and submit the request to its engine.

        idle_timeout: seconds that the model stays loaded after this request, instead of its ttl. dialect: as metrics
        have it.

        Raises:
            QueueFull: max_waiting requests wait already.
            ModelNotLoaded: the model is not loaded, and requests do not load models here.
            PromptRejected: the request has a part that this model can't serve.
            WrongKind: the model is of another kind than the request needs. It is not loaded for it.
            ModelFailed: the model failed several times, and the backoff is not over.
            LoadFailed, LoadAborted, NoRoom, ModelUnloading, EngineStopped
        """
        lease = Lease(idle_timeout)
        try:
            self._check_kind(request)
            engine = await self._enter(lease)
            generation = engine.submit(await engine.preprocess(request))
        except BaseException as error:
            self._exit(lease)
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__
            self.metrics.note(outcome, dialect=dialect)
            raise
        if generation.is_done:
            self._finish(lease, generation, dialect)
        else:
            generation.on_done = lambda: self._finish(lease, generation, dialect)
        return generation

    async def ask(self, question: Question) -> Any:
        """Answer of the model's tokenizer; loads the model if need be. Raises as generate(), and PromptRejected."""
        lease = Lease()
        try:
            return await (await self._enter(lease)).ask(question)
        finally:
            self._exit(lease)

    async def hold(self, idle_timeout: float | None = None) -> None:
        """Load the model if need be, as a request without a question; it then stays for idle_timeout seconds.

        0 unloads it, once it has no requests; a model that is not loaded is not loaded for that. Raises as generate().
        """
        if idle_timeout == 0 and (self.is_absent or self.state.is_leaving):
            return
        lease = Lease(idle_timeout)
        try:
            await self._enter(lease)
        finally:
            self._exit(lease)

    def _check_kind(self, request: EngineRequest) -> None:
        """Raise WrongKind or SeesNoImages as far as the kind is known before the model is loaded."""
        if self.kind is not None and self.kind not in request.kinds:
            raise WrongKind(self.key, self.kind)
        prompt = request.prompt if isinstance(request, GenerationRequest) else None
        if not self.may_see and isinstance(prompt, ChatPrompt) and prompt.images:
            raise SeesNoImages(prompt.images[0].origin)

    async def _enter(self, lease: Lease) -> Engine:
        """Take a request in. The engine that serves it, once there is one."""
        self._lifecycle.check_admission()
        if self.requests >= self.spec.max_running + self.spec.max_waiting:
            raise QueueFull(self.key, self.spec.max_waiting, max(1.0, self.pace))
        if self.is_loaded:
            self._queue.admit(lease)
            self.restart_idle_timer()
        else:
            self._queue.add(lease)
            self._memory.reconsider()  # a load that was explicit now has a request that waits
            await self._lifecycle.load(self.spec)
        if self._engine is None:
            raise ModelUnloading(self.key)
        return self._engine

    def _finish(self, lease: Lease, generation: Generation, dialect: str) -> None:
        """The engine is done with a request."""
        if generation.usage:  # a complete answer
            self._queue.note_answer(lease)
            self._lifecycle.backoff.reset()
        self._exit(lease)
        self.metrics.note(generation.outcome, generation.usage, dialect)

    def _exit(self, lease: Lease) -> None:
        if self._queue.remove(lease):
            self.restart_idle_timer()
            self._memory.reconsider()

    async def settled(self) -> None:
        """Wait until the engine, if there is one, is through with the requests that have ended."""
        if self._engine:
            await self._engine.settled()

    # -- load and unload ------------------------------------------------------------------------------------------

    async def load(self, on_progress: Callable[[LoadProgress], None] = lambda progress: None) -> None:
        """Load the model, as Lifecycle.load(); of a loaded one it is a use. Raises LoadFailed, LoadAborted, NoRoom,
        ModelUnloading.
        """
        with self._loader.reporting_to(on_progress):
            await self._lifecycle.load(self.spec)
        self._queue.note_use()
        self.restart_idle_timer()

    async def unload(self, mode: UnloadMode, patience: float | None = None) -> UnloadReport:
        """Unload the model, as Lifecycle.start_unload(). Goes on if the caller leaves. Raises ModelBusy."""
        return await asyncio.shield(self.start_unload(mode, patience))

    def start_unload(self, mode: UnloadMode, patience: float | None) -> asyncio.Task[UnloadReport]:
        """Start to unload the model. Raises ModelBusy at once."""
        return self._lifecycle.start_unload(mode, patience)

    async def close(self, patience: float) -> None:
        """Unload the model for good: a load is aborted, running requests get `patience` seconds."""
        await self._lifecycle.close(patience)

    def retire(self, is_retired: bool = True) -> None:
        """Never load the model again: it is no longer registered. False takes that back."""
        self._lifecycle.is_retired = is_retired

    def forget_alias(self, alias: str) -> None:
        """Take back a copied alias."""
        self.copied_aliases = tuple(name for name in self.copied_aliases if name != alias)

    def restart_idle_timer(self) -> None:
        """Arm the timer of an idle model, disarm that of any other: its state, requests or settings have changed."""
        usual = self._settings().ttl if self.spec.ttl is None else self.spec.ttl
        may_leave = self.is_loaded and not self.spec.pin
        self._idle_timer.start(self._queue.idle_left(usual) if may_leave else math.inf)

    def _follow_transition(self) -> None:
        """Update the other parts after a change of the state."""
        if self.is_loaded:
            if facts := self.facts:  # the files may have told nothing before they were fetched
                self._known_kind = facts.kind
            self._queue.admit_waiting()
        self.restart_idle_timer()

    def pin(self, is_pinned: bool) -> None:
        """Keep the model in memory, or no longer, until its settings are read again."""
        self.spec = replace(self.spec, pin=is_pinned)
        self.restart_idle_timer()
        self._memory.reconsider()

    # -- for the memory budget ------------------------------------------------------------------------------------

    @property
    def waiting_since(self) -> float | None:
        """Arrival of the oldest request that waits for the model, by time.monotonic(); None without one."""
        return self._queue.waiting_since

    @property
    def is_pinned(self) -> bool:
        """Whether it is never evicted."""
        return self.spec.pin

    @property
    def reserved_bytes(self) -> int:
        """Memory that the model holds: what is reserved for it, and the KV cache beyond that."""
        return self._memory.held(self._reservation)

    def resident(self, bytes: int) -> Resident:
        """Figures of the model for a decision on memory."""
        return Resident(
            self,
            bytes,
            is_pinned=self.spec.pin,
            is_busy=self.requests > 0 or not self.is_loaded,
            is_evictable=self.is_loaded,
            last_used=self._queue.last_used,
            resident_since=self._lifecycle.ready_since,
        )

    def evict(self) -> None:
        """Unload the model after its running requests; those that arrive from now on wait until it is loaded again."""
        self._lifecycle.start_drain(ModelState.EVICTING, "evict")
