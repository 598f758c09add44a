"""Draws of tokens from the logits of a batch: by MLX's functions, or by one kernel.

A draw is by inverse transform: one uniform number per sequence against the cumulative distribution, in the order of
the vocabulary. top_k, top_p (Holtzman et al. 2020, "nucleus") and min_p (Nguyen et al. 2024) become one threshold on
the probability; tokens below it are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlxserver.engine.mlx import mx

from mlxserver.config.sampling_params import SamplingParams
from mlxserver.engine.platform import cpu_kernels, sampling_kernels
from mlxserver.engine.platform.policy import ExecutionPolicy

# Most likely tokens among which the threshold is found. A nucleus that is larger keeps the whole tail.
CANDIDATES = 256

_SMALLEST_TEMPERATURE = 1e-6  # below it a logit over it would leave float32; the draw is greedy long before
_LARGEST_UNIFORM = 1.0 - 2.0**-20  # a float32 total times this stays below the total


class Draw(Protocol):
    """A way to draw tokens, with the settings of the sequences of a batch."""

    def cast(self, logits: mx.array) -> mx.array:
        """The logits in a type that it draws from."""

    def configure(self, settings: Sequence[SamplingParams]) -> None:
        """Set the parameters of each sequence, of which at least one is sampled."""

    def __call__(self, logits: mx.array, uniforms: mx.array) -> mx.array:
        """Draw a token per sequence, or take its likeliest one at temperature 0: [batch] of uint32.

        logits: [batch, vocab]. uniforms: [batch, 1] of float32, in [0, 1).
        """


def new_draw(vocab_size: int, policy: ExecutionPolicy) -> Draw:
    """The way to draw that a policy states."""
    if policy.sampling_kernel:
        return KernelDraw(vocab_size)
    return ArrayDraw(vocab_size, cpu_kernels.softmax if policy.replace_kernels else mx.softmax)


def column(values: Sequence[float]) -> mx.array:
    """Values of the sequences, [batch, 1] of float32."""
    return mx.array(list(values), dtype=mx.float32)[:, None]


class KernelDraw:
    """Draws by one kernel (platform/sampling_kernels.py)."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def cast(self, logits: mx.array) -> mx.array:
        """The same logits: the kernel takes any float type."""
        return logits

    def configure(self, settings: Sequence[SamplingParams]) -> None:
        """Set the parameters of each sequence."""
        self._settings = mx.array([self._row(one) for one in settings])

    def __call__(self, logits: mx.array, uniforms: mx.array) -> mx.array:
        """Draw a token per sequence."""
        return sampling_kernels.draw(logits, self._settings, uniforms)

    def _row(self, sampling: SamplingParams) -> tuple[float, float, float, float]:
        """A sequence's settings as the kernel has them."""
        if sampling.temperature == 0:
            return 0.0, 1.0, 0.0, self._vocab_size
        top_k = min(sampling.top_k or self._vocab_size, self._vocab_size)
        return 1.0 / max(sampling.temperature, _SMALLEST_TEMPERATURE), sampling.top_p, sampling.min_p, top_k


class ArrayDraw:
    """Draws by MLX's functions."""

    def __init__(self, vocab_size: int, softmax: Callable[..., mx.array]) -> None:
        self._vocab_size = vocab_size
        self._softmax = softmax

    def cast(self, logits: mx.array) -> mx.array:
        """The logits in float32."""
        return logits.astype(mx.float32)

    def configure(self, settings: Sequence[SamplingParams]) -> None:
        """Set the parameters of each sequence."""
        self._greedy = mx.array([one.temperature == 0 for one in settings])
        self._inverse_temperature = column([1.0 / max(one.temperature, _SMALLEST_TEMPERATURE) for one in settings])
        self._filters = _Filters.of(settings, self._vocab_size) if any(map(_is_filtered, settings)) else None

    def __call__(self, logits: mx.array, uniforms: mx.array) -> mx.array:
        """Draw a token per sequence."""
        likeliest = mx.argmax(logits, axis=-1)
        return mx.where(self._greedy, likeliest, self._draw(logits, likeliest, uniforms))

    def _draw(self, logits: mx.array, likeliest: mx.array, uniforms: mx.array) -> mx.array:
        """Draw from the filtered distribution, [batch, vocab] -> [batch]; the likeliest where nothing can be drawn."""
        probabilities = self._softmax(logits * self._inverse_temperature, axis=-1)
        if self._filters is not None:
            probabilities = mx.where(probabilities >= self._filters.threshold(probabilities), probabilities, 0.0)
        cumulative = mx.cumsum(probabilities, axis=-1)
        bound = mx.minimum(uniforms, _LARGEST_UNIFORM) * cumulative[:, -1:]
        tokens = mx.minimum(mx.sum(cumulative <= bound, axis=-1), self._vocab_size - 1).astype(mx.uint32)
        # A GPU adds up in parallel: its sums may rise by a rounding error where the probability is 0. And logits that
        # are NaN leave nothing to draw from; the next step needs a token that exists all the same.
        chance = mx.take_along_axis(probabilities, tokens[:, None], axis=-1)[:, 0]
        return mx.where(chance > 0, tokens, likeliest)


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.temperature > 0 and bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Filters:
    """Filters of the sequences: columns, [batch, 1].

    widest_nucleus: candidates of each sequence; its own, so that another sequence's top_k changes nothing.
    """

    candidates: int
    widest_nucleus: mx.array
    top_p: mx.array
    top_k: mx.array
    min_p: mx.array

    @classmethod
    def of(cls, settings: Sequence[SamplingParams], vocab_size: int) -> _Filters:
        """Those of so many sequences."""
        candidates = [min(vocab_size, max(CANDIDATES, 1 << one.top_k.bit_length())) for one in settings]
        return cls(
            max(candidates),
            column(candidates),
            column([one.top_p if one.top_p < 1.0 else math.inf for one in settings]),
            column([one.top_k or vocab_size for one in settings]),
            column([one.min_p for one in settings]),
        )

    def threshold(self, probabilities: mx.array) -> mx.array:
        """The smallest probability to keep of each sequence, [batch, vocab] -> [batch, 1]."""
        top = -mx.sort(-mx.topk(probabilities, self.candidates, axis=-1), axis=-1)
        mass_before = mx.cumsum(top, axis=-1) - top
        is_kept = (mass_before < self.top_p) & (mx.arange(self.candidates) < self.top_k)
        count = mx.sum(is_kept, axis=-1, keepdims=True)
        smallest = mx.take_along_axis(top, mx.maximum(count - 1, 0), axis=-1)
        smallest = mx.where(count >= self.widest_nucleus, 0.0, smallest)
        return mx.maximum(smallest, top[:, :1] * self.min_p)
