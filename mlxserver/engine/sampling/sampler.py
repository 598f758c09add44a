"""Sampling of the next tokens of a whole batch in one call.

Rule 1: every setting is an array with one entry per sequence; a sequence's draw depends on its own seed and position
        alone, never on the rest of the batch.
Rule 2: settings that no sequence uses cost nothing: the work is chosen when the batch changes, not at every step.

The draw is by inverse transform: one uniform number per sequence against the cumulative distribution, in the order of
the vocabulary. top_k, top_p (Holtzman et al. 2020, "nucleus") and min_p (Nguyen et al. 2024) become one threshold on
the probability; tokens below it are dropped. frequency, presence and repetition penalties are those of the OpenAI API
and of Keskar et al. 2019.
"""

from __future__ import annotations

import math
import secrets
from collections import abc

from mlxserver.engine.mlx import mx

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform import cpu_kernels, cuda_sampling
from mlxserver.engine.platform.policy import current
from mlxserver.engine.sequence import Sequence

# Most likely tokens among which the threshold is found. A nucleus that is larger keeps the whole tail.
CANDIDATES = 256

GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.9)  # what most requests use

_SMALLEST_TEMPERATURE = 1e-6  # below it a logit over it would leave float32; the draw is greedy long before
_LARGEST_UNIFORM = 1.0 - 2.0**-20  # a float32 total times this stays below the total


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


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.temperature > 0 and bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0)


def _kernel_settings(sampling: SamplingParams, vocab_size: int) -> tuple[float, float, float, float]:
    """A sequence's settings as cuda_sampling.draw() has them."""
    if sampling.temperature == 0:
        return 0.0, 1.0, 0.0, vocab_size
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    return 1.0 / max(sampling.temperature, _SMALLEST_TEMPERATURE), sampling.top_p, sampling.min_p, top_k


def _column(values: abc.Sequence[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]


class BatchSampler:
    """Samples one token per sequence; follows the sequences of the decode batch through extend() and filter()."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        policy = current()
        self._softmax = cpu_kernels.softmax if policy.replace_kernels else mx.softmax
        self._has_kernel = policy.sampling_kernel
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

        allowed: [batch, vocab] of bool, the tokens that each sequence's constraint allows; None allows every token.
        """
        if not self._has_kernel:
            logits = logits.astype(mx.float32)
        if self._bias is not None:
            logits = logits + self._bias
        if self._generated is not None and self._prompted is not None:
            logits = self._penalize(logits, self._generated, self._prompted)
        if allowed is not None:
            logits = mx.where(allowed, logits, -mx.inf)
        if self._is_sampled and self._has_kernel:
            tokens = cuda_sampling.draw(logits, self._kernel_settings, self._uniform())
        else:
            tokens = mx.argmax(logits, axis=-1)
            if self._is_sampled:
                tokens = mx.where(self._greedy, tokens, self._draw(logits, tokens))
        if self._generated is not None:
            self._generated = self._generated.at[mx.arange(len(self._settings)), tokens].add(1.0)
        return tokens

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last n calls back, but for the first `kept` of each sequence. sampled: their tokens, [batch, n]."""
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
        self._is_sampled = any(one.temperature > 0 for one in settings)
        self._has_filter = any(map(_is_filtered, settings))
        if self._is_sampled and self._has_kernel:
            self._kernel_settings = mx.array([_kernel_settings(one, self._vocab_size) for one in settings])
        elif self._is_sampled:
            self._greedy = mx.array([one.temperature == 0 for one in settings])
            self._inverse_temperature = _column([1.0 / max(one.temperature, _SMALLEST_TEMPERATURE) for one in settings])
        if self._has_filter and not self._has_kernel:
            candidates = [min(self._vocab_size, max(CANDIDATES, 1 << one.top_k.bit_length())) for one in settings]
            self._candidates = max(candidates)
            self._widest_nucleus = _column(candidates)  # each its own, so that other sequences' top_k changes nothing
            self._top_p = _column([one.top_p if one.top_p < 1.0 else math.inf for one in settings])
            self._top_k = _column([one.top_k or self._vocab_size for one in settings])
            self._min_p = _column([one.min_p for one in settings])
        if self._generated is not None:
            self._frequency = _column([one.frequency_penalty for one in settings])
            self._presence = _column([one.presence_penalty for one in settings])
            self._repetition = _column([one.repetition_penalty for one in settings])

    def _draw(self, logits: mx.array, likeliest: mx.array) -> mx.array:
        """Draw from the filtered distribution, [batch, vocab] -> [batch]; the likeliest where nothing can be drawn."""
        probabilities = self._softmax(logits * self._inverse_temperature, axis=-1)
        if self._has_filter:
            probabilities = mx.where(probabilities >= self._threshold(probabilities), probabilities, 0.0)
        cumulative = mx.cumsum(probabilities, axis=-1)
        bound = mx.minimum(self._uniform(), _LARGEST_UNIFORM) * cumulative[:, -1:]
        tokens = mx.minimum(mx.sum(cumulative <= bound, axis=-1), self._vocab_size - 1).astype(mx.uint32)
        # A GPU adds up in parallel: its sums may rise by a rounding error where the probability is 0. And logits that
        # are NaN leave nothing to draw from; the next step needs a token that exists all the same.
        chance = mx.take_along_axis(probabilities, tokens[:, None], axis=-1)[:, 0]
        return mx.where(chance > 0, tokens, likeliest)

    def _uniform(self) -> mx.array:
        """The next number of each sequence's random stream, [batch, 1] in [0, 1)."""
        uniform: mx.array = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(self._keys)
        self._keys = self._keys + mx.array([0, 1], dtype=mx.uint32)
        return uniform

    def _threshold(self, probabilities: mx.array) -> mx.array:
        """The smallest probability to keep of each sequence, [batch, vocab] -> [batch, 1]."""
        top = -mx.sort(-mx.topk(probabilities, self._candidates, axis=-1), axis=-1)
        mass_before = mx.cumsum(top, axis=-1) - top
        is_kept = (mass_before < self._top_p) & (mx.arange(self._candidates) < self._top_k)
        count = mx.sum(is_kept, axis=-1, keepdims=True)
        smallest = mx.take_along_axis(top, mx.maximum(count - 1, 0), axis=-1)
        smallest = mx.where(count >= self._widest_nucleus, 0.0, smallest)
        return mx.maximum(smallest, top[:, :1] * self._min_p)

    def _penalize(self, logits: mx.array, generated: mx.array, prompted: mx.array) -> mx.array:
        """Apply the penalties, [batch, vocab] -> [batch, vocab]."""
        was_generated = generated > 0
        penalized = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = mx.where(was_generated | prompted, penalized, logits)
        return logits - generated * self._frequency - was_generated * self._presence

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
