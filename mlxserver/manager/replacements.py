"""Replacement of a registered model by another one of its key, beside it if there is memory for both, or after it.

Invariants
1. A model that was replaced is retired at once; its running requests have shutdown_timeout to finish.
2. If the new model can't be loaded, the old one has its key again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from mlxserver.config.settings import Settings
from mlxserver.engine.errors import EngineError, NoRoom
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.registry import Registry
from mlxserver.manager.states import LoadProgress, UnloadMode, UnloadReport
from mlxserver.manager.tasks import Tasks


class Replacements:
    """Puts models in the place of others. Used on one event loop. settings: read at every use."""

    def __init__(self, registry: Registry, settings: Callable[[], Settings], tasks: Tasks) -> None:
        self._registry = registry
        self._settings = settings
        self._tasks = tasks

    async def replace(
        self, old: ModelInstance, new: ModelInstance, on_progress: Callable[[LoadProgress], None]
    ) -> ModelInstance:
        """Load the new model, and put it in the place of the old one. Raises as ModelManager.load()."""
        was_loaded = old.is_loaded
        with self._registry.replacing(new):
            try:
                await new.load(on_progress)
                self.put(new)
            except NoRoom:
                if not was_loaded:
                    raise
                await self._load_after(old, new, on_progress)
        return new

    async def _load_after(
        self, old: ModelInstance, new: ModelInstance, on_progress: Callable[[LoadProgress], None]
    ) -> None:
        """Unload the old model, then load the new one; if that fails, put the old one back."""
        self.put(new)  # requests from here on wait for it
        await old.unload("drain", self._settings().shutdown_timeout)
        try:
            await new.load(on_progress)
        except EngineError:
            if self._registry.get(new.key) is new:
                self.unregister(new, "abort", None)  # it may have been asked for again at once
                self._registry.put(old)
                self._tasks.keep(load_all([old]))
            raise

    def put(self, new: ModelInstance) -> None:
        """Register a model in place of the one that has its key now."""
        if former := self._registry.put(new):
            self.unregister(former, "drain", self._settings().shutdown_timeout)

    def unregister(
        self, instance: ModelInstance, mode: UnloadMode, patience: float | None
    ) -> asyncio.Task[UnloadReport]:
        """Remove a model from the registry, and start to unload it. Raises ModelBusy at once."""
        unload = instance.start_unload(mode, patience)
        self._registry.remove_leaving(instance, unload)
        return unload


async def load_all(instances: Iterable[ModelInstance]) -> None:
    """Load models at once; one that fails does not stop the others."""
    for outcome in await asyncio.gather(*(instance.load() for instance in instances), return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, EngineError):
            raise outcome
