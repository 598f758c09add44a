"""Batched KV caches of models with other layers than plain ones (sliding windows, recurrent states): mlx-lm's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches


class MergedCache:
    """BatchCache of any cache that mlx-lm can batch."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Drop all sequences."""
        self._cache: caches.Cache = []

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences behind the present ones."""
        merged = caches.merge(joining)
        if not self._cache:
            self._cache = merged
            return
        for layer, other in zip(self._cache, merged, strict=True):
            layer.extend(other)

    def keep(self, order: Sequence[int]) -> None:
        """Keep only these sequences."""
        for layer in self._cache:
            layer.filter(list(order))

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's cache."""
        return caches.extract(self._cache, index)

    def advance(self, inputs: mx.array) -> mx.array:
        """Compute one token per sequence."""
        logits: mx.array = self._model(inputs[:, None], cache=self._cache)[:, -1, :]
        return logits

    def tokens_for(self, lengths: Sequence[int]) -> int:
        """Tokens of KV cache of such a batch."""
        return len(lengths) * max(lengths, default=0)

    def compact(self) -> None:
        """Nothing to do: mlx-lm's caches keep no more than their longest sequence needs."""
