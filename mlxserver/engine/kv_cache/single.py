"""Decode batch of a model that can't be batched: each sequence has its own cache, and a forward pass per step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.sight import step_logits


class SingleCache:
    """BatchCache of any model that runs at all."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Drop all sequences."""
        self._caches: list[caches.Cache] = []

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences behind the present ones. One cache may be given for several sequences."""
        present = {id(cache) for cache in self._caches}
        for cache in joining:
            self._caches.append(copy.deepcopy(cache) if id(cache) in present else cache)
            present.add(id(cache))

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences."""
        self._caches = [self._caches[index] for index in order]

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's cache."""
        return copy.deepcopy(self._caches[index])

    def advance(self, inputs: mx.array, sights: Sequence[mx.array] = ()) -> mx.array:
        """Compute one token per sequence."""
        logits = [
            step_logits(self._model, inputs[n : n + 1, None], cache, [own[n : n + 1] for own in sights])[:, -1, :]
            for n, cache in enumerate(self._caches)
        ]
        return mx.concatenate(logits) if len(logits) > 1 else logits[0]

    def tokens_for(self, lengths: Sequence[int]) -> int:
        """Tokens of KV cache of such sequences."""
        return sum(lengths)

    def tokens_alone(self, length: int) -> int:
        """Its own tokens."""
        return length

    def compact(self) -> None:
        """Nothing to do: a cache is no longer than its sequence."""
