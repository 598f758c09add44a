"""Registry of the models: those that are registered, those that are to replace them, and those that are leaving.

Invariants
1. A name is a key before it is an alias, and an alias before it fits a pattern; the longest pattern counts.
2. A model that is no longer registered is retired: it can't be loaded again through a reference that is left.
3. Every model that may have an engine is in here until that engine has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from mlxserver.config.aliases import clash, fits
from mlxserver.config.settings import ModelSpec
from mlxserver.engine.errors import ModelExists, ModelNotFound, ModelReplaced
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.manager.instance import ModelInstance
from mlxserver.manager.states import UnloadReport


class Registry:
    """Models by key."""

    def __init__(self) -> None:
        self._registered: dict[str, ModelInstance] = {}
        self._replacements: dict[str, ModelInstance] = {}  # by the key that they are to take
        self._leaving: set[ModelInstance] = set()

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
        return [*self.instances, *self._replacements.values(), *self._leaving]

    @property
    def metrics(self) -> list[ModelMetrics]:
        """Counters of all models, one per key."""
        return list({instance.key: instance.metrics for instance in self.all_instances}.values())

    def metrics_of(self, key: str) -> ModelMetrics:
        """Counters of a key; new ones if there is no such model."""
        return next((metrics for metrics in self.metrics if metrics.key == key), None) or ModelMetrics(key)

    def get(self, key: str) -> ModelInstance | None:
        """The model registered under this key; aliases do not count."""
        return self._registered.get(key)

    def find(self, name: str, *others: str) -> ModelInstance:
        """The model with this key or alias, or with a pattern that the name fits. Raises ModelNotFound.

        others: more spellings of the name; one that is a key counts before one that is an alias, and so on.
        """
        for look_up in (self.get, self.with_alias, self._with_pattern):
            for spelling in (name, *others):
                if found := look_up(spelling):
                    return found
        raise ModelNotFound(name, self.keys)

    def with_alias(self, alias: str) -> ModelInstance | None:
        """The model with this alias; that of the configuration before one that was copied."""
        aliases = {each: instance for instance in self.instances for each in instance.copied_aliases}
        aliases |= {each: instance for instance in self.instances for each in instance.spec.aliases}
        return aliases.get(alias)

    def check_aliases(self, spec: ModelSpec) -> None:
        """Refuse a model with an alias that is, or leaves open, another one's name. Raises ModelExists."""
        for other in self.instances:
            names = () if other.key == spec.key else (other.key, *other.aliases)
            if taken := next((alias for alias in spec.aliases for name in names if clash(name, alias)), None):
                raise ModelExists(taken, other.spec.source, spec.source)

    def copy(self, instance: ModelInstance, alias: str) -> None:
        """Give a model one more name; a model that was given it before loses it. Raises ModelExists."""
        owner = self.get(alias) or self.with_alias(alias)
        if owner is instance:
            return
        if owner and alias not in owner.copied_aliases:
            raise ModelExists(alias, owner.spec.source, instance.spec.source)
        if owner:
            owner.forget_alias(alias)
        instance.copied_aliases += (alias,)

    def _with_pattern(self, name: str) -> ModelInstance | None:
        patterns = [
            (len(alias), instance)
            for instance in self.instances
            for alias in instance.spec.aliases
            if fits(name, alias)
        ]
        return max(patterns, key=lambda fitting: fitting[0], default=(0, None))[1]

    def put(self, instance: ModelInstance) -> ModelInstance | None:
        """Register a model. Gives the one that had its key before."""
        if former := self.get(instance.key):
            instance.copied_aliases = former.copied_aliases
        self._registered[instance.key] = instance
        instance.retire(False)
        return former

    def remove(self, instance: ModelInstance) -> None:
        """Retire a model. Its key may belong to another one by now, which stays."""
        instance.retire()
        if self.get(instance.key) is instance:
            del self._registered[instance.key]

    def remove_leaving(self, instance: ModelInstance, unload: asyncio.Task[UnloadReport]) -> None:
        """Retire a model that is being unloaded; it stays among all_instances until that is done."""
        self.remove(instance)
        self._leaving.add(instance)
        unload.add_done_callback(lambda _: self._leaving.discard(instance))

    @contextmanager
    def replacing(self, new: ModelInstance) -> Iterator[None]:
        """Keep a model that is to replace another among all_instances, one per key. Raises ModelReplaced."""
        if new.key in self._replacements:
            raise ModelReplaced(new.key)
        self._replacements[new.key] = new
        try:
            yield
        finally:
            del self._replacements[new.key]
