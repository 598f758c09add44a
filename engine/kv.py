"""Keys and values: those of the rows that decode together, and those kept of finished ones.

A row's cache is a list with one mlx-lm cache a layer. mlx-lm's caches know how to merge into a batch and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

Cache = list[Any]

# A shorter common prefix is not worth a copy of the keys and values.
_SHORTEST_PREFIX = 16


def new_cache(model: Any) -> Cache:
    """An empty cache for one row."""
    cache: Cache = make_prompt_cache(model)
    return cache


def merge(caches: Sequence[Cache]) -> Cache:
    """One cache for several rows out of the rows' own.

    Raises:
        NotImplementedError: a kind of cache that mlx-lm can't batch.
    """
    layers = zip(*caches, strict=True)
    try:
        return [layer[0].merge(list(layer)) for layer in layers]
    except AttributeError as error:
        raise NotImplementedError(f"this model's cache can't be batched: {error}") from error


def extract(batched: Cache, index: int, length: int | None = None) -> Cache:
    """One row's own cache out of a batched one. With its length in tokens known, nothing is waited for."""
    return [_extract_layer(layer, index, length) for layer in batched]


def _extract_layer(layer: Any, index: int, length: int | None) -> Any:
    if type(layer) is not BatchKVCache or length is None:
        return layer.extract(index)
    own = KVCache()
    own.offset = length
    if length:
        end = layer.size()
        own.keys = layer.keys[index : index + 1, :, end - length : end]
        own.values = layer.values[index : index + 1, :, end - length : end]
    return own


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values held."""
    return sum(layer.nbytes for layer in cache)


class PrefixCache:
    """Keys and values of finished requests of one model, the least recently used given back first.

    Bounded by bytes. Entries are found by the longest common prefix of their tokens with a prompt's.
    """

    _ENTRIES = 1024

    def __init__(self, max_bytes: int) -> None:
        self._entries = LRUPromptCache(max_size=self._ENTRIES, max_bytes=max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return int(self._entries.nbytes)

    def fetch(self, tokens: Sequence[int]) -> tuple[Cache | None, int]:
        """A copy of the longest usable prefix of `tokens` and its length in tokens; (None, 0) if there is none.

        At least one token is left to the caller, who needs something to feed the model.
        """
        cache, rest = self._entries.fetch_nearest_cache("", list(tokens))
        if cache is None:
            return None, 0
        if not rest:
            if not can_trim_prompt_cache(cache):
                return None, 0
            trim_prompt_cache(cache, 1)
            rest = tokens[-1:]
        length = len(tokens) - len(rest)
        return (cache, length) if length >= _SHORTEST_PREFIX else (None, 0)

    def store(self, tokens: Sequence[int], cache: Cache) -> None:
        """Keep a row's cache, which holds exactly these tokens."""
        if len(tokens) >= _SHORTEST_PREFIX:
            mx.eval([layer.state for layer in cache])
            self._entries.insert_cache("", list(tokens), cache)

    def shrink(self, max_bytes: int) -> None:
        """Give back the least recently used until at most this many bytes are held."""
        self._entries.trim_to(n_bytes=max_bytes)
