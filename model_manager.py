"""The registry of models: which there are, by which names, and what becomes of them.

ModelManager holds one ModelInstance a key (model_instance.py); all of them share one Room (model_room.py).

Rule 1: only registered sources are loaded. A request registers nothing, unless allow_any_model is set.
Rule 2: a model that was replaced or removed is forgotten at once; its last requests end with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from engine import memory, sources
from engine.config import ModelSpec, Settings
from engine.errors import EngineError, ModelExists, ModelNotFound, NoRoom
from engine.memory import Estimate
from engine.metrics import Metrics
from engine.placement import Rules
from engine.ranks import RankReport
from model_instance import ModelInstance
from model_load import Services, StartEngine
from model_room import Room
from model_state import ModelState, Step, UnloadMode, UnloadReport

log = logging.getLogger("models")

CLOSE_GRACE = 10.0  # seconds that engines get to end

# What changes with new settings while the model stays as it is.
_LIVE_FIELDS = ("aliases", "pin", "preload", "ttl", "max_waiting")
_LIVE_SETTINGS = {
    "models", "log_level", "memory_limit", "min_residency", "max_wait", "ttl", "load_on_demand", "allow_any_model",
    "wedged_after", "api_key", "admin_key", "api_key_file", "admin_key_file", "allow_host", "allow_origin",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reload:
    """What new settings changed: keys of models, and names of settings that take a restart."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()


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
        named = (instance for instance in self._instances.values() if key in instance.spec.aliases)
        if found := self._instances.get(key) or next(named, None):
            return found
        if self.settings.allow_any_model and sources.is_repository(key):
            return self.register(ModelSpec(key, key))
        raise ModelNotFound(key, self.keys)

    def register(self, spec: ModelSpec) -> ModelInstance:
        """Make a model known without loading it. A spec that agrees with the known one is no change.

        Raises:
            ModelExists: the key has another source, or another adapter, type or context than one that is stated.
        """
        known = self._instances.get(spec.key)
        if known is None:
            known = self._instances[spec.key] = self._new(spec)
        elif _contradicts(spec, known.spec):
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
            ModelExists, LoadFailed, LoadAborted, NoRoom, ModelUnloading
        """
        known = self._instances.get(spec.key)
        if known and replaces and _contradicts(spec, known.spec):
            new = self._new(spec)
            with new.heard_by(on_step):
                return await self._replace(known, new)
        instance = self.register(spec)
        try:
            with instance.heard_by(on_step):
                await instance.load()
        except EngineError:
            is_absent = instance.state in (ModelState.UNLOADED, ModelState.FAILED)
            if known is None and is_absent and self._instances.get(spec.key) is instance:
                del self._instances[spec.key]
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
            del self._instances[instance.key]
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
        before, after = ({spec.key: spec for spec in s.models} for s in (self.settings, settings))
        fixed = [field.name for field in fields(Settings) if field.name not in _LIVE_SETTINGS]
        restart = tuple(name for name in fixed if getattr(settings, name) != getattr(self.settings, name))
        removed = tuple(key for key in before if key not in after and key in self._instances)
        added = tuple(key for key in after if key not in self._instances)
        changed = tuple(key for key in after if key in self._instances and after[key] != before.get(key))
        self.settings = settings
        for key in removed:
            self._part_with(self._instances.pop(key))
        wanted = [self.register(after[key]) for key in added]
        wanted = [instance for instance in wanted if instance.spec.preload]
        wanted += [new for key in changed if (new := self._change(after[key]))]
        self._keep(self._load_all(wanted))
        self.room.look()
        return Reload(added, removed, changed, restart)

    async def close(self, patience: float) -> None:
        """Call loads off, let running requests finish for `patience` seconds, then end every engine.

        One that is stuck is left where it is, CLOSE_GRACE seconds later.
        """
        self.room.close()
        everybody = [*self.instances, *self._departing]
        closing = [asyncio.ensure_future(instance.close(patience)) for instance in everybody] + [*self._work]
        if not closing:
            return
        done, stuck = await asyncio.wait(closing, timeout=patience + CLOSE_GRACE)
        await asyncio.gather(*done)
        if stuck:
            log.error("%d models could not be unloaded", len(stuck))

    def _new(self, spec: ModelSpec) -> ModelInstance:
        return ModelInstance(spec, self._services, self.room, self.metrics.of(spec.key))

    def _rules(self) -> Rules:
        budget = memory.budget(self.settings.memory_limit)
        return Rules(budget, self.settings.min_residency, self.settings.max_wait)

    async def _replace(self, old: ModelInstance, new: ModelInstance) -> ModelInstance:
        """Load the new one beside the old one, or else after it; the old one is put back if the new one fails."""
        was_loaded = old.state is ModelState.READY
        try:
            await new.load()
            self._instances[old.key] = new
            self._part_with(old)
            return new
        except NoRoom:
            if not was_loaded:
                raise
        self._instances[old.key] = new  # requests from here on wait for it
        await old.unload("drain")
        try:
            await new.load()
        except EngineError:
            self._instances[old.key] = old
            self._keep(self._load_all([old]))
            raise
        return new

    def _change(self, spec: ModelSpec) -> ModelInstance | None:
        """Give a model its new section. What has to be loaded for it, if anything."""
        known = self._instances[spec.key]
        live = {name: getattr(spec, name) for name in _LIVE_FIELDS}
        if replace(known.spec, **live) == spec:
            known.spec = spec
            return None
        new = self._instances[spec.key] = self._new(spec)
        was_loaded = known.state in (ModelState.READY, ModelState.LOADING)
        self._part_with(known)
        return new if was_loaded or spec.preload else None

    def _part_with(self, instance: ModelInstance) -> None:
        """Unload a model that is no longer in the registry, after its last request."""
        self._departing.add(instance)
        self._keep(self._bid_farewell(instance))

    async def _bid_farewell(self, instance: ModelInstance) -> None:
        await instance.unload("drain")
        self._departing.discard(instance)

    def _keep(self, work: Coroutine[Any, Any, object]) -> None:
        """Let work go on by itself; close() waits for it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _load_all(self, instances: Iterable[ModelInstance]) -> None:
        for outcome in await asyncio.gather(*(instance.load() for instance in instances), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
                raise outcome


def _contradicts(asked: ModelSpec, known: ModelSpec) -> bool:
    """Whether two specs can't be one model's. What `asked` leaves open agrees with anything."""
    stated = ((asked.adapter, known.adapter), (asked.type, known.type), (asked.context_length, known.context_length))
    return asked.source != known.source or any(want is not None and want != has for want, has in stated)
