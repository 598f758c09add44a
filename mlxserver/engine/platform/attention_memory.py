"""Memory of a prefill chunk's attention where its scores are materialized, and the chunk length that fits; and of what
it reads, where keys and values are dequantised first.

Rule: a chunk is held to what was counted for the model before it was loaded (loading/estimate.py). Sizes are bytes.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxserver.engine.platform.policy import ExecutionPolicy, current

_COPIES = 2  # the scores, and their exponentials
_MASKS = 3  # of a chunk or a batch: those of windows or of sequences, and what they are made of
_MAX_TEXT_BYTES = 1 << 30  # that the scores of one text in an encoder would take, which can't be cut into chunks
_MAX_BYTES = 128 << 20  # of all scores that exist at once; a chunk has at least SMALLEST_CHUNK tokens even so
# Tokens in a chunk, on every device: never fewer, so that a slow machine gets on; never more, so that a fast one stays
# responsive.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 4096
# Tokens in a batch of an encoder from which it is computed layer by layer on a CPU, its scores in pieces
# (cpu_attention.py). Of a shorter one, waiting for each layer takes a tenth of the time.
STEPWISE_TOKENS = 128
SCORES_AT_ONCE = 1 << 20  # of the scores of such a layer
# mlx-lm computes state-space layers in blocks of so many tokens, in which each has a score for each before it.
STATE_REACH = 256
_DEQUANTIZED_TOKENS = 4096  # of a layer that are reserved with a model; a longer prompt claims the rest


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Attention memory of a model with `heads` query heads per layer (0: unknown, and never a limit).

    reach: most tokens that one attends to, 0 for all; STATE_REACH where all layers are state-space models. dequantized:
    bytes per token of a layer's dequantised keys and values, 0 where they are read as they are. in_blocks: no score is
    in memory (kv_cache/caches.py), so that a chunk may be as long behind other tokens as at a prompt's start; what is
    counted for a model is the same, for it has the activations of that chunk, and a prompt's keys and values exist
    twice when it joins.
    """

    heads: int
    policy: ExecutionPolicy = field(default_factory=current)
    reach: int = 0
    dequantized: int = 0
    in_blocks: bool = False

    def chunk_bytes(self, chunk: int, length: int) -> int:
        """Attention memory of a chunk of so many tokens, the last of which attends to `length` tokens."""
        if not self.policy.materialized_attention:
            return 0
        length = min(length, self.reach) if self.reach else length
        return self.policy.layers_ahead * _COPIES * 4 * self.heads * chunk * length

    def fit(self, wanted: int, done: int) -> int:
        """Tokens of a chunk behind `done` others: those wanted, or as many as have small enough scores, or masks."""
        if not self.in_blocks:
            return _fit(wanted, done, self.chunk_bytes)
        return _fit(_fit(wanted, 0, self.chunk_bytes), done, _mask_bytes)

    def fit_texts(self, length: int) -> int:
        """Texts of so many tokens that an encoder processes together, at least one."""
        return max(1, _MAX_BYTES // max(1, self.chunk_bytes(length, length)))

    def batch_bytes(self, tokens: int, context: int) -> int:
        """Attention memory of an encoder's batches of so many tokens, of texts within the context.

        Native kernels have no scores in memory: what is left are masks of the positions that a token attends to.
        """
        from mlxserver.engine.platform.native.extension import native  # imports MLX

        pieces = self.policy.layers_ahead * _COPIES * 4 * SCORES_AT_ONCE
        if self.policy.replace_kernels and native() is not None:
            return min(pieces, _mask_bytes(tokens, context))
        return min(pieces, self.chunk_bytes(tokens, context))

    def longest_text(self) -> int:
        """Tokens of the longest text that an encoder should have: its time grows with that of the scores."""
        one = self.chunk_bytes(1, 1)
        return math.isqrt(_MAX_TEXT_BYTES // one) if one else sys.maxsize

    def max_bytes(self, context: int) -> int:
        """Attention memory of any chunk at most, when no prompt is longer than the context."""
        return self.fitted_bytes(context) + self.bytes_beyond(context)

    def fitted_bytes(self, context: int) -> int:
        """Attention memory of the chunks whose length fit() chooses."""
        read = self.dequantized_bytes(min(context, _DEQUANTIZED_TOKENS))
        return read + min(_MAX_BYTES, self.chunk_bytes(self.fit(LARGEST_CHUNK, 0), context))

    def bytes_beyond(self, length: int) -> int:
        """What the smallest chunk at the end of a long prompt takes beyond that."""
        read = self.dequantized_bytes(max(0, length - _DEQUANTIZED_TOKENS))
        return read + max(0, self.chunk_bytes(SMALLEST_CHUNK, length) - _MAX_BYTES)

    def dequantized_bytes(self, length: int) -> int:
        """Dequantised keys and values of so many tokens, in the layers that are computed at the same time."""
        return self.policy.layers_ahead * self.dequantized * length


def _mask_bytes(chunk: int, length: int) -> int:
    """Masks of a chunk of so many tokens, the last of which attends to `length` tokens."""
    return _MASKS * 4 * chunk * length


def _fit(wanted: int, done: int, nbytes: Callable[[int, int], int]) -> int:
    """Tokens of a chunk behind `done` others, those wanted or as many as take little enough.

    nbytes: bytes of a chunk of so many tokens, the last of which attends to so many.
    """
    longest = bisect_right(range(wanted + 1), _MAX_BYTES, key=lambda chunk: nbytes(chunk, done + chunk)) - 1
    return min(wanted, max(longest, SMALLEST_CHUNK))
