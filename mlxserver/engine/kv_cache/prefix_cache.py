"""Keys and values of finished requests, kept for those that begin alike.

Rule 1: what is kept is bounded in bytes and entries; the least recently used goes first.
Rule 2: an entry that the beginning of another contains is not kept beside it.
Rule 3: looking one up costs microseconds an entry, whatever its length: entries are compared as arrays, and only those
        whose first tokens are the same. (A walk through mlx-lm's trie of tokens took 18 ms with a hundred entries.)
Rule 4: what is no number any more serves nobody: one row's overflow must not reach those who ask alike after it. Ranks
        that share a model do not look: each would see its own part, and they have to decide alike.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxserver.engine.mlx import mx

import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxserver.engine.kv_cache.caches import Cache, cache_bytes, is_finite
from mlxserver.engine.platform.policy import ExecutionPolicy, current

# A shorter common prefix is not worth a copy of the keys and values.
_SHORTEST = 16
_MOST_ENTRIES = 256

_Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class _Entry:
    """The cache of one row, which holds exactly these tokens."""

    tokens: _Tokens
    cache: Cache
    nbytes: int
    is_trimmable: bool
    is_sound: mx.array  # of bool; computed along with the cache, and read only when it is wanted

    def usable(self, tokens: _Tokens) -> int:
        """How many of these tokens it can serve. One is always left to feed."""
        most = min(len(self.tokens), len(tokens) - 1)
        differs = np.flatnonzero(self.tokens[:most] != tokens[:most])
        common = int(differs[0]) if len(differs) else most
        return common if self.is_trimmable or common == len(self.tokens) else 0


class PrefixCache:
    """Kept prefixes of one model. Sizes in bytes. bytes_per_token: what a token counts for on ranks that share the
    model; None measures each entry.
    """

    def __init__(
        self, max_bytes: int, bytes_per_token: int | None = None, policy: ExecutionPolicy | None = None
    ) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._bytes_per_token = bytes_per_token
        self._evaluate = mx.eval if (policy or current()).eager_prefix_copy else mx.async_eval
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by identity, the least recently used first

    def fetch(self, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """A copy of the longest usable prefix of `tokens` and its length in tokens; (None, 0) if there is none."""
        wanted = np.asarray(tokens, dtype=np.int64)
        lengths = {key: entry.usable(wanted) for key, entry in self._alike(wanted)}
        best = max(lengths, key=lambda key: lengths[key], default=None)
        if best is None or lengths[best] < _SHORTEST:
            return None, 0
        self._entries.move_to_end(best)
        entry = self._entries[best]
        if not entry.is_sound:
            self._drop(best)
            return self.fetch(tokens)
        cache: Cache = copy.deepcopy(entry.cache)  # shares the arrays
        if surplus := len(entry.tokens) - lengths[best]:
            trim_prompt_cache(cache, surplus)
        return cache, lengths[best]

    def store(self, tokens: Sequence[int], cache: Cache) -> None:
        """Keep a row's cache, which holds exactly these tokens."""
        if len(tokens) < _SHORTEST:
            return
        # A GPU copies while the next step is prepared; a CPU has to be done first, or else the step copies everything.
        is_sound = mx.array(True) if self._bytes_per_token else is_finite(cache)
        self._evaluate([layer.state for layer in cache], is_sound)
        kept = np.asarray(tokens, dtype=np.int64)
        nbytes = cache_bytes(cache) if self._bytes_per_token is None else len(kept) * self._bytes_per_token
        entry = _Entry(kept, cache, nbytes, can_trim_prompt_cache(cache), is_sound)
        if entry.is_trimmable:
            for key, other in self._alike(kept):
                if np.array_equal(other.tokens, kept[: len(other.tokens)]):
                    self._drop(key)
        self._entries[id(entry)] = entry
        self.nbytes += entry.nbytes
        self.shrink(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Give back the least recently used until at most this many bytes are held."""
        while self._entries and (self.nbytes > max_bytes or len(self._entries) > _MOST_ENTRIES):
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.nbytes -= self._entries.pop(key).nbytes

    def _alike(self, tokens: _Tokens) -> list[tuple[int, _Entry]]:
        """The entries with the same first tokens."""
        head = tokens[:_SHORTEST].tobytes()
        return [(key, entry) for key, entry in self._entries.items() if entry.tokens[:_SHORTEST].tobytes() == head]
