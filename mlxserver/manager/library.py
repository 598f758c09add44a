"""Library of the manager: the models of this machine that a request may name although they are not registered.

Invariants
1. A scan runs on a thread of its own, one at a time, and never fails a request or the start.
2. Answers use what the last scan has found; a scan that is out of date is repeated in the background.
3. Registered models keep their names. A model that a request registered from the library, and that is no longer in it,
   is removed once it is idle.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from mlxserver.config.settings import ModelSpec, Settings
from mlxserver.engine.errors import ModelLoaded, ModelNotFound
from mlxserver.engine.loading.errors import SourceInvalid
from mlxserver.engine.loading.library.remove import remove
from mlxserver.engine.loading.library.scan import LocalModel, Scan
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.registry import Registry
from mlxserver.manager.tasks import Tasks

log = logging.getLogger("models")

FRESH = 10.0  # seconds for which a scan is up to date
MOMENT = 2.0  # seconds for which one is that even for a list of the library, unless folders have changed


class Library:
    """Models on this machine. Used on one event loop.

    scan: searches the folders; None: there are none. settings: read at every scan. register: of the manager.
    """

    def __init__(
        self,
        scan: Scan | None,
        settings: Callable[[], Settings],
        registry: Registry,
        register: Callable[[ModelSpec], ModelInstance],
        tasks: Tasks,
    ) -> None:
        self.models: tuple[LocalModel, ...] = ()
        self._scan = scan
        self._settings = settings
        self._registry = registry
        self._register = register
        self._tasks = tasks
        self._by_request: set[str] = set()  # keys that requests registered
        self._scanned = -math.inf  # time.monotonic() of the last scan
        self._seen: tuple[object, ...] = ()  # of its folders
        self._running: asyncio.Task[None] | None = None

    @property
    def usable(self) -> list[LocalModel]:
        """The models that can be loaded."""
        return [model for model in self.models if model.facts]

    @property
    def unregistered(self) -> list[LocalModel]:
        """The models that can be loaded and are not registered, under this name or another."""
        return [model for model in self.usable if not self.registered(model)]

    # -- names ----------------------------------------------------------------------------------------------------

    def find(self, name: str) -> LocalModel | None:
        """The model with this name that can be loaded; None without one, and then the folders are searched again."""
        found = next((model for model in self.usable if name in model.names), None)
        if found is None:
            self.refresh_soon()
        return found

    def meant_by(self, *names: str) -> LocalModel | None:
        """The model with one of these names that can be loaded, unless a registered one has them, patterns aside."""
        if any(self._registry.get(name) or self._registry.with_alias(name) for name in names):
            return None
        return next(filter(None, map(self.find, names)), None)

    def with_source(self, source: str) -> LocalModel | None:
        """The model of a source, by its path or, in the hub's cache, its id."""
        return next((model for model in self.usable if source in sources_of(model)), None)

    def spec(self, model: LocalModel) -> ModelSpec:
        """The spec to register a model with. Names that registered models have stay theirs."""
        is_taken = model.alias in self._registry.keys or (model.alias and self._registry.with_alias(model.alias))
        aliases = () if is_taken or model.alias is None else (model.alias,)
        return ModelSpec(model.key, str(model.path), aliases=aliases)

    def registered(self, model: LocalModel) -> ModelInstance | None:
        """The registered model that a model is: it has its full name, or its source and no adapter."""
        if named := self._registry.get(model.key):
            return named
        sources = sources_of(model)
        instances = self._registry.instances
        return next((each for each in instances if each.spec.source in sources and not each.spec.adapter), None)

    def instance(self, model: LocalModel) -> ModelInstance:
        """The registered model that a model is, registered now if it was not."""
        if known := self.registered(model):
            return known
        self._by_request.add(model.key)
        return self._register(self.spec(model))

    # -- removal --------------------------------------------------------------------------------------------------

    async def delete(self, name: str, *, force: bool = False) -> LocalModel:
        """Remove the files of a model, damaged or not; a loaded one is unloaded if that is forced.

        Raises:
            ModelNotFound, ModelLoaded, SourceInvalid
        """
        await self.refresh()
        model = self._files_of(name)
        await asyncio.shield(self._tasks.keep(self._delete(model, force)))
        return model

    def _files_of(self, name: str) -> LocalModel:
        """The model with this name, or that a registered model with it is."""
        registered = self._registry.get(name) or self._registry.with_alias(name)
        source = registered.spec.source if registered else ""
        named = next((model for model in self.models if name in model.names), None)
        if model := self.with_source(source) if registered else named:
            return model
        if registered:
            raise SourceInvalid(source, "it has no files in the library; nothing was removed")
        raise ModelNotFound(name, [*self._registry.keys, *(each.key for each in self.models)])

    async def _delete(self, model: LocalModel, force: bool) -> None:
        users = [each for each in self._registry.all_instances if each.spec.source in sources_of(model)]
        if not force and (loaded := next((each for each in users if not each.is_absent), None)):
            raise ModelLoaded(loaded.key)
        await asyncio.gather(*(each.unload("abort") for each in users if not each.is_absent))
        await asyncio.to_thread(remove, model)
        await self.refresh()

    def _remove_vanished(self) -> None:
        """Remove the models that requests registered and that are no longer in the library."""
        names = {model.key for model in self.models}
        for key in self._by_request - names:
            instance = self._registry.get(key)
            if instance is None or (instance.is_absent and not instance.requests):
                self._by_request.discard(key)
                if instance:
                    self._registry.remove(instance)

    # -- scans ----------------------------------------------------------------------------------------------------

    def refresh_soon(self) -> None:
        """Start a scan in the background, unless the last one is up to date."""
        if self._scan and time.monotonic() - self._scanned > FRESH:
            self._start()

    async def refresh(self) -> None:
        """Search the folders now, and wait for what is found. A scan that runs already may have begun too early."""
        if self._running:
            await asyncio.shield(self._running)
        if self._scan:
            await asyncio.shield(self._start())

    async def refresh_if_old(self) -> None:
        """As refresh(), unless the last scan was a moment ago and no entry of its folders has come or gone since."""
        if time.monotonic() - self._scanned > MOMENT or self._seen != await asyncio.to_thread(self._look):
            await self.refresh()

    def _look(self) -> tuple[object, ...]:
        """What tells that a scan would find more or less: the settings, and when the folders of models changed."""
        settings = self._settings()
        return (
            settings.library,
            settings.model_dirs,
            {top: changed_at(top) for top in {each.top for each in self.models}},
        )

    def _start(self) -> asyncio.Task[None]:
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return self._running

    async def _run(self) -> None:
        settings = self._settings()
        try:
            scan = self._scan if settings.library else None
            self.models = await asyncio.to_thread(scan, settings.model_dirs) if scan else ()
            self._seen = await asyncio.to_thread(self._look)
        except Exception as error:
            log.warning("The models of this machine could not be listed: %s: %s", type(error).__name__, error)
        finally:
            self._scanned, self._running = time.monotonic(), None
        self._remove_vanished()


def changed_at(folder: Path) -> int | None:
    """When an entry of a folder came or went, in nanoseconds; None if it is not there."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def sources_of(model: LocalModel) -> tuple[str, ...]:
    """Sources, as registered models may state them, that are this model."""
    own = str(model.path)
    return (own, model.key) if model.place == "huggingface" else (own,)
