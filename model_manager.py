"""The models of a server, and what becomes of them: registered, loaded, replaced, changed, unloaded, forgotten.

ModelManager has one ModelInstance a key (manager/instance.py) in its Registry (manager/registry.py); all of them
share one MemoryBudget (manager/memory_budget.py).

Rule 1: only registered sources are loaded. A request registers nothing, unless allow_any_model is set; what it
        registered then and could not be loaded is forgotten when the next one comes.
Rule 2: a model that was replaced or removed is forgotten at once; its last requests have shutdown_timeout to finish.
Rule 3: close() finds every model that may have an engine, registered or not.
Rule 4: what somebody asks for goes on when that caller has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import EngineError, ModelExists, ModelNotFound, NoRoom
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import Estimate, budget
from mlxserver.engine.metrics import ModelMetrics, RankReport
from mlxserver.manager.eviction import Rules
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.loading import Services, StartEngine, retrieve_exception
from mlxserver.manager.memory_budget import MemoryBudget
from mlxserver.manager.registry import Registry
from mlxserver.manager.reload import Reload, changes, contradicts, is_live
from mlxserver.manager.states import ModelState, Step, UnloadMode, UnloadReport

log = logging.getLogger("models")

T = TypeVar("T")

CLOSE_GRACE = 10.0  # seconds that engines get to end


class ModelManager:
    """All models by key.

    `start_engine` makes the engine of a spec (runners/builder.py in the server, a scripted one in tests);
    `measure_memory` tells the bytes that this process holds, `measure_arrays` those of them that are models' arrays;
    `estimate` what a model will take.
    """

    def __init__(
        self,
        settings: Settings,
        start_engine: StartEngine,
        measure_memory: Callable[[], int],
        estimate: Callable[[ModelSpec], Estimate],
        measure_arrays: Callable[[], int] = lambda: 0,
    ) -> None:
        self.settings = settings
        self.ranks: Callable[[], Sequence[RankReport]] = list  # how those are that share models, if there are several
        self._started = time.monotonic()
        self.memory = MemoryBudget(self._rules, measure_arrays)
        self._services = Services(start_engine, estimate, measure_memory, lambda: self.settings)
        self._registry = Registry()
        self._work: set[asyncio.Task[Any]] = set()
        for spec in settings.models:
            self.register(spec)

    # -- who there is ---------------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """Every registered key."""
        return self._registry.keys

    @property
    def instances(self) -> list[ModelInstance]:
        """Every registered model."""
        return self._registry.instances

    @property
    def all_instances(self) -> list[ModelInstance]:
        """Every model that may have an engine, registered or not."""
        return self._registry.all_instances

    @property
    def metrics(self) -> list[ModelMetrics]:
        """The counters of all of them, one a key."""
        return self._registry.metrics

    def instance(self, key: str) -> ModelInstance:
        """The model of this key or alias. Raises ModelNotFound."""
        return self._registry.find(key)

    def resolve(self, key: str) -> ModelInstance:
        """The model of this key or alias, for a request that it is to answer: registered for it if allow_any_model is
        set. Raises ModelNotFound.
        """
        try:
            return self.instance(key)
        except ModelNotFound:
            may_come = self.settings.allow_any_model and self.settings.load_on_demand
            if not (may_come and sources.is_repository(key)):
                raise
        self._forget_failures()
        return self.register(ModelSpec(key, key))

    def register(self, spec: ModelSpec) -> ModelInstance:
        """Make a model known without loading it. A spec that agrees with the known one is no change.

        Raises:
            ModelExists: the key has another source, or another adapter, type or context than one that is stated.
        """
        known = self._registry.get(spec.key)
        if known is None:
            self._registry.put(known := self._new(spec))
        elif contradicts(spec, known.spec):
            raise ModelExists(spec.key, known.spec.source, spec.source)
        return known

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def is_closing(self) -> bool:
        """Whether the server stops."""
        return self.memory.is_closed

    # -- coming and going -----------------------------------------------------------------------------------------

    async def load(
        self, spec: ModelSpec, *, replaces: bool = False, on_step: Callable[[Step], None] = lambda step: None
    ) -> ModelInstance:
        """Register a model and load it; one that was unknown is forgotten again if that fails.

        replaces: the model takes the place of another source under its key, which is put back if this one fails.
        on_step hears of the load's progress.

        Raises:
            ModelExists, ModelReplaced, LoadFailed, LoadAborted, NoRoom, ModelUnloading
        """
        known = self._registry.get(spec.key)
        if known and replaces and contradicts(spec, known.spec):
            work = self._replace(known, self._new(spec), on_step)
        elif known is None and (other := self._registry.named(spec.key)):
            raise ModelExists(spec.key, other.spec.source, spec.source)
        else:
            work = self._introduce(self.register(spec), on_step, is_new=known is None)
        return await asyncio.shield(self._keep(work))

    async def unload(self, key: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Unload a model; it stays registered. Raises ModelNotFound, ModelBusy."""
        return await self.instance(key).unload(mode, patience)

    async def forget(self, key: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Unload a model and remove its key at once. Raises ModelNotFound, ModelBusy."""
        return await asyncio.shield(self._part_with(self.instance(key), mode, patience))

    async def preload(self) -> None:
        """Load what is to be there at the start; one that fails is logged and does not stop the others."""
        await self._load_all(instance for instance in self.instances if instance.spec.preload)

    async def reload(self, settings: Settings) -> Reload:
        """Take new settings. Models whose section did not change are not touched; changed ones that were loaded are
        loaded anew, in the background.
        """
        new = changes(self.settings, settings, self.keys)
        specs = {spec.key: spec for spec in settings.models}
        self.settings = settings
        for key in new.removed:
            self._part_with(self.instance(key), "drain", settings.shutdown_timeout)
        wanted = [self.register(specs[key]) for key in new.added]
        wanted = [instance for instance in wanted if instance.spec.preload]
        wanted += [changed for key in new.changed if (changed := self._change(specs[key]))]
        self._keep(self._load_all(wanted))
        self.memory.reconsider()
        for instance in self.instances:
            instance.restart_idle_timer()
        return new

    async def close(self, patience: float) -> None:
        """Call loads off, let running requests finish for `patience` seconds, then end every engine.

        One that is stuck is left where it is, CLOSE_GRACE seconds later.
        """
        self.memory.close()
        closing = [asyncio.ensure_future(instance.close(patience)) for instance in {*self.all_instances}] + [
            *self._work
        ]
        if not closing:
            return
        done, stuck = await asyncio.wait(closing, timeout=patience + CLOSE_GRACE)
        for outcome in await asyncio.gather(*done, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
                log.error("The end of a model met what nobody expected", exc_info=outcome)
        if stuck:
            log.error("%d models could not be unloaded", len(stuck))

    def _new(self, spec: ModelSpec) -> ModelInstance:
        return ModelInstance(spec, self._services, self.memory, self._registry.metrics_of(spec.key))

    def _rules(self) -> Rules:
        return Rules(budget(self.settings.memory_limit), self.settings.min_residency, self.settings.max_wait)

    async def _introduce(
        self, instance: ModelInstance, on_step: Callable[[Step], None], *, is_new: bool
    ) -> ModelInstance:
        """Load a registered model; if that fails, forget it if it is new."""
        try:
            with instance.reporting_to(on_step):
                await instance.load()
        except EngineError:
            if is_new and instance.is_absent:
                self._registry.remove(instance)
            raise
        return instance

    async def _replace(self, old: ModelInstance, new: ModelInstance, on_step: Callable[[Step], None]) -> ModelInstance:
        """Load the new one beside the old one, or else after it; the old one is put back if the new one fails."""
        was_loaded = old.state is ModelState.READY
        with self._registry.arriving(new), new.reporting_to(on_step):
            try:
                await new.load()
                self._put(new)
            except NoRoom:
                if not was_loaded:
                    raise
                await self._load_after(old, new)
        return new

    async def _load_after(self, old: ModelInstance, new: ModelInstance) -> None:
        self._put(new)  # requests from here on wait for it
        await old.unload("drain", self.settings.shutdown_timeout)
        try:
            await new.load()
        except EngineError:
            if self._registry.get(new.key) is new:
                self._part_with(new, "abort", None)  # somebody may have asked for it again at once
                self._registry.put(old)
                self._keep(self._load_all([old]))
            raise

    def _put(self, new: ModelInstance) -> None:
        """Register a model in the place of whichever has its key now."""
        if former := self._registry.put(new):
            self._part_with(former, "drain", self.settings.shutdown_timeout)

    def _change(self, spec: ModelSpec) -> ModelInstance | None:
        """Give a model its new section. What has to be loaded for it, if anything."""
        known = self.instance(spec.key)
        if is_live(known.spec, spec):
            known.spec = spec
            return None
        was_loaded = known.state in (ModelState.READY, ModelState.LOADING)
        self._put(new := self._new(spec))
        return new if was_loaded or spec.preload else None

    def _part_with(
        self, instance: ModelInstance, mode: UnloadMode, patience: float | None
    ) -> asyncio.Task[UnloadReport]:
        """Take a model out of the registry, and unload it. Raises ModelBusy at once."""
        leaving = instance.start_unload(mode, patience)
        self._registry.depart(instance, leaving)
        return leaving

    def _forget_failures(self) -> None:
        """Strike the models that a request registered and that were never there."""
        configured = {spec.key for spec in self.settings.models}
        for instance in self.instances:
            was_tried = instance.metrics.loads and not instance.metrics.loads["loaded"]
            if was_tried and instance.is_absent and instance.key not in configured and not instance.requests:
                self._registry.remove(instance)

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let work go on by itself; close() waits for it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        task.add_done_callback(retrieve_exception)  # whoever asked for it may have left
        return task

    async def _load_all(self, instances: Iterable[ModelInstance]) -> None:
        for outcome in await asyncio.gather(*(instance.load() for instance in instances), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
                raise outcome
