"""KV budget of one model: what its sequences and its prefixes may take, of the pool and of max_kv_tokens.

The prefix cache has what the sequences leave. max_kv_tokens is a cap of the model's own, in tokens; the pool is that of
all models, in bytes (engine/kv_pool.py).
"""

from __future__ import annotations

import math
import sys
from collections import abc
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from mlxserver.engine.kv_cache.caches import Cache, CacheSizes
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes
from mlxserver.engine.kv_claims import Verdict
from mlxserver.engine.kv_pool import KVAccount, KVPool
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.prefill import Prefill
from mlxserver.engine.scheduler.prompts import PendingPrompt

Prompts = abc.Sequence[PendingPrompt]

BLOCK = 256  # tokens that are claimed at once


def block_bytes(sizes: CacheSizes, tokens: int, sequences: int) -> int:
    """Bytes of KV cache of so many tokens, in whole blocks, of so many sequences."""
    return sizes.total(-(-tokens // BLOCK) * BLOCK, sequences)


class KVBudget:
    """Claims for one batch. max_tokens: None for no cap. account: the model's in the pool; None for no limit."""

    def __init__(
        self,
        running: DecodeBatch,
        prefill: Prefill,
        prefixes: ModelPrefixes | None,
        max_tokens: int | None,
        sizes: CacheSizes,
        max_running: int = 1,
        account: KVAccount | None = None,
    ) -> None:
        self._running = running
        self._prefill = prefill
        self._prefixes = prefixes
        self._max_tokens = max_tokens or sys.maxsize
        self._sizes = sizes
        self._max_running = max_running
        self._account = account or KVPool().open("", 0)

    @property
    def has_prefixes(self) -> bool:
        """Whether prefixes are cached."""
        return self._prefixes is not None

    def holds(self, kv_tokens: int) -> bool:
        """Whether so many tokens of KV cache are within the model's cap."""
        return kv_tokens <= self._max_tokens

    def holds_together(self, prompt: PendingPrompt) -> bool:
        """Whether all sequences of a prompt could decode at once, with nothing beside them."""
        kv_tokens = self._running.cache.tokens_for([prompt.length] * len(prompt.sequences))
        most = self._account.most_alone
        needed = block_bytes(self._sizes, kv_tokens, len(prompt.sequences))
        return self.holds(kv_tokens) and (most is None or needed <= most)

    def longest(self, most: int) -> int:
        """Tokens of the longest sequence, of `most` at most, that the pool could hold alone."""
        most_bytes = self._account.most_alone
        if most_bytes is None or self._alone_bytes(most) <= most_bytes:
            return most
        fits, too_long = 0, most
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self._alone_bytes(middle) <= most_bytes:
                fits = middle
            else:
                too_long = middle
        return fits

    def _alone_bytes(self, tokens: int) -> int:
        """Bytes of one sequence of so many tokens, in a slot of its own or in prefill."""
        length = tokens + 2  # as RunningSequence counts its last step
        kv_tokens = max(self._running.cache.tokens_alone(length), self._prefill.tokens_for(length))
        return block_bytes(self._sizes, kv_tokens, 1) + self._prefill.bytes_beyond(length)

    def tokens_of(self, prompts: Prompts) -> int:
        """Tokens of KV cache that the running sequences and these prompts take, until they decode together.

        The cache of a prompt becomes a part of the batch's when it joins: layer by layer, so that of the prompt that
        joins first one of the two counts.
        """
        running = [running.length for running in self._running.sequences]
        if not prompts:
            return self._running.cache.tokens_for(running)
        own = [self._prefill.tokens_for(len(prompt.tokens)) for prompt in prompts]
        joined = running + [prompt.length for prompt in prompts for _ in prompt.sequences]
        tokens_for = self._running.cache.tokens_for
        return max(tokens_for(running) + sum(own), tokens_for(joined) + sum(own) - min(own, default=0))

    def compacted_tokens_of(self, prompts: Prompts) -> int:
        """As tokens_of(); if that is over a limit, unused slots and capacity are given back first."""
        kv_tokens = self.tokens_of(prompts)
        if (self.holds(kv_tokens) and self.has_space(kv_tokens, prompts)) or not self._running.sequences:
            return kv_tokens
        self._running.compact()
        return self.tokens_of(prompts)

    # -- claims ---------------------------------------------------------------------------------------------------

    def start(self, kv_tokens: int, prompts: Prompts, now: float) -> bool:
        """Claim the memory of the running sequences and these prompts, the last of which is to start now."""
        bytes = self._bytes(kv_tokens, prompts)
        return self._account.start(bytes, self._count(prompts), prompts[-1].arrived, now)

    def grow(self, kv_tokens: int, prompts: Prompts) -> Verdict:
        """Claim the memory of the next step."""
        return self._account.grow(self._bytes(kv_tokens, prompts), self._count(prompts), self._youngest(prompts))

    def settle(self, prompts: Prompts) -> None:
        """Give back what the running sequences and these prompts do not need, and what prefixes have too much."""
        kv_tokens = self.compacted_tokens_of(prompts)
        sequences = self._count(prompts)
        self._account.give_back(self._bytes(kv_tokens, prompts), sequences, self._youngest(prompts))
        self.shrink_prefixes_beside(kv_tokens, sequences)

    @contextmanager
    def borrowing(self, kv_tokens: int) -> Iterator[bool]:
        """Have so many tokens of KV cache for as long as the block runs, while no sequence has any. False: not now."""
        with self._account.borrowing(block_bytes(self._sizes, kv_tokens, 1)) as is_granted:
            yield is_granted and self.holds(kv_tokens)

    def has_space(self, kv_tokens: int, prompts: Prompts) -> bool:
        """Whether the pool has this memory, once prefixes are dropped."""
        return self._account.has_space(self._bytes(kv_tokens, prompts))

    def withdraw(self) -> None:
        """No prompt waits any more."""
        self._account.withdraw()

    def wait(self) -> None:
        """Wait for memory, for a short time. Raises MemoryError if there will be none: the model is being unloaded."""
        if self._account.is_stuck:
            raise MemoryError("the prompt does not fit beside the models in use")
        self._account.wait()

    def _bytes(self, kv_tokens: int, prompts: Prompts) -> int:
        """Bytes of so much KV cache, of the running sequences and these prompts, and of the prompts' chunks."""
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        beyond = self._prefill.bytes_beyond(longest) if longest else 0
        return block_bytes(self._sizes, kv_tokens, self._count(prompts)) + beyond

    def _count(self, prompts: Prompts) -> int:
        return len(self._running.sequences) + sum(len(prompt.sequences) for prompt in prompts)

    def _youngest(self, prompts: Prompts) -> float:
        started = [running.started for running in self._running.sequences] + [prompt.started for prompt in prompts]
        return max(started, default=-math.inf)

    # -- prefixes -------------------------------------------------------------------------------------------------

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
        """Leave to the prefix cache what so many sequences with so many tokens of KV cache do not need of the cap."""
        if self._max_tokens < sys.maxsize:
            most = self._sizes.total(self._max_tokens, self._max_running)
            self.shrink_prefixes(max(0, most - self._sizes.total(kv_tokens, sequences)))

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Drop the least recently used prefixes until at most this many bytes are left."""
        if self._prefixes:
            self._prefixes.shrink(max_bytes)

    def close(self) -> None:
        """Drop the prefixes for good, and give everything back."""
        if self._prefixes:
            self._prefixes.close()
        self._account.close()
