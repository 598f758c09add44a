"""Prefix cache in memory: entries are the KV caches themselves, on the device.

Rule 1: entries are bounded in bytes and number; the least recently used goes first.
Rule 2: an entry that is the beginning of another one is not kept beside it.
Rule 3: a lookup costs microseconds per entry, whatever its length: entries are compared as arrays, and only those that
        have the same first tokens. (A walk through mlx-lm's trie of tokens took 18 ms with a hundred entries.)
Rule 4: entries that contain NaN or inf are never reused: one sequence's overflow must not reach later ones. Ranks that
        share a model do not look: each would see its own part, and they have to decide alike.
Rule 5: nothing waits for the device with the lock held.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxserver.engine.kv_cache.caches import Cache, cache_bytes, is_finite
from mlxserver.engine.kv_cache.prefix_cache import SHORTEST, Match, ModelIdentity, Tokens
from mlxserver.engine.platform.policy import ExecutionPolicy, current

_MOST_ENTRIES = 256  # per model


@dataclass(eq=False)
class _Entry:
    """The cache of one sequence, which holds exactly these tokens. used: the higher, the more recently."""

    tokens: Tokens
    cache: Cache
    nbytes: int
    is_trimmable: bool
    is_sound: mx.array  # of bool; computed along with the cache, and read only when a prompt matches
    used: int = 0

    def usable(self, tokens: Tokens) -> int:
        """Number of first tokens that it has of these. At least one of them is left to compute."""
        most = min(len(self.tokens), len(tokens) - 1)
        differs = np.flatnonzero(self.tokens[:most] != tokens[:most])
        common = int(differs[0]) if len(differs) else most
        return common if self.is_trimmable or common == len(self.tokens) else 0


@dataclass
class _Shelf:
    """Entries of one model, by identity, the least recently used first."""

    entries: OrderedDict[int, _Entry] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def add(self, entry: _Entry) -> None:
        """Add an entry."""
        self.entries[id(entry)] = entry
        self.nbytes += entry.nbytes

    def drop(self, entry: _Entry) -> None:
        """Drop an entry, unless that has happened already."""
        if self.entries.pop(id(entry), None):
            self.nbytes -= entry.nbytes

    @property
    def oldest(self) -> _Entry:
        """The least recently used entry, of one at least."""
        return next(iter(self.entries.values()))

    def alike(self, tokens: Tokens) -> list[_Entry]:
        """The entries with the same first tokens."""
        head = tokens[:SHORTEST].tobytes()
        return [entry for entry in self.entries.values() if entry.tokens[:SHORTEST].tobytes() == head]


class RamTier:
    """A tier in memory (kv_cache/prefix_cache.py)."""

    def __init__(self, policy: ExecutionPolicy | None = None) -> None:
        # A GPU copies while the next step is prepared; a CPU has to be done first, or else the step copies everything.
        self._evaluate: Any = mx.eval if (policy or current()).eager_prefix_copy else mx.async_eval
        self._shelves: dict[ModelIdentity, _Shelf] = {}
        self._uses = count(1)
        self._lock = threading.Lock()

    def match(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        """The entry with the longest usable prefix of `tokens`; None if that is too short to be worth a copy."""
        while found := self._find(model, tokens):
            if found.entry.is_sound:  # waits for the device
                return found
            with self._lock:
                self._drop(model, found.entry)
        return None

    def load(self, match: Match) -> Cache:
        """A copy of the matched prefix, which shares the arrays."""
        cache: Cache = copy.deepcopy(match.entry.cache)
        if surplus := len(match.entry.tokens) - match.length:
            trim_prompt_cache(cache, surplus)
        return cache

    def store(self, model: ModelIdentity, tokens: Tokens, cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""
        per_token = model.bytes_per_token
        is_sound = is_finite(cache) if per_token is None else mx.array(True)
        self._evaluate([layer.state for layer in cache], is_sound)
        nbytes = cache_bytes(cache) if per_token is None else len(tokens) * per_token
        entry = _Entry(tokens, cache, nbytes, can_trim_prompt_cache(cache), is_sound)
        with self._lock:
            shelf = self._shelves.setdefault(model, _Shelf())
            if entry.is_trimmable:
                for other in shelf.alike(tokens):
                    if np.array_equal(other.tokens, tokens[: len(other.tokens)]):
                        shelf.drop(other)
            entry.used = next(self._uses)
            shelf.add(entry)
            if len(shelf.entries) > _MOST_ENTRIES:
                shelf.drop(shelf.oldest)

    def shrink(self, max_bytes: int, model: ModelIdentity | None = None) -> None:
        """Drop the least recently used entries, of one model or of all, until at most this many bytes are left."""
        with self._lock:
            shelves = {model: self._shelves[model]} if model in self._shelves else {}
            if model is None:
                shelves = dict(self._shelves)
            excess = sum(shelf.nbytes for shelf in shelves.values()) - max_bytes
            while excess > 0:
                owner = min(shelves, key=lambda owner: shelves[owner].oldest.used)
                entry = shelves[owner].oldest
                excess -= entry.nbytes
                if self._drop(owner, entry):
                    del shelves[owner]

    def nbytes(self, model: ModelIdentity) -> int:
        """Bytes of a model's entries."""
        shelf = self._shelves.get(model)
        return shelf.nbytes if shelf else 0

    def _find(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        with self._lock:
            shelf = self._shelves.get(model)
            lengths = [(entry.usable(tokens), entry) for entry in shelf.alike(tokens)] if shelf else []
            length, best = max(lengths, key=lambda found: found[0], default=(0, None))
            if shelf is None or best is None or length < SHORTEST:
                return None
            best.used = next(self._uses)
            shelf.entries.move_to_end(id(best))
            return Match(best, length)

    def _drop(self, model: ModelIdentity, entry: _Entry) -> bool:
        """Drop an entry, if it is still there; returns whether the model has no more."""
        shelf = self._shelves.get(model, _Shelf())
        shelf.drop(entry)
        if not shelf.entries:
            self._shelves.pop(model, None)
        return not shelf.entries
