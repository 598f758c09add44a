"""Prefix cache of one process: KV caches of sequences that left, for prompts that begin alike.

Rule 1: entries belong to the identity of a model, not to a loaded model: loaded models of one identity share them.
Rule 2: the entries of an identity are bounded by each of its loaded models, and dropped with the last of them: they
        are part of the memory that was reserved for it.
Rule 3: any engine thread may use the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlxserver.engine.kv_cache.caches import Cache

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


class Tier(Protocol):
    """Storage of entries. May be called on any thread. Sizes in bytes."""

    def match(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        """The longest usable prefix of `tokens`. At least one token is always left to compute."""

    def load(self, match: Match) -> Cache:
        """A copy of the matched prefix."""

    def store(self, model: ModelIdentity, tokens: Tokens, cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""

    def store_checkpoint(self, model: ModelIdentity, tokens: Tokens, cache: Cache) -> None:
        """Store a checkpoint of a sequence that goes on (kv_cache/checkpoints.py)."""

    def shrink(self, max_bytes: int, model: ModelIdentity | None = None) -> None:
        """Drop the least recently used entries, of one model or of all, until at most this many bytes are left."""

    def nbytes(self, model: ModelIdentity) -> int:
        """Bytes of a model's entries."""


class PrefixCache:
    """The tier of one process, and the loaded models that use it."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._opened: dict[ModelIdentity, set[ModelPrefixes]] = {}
        self._lock = threading.Lock()

    def open(self, model: ModelIdentity, max_bytes: int) -> ModelPrefixes:
        """Prefixes of a model that is loaded, of at most so many bytes; close() them when it is unloaded."""
        prefixes = ModelPrefixes(self, model, max_bytes)
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


class ModelPrefixes:
    """Prefixes of one loaded model, used on its engine thread. Sizes in bytes."""

    def __init__(self, owner: PrefixCache, model: ModelIdentity, max_bytes: int) -> None:
        self.model = model
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
        return (self._tier.load(match), match.length) if match else (None, 0)

    def store(self, tokens: Sequence[int], cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""
        if len(tokens) >= SHORTEST:
            self._tier.store(self.model, np.asarray(tokens, dtype=np.int64), cache)
            self._tier.shrink(self._owner.limit(self.model), self.model)

    def store_checkpoint(self, tokens: Sequence[int], cache: Cache) -> None:
        """Store a checkpoint of a sequence that goes on, and whose cache holds exactly these tokens."""
        if len(tokens) >= SHORTEST:
            self._tier.store_checkpoint(self.model, np.asarray(tokens, dtype=np.int64), cache)
            self._tier.shrink(self._owner.limit(self.model), self.model)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries until at most this many bytes are left."""
        if max_bytes < self.max_bytes:  # which store() keeps to
            self._tier.shrink(max_bytes, self.model)

    def close(self) -> None:
        """Drop the entries: the model is unloaded. Idempotent."""
        self._owner.close(self)
