"""Prefix cache of one process: KV caches of sequences that left, for prompts that begin alike.

Rule 1: entries belong to the identity of a model, not to a loaded model: loaded models of one identity share them.
Rule 2: the entries of an identity are bounded by each of its loaded models, and dropped with the last of them. What is
        on disk stays (kv_cache/disk_tier.py).
Rule 3: any engine thread may use the cache.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlxserver.engine.kv_cache import checkpoints
from mlxserver.engine.kv_cache.caches import Cache, cache_bytes
from mlxserver.engine.kv_pool import KVPool
from mlxserver.engine.metrics import TierUsage

SHORTEST = 16  # tokens of a prefix that is worth a copy of its KV cache

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Identity of a model's KV cache: models that compute the same one from the same tokens are equal.

    files, adapter: fingerprints of the files that were read. weights, kv_format: formats in memory. share: the rank's
    share of a model that several ranks compute. bytes_per_token: size of an entry per token, on every rank, and
    bytes_per_checkpoint that of a checkpoint; None measures the entries.
    """

    files: str
    adapter: str = ""
    weights: str = ""
    kv_format: str = ""
    share: str = ""
    bytes_per_token: int | None = None
    bytes_per_checkpoint: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """What a tier has of the first `length` tokens of a prompt."""

    entry: Any
    length: int


@dataclass(frozen=True, slots=True)
class Restored:
    """What was read from disk: layers that keep all tokens, of `tokens`, and a checkpoint, of `checkpoint_tokens`."""

    tokens: Tokens
    lasting: Cache | None
    checkpoint_tokens: Tokens
    checkpoint: Cache | None


class Store(Protocol):
    """Storage behind the tier, slower and lasting. May be called on any thread."""

    def store(self, model: ModelIdentity, tokens: Tokens, lasting: Cache | None, checkpoint: Cache | None) -> None:
        """Write, sooner or later, the layers that keep all tokens of a sequence, and a checkpoint of the others."""

    def restore(
        self, model: ModelIdentity, tokens: Tokens, beyond: int, keep: Callable[[Restored], None]
    ) -> Future[None] | None:
        """Read the longest stored prefix of `tokens` and keep it, if it is longer than `beyond`; None if it is not."""

    def prepare(self) -> None:
        """Get ready, sooner or later, for a model that is loaded."""

    def usage(self, model: ModelIdentity | None = None) -> tuple[int, int]:
        """Number and bytes of the files, of one model or of all."""

    def clear(self) -> None:
        """Remove everything."""

    def close(self) -> None:
        """Write what is pending, and end."""


class Tier(Protocol):
    """Storage of entries. May be called on any thread. Sizes in bytes."""

    def match(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        """The longest usable prefix of `tokens`. At least one token is always left to compute."""

    def load(self, match: Match) -> Cache:
        """A copy of the matched prefix."""

    def store(self, model: ModelIdentity, tokens: Tokens, cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""

    def store_trimmable(self, model: ModelIdentity, tokens: Tokens, part: Cache) -> None:
        """Store the layers that can be trimmed, of a cache that holds exactly these tokens."""

    def store_checkpoint(self, model: ModelIdentity, tokens: Tokens, part: Cache) -> None:
        """Store a checkpoint of exactly these tokens (kv_cache/checkpoints.py)."""

    def shrink(self, max_bytes: int, model: ModelIdentity | None = None) -> None:
        """Drop the least recently used entries, of one model or of all, until at most this many bytes are left."""

    def nbytes(self, model: ModelIdentity) -> int:
        """Bytes of a model's entries."""

    def count(self, model: ModelIdentity) -> int:
        """Number of a model's entries."""


class PrefixCache:
    """The tier of one process, what is behind it, and the loaded models that use it. pool: what entries come out of."""

    def __init__(self, tier: Tier, disk: Store | None = None, pool: KVPool | None = None) -> None:
        self.tier = tier
        self.disk = disk
        self.pool = pool or KVPool()
        self.hits: Counter[tuple[str, str]] = Counter()  # by tier and key of the model
        self._opened: dict[ModelIdentity, set[ModelPrefixes]] = {}
        self._lock = threading.Lock()

    def open(self, model: ModelIdentity, max_bytes: int, key: str = "") -> ModelPrefixes:
        """Prefixes of a model that is loaded, of at most so many bytes; close() them when it is unloaded."""
        prefixes = ModelPrefixes(self, model, max_bytes, key)
        if self.disk:
            self.disk.prepare()
        with self._lock:
            self._opened.setdefault(model, set()).add(prefixes)
        return prefixes

    def limit(self, model: ModelIdentity) -> int:
        """Most bytes of a model's entries; 0 while it is not loaded."""
        with self._lock:
            return min((prefixes.max_bytes for prefixes in self._opened.get(model, ())), default=0)

    def close(self, prefixes: ModelPrefixes) -> None:
        """Undo open(): drop the entries, unless another loaded model has them too. Idempotent."""
        model = prefixes.model
        with self._lock:
            opened = self._opened.get(model, set())
            opened.discard(prefixes)
            if not opened:
                self._opened.pop(model, None)
        self.tier.shrink(self.limit(model), model)

    def usage(self) -> list[TierUsage]:
        """What each loaded model has in each tier, and with an empty key what all have on disk."""
        with self._lock:
            opened = {(prefixes.key, model) for model, each in self._opened.items() for prefixes in each}
        found = []
        for key, model in sorted(opened, key=lambda each: each[0]):
            found.append(TierUsage("ram", key, self.tier.count(model), self.tier.nbytes(model), self.hits["ram", key]))
            if self.disk:
                found.append(TierUsage("disk", key, *self.disk.usage(model), self.hits["disk", key]))
        if self.disk:
            hits = sum(number for (tier, _), number in list(self.hits.items()) if tier == "disk")
            found.append(TierUsage("disk", "", *self.disk.usage(), hits))
        return found

    def clear(self) -> None:
        """Drop all entries of all models, in memory and on disk."""
        self.tier.shrink(0)
        if self.disk:
            self.disk.clear()


class ModelPrefixes:
    """Prefixes of one loaded model, used on its engine thread. Sizes in bytes.

    is_warm: the model is warmed up; from then on hits are counted, and what is behind the tier is used, too.
    """

    def __init__(self, owner: PrefixCache, model: ModelIdentity, max_bytes: int, key: str = "") -> None:
        self.model = model
        self.key = key
        self.is_warm = False
        self.max_bytes = max_bytes
        self._owner = owner
        self._tier = owner.tier

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return self._tier.nbytes(self.model)

    def fetch(self, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """A copy of the longest usable prefix of `tokens` and its length in tokens; (None, 0) without one."""
        match = self._tier.match(self.model, np.asarray(tokens, dtype=np.int64))
        if match is None:
            return None, 0
        self._owner.hits["ram", self.key] += self.is_warm
        return self._tier.load(match), match.length

    def length(self, tokens: Sequence[int]) -> int:
        """Length in tokens of what fetch() would give."""
        match = self._tier.match(self.model, np.asarray(tokens, dtype=np.int64))
        return match.length if match else 0

    def restore(self, tokens: Sequence[int]) -> Future[None] | None:
        """Bring a prefix of `tokens` from disk, if it has a longer one; None if it has not."""
        if not (disk := self._disk):
            return None
        asked = np.asarray(tokens, dtype=np.int64)
        match = self._tier.match(self.model, asked)
        return disk.restore(self.model, asked, SHORTEST + (match.length if match else 0), self._keep)

    def _keep(self, restored: Restored) -> None:
        self._owner.hits["disk", self.key] += 1
        read = [*(restored.checkpoint or ()), *(restored.lasting or ())]
        with self._owner.pool.storing(cache_bytes(read)) as fits:
            if fits and restored.checkpoint:
                self._tier.store_checkpoint(self.model, restored.checkpoint_tokens, restored.checkpoint)
            if fits and restored.lasting:
                self._tier.store_trimmable(self.model, restored.tokens, restored.lasting)
            self._tier.shrink(self._owner.limit(self.model), self.model)

    def store(self, tokens: Sequence[int], cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""
        if len(tokens) < SHORTEST:
            return
        stored, limit = np.asarray(tokens, dtype=np.int64), self._owner.limit(self.model)
        with self._owner.pool.storing(cache_bytes(cache)) as fits:
            if fits:
                self._tier.store(self.model, stored, cache)
            self._tier.shrink(limit, self.model)
        if (disk := self._disk) and cache_bytes(cache) <= limit:  # or else it could not be brought back
            checkpoint = checkpoints.checkpoint_part(cache)
            has_checkpoint = not checkpoints.is_empty(checkpoint)
            disk.store(self.model, stored, checkpoints.lasting_part(cache), checkpoint if has_checkpoint else None)

    def store_checkpoint(self, tokens: Sequence[int], cache: Cache) -> None:
        """Store a checkpoint of a sequence that goes on, and whose cache holds exactly these tokens."""
        if len(tokens) < SHORTEST:
            return
        stored, part = np.asarray(tokens, dtype=np.int64), checkpoints.checkpoint_part(cache)
        with self._owner.pool.storing(cache_bytes(part)) as fits:
            if fits:
                self._tier.store_checkpoint(self.model, stored, part)
            self._tier.shrink(self._owner.limit(self.model), self.model)
        if disk := self._disk:
            disk.store(self.model, stored, None, part)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries until at most this many bytes are left."""
        if max_bytes < self.max_bytes:  # which store() keeps to
            self._tier.shrink(max_bytes, self.model)

    def close(self) -> None:
        """Drop the entries: the model is unloaded. Idempotent."""
        self._owner.close(self)

    @property
    def _disk(self) -> Store | None:
        return self._owner.disk if self.is_warm else None
