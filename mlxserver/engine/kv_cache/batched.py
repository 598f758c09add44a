"""KV cache of the sequences that decode together.

Rule 1: sequences have the order of the decode batch; row i of the logits belongs to sequence i.
Rule 2: plain keys and values are in slots (slot_cache.py), all other layers in mlx-lm's own batched caches (merged.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.classes import one_class
from mlxserver.engine.kv_cache.merged import MergedCache
from mlxserver.engine.kv_cache.single import SingleCache
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.platform.policy import ExecutionPolicy, current


class BatchCache(Protocol):
    """KV cache of a decode batch."""

    def join(self, joining: Sequence[caches.Cache], coming: int = 0) -> None:
        """Add sequences, each with its own cache, behind the present ones. coming: how many more are soon to join."""

    def keep(self, order: Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order; at least one. None may move towards the end."""

    def clear(self) -> None:
        """Drop all sequences."""

    def extract(self, index: int) -> caches.Cache:
        """A copy of a sequence's cache."""

    def advance(self, inputs: mx.array, sights: Sequence[mx.array] = ()) -> mx.array:
        """Compute one token per sequence, [batch] -> logits [batch, vocab]. Nothing is evaluated.

        sights: what the sequences are given of images (step_sights).
        """

    def tokens_for(self, lengths: Sequence[int]) -> int:
        """Tokens of KV cache of sequences of so many tokens each; unused capacity included."""

    def tokens_alone(self, length: int) -> int:
        """Tokens of KV cache of a single sequence, with nothing beside it."""

    def compact(self) -> None:
        """Give back slots and capacity that the present sequences do not need."""


def make_batch_cache(model: Any, policy: ExecutionPolicy | None = None, *, is_shared: bool = False) -> BatchCache:
    """An empty cache for a model's decode batch. is_shared: several ranks compute the model.

    They must make the same forward passes, and may have unlike parts of it, whose sizes say something else on each.
    """
    policy = policy or current()
    wide = one_class if is_shared else None
    if policy.batch_cache == "single":
        return SingleCache(model)
    if policy.batch_cache == "slots" and caches.is_plain(model):
        return SlotCache(model, policy, wide=wide)
    return MergedCache(model, wide)
