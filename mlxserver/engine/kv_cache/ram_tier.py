"""Prefix cache in memory: entries are parts of KV caches (kv_cache/checkpoints.py), on the device.

Rule 1: entries are bounded in bytes and number; the least recently used goes first. Checkpoints of a sequence go before
        the layers that they need beside them, those behind its system message and its latest ones last.
Rule 2: an entry that is the beginning of another one is not kept beside it, unless it can be trimmed and the other not.
Rule 3: a lookup costs microseconds per entry that has the same first tokens, whatever its length: entries are kept by
        those, and compared as arrays. (A walk through mlx-lm's trie of tokens took 18 ms with a hundred entries.)
Rule 4: entries that contain NaN or inf are never reused: one sequence's overflow must not reach later ones. Ranks that
        share a model do not look: each would see its own part, and they have to decide alike.
Rule 5: nothing waits for the device with the lock held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.kv_cache import checkpoints
from mlxserver.engine.kv_cache.caches import Cache, cache_bytes, flat, is_finite
from mlxserver.engine.kv_cache.prefix_cache import SHORTEST, Match, ModelIdentity, Tokens
from mlxserver.engine.platform.policy import ExecutionPolicy, current

_MOST_ENTRIES = 256  # per model


@dataclass(eq=False)
class _Entry:
    """A part of the cache of exactly these tokens. used: the higher, the more recently.

    is_checkpoint: the layers that can't be trimmed; otherwise those that can. is_whole: it has all layers.
    """

    tokens: Tokens
    part: Cache
    nbytes: int
    is_checkpoint: bool
    is_whole: bool
    is_sound: mx.array  # of bool; computed along with the cache, and read only when a prompt matches
    used: int = 0

    @cached_property
    def kin(self) -> tuple[bytes, bool]:
        """What entries of its kind with the same first tokens have in common."""
        return _kin(self.tokens, self.is_checkpoint)

    def common(self, tokens: Tokens) -> int:
        """Number of first tokens that it has of these. At least one of them is left to compute."""
        most = min(len(self.tokens), len(tokens) - 1)
        differs = np.flatnonzero(self.tokens[:most] != tokens[:most])
        return int(differs[0]) if len(differs) else most

    def begins(self, tokens: Tokens) -> bool:
        """Whether its tokens are the first of these."""
        return np.array_equal(self.tokens, tokens[: len(self.tokens)])


def _kin(tokens: Tokens, is_checkpoint: bool) -> tuple[bytes, bool]:
    return tokens[:SHORTEST].tobytes(), is_checkpoint


@dataclass(frozen=True)
class _Found:
    """What a match consists of: layers that are trimmed, or a checkpoint, or both."""

    trimmable: _Entry | None
    checkpoint: _Entry | None

    @property
    def entries(self) -> list[_Entry]:
        """The entries that it consists of."""
        return [entry for entry in (self.checkpoint, self.trimmable) if entry]


@dataclass
class _Shelf:
    """Entries of one model, by identity, the least recently used first."""

    entries: OrderedDict[int, _Entry] = field(default_factory=OrderedDict)
    by_kin: dict[tuple[bytes, bool], OrderedDict[int, _Entry]] = field(default_factory=dict)  # in the same order
    nbytes: int = 0

    def add(self, entry: _Entry) -> None:
        """Add an entry."""
        self.entries[id(entry)] = entry
        self.by_kin.setdefault(entry.kin, OrderedDict())[id(entry)] = entry
        self.nbytes += entry.nbytes

    def use(self, entry: _Entry) -> None:
        """Have an entry be the last to go."""
        self.entries.move_to_end(id(entry))
        self.by_kin[entry.kin].move_to_end(id(entry))

    def drop(self, entry: _Entry) -> None:
        """Drop an entry, unless that has happened already."""
        if self.entries.pop(id(entry), None):
            self.nbytes -= entry.nbytes
            alike = self.by_kin[entry.kin]
            del alike[id(entry)]
            if not alike:
                del self.by_kin[entry.kin]

    @property
    def oldest(self) -> _Entry:
        """The least recently used entry, of one at least."""
        return next(iter(self.entries.values()))

    def alike(self, tokens: Tokens, is_checkpoint: bool) -> list[_Entry]:
        """The entries of a kind with the same first tokens."""
        return [*self.by_kin.get(_kin(tokens, is_checkpoint), {}).values()]

    def find(self, tokens: Tokens) -> tuple[int, _Found]:
        """The longest usable prefix of these tokens: its length, and what it consists of; 0 without one."""
        trimmable = [(entry.common(tokens), entry) for entry in self.alike(tokens, False)]
        length, best = max(
            ((common, entry) for common, entry in trimmable if entry.is_whole),
            key=lambda found: found[0],
            default=(0, None),
        )
        for entry in sorted(self.alike(tokens, True), key=lambda entry: len(entry.tokens), reverse=True):
            own = len(entry.tokens)
            if own <= length:
                break
            if own >= len(tokens) or not entry.begins(tokens):
                continue
            if entry.is_whole:
                return own, _Found(None, entry)
            if beside := next((other for common, other in trimmable if common >= own), None):
                return own, _Found(beside, entry)
        return length, _Found(best, None)

    def lineage(self, tokens: Tokens) -> list[_Entry]:
        """The checkpoints of these tokens' beginnings, the shortest first."""
        begun = [entry for entry in self.alike(tokens, True) if entry.begins(tokens)]
        return sorted(begun, key=lambda entry: len(entry.tokens))


class RamTier:
    """A tier in memory (kv_cache/prefix_cache.py)."""

    def __init__(self, policy: ExecutionPolicy | None = None) -> None:
        # A GPU copies while the next step is prepared; a CPU has to be done first, or else the step copies everything.
        self._evaluate: Any = mx.eval if (policy or current()).eager_prefix_copy else mx.async_eval
        self._shelves: dict[ModelIdentity, _Shelf] = {}
        self._uses = count(1)
        self._lock = threading.Lock()

    def match(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        """The longest usable prefix of `tokens`; None if that is too short to be worth a copy."""
        while match := self._find(model, tokens):
            unsound = [entry for entry in match.entry.entries if not entry.is_sound]  # waits for the device
            if not unsound:
                return match
            with self._lock:
                for entry in unsound:
                    self._drop(model, entry)
        return None

    def load(self, match: Match) -> Cache:
        """A copy of the matched prefix, which shares the arrays."""
        found: _Found = match.entry
        trimmable, checkpoint = found.trimmable, found.checkpoint
        surplus = len(trimmable.tokens) - match.length if trimmable else 0
        return checkpoints.joined(
            trimmable.part if trimmable else None, surplus, checkpoint.part if checkpoint else None
        )

    def store(self, model: ModelIdentity, tokens: Tokens, cache: Cache) -> None:
        """Store the cache of a sequence, which holds exactly these tokens."""
        trimmable = checkpoints.trimmable_part(cache)
        if not checkpoints.is_whole(trimmable):
            self.store_checkpoint(model, tokens, checkpoints.checkpoint_part(cache))
        if not checkpoints.is_empty(trimmable):
            self.store_trimmable(model, tokens, trimmable)

    def store_trimmable(self, model: ModelIdentity, tokens: Tokens, part: Cache) -> None:
        """Store the layers that can be trimmed, of a cache that holds exactly these tokens."""
        entry = self._entry(model, tokens, part, is_checkpoint=False)
        with self._lock:
            shelf = self._shelves.setdefault(model, _Shelf())
            for other in shelf.alike(tokens, False):
                if other.begins(tokens) and (entry.is_whole or not other.is_whole):
                    shelf.drop(other)
            self._add(shelf, entry)

    def store_checkpoint(self, model: ModelIdentity, tokens: Tokens, part: Cache) -> None:
        """Store a checkpoint of exactly these tokens."""
        entry = self._entry(model, tokens, part, is_checkpoint=True)
        with self._lock:
            shelf = self._shelves.setdefault(model, _Shelf())
            for other in shelf.lineage(tokens):
                if len(other.tokens) == len(tokens):
                    shelf.drop(other)
            self._add(shelf, entry)

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

    @property
    def total_bytes(self) -> int:
        """Bytes of all models' entries."""
        with self._lock:
            return sum(shelf.nbytes for shelf in self._shelves.values())

    def nbytes(self, model: ModelIdentity) -> int:
        """Bytes of a model's entries."""
        shelf = self._shelves.get(model)
        return shelf.nbytes if shelf else 0

    def count(self, model: ModelIdentity) -> int:
        """Number of a model's entries."""
        shelf = self._shelves.get(model)
        return len(shelf.entries) if shelf else 0

    def _entry(self, model: ModelIdentity, tokens: Tokens, part: Cache, *, is_checkpoint: bool) -> _Entry:
        """An entry whose arrays are computed, or on a GPU soon will be."""
        per_token = model.bytes_per_token
        layers = [layer for layer in flat(part) if layer is not None]
        is_sound = is_finite(layers) if per_token is None else mx.array(True)
        self._evaluate([layer.state for layer in layers], is_sound)
        if per_token is None:
            nbytes = cache_bytes(layers)
        else:
            nbytes = model.bytes_per_checkpoint if is_checkpoint else len(tokens) * per_token
        return _Entry(tokens, part, nbytes, is_checkpoint, checkpoints.is_whole(part), is_sound)

    def _add(self, shelf: _Shelf, entry: _Entry) -> None:
        """Add an entry that is now the last to go, and behind it the sequence's others."""
        shelf.add(entry)
        lineage = shelf.lineage(entry.tokens)
        gone = set(checkpoints.superfluous([len(other.tokens) for other in lineage]))
        for other in lineage:
            if len(other.tokens) in gone:
                shelf.drop(other)
        kept = [other for other in lineage if len(other.tokens) not in gone]
        for other in [*kept[1:], *kept[:1], entry]:
            self._use(shelf, other)
        if len(shelf.entries) > _MOST_ENTRIES:
            shelf.drop(shelf.oldest)

    def _use(self, shelf: _Shelf, entry: _Entry) -> None:
        entry.used = next(self._uses)
        shelf.use(entry)

    def _find(self, model: ModelIdentity, tokens: Tokens) -> Match | None:
        with self._lock:
            shelf = self._shelves.get(model)
            length, found = shelf.find(tokens) if shelf else (0, None)
            if shelf is None or found is None or length < SHORTEST:
                return None
            for entry in found.entries:
                self._use(shelf, entry)
            return Match(found, length)

    def _drop(self, model: ModelIdentity, entry: _Entry) -> bool:
        """Drop an entry, if it is still there; returns whether the model has no more."""
        shelf = self._shelves.get(model, _Shelf())
        shelf.drop(entry)
        if not shelf.entries:
            self._shelves.pop(model, None)
        return not shelf.entries
