"""Feed of GET /v1/events: the state of the server, then what changes, once a second, for any number of readers.

Rule 1: the state is taken and encoded once per interval, however many read, and not at all while none does.
Rule 2: a reader that has missed a change gets the whole state again.
Rule 3: what all readers get has no path of this machine, which only admins may see.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson

from mlxserver import __version__
from mlxserver.api import sse
from mlxserver.api.native.events import Figures, live_model, memory_object
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.server.model_status import model_status, without_paths
from model_manager import ModelManager

INTERVAL = 1.0  # seconds between two states
DISK_INTERVAL = 10.0  # seconds between two counts of the files of the prefix cache

Object = dict[str, Any]


class LiveFeed:
    """The states of one server. Used on one event loop."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._readers = 0
        self._sampling: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._version = 0
        self._changes = b""  # of the last version
        self._memory: Object = {}
        self._models: dict[str, Object] = {}
        self._samples: dict[str, Sample] = {}
        self._disk: int | None = None
        self._disk_at = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Take states as long as the block runs."""
        self._readers += 1
        if self._sampling is None:
            self._take()
            self._sampling = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers and self._sampling:
                self._sampling.cancel()
                self._sampling = None

    async def next(self, seen: int) -> tuple[int, bytes] | None:
        """The next version after `seen`, and the event that leads to it; for 0 the whole state, at once.

        None when the server stops.
        """
        if seen == 0:
            return self._version, self._snapshot()
        async with self._changed:
            await self._changed.wait_for(lambda: self._version != seen or self._manager.is_closing)
        if self._manager.is_closing:
            return None
        return self._version, self._changes if self._version == seen + 1 else self._snapshot()

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            if time.monotonic() - self._disk_at > DISK_INTERVAL:
                await self._count_disk()
            if changes := self._take():
                self._changes = _event("changes", changes)
                self._version += 1
            async with self._changed:
                self._changed.notify_all()

    async def _count_disk(self) -> None:
        with suppress(OSError):
            usages = await asyncio.to_thread(self._manager.cache_usage)
            self._disk = next((usage.bytes for usage in usages if not usage.model), None)
        self._disk_at = time.monotonic()

    def _take(self) -> Object:
        """Take the state. What has changed since the last one; empty if nothing has."""
        self._version = self._version or 1
        memory, models = self._memory_now(), self._models_now()
        changes: Object = {}
        if memory != self._memory:
            changes["memory"] = memory
        if changed := [model for key, model in models.items() if model != self._models.get(key)]:
            changes["models"] = changed
        if removed := [key for key in self._models if key not in models]:
            changes["removed"] = removed
        self._memory, self._models = memory, models
        return changes

    def _models_now(self) -> dict[str, Object]:
        instances = {instance.key: instance for instance in self._manager.instances}
        samples = {key: Sample(instance.metrics) for key, instance in instances.items()}
        models = {
            key: live_model(
                without_paths(model_status(instance, self._manager)), samples[key].since(self._samples.get(key))
            )
            for key, instance in instances.items()
        }
        self._samples = samples
        return models

    def _memory_now(self) -> Object:
        memory = self._manager.memory
        use = memory.use
        return memory_object(
            budget=memory.budget,
            weights=sum(each.facts.weight_bytes for each in self._manager.all_instances if each.facts),
            held=use.held,
            kv_cache=use.live_kv,
            prefixes=use.prefixes,
            other=memory.unaccounted,
            disk=self._disk,
        )

    def _snapshot(self) -> bytes:
        server = {"version": __version__, "uptime_seconds": round(self._manager.uptime, 3)}
        return _event("snapshot", {"server": server, "memory": self._memory, "models": list(self._models.values())})


class Sample:
    """Counters of one model at one time."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._at = time.monotonic()
        self._tokens = metrics.generated_tokens
        waits = list(metrics.ttft.values())
        self._ttft = (sum(each.count for each in waits), sum(each.sum for each in waits))
        self._inter_token = (metrics.inter_token.count, metrics.inter_token.sum)

    def since(self, earlier: Sample | None) -> Figures:
        """What happened since an earlier sample."""
        if earlier is None:
            return Figures(0.0, None, None)
        rate = max(0, self._tokens - earlier._tokens) / max(1e-3, self._at - earlier._at)
        return Figures(rate, _mean(self._ttft, earlier._ttft), _mean(self._inter_token, earlier._inter_token))


def _mean(now: tuple[int, float], before: tuple[int, float]) -> float | None:
    count = now[0] - before[0]
    return (now[1] - before[1]) / count if count > 0 else None


def _event(name: str, content: Object) -> bytes:
    return sse.encode(orjson.dumps({"event": name, "time": round(time.time(), 3), **content}))


def stopping() -> bytes:
    """The last event of a server that stops."""
    return _event("stopping", {})
