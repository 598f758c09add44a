"""Sampling of the next tokens of a whole batch in one call.

Rule 1: every setting is an array with one entry per sequence; a sequence's draw depends on its own seed and position
        alone, never on the rest of the batch.
Rule 2: settings that no sequence uses cost nothing: the work is chosen when the batch changes, not at every step.

frequency, presence and repetition penalties are those of the OpenAI API and of Keskar et al. 2019; draw.py has the
temperature, the filters and the draw itself.
"""

from __future__ import annotations

import secrets
from collections import abc

from mlxserver.engine.mlx import mx

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform import sampling_kernels
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.sampling.draw import Draw, new_draw
from mlxserver.engine.sequence import Sequence

GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.9)  # what most requests use


def _key_of(sampling: SamplingParams) -> tuple[int, int]:
    """The 64 bits that start a sequence's random stream: mixed from its seed (splitmix64), or fresh."""
    bits = secrets.randbits(64) if sampling.seed is None else sampling.seed & (2**64 - 1)
    bits = (bits + 0x9E3779B97F4A7C15) & (2**64 - 1)
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    bits ^= bits >> 31
    return bits >> 32, bits & (2**32 - 1)


def _is_penalized(sampling: SamplingParams) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0)


class BatchSampler:
    """Samples one token per sequence; follows the sequences of the decode batch through extend() and filter()."""

    def __init__(self, vocab_size: int, policy: ExecutionPolicy | None = None) -> None:
        self._vocab_size = vocab_size
        self._policy = policy or current()
        self._draw = new_draw(vocab_size, self._policy)
        self._settings: list[SamplingParams] = []
        self._keys = mx.zeros((0, 2), dtype=mx.uint32)
        self._generated: mx.array | None = None  # [batch, vocab], how often each token was generated
        self._prompted: mx.array | None = None  # [batch, vocab], whether the prompt has the token
        self._bias: mx.array | None = None  # [batch, vocab]

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences behind the present ones. Their draws start where their own random stream was left."""
        self._extend_penalties(sequences)
        self._extend_bias(sequences)
        self._settings += [sequence.sampling for sequence in sequences]
        keys = mx.array([_key_of(sequence.sampling) for sequence in sequences], dtype=mx.uint32)
        positions = mx.array([(0, sequence.num_generated) for sequence in sequences], dtype=mx.uint32)
        self._keys = mx.concatenate([self._keys, keys + positions])
        self._choose_work()

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order."""
        self._settings = [self._settings[index] for index in keep]
        kept = mx.array(list(keep), dtype=mx.uint32)
        self._keys = self._keys[kept]
        penalized = any(map(_is_penalized, self._settings))
        self._generated = self._generated[kept] if penalized and self._generated is not None else None
        self._prompted = self._prompted[kept] if penalized and self._prompted is not None else None
        biased = any(sampling.logit_bias for sampling in self._settings)
        self._bias = self._bias[kept] if biased and self._bias is not None else None
        self._choose_work()

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Sample: logits [batch, vocab] of any float type -> token ids [batch], uint32. Nothing is evaluated.

        Logits of the next positions of each sequence, [batch, n, vocab] -> [batch, n]: the tokens of n calls.
        allowed: [batch, bytes] of uint8, a bit per token that the sequence's constraint allows at the first position,
        the first token in the lowest; None allows every token.
        """
        if logits.ndim > 2:
            return self._sample_positions(logits, allowed)
        logits = self._draw.cast(logits)
        if self._bias is not None:
            logits = logits + self._bias
        if self._generated is not None and self._prompted is not None:
            logits = sampling_kernels.penalize(logits, self._generated, self._prompted, self._penalties)
        if allowed is not None:
            logits = sampling_kernels.mask(logits, allowed)
        tokens = self._draw(logits, self._uniform()) if self._is_sampled else sampling_kernels.argmax(logits)
        if self._generated is not None:
            self._generated = self._generated.at[mx.arange(len(self._settings)), tokens].add(1.0)
        return tokens

    def _sample_positions(self, logits: mx.array, allowed: mx.array | None) -> mx.array:
        """Sample several positions of each sequence, all at once where none depends on the tokens before it."""
        batch, count, vocab = logits.shape
        if self._generated is not None or allowed is not None:
            return mx.stack([self(logits[:, n], None if n else allowed) for n in range(count)], axis=1)
        if self._bias is not None:
            logits = logits + self._bias[:, None]
        rows = self._draw.cast(logits.reshape(batch * count, vocab))
        if not self._is_sampled:
            return sampling_kernels.argmax(rows).reshape(batch, count)
        if count not in self._draws:
            self._draws[count] = new_draw(self._vocab_size, self._policy)
            self._draws[count].configure([own for own in self._settings for _ in range(count)])
        return self._draws[count](rows, self._uniform(count)).reshape(batch, count)

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last n tokens back, but for the first `kept` of each sequence. sampled: these tokens, [batch, n]."""
        tokens, counts = sampled.shape[1], mx.array(list(kept), dtype=mx.uint32)
        if self._is_sampled:
            taken_back = mx.stack([mx.zeros_like(counts), tokens - counts], axis=1)
            self._keys = self._keys - taken_back
        if self._generated is not None:
            is_dropped = (mx.arange(tokens) >= counts[:, None]).astype(mx.float32)
            self._generated = self._generated.at[mx.arange(len(kept))[:, None], sampled].subtract(is_dropped)

    def _choose_work(self) -> None:
        """Set the arrays and flags that hold until the batch changes again."""
        settings = self._settings
        self._draws: dict[int, Draw] = {}  # of several positions at once, by their number
        self._is_sampled = any(one.temperature > 0 for one in settings)
        if self._is_sampled:
            self._draw.configure(settings)
        if self._generated is not None:
            self._penalties = mx.array(
                [(one.frequency_penalty, one.presence_penalty, one.repetition_penalty) for one in settings]
            )

    def _uniform(self, count: int = 1) -> mx.array:
        """The next numbers of each sequence's random stream, [batch * count, 1] in [0, 1)."""
        keys = self._keys
        if count > 1:
            positions = mx.array([(0, n) for n in range(count)], dtype=mx.uint32)
            keys = (keys[:, None] + positions).reshape(-1, 2)
        uniform: mx.array = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)
        self._keys = self._keys + mx.array([0, count], dtype=mx.uint32)
        return uniform

    def _extend_penalties(self, sequences: abc.Sequence[Sequence]) -> None:
        if self._generated is None and not any(_is_penalized(sequence.sampling) for sequence in sequences):
            return
        before = (len(self._settings), self._vocab_size)
        generated = mx.zeros(before) if self._generated is None else self._generated
        prompted = mx.zeros(before, dtype=mx.bool_) if self._prompted is None else self._prompted
        self._generated = mx.concatenate([generated, mx.stack([self._count_generated(one) for one in sequences])])
        self._prompted = mx.concatenate([prompted, mx.stack([self._mark_prompted(one) for one in sequences])])

    def _mark_prompted(self, sequence: Sequence) -> mx.array:
        """Whether the prompt has each token, [vocab] of bool; all false where no penalty depends on it."""
        seen = mx.zeros((self._vocab_size,), dtype=mx.bool_)
        if sequence.sampling.repetition_penalty != 1.0:
            seen[mx.array(sorted(set(sequence.tokens)))] = True
        return seen

    def _count_generated(self, sequence: Sequence) -> mx.array:
        """How often the sequence has generated each token before it was preempted, [vocab]."""
        counts = mx.zeros((self._vocab_size,))
        if not sequence.num_generated:
            return counts
        return counts.at[mx.array(sequence.tokens[-sequence.num_generated :])].add(1.0)

    def _extend_bias(self, sequences: abc.Sequence[Sequence]) -> None:
        if self._bias is None and not any(sequence.sampling.logit_bias for sequence in sequences):
            return
        bias = mx.zeros((len(self._settings), self._vocab_size)) if self._bias is None else self._bias
        self._bias = mx.concatenate([bias, mx.stack([self._bias_of(sequence.sampling) for sequence in sequences])])

    def _bias_of(self, sampling: SamplingParams) -> mx.array:
        bias = mx.zeros((self._vocab_size,))
        if sampling.logit_bias:
            bias[mx.array(list(sampling.logit_bias))] = mx.array(list(sampling.logit_bias.values()), dtype=mx.float32)
        return bias
