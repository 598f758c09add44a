"""One choice of tokens for all ranks: rank 0 makes it, and every rank feeds it.

So the ranks can't go astray for a difference in the last bit, and what a request asks of its sampling concerns rank 0
alone.
"""

from __future__ import annotations

from collections import abc
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.sequence import Sequence


class LeadingSampler:
    """Chooses the tokens, and tells them to all ranks."""

    def __init__(self, vocab_size: int, group: Any) -> None:
        self._own = BatchSampler(vocab_size)
        self._group = group

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add rows."""
        self._own.extend(sequences)

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only these rows."""
        self._own.filter(keep)

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [rows, vocab] -> token ids [rows]."""
        return mx.distributed.all_sum(self._own(logits, allowed).astype(mx.uint32), group=self._group)


class FollowingSampler:
    """Takes the tokens that rank 0 chooses."""

    def __init__(self, vocab_size: int, group: Any) -> None:
        self._group = group

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Rank 0 knows how they are to be sampled."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """There is nothing to keep of them."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [rows, vocab] -> token ids [rows]. What made the logits is computed before, as on rank 0."""
        nothing = mx.depends(mx.zeros((logits.shape[0],), mx.uint32), logits)
        return mx.distributed.all_sum(nothing, group=self._group)
