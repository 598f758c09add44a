"""The registry of models: which there are, by which names, and what becomes of them.

ModelManager holds one ModelInstance a key (model_instance.py); all of them share one Room (model_room.py).

Rule 1: only registered sources are loaded. A request registers nothing, unless allow_any_model is set; what it
        registered then and could not be loaded is forgotten when the next one comes.
Rule 2: a model that was replaced or removed is forgotten at once; its last requests end with it.
Rule 3: close() finds every model that may have an engine, registered or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from engine import memory, sources
from engine.config import ModelSpec, Settings
from engine.errors import EngineError, ModelExists, ModelNotFound, ModelReplaced, NoRoom
from engine.memory import Estimate
from engine.metrics import Metrics
from engine.placement import Rules
from engine.ranks import RankReport
from model_changes import Reload, changes, contradicts, is_live
from model_instance import ModelInstance
from model_load import Services, StartEngine
from model_room import Room
from model_state import ModelState, Step, UnloadMode, UnloadReport

log = logging.getLogger("models")

CLOSE_GRACE = 10.0  # seconds that engines get to end


class ModelManager:
    """All models by key.

    `start_engine` makes the engine of a spec (engine/runtime.py in the server, a scripted one in tests);
    `measure_memory` tells the bytes that this process holds; `estimate` what a model will take.
    """

    def __init__(
        self,
        settings: Settings,
        start_engine: StartEngine,
        measure_memory: Callable[[], int],
        estimate: Callable[[ModelSpec], Estimate],
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.ranks: Callable[[], Sequence[RankReport]] = list  # how those are that share models, if there are several
        self._started = time.monotonic()
        self.room = Room(self._rules)
        self._services = Services(start_engine, estimate, measure_memory, lambda: self.settings)
        self._instances: dict[str, ModelInstance] = {}
        self._departing: set[ModelInstance] = set()  # no longer registered, not yet unloaded
        self._arriving: dict[str, ModelInstance] = {}  # by the key under which they replace others
        self._work: set[asyncio.Task[object]] = set()
        for spec in settings.models:
            self.register(spec)

    # -- who there is ---------------------------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """Every registered key."""
        return list(self._instances)

    @property
    def instances(self) -> list[ModelInstance]:
        """Every registered model."""
        return list(self._instances.values())

    def instance(self, key: str) -> ModelInstance:
        """The model of this key or alias. Raises ModelNotFound."""
        if found := self._instances.get(key) or self._named(key):
            return found
        raise ModelNotFound(key, self.keys)

    def wanted(self, key: str) -> ModelInstance:
        """The model of this key or alias, for a request that it is to answer: registered for it if allow_any_model is
        set. Raises ModelNotFound.
        """
        try:
            return self.instance(key)
        except ModelNotFound:
            if not (self.settings.allow_any_model and sources.is_repository(key)):
                raise
        self._forget_failures()
        return self.register(ModelSpec(key, key))

    def register(self, spec: ModelSpec) -> ModelInstance:
        """Make a model known without loading it. A spec that agrees with the known one is no change.

        Raises:
            ModelExists: the key has another source, or another adapter, type or context than one that is stated.
        """
        known = self._instances.get(spec.key)
        if known is None:
            known = self._instances[spec.key] = self._new(spec)
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
        return self.room.is_closed

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
        known = self._instances.get(spec.key)
        if known and replaces and contradicts(spec, known.spec):
            return await self._replace(known, self._new(spec), on_step)
        if known is None and (other := self._named(spec.key)):
            raise ModelExists(spec.key, other.spec.source, spec.source)
        instance = self.register(spec)
        try:
            with instance.heard_by(on_step):
                await instance.load()
        except EngineError:
            if known is None and instance.is_absent:
                self._strike(instance)
            raise
        return instance

    async def unload(self, key: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Unload a model; it stays registered. Raises ModelNotFound, ModelBusy."""
        return await self.instance(key).unload(mode, patience)

    async def forget(self, key: str, mode: UnloadMode = "drain", patience: float | None = None) -> UnloadReport:
        """Unload a model and remove its key at once. Raises ModelNotFound, ModelBusy."""
        instance = self.instance(key)
        unloading = asyncio.ensure_future(instance.unload(mode, patience))
        await asyncio.sleep(0)  # a refusal comes at once, and leaves the key
        if not (unloading.done() and unloading.exception()):
            self._strike(instance)
            self._departing.add(instance)
            unloading.add_done_callback(lambda _: self._departing.discard(instance))
        return await unloading

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
            self._part_with(self._instances[key])
        wanted = [self.register(specs[key]) for key in new.added]
        wanted = [instance for instance in wanted if instance.spec.preload]
        wanted += [changed for key in new.changed if (changed := self._change(specs[key]))]
        self._keep(self._load_all(wanted))
        self.room.look()
        for instance in self.instances:
            instance.set_expiry()
        return new

    async def close(self, patience: float) -> None:
        """Call loads off, let running requests finish for `patience` seconds, then end every engine.

        One that is stuck is left where it is, CLOSE_GRACE seconds later.
        """
        self.room.close()
        everybody = {*self.instances, *self._departing, *self._arriving.values()}
        closing = [asyncio.ensure_future(instance.close(patience)) for instance in everybody] + [*self._work]
        if not closing:
            return
        done, stuck = await asyncio.wait(closing, timeout=patience + CLOSE_GRACE)
        for outcome in await asyncio.gather(*done, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.error("The end of a model met what nobody expected", exc_info=outcome)
        if stuck:
            log.error("%d models could not be unloaded", len(stuck))

    def _named(self, alias: str) -> ModelInstance | None:
        return next((instance for instance in self.instances if alias in instance.spec.aliases), None)

    def _new(self, spec: ModelSpec) -> ModelInstance:
        return ModelInstance(spec, self._services, self.room, self.metrics.of(spec.key))

    def _rules(self) -> Rules:
        budget = memory.budget(self.settings.memory_limit)
        return Rules(budget, self.settings.min_residency, self.settings.max_wait)

    async def _replace(self, old: ModelInstance, new: ModelInstance, on_step: Callable[[Step], None]) -> ModelInstance:
        """Load the new one beside the old one, or else after it; the old one is put back if the new one fails."""
        if new.key in self._arriving:
            raise ModelReplaced(new.key)
        self._arriving[new.key] = new
        was_loaded = old.state is ModelState.READY
        try:
            with new.heard_by(on_step):
                try:
                    await new.load()
                    self._put(new)
                except NoRoom:
                    if not was_loaded:
                        raise
                    await self._load_after(old, new)
        finally:
            del self._arriving[new.key]
        return new

    async def _load_after(self, old: ModelInstance, new: ModelInstance) -> None:
        self._put(new)  # requests from here on wait for it
        await old.unload("drain")
        try:
            await new.load()
        except EngineError:
            if self._instances.get(new.key) is new:
                self._instances[new.key], new.is_retired, old.is_retired = old, True, False
                self._keep(self._load_all([old]))
            raise

    def _put(self, new: ModelInstance) -> None:
        """Register a model in the place of whichever has its key now."""
        former = self._instances.get(new.key)
        self._instances[new.key] = new
        if former:
            self._part_with(former)

    def _change(self, spec: ModelSpec) -> ModelInstance | None:
        """Give a model its new section. What has to be loaded for it, if anything."""
        known = self._instances[spec.key]
        if is_live(known.spec, spec):
            known.spec = spec
            return None
        was_loaded = known.state in (ModelState.READY, ModelState.LOADING)
        self._put(new := self._new(spec))
        return new if was_loaded or spec.preload else None

    def _part_with(self, instance: ModelInstance) -> None:
        """Take a model out of the registry, and unload it after its last request."""
        self._strike(instance)
        self._departing.add(instance)
        self._keep(self._bid_farewell(instance))

    async def _bid_farewell(self, instance: ModelInstance) -> None:
        await instance.unload("drain")
        self._departing.discard(instance)

    def _strike(self, instance: ModelInstance) -> None:
        """Take a model out of the registry, in which its key may be another one's by now."""
        instance.is_retired = True
        if self._instances.get(instance.key) is instance:
            del self._instances[instance.key]

    def _forget_failures(self) -> None:
        """Strike the models that a request registered and that were never there."""
        configured = {spec.key for spec in self.settings.models}
        for instance in self.instances:
            was_tried = instance.metrics.loads and not instance.metrics.loads["loaded"]
            if was_tried and instance.is_absent and instance.key not in configured and not instance.requests:
                self._strike(instance)

    def _keep(self, work: Coroutine[Any, Any, object]) -> None:
        """Let work go on by itself; close() waits for it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _load_all(self, instances: Iterable[ModelInstance]) -> None:
        for outcome in await asyncio.gather(*(instance.load() for instance in instances), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
                raise outcome
