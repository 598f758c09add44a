"""Which models there are: those that are registered, and those that are coming to be or no longer are.

Rule 1: a model that is no longer registered is retired: whoever still holds it can't have it loaded again.
Rule 2: all_instances who may have an engine is in here, until that has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from mlxserver.engine.errors import ModelNotFound, ModelReplaced
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import UnloadReport


class Registry:
    """The models by key."""

    def __init__(self) -> None:
        self._registered: dict[str, ModelInstance] = {}
        self._arriving: dict[str, ModelInstance] = {}  # by the key under which they replace others
        self._departing: set[ModelInstance] = set()

    @property
    def keys(self) -> list[str]:
        """Every registered key."""
        return list(self._registered)

    @property
    def instances(self) -> list[ModelInstance]:
        """Every registered model."""
        return list(self._registered.values())

    @property
    def all_instances(self) -> list[ModelInstance]:
        """Every model that may have an engine, registered or not."""
        return [*self.instances, *self._arriving.values(), *self._departing]

    @property
    def metrics(self) -> list[ModelMetrics]:
        """The counters of all of them, one a key."""
        return list({instance.key: instance.metrics for instance in self.all_instances}.values())

    def metrics_of(self, key: str) -> ModelMetrics:
        """The counters of a key; from zero if there is no such model."""
        return next((metrics for metrics in self.metrics if metrics.key == key), None) or ModelMetrics(key)

    def get(self, key: str) -> ModelInstance | None:
        """The model that is registered under this very key."""
        return self._registered.get(key)

    def find(self, key: str) -> ModelInstance:
        """The model of this key or alias. Raises ModelNotFound."""
        if found := self.get(key) or self.named(key):
            return found
        raise ModelNotFound(key, self.keys)

    def named(self, alias: str) -> ModelInstance | None:
        """The model that has this alias."""
        return next((instance for instance in self.instances if alias in instance.spec.aliases), None)

    def put(self, instance: ModelInstance) -> ModelInstance | None:
        """Register a model, and give the one that had its key before."""
        former = self.get(instance.key)
        self._registered[instance.key] = instance
        instance.is_retired = False
        return former

    def remove(self, instance: ModelInstance) -> None:
        """Take a model out of the registry, in which its key may be another one's by now."""
        instance.is_retired = True
        if self.get(instance.key) is instance:
            del self._registered[instance.key]

    def depart(self, instance: ModelInstance, leaving: asyncio.Task[UnloadReport]) -> None:
        """Take out a model that is being unloaded."""
        self.remove(instance)
        self._departing.add(instance)
        leaving.add_done_callback(lambda _: self._departing.discard(instance))

    @contextmanager
    def arriving(self, new: ModelInstance) -> Iterator[None]:
        """Know of a model that is to take another's place, one a key. Raises ModelReplaced."""
        if new.key in self._arriving:
            raise ModelReplaced(new.key)
        self._arriving[new.key] = new
        try:
            yield
        finally:
            del self._arriving[new.key]
