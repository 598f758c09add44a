"""The models of a server: registered, loaded, unloaded, replaced, reloaded, closed.

ModelManager has one ModelInstance per key (manager/instance.py) in its Registry (manager/registry.py); all of them
share one MemoryBudget (manager/memory_budget.py).

Invariants
1. Only registered sources are loaded, and models of the library (manager/library.py). A request registers nothing else,
   unless allow_any_model is set; a model that it registered then and that could not be loaded is removed when the next
   one comes.
2. A model that was replaced (manager/replacements.py) or removed is retired at once; its running requests have
   shutdown_timeout to finish.
3. close() finds every model that may have an engine, registered or not.
4. Work that a caller asked for goes on when the caller has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import EngineError, ModelExists, ModelNotFound
from mlxserver.engine.kv_pool import KVPool
from mlxserver.engine.loading import sources
from mlxserver.engine.loading.estimate import Estimate, budget
from mlxserver.engine.loading.library.scan import Scan
from mlxserver.engine.metrics import ModelMetrics, RankReport, TierUsage
from mlxserver.manager.eviction import Rules
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.library import Library
from mlxserver.manager.loading import Services, StartEngine
from mlxserver.manager.memory_budget import MemoryBudget
from mlxserver.manager.pulls import Pulls
from mlxserver.manager.registry import Registry
from mlxserver.manager.reload import Reload, changes, contradicts, is_live
from mlxserver.manager.replacements import Replacements, load_all
from mlxserver.manager.states import LoadProgress, ModelState, UnloadMode, UnloadReport
from mlxserver.manager.tasks import Tasks

log = logging.getLogger("models")

_SETTLE_PATIENCE = 5.0  # seconds for a busy engine to come to the end of its step
CLOSE_GRACE = 10.0  # seconds that engines get to end


class ModelManager:
    """All models by key.

    start_engine: makes the engine of a spec (runners/builder.py in the server, a scripted one in tests).
    measure_memory: bytes that this process holds; measure_arrays: those of them in models' arrays. estimate: memory
    that a model will take. `ranks`: reports of the ranks that share models, none if the server is alone. `cache_usage`,
    `drop_prefixes`: of the prefix cache. pool: what the engines' KV cache and prefixes come out of. scan: finds
    the models of this machine; None: there are none.
    """

    def __init__(
        self,
        settings: Settings,
        start_engine: StartEngine,
        measure_memory: Callable[[], int],
        estimate: Callable[[ModelSpec], Estimate],
        measure_arrays: Callable[[], int] = lambda: 0,
        pool: KVPool | None = None,
        scan: Scan | None = None,
    ) -> None:
        self.settings = settings
        self.ranks: Callable[[], Sequence[RankReport]] = list
        self.cache_usage: Callable[[], Sequence[TierUsage]] = list
        self.drop_prefixes: Callable[[], None] = lambda: None
        self.memory = MemoryBudget(self._rules, measure_arrays, pool)
        self._started = time.monotonic()
        self.estimate = estimate
        self._registry = Registry()
        self._services = Services(
            start_engine,
            estimate,
            measure_memory,
            lambda: self.settings,
            lambda: {instance.key: instance.spec for instance in self._registry.instances},
        )
        self._tasks = Tasks()
        self._replacements = Replacements(self._registry, lambda: self.settings, self._tasks)
        self.library = Library(scan, lambda: self.settings, self._registry, self.register, self._tasks)
        self.pulls = Pulls(self.library, lambda: self.settings, estimate, self._tasks)
        for spec in settings.models:
            self.register(spec)

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
        """Counters of all models, one per key."""
        return self._registry.metrics

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def is_closing(self) -> bool:
        """Whether the server stops."""
        return self.memory.is_closed

    async def clear_cache(self) -> None:
        """Empty the prefix cache, in memory and on disk: of all requests that have ended, the last ones too."""
        settled = [asyncio.ensure_future(instance.settled()) for instance in self.all_instances]
        if settled:
            _, late = await asyncio.wait(settled, timeout=_SETTLE_PATIENCE)
            for task in late:
                task.cancel()
        await asyncio.to_thread(self.drop_prefixes)

    # -- register, resolve ----------------------------------------------------------------------------------------

    def register(self, spec: ModelSpec) -> ModelInstance:
        """Register a model without loading it. A spec that agrees with the registered one changes nothing.

        Raises:
            ModelExists: the key has another source, or another adapter, type or context than one that is stated.
        """
        known = self._registry.get(spec.key)
        if known is None:
            self._registry.put(known := self._new(spec))
        elif contradicts(spec, known.spec):
            raise ModelExists(spec.key, known.spec.source, spec.source)
        return known

    def instance(self, name: str, *others: str) -> ModelInstance:
        """The model with this key or alias, or that the name fits. others: more spellings. Raises ModelNotFound."""
        return self._registry.find(name, *others)

    def copy(self, instance: ModelInstance, alias: str) -> None:
        """Give a model one more name while the server runs. Raises ModelExists."""
        self._registry.copy(instance, alias)

    def resolve(self, name: str, *others: str) -> ModelInstance:
        """As instance(), for a request that the model is to serve.

        Registers one of the library; any other if allow_any_model is set.

        Raises:
            ModelNotFound
        """
        if found := self.library.meant_by(name, *others):
            return self.library.instance(found)
        try:
            return self._registry.find(name, *others)
        except ModelNotFound:
            may_register = self.settings.allow_any_model and self.settings.load_on_demand
            if not (may_register and sources.is_repository(name)):
                raise
        self._remove_failed()
        return self.register(ModelSpec(name, name))

    def _remove_failed(self) -> None:
        """Remove the models that a request registered and that never could be loaded."""
        configured = {spec.key for spec in self.settings.models}
        for instance in self.instances:
            has_failed = instance.metrics.loads and not instance.metrics.loads["loaded"]
            if has_failed and instance.is_absent and instance.key not in configured and not instance.requests:
                self._registry.remove(instance)

    def _new(self, spec: ModelSpec) -> ModelInstance:
        return ModelInstance(spec, self._services, self.memory, self._registry.metrics_of(spec.key))

    def _rules(self) -> Rules:
        return Rules(budget(self.settings.memory_limit), self.settings.min_residency, self.settings.max_wait)

    # -- load, replace --------------------------------------------------------------------------------------------

    async def load(
        self,
        spec: ModelSpec,
        *,
        replaces: bool = False,
        on_progress: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> ModelInstance:
        """Register a model and load it; a new key is removed again if that fails.

        replaces: the model takes the place of another source under its key, which is put back if this one fails.

        Raises:
            ModelExists, ModelReplaced, LoadFailed, LoadAborted, NoRoom, ModelUnloading
        """
        known = self._registry.get(spec.key)
        if known is None or replaces:
            self._registry.check_aliases(spec)
        if known and replaces and contradicts(spec, known.spec):
            load = self._replacements.replace(known, self._new(spec), on_progress)
        elif known is None and (other := self._registry.with_alias(spec.key)):
            raise ModelExists(spec.key, other.spec.source, spec.source)
        else:
            load = self._load(self.register(spec), on_progress, is_new=known is None)
        return await asyncio.shield(self._tasks.keep(load))

    async def preload(self) -> None:
        """Load the models that are marked for it; one that fails is logged and does not stop the others."""
        await load_all(instance for instance in self.instances if instance.spec.preload)

    async def _load(
        self, instance: ModelInstance, on_progress: Callable[[LoadProgress], None], *, is_new: bool
    ) -> ModelInstance:
        try:
            await instance.load(on_progress)
        except EngineError:
            if is_new and instance.is_absent:
                self._registry.remove(instance)
            raise
        return instance

    # -- unload ---------------------------------------------------------------------------------------------------

    async def unload(self, name: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Unload a model; it stays registered. Raises ModelNotFound, ModelBusy."""
        return await self.instance(name).unload(mode, patience)

    async def forget(self, name: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Remove a model's key at once, and unload it. Raises ModelNotFound, ModelBusy."""
        return await asyncio.shield(self._replacements.unregister(self.instance(name), mode, patience))

    # -- reload, close --------------------------------------------------------------------------------------------

    async def reload(self, settings: Settings) -> Reload:
        """Apply new settings. Models whose section did not change are not touched; changed ones that were loaded are
        loaded anew, in the background.
        """
        found = changes(self.settings, settings, self.keys)
        specs = {spec.key: spec for spec in settings.models}
        self.settings = settings
        for key in found.removed:
            self._replacements.unregister(self.instance(key), "drain", settings.shutdown_timeout)
        added = [self.register(specs[key]) for key in found.added]
        wanted = [instance for instance in added if instance.spec.preload]
        wanted += [changed for key in found.changed if (changed := self._change(specs[key]))]
        self._tasks.keep(load_all(wanted))
        self._tasks.keep(self.library.refresh())
        self.memory.reconsider()
        for instance in self.instances:
            instance.restart_idle_timer()
        return found

    def _change(self, spec: ModelSpec) -> ModelInstance | None:
        """Give a model its new section. The instance that has to be loaded for it, if any."""
        known = self.instance(spec.key)
        if is_live(known.spec, spec):
            known.spec = spec
            return None
        was_loaded = known.state in (ModelState.READY, ModelState.LOADING)
        self._replacements.put(new := self._new(spec))
        return new if was_loaded or spec.preload else None

    async def close(self, patience: float) -> None:
        """Abort loads, let running requests finish for `patience` seconds, then end every engine.

        An engine that is stalled is left behind, CLOSE_GRACE seconds later.
        """
        self.memory.close()
        self.pulls.stop()
        closing = [asyncio.ensure_future(instance.close(patience)) for instance in {*self.all_instances}]
        if not (pending := [*closing, *self._tasks.pending]):
            return
        done, stalled = await asyncio.wait(pending, timeout=patience + CLOSE_GRACE)
        for outcome in await asyncio.gather(*done, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
                log.error("The end of a model met an unexpected error", exc_info=outcome)
        if stalled:
            log.error("%d models could not be unloaded", len(stalled))
