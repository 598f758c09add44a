"""Log-probabilities of sampled tokens and of prompts, computed only for the sequences that ask for them.

They are the model's own: before penalties, bias, temperature and filters.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.platform import sampling_kernels
from mlxserver.engine.sequence import Logprobs, Sequence

_POSITIONS = 32  # of a prompt that are measured at once, in float32


@dataclass(frozen=True)
class MeasuredLogprobs:
    """Log-probabilities of one step, on their way from the device.

    arrays: of the sampled tokens [n], ids of the likeliest [n, k] and their log-probabilities [n, k].
    """

    sequences: tuple[Sequence, ...] = ()
    arrays: list[mx.array] = field(default_factory=list)

    def read(self) -> dict[int, Logprobs]:
        """Log-probabilities by sequence id; waits for the device."""
        if not self.sequences:
            return {}
        chosen, ids, values = (array.tolist() for array in self.arrays)
        read = {}
        for sequence, own, top_ids, top_values in zip(
            self.sequences,
            cast(list[float], chosen),
            cast(list[list[int]], ids),
            cast(list[list[float]], values),
            strict=True,
        ):
            likeliest = sorted(zip(top_ids, top_values, strict=True), key=lambda pair: -pair[1])
            read[sequence.id] = Logprobs(own, tuple(likeliest[: sequence.top_logprobs]))
        return read


@dataclass(frozen=True)
class KnownLogprobs:
    """Log-probabilities of one step that are here already, by sequence id."""

    known: dict[int, Logprobs]

    def read(self) -> dict[int, Logprobs]:
        """Log-probabilities by sequence id."""
        return self.known


def measure(sequences: abc.Sequence[Sequence], logits: mx.array, tokens: mx.array) -> MeasuredLogprobs:
    """Log-probabilities of the sampled tokens: logits [batch, vocab], tokens [batch]. Nothing is evaluated."""
    asking = [index for index, sequence in enumerate(sequences) if sequence.top_logprobs is not None]
    if not asking:
        return MeasuredLogprobs()
    indices = mx.array(asking, dtype=mx.uint32)
    own = logits[indices].astype(mx.float32)
    ids = sampling_kernels.top(own, max(sequences[index].top_logprobs or 0 for index in asking))
    total = sampling_kernels.log_sum(own)
    chosen = mx.take_along_axis(own, tokens[indices][:, None], axis=-1) - total
    values = mx.take_along_axis(own, ids, axis=-1) - total
    return MeasuredLogprobs(tuple(sequences[index] for index in asking), [chosen[:, 0], ids, values])


def measure_prompt(logits: mx.array, tokens: list[int], most: int) -> list[mx.array]:
    """Log-probabilities of a prompt's tokens, each at the position before it: logits [positions, vocab].

    Returns arrays of the tokens' own [positions], their ranks [positions], the ids of the `most` likeliest tokens
    [positions, most] and the log-probabilities of these. Nothing is evaluated.
    """
    parts: list[tuple[mx.array, ...]] = []
    for start in range(0, len(tokens), _POSITIONS):
        own = logits[start : start + _POSITIONS].astype(mx.float32)
        total = sampling_kernels.log_sum(own)
        there = mx.array(tokens[start : start + _POSITIONS], dtype=mx.uint32)[:, None]
        chosen = mx.take_along_axis(own, there, axis=-1)
        ids = sampling_kernels.top(own, most)
        ranks = mx.sum(own > chosen, axis=-1) + 1
        values = mx.take_along_axis(own, ids, axis=-1)
        parts.append(((chosen - total)[:, 0], ranks, ids, values - total))
    return [mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]


def read_prompt(arrays: abc.Sequence[mx.array], count: int) -> list[Logprobs]:
    """The first `count` log-probabilities of measure_prompt(); waits for the device."""
    rows = zip(*(cast(list[Any], array[:count].tolist()) for array in arrays), strict=True)
    return [
        Logprobs(own, tuple(sorted(zip(ids, values, strict=True), key=lambda pair: -pair[1])), rank)
        for own, rank, ids, values in rows
    ]
