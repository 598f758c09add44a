"""Samplers of ranks: rank 0 samples the tokens, and every rank continues with them.

So a difference in the last bit can't make the ranks diverge, and sampling parameters concern rank 0 alone.
"""

from __future__ import annotations

from collections import abc
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.sequence import Sequence


class LeadingSampler:
    """Samples the tokens and sends them to all ranks."""

    def __init__(self, vocab_size: int, group: Any) -> None:
        self._own = BatchSampler(vocab_size)
        self._group = group

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences."""
        self._own.extend(sequences)

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices."""
        self._own.filter(keep)

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last calls back."""
        self._own.rewind(sampled, kept)

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch]."""
        return mx.distributed.all_sum(self._own(logits, allowed).astype(mx.uint32), group=self._group)


class FollowingSampler:
    """Receives the tokens that rank 0 samples."""

    def __init__(self, vocab_size: int, group: Any) -> None:
        self._group = group

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Nothing to do: only rank 0 needs sampling parameters."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Nothing to do."""

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Nothing to do."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch]. The logits are computed first, as on rank 0."""
        nothing = mx.depends(mx.zeros(logits.shape[:-1], mx.uint32), logits)
        return mx.distributed.all_sum(nothing, group=self._group)
