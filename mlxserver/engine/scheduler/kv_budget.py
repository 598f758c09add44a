"""KV budget of one model: max_kv_tokens, divided between the KV cache of its sequences and its prefix cache."""

from __future__ import annotations

import sys
from collections import abc
from concurrent.futures import Future

from mlxserver.engine.kv_cache.caches import Cache, CacheSizes
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.prefill import Prefill
from mlxserver.engine.scheduler.prompts import PendingPrompt

Prompts = abc.Sequence[PendingPrompt]


class KVBudget:
    """Sequences come first: the prefix cache has what they leave. max_tokens: None for no limit."""

    def __init__(
        self,
        running: DecodeBatch,
        prefill: Prefill,
        prefixes: ModelPrefixes | None,
        max_tokens: int | None,
        sizes: CacheSizes,
        max_running: int = 1,
    ) -> None:
        self._running = running
        self._prefill = prefill
        self._prefixes = prefixes
        self._max_tokens = max_tokens or sys.maxsize
        self._sizes = sizes
        self._max_running = max_running

    @property
    def has_prefixes(self) -> bool:
        """Whether prefixes are cached."""
        return self._prefixes is not None

    def holds(self, kv_tokens: int) -> bool:
        """Whether so many tokens of KV cache are within the budget."""
        return kv_tokens <= self._max_tokens

    def holds_together(self, prompt: PendingPrompt) -> bool:
        """Whether all sequences of a prompt could decode at once, with nothing beside them."""
        return self.holds(self._running.cache.tokens_for([prompt.length] * len(prompt.sequences)))

    def tokens_of(self, prompts: Prompts) -> int:
        """Tokens of KV cache that the running sequences and these prompts take once they decode together.

        A prompt counts twice: until it joins, its KV cache is a copy of its own.
        """
        lengths = [running.length for running in self._running.sequences]
        lengths += [prompt.length for prompt in prompts for _ in prompt.sequences]
        own = sum(self._prefill.tokens_for(prompt) for prompt in prompts)
        return self._running.cache.tokens_for(lengths) + own

    def compacted_tokens_of(self, prompts: Prompts) -> int:
        """As tokens_of(); if that is over the limit, unused slots and capacity are given back first."""
        kv_tokens = self.tokens_of(prompts)
        if self.holds(kv_tokens) or not self._running.sequences:
            return kv_tokens
        self._running.cache.compact()
        return self.tokens_of(prompts)

    def fetch_prefix(self, tokens: abc.Sequence[int]) -> tuple[Cache | None, int]:
        """A copy of the longest cached prefix and its length in tokens; (None, 0) without one."""
        return self._prefixes.fetch(tokens) if self._prefixes else (None, 0)

    def restore_prefix(self, tokens: abc.Sequence[int]) -> Future[None] | None:
        """Bring a prefix from disk, if there is a longer one than in memory; None if there is not."""
        return self._prefixes.restore(tokens) if self._prefixes else None

    def store_prefix(self, tokens: abc.Sequence[int], cache: Cache) -> None:
        """Store the KV cache of exactly these tokens; shrink_prefixes_beside() afterwards."""
        if self._prefixes:
            self._prefixes.store(tokens, cache)

    def store_checkpoint(self, tokens: abc.Sequence[int], cache: Cache) -> None:
        """Store a checkpoint of exactly these tokens; shrink_prefixes_beside() afterwards."""
        if self._prefixes:
            self._prefixes.store_checkpoint(tokens, cache)

    def shrink_prefixes_beside(self, kv_tokens: int, sequences: int) -> None:
        """Leave to the prefix cache what so many sequences with so many tokens of KV cache do not need."""
        if self._max_tokens < sys.maxsize:
            most = self._sizes.total(self._max_tokens, self._max_running)
            self.shrink_prefixes(max(0, most - self._sizes.total(kv_tokens, sequences)))

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Drop the least recently used prefixes until at most this many bytes are left."""
        if self._prefixes:
            self._prefixes.shrink(max_bytes)

    def close(self) -> None:
        """Drop the prefixes for good."""
        if self._prefixes:
            self._prefixes.close()
