"""Choosing the next token for a whole batch in one call.

Rule 1: every setting is an array with one entry a row; a row's draw depends on its own seed and position alone,
        never on who else is in the batch.
Rule 2: what no row uses costs nothing: the work is chosen when the batch changes, not at every step.

The draw is by inverse transform: one uniform number a row against the cumulative distribution, in the order of the
vocabulary. top_k, top_p (Holtzman et al. 2020, "nucleus") and min_p (Nguyen et al. 2024) are all turned into one
threshold on the probability; what lies below it is dropped. frequency, presence and repetition penalties are those
of the OpenAI API and of Keskar et al. 2019.
"""

from __future__ import annotations

import math
import secrets
from collections import abc

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import cpu_kernels
from mlxserver.engine.platform.policy import current
from mlxserver.engine.requests import Sampling
from mlxserver.engine.sequence import Sequence

# The threshold is looked for among this many most likely tokens. A nucleus that is larger keeps the whole tail.
CANDIDATES = 256

_SMALLEST_TEMPERATURE = 1e-6  # below it a logit over it would leave float32; the draw is greedy long before
_LARGEST_UNIFORM = 1.0 - 2.0**-20  # a float32 total times this stays below the total


def _key_of(sampling: Sampling) -> tuple[int, int]:
    """The 64 bits that start a row's random stream: mixed from its seed (splitmix64), or fresh."""
    bits = secrets.randbits(64) if sampling.seed is None else sampling.seed & (2**64 - 1)
    bits = (bits + 0x9E3779B97F4A7C15) & (2**64 - 1)
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    bits ^= bits >> 31
    return bits >> 32, bits & (2**32 - 1)


def _is_penalized(sampling: Sampling) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0)


def _is_filtered(sampling: Sampling) -> bool:
    return sampling.temperature > 0 and bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0)


def _column(values: abc.Sequence[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]


class BatchSampler:
    """Samples one token a row; its rows follow those of the decode batch through extend() and filter()."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._softmax = cpu_kernels.softmax if current().replace_kernels else mx.softmax
        self._rows: list[Sampling] = []
        self._keys = mx.zeros((0, 2), dtype=mx.uint32)
        self._generated: mx.array | None = None  # [rows, vocab], how often each token was generated
        self._prompted: mx.array | None = None  # [rows, vocab], whether the prompt has the token
        self._bias: mx.array | None = None  # [rows, vocab]

    def extend(self, rows: abc.Sequence[Sequence]) -> None:
        """Add rows behind the present ones. Their draws start where their own random stream was left."""
        self._extend_penalties(rows)
        self._extend_bias(rows)
        self._rows += [row.sampling for row in rows]
        keys = mx.array([_key_of(row.sampling) for row in rows], dtype=mx.uint32)
        positions = mx.array([(0, row.said) for row in rows], dtype=mx.uint32)
        self._keys = mx.concatenate([self._keys, keys + positions])
        self._choose_work()

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the rows at these indices, in this order."""
        self._rows = [self._rows[index] for index in keep]
        kept = mx.array(list(keep), dtype=mx.uint32)
        self._keys = self._keys[kept]
        penalized = any(map(_is_penalized, self._rows))
        self._generated = self._generated[kept] if penalized and self._generated is not None else None
        self._prompted = self._prompted[kept] if penalized and self._prompted is not None else None
        biased = any(row.logit_bias for row in self._rows)
        self._bias = self._bias[kept] if biased and self._bias is not None else None
        self._choose_work()

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Choose tokens: logits [rows, vocab] of any float type -> token ids [rows], uint32. Nothing is evaluated.

        allowed: [rows, vocab] of bool, what each row may say; None allows everything.
        """
        logits = logits.astype(mx.float32)
        if self._bias is not None:
            logits = logits + self._bias
        if self._generated is not None and self._prompted is not None:
            logits = self._penalize(logits, self._generated, self._prompted)
        if allowed is not None:
            logits = mx.where(allowed, logits, -mx.inf)
        tokens = mx.argmax(logits, axis=-1)
        if self._is_sampled:
            tokens = mx.where(self._greedy, tokens, self._draw(logits, tokens))
        if self._generated is not None:
            self._generated = self._generated.at[mx.arange(len(self._rows)), tokens].add(1.0)
        return tokens

    def _choose_work(self) -> None:
        """Set the arrays and flags that hold until the batch changes again."""
        rows = self._rows
        self._is_sampled = any(row.temperature > 0 for row in rows)
        self._has_filter = any(map(_is_filtered, rows))
        if self._is_sampled:
            self._greedy = mx.array([row.temperature == 0 for row in rows])
            self._inverse_temperature = _column([1.0 / max(row.temperature, _SMALLEST_TEMPERATURE) for row in rows])
        if self._has_filter:
            candidates = [min(self._vocab_size, max(CANDIDATES, 1 << row.top_k.bit_length())) for row in rows]
            self._candidates = max(candidates)
            self._widest_nucleus = _column(candidates)  # a row's own, so that its neighbours' top_k changes nothing
            self._top_p = _column([row.top_p if row.top_p < 1.0 else math.inf for row in rows])
            self._top_k = _column([row.top_k or self._vocab_size for row in rows])
            self._min_p = _column([row.min_p for row in rows])
        if self._generated is not None:
            self._frequency = _column([row.frequency_penalty for row in rows])
            self._presence = _column([row.presence_penalty for row in rows])
            self._repetition = _column([row.repetition_penalty for row in rows])

    def _draw(self, logits: mx.array, likeliest: mx.array) -> mx.array:
        """Draw from the filtered distribution, [rows, vocab] -> [rows]; the likeliest where nothing can be drawn."""
        probabilities = self._softmax(logits * self._inverse_temperature, axis=-1)
        if self._has_filter:
            probabilities = mx.where(probabilities >= self._threshold(probabilities), probabilities, 0.0)
        cumulative = mx.cumsum(probabilities, axis=-1)
        uniform = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(self._keys)
        self._keys = self._keys + mx.array([0, 1], dtype=mx.uint32)
        bound = mx.minimum(uniform, _LARGEST_UNIFORM) * cumulative[:, -1:]
        tokens = mx.minimum(mx.sum(cumulative <= bound, axis=-1), self._vocab_size - 1).astype(mx.uint32)
        # A GPU adds up in parallel: its sums may rise by a rounding error where the probability is 0. And logits that
        # are no numbers leave nothing to draw from; what follows must get a token that exists all the same.
        chance = mx.take_along_axis(probabilities, tokens[:, None], axis=-1)[:, 0]
        return mx.where(chance > 0, tokens, likeliest)

    def _threshold(self, probabilities: mx.array) -> mx.array:
        """The smallest probability to keep in each row, [rows, vocab] -> [rows, 1]."""
        top = -mx.sort(-mx.topk(probabilities, self._candidates, axis=-1), axis=-1)
        mass_before = mx.cumsum(top, axis=-1) - top
        is_kept = (mass_before < self._top_p) & (mx.arange(self._candidates) < self._top_k)
        count = mx.sum(is_kept, axis=-1, keepdims=True)
        smallest = mx.take_along_axis(top, mx.maximum(count - 1, 0), axis=-1)
        smallest = mx.where(count >= self._widest_nucleus, 0.0, smallest)
        return mx.maximum(smallest, top[:, :1] * self._min_p)

    def _penalize(self, logits: mx.array, generated: mx.array, prompted: mx.array) -> mx.array:
        """Apply the penalties, [rows, vocab] -> [rows, vocab]."""
        was_generated = generated > 0
        penalized = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = mx.where(was_generated | prompted, penalized, logits)
        return logits - generated * self._frequency - was_generated * self._presence

    def _extend_penalties(self, rows: abc.Sequence[Sequence]) -> None:
        if self._generated is None and not any(_is_penalized(row.sampling) for row in rows):
            return
        before = (len(self._rows), self._vocab_size)
        generated = mx.zeros(before) if self._generated is None else self._generated
        prompted = mx.zeros(before, dtype=mx.bool_) if self._prompted is None else self._prompted
        seen = mx.stack([self._prompt_tokens(row) for row in rows])
        said = mx.stack([self._said_tokens(row) for row in rows])
        self._generated = mx.concatenate([generated, said])
        self._prompted = mx.concatenate([prompted, seen])

    def _prompt_tokens(self, row: Sequence) -> mx.array:
        """Which tokens the prompt has, [vocab] of bool; empty where the row does not ask for it."""
        seen = mx.zeros((self._vocab_size,), dtype=mx.bool_)
        if row.sampling.repetition_penalty != 1.0:
            seen[mx.array(sorted(set(row.tokens)))] = True
        return seen

    def _said_tokens(self, row: Sequence) -> mx.array:
        """How often the row has generated each token already, [vocab]."""
        counts = mx.zeros((self._vocab_size,))
        return counts.at[mx.array(row.tokens[-row.said :])].add(1.0) if row.said else counts

    def _extend_bias(self, rows: abc.Sequence[Sequence]) -> None:
        if self._bias is None and not any(row.sampling.logit_bias for row in rows):
            return
        bias = mx.zeros((len(self._rows), self._vocab_size)) if self._bias is None else self._bias
        self._bias = mx.concatenate([bias, mx.stack([self._bias_of(row.sampling) for row in rows])])

    def _bias_of(self, sampling: Sampling) -> mx.array:
        bias = mx.zeros((self._vocab_size,))
        if sampling.logit_bias:
            bias[mx.array(list(sampling.logit_bias))] = mx.array(list(sampling.logit_bias.values()), dtype=mx.float32)
        return bias
