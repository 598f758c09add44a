"""The decode batch: the running sequences, one token per sequence and step.

Rule 1: a sequence joins with its last prompt token as input, so that its first token comes out of the step that
        advances all others. There is no separate first step.
Rule 2: a step is launched before the tokens of the one before it are read: the device works while Python publishes.
        Where a constraint must see those tokens first, the forward pass is launched and only the sampling waits.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.logprobs import MeasuredLogprobs, measure
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.sequence import Logprobs, SampledToken, Sequence


class Sampler(Protocol):
    """Samples the tokens of a batch (sampling/sampler.py)."""

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences behind the present ones."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch], of those that are allowed. Nothing is evaluated."""


MakeSampler = Callable[[int], Sampler]  # from the size of the vocabulary


@dataclass
class RunningSequence:
    """A sequence that decodes. `fed`: its tokens in the KV cache behind the prompt's first ones, from the last prompt
    token on. num_sampled: tokens sampled for it, read or not. prompt_logprobs: to be published with its first token.
    """

    sequence: Sequence
    cached_tokens: int
    started: float
    fed: list[int] = field(default_factory=list)
    num_sampled: int = 0
    is_fresh: bool = True  # its input is still the last prompt token, which is not published
    prompt_logprobs: tuple[Logprobs, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens of KV cache that it needs, the next one included."""
        return len(self.sequence.tokens) + len(self.fed) + 1

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens in its KV cache, once one was fed."""
        return (*self.sequence.tokens[:-1], *self.fed)

    @property
    def keys(self) -> tuple[int, ...]:
        """What its KV cache is stored under."""
        return self.sequence.keys(self.tokens)

    def publish(self, token: int, logprobs: Logprobs | None) -> SampledToken:
        """A sampled token, the first one with the log-probabilities of the prompt."""
        of_prompt, self.prompt_logprobs = self.prompt_logprobs, None
        return SampledToken(self.sequence.id, token, self.cached_tokens, logprobs, self.started, of_prompt)

    def resumed(self) -> Sequence:
        """The sequence that goes on from here after a preemption."""
        generated = len(self.fed) - 1  # the first that was fed is the prompt's last
        if generated < 1:
            return self.sequence
        return replace(
            self.sequence,
            tokens=self.tokens,
            max_tokens=self.sequence.max_tokens - generated,
            num_generated=self.sequence.num_generated + generated,
        )


class DecodeBatch:
    """Running sequences of one model. `sampled`: token ids of the step under way, [batch], inputs of the next one."""

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        make_sampler: MakeSampler = BatchSampler,
        policy: ExecutionPolicy | None = None,
        *,
        is_shared: bool = False,
    ) -> None:
        self._vocab_size = vocab_size
        self._make_sampler = make_sampler
        self.cache = make_batch_cache(model, policy, is_shared=is_shared)
        self.clear()

    def clear(self) -> None:
        """Drop all sequences."""
        self.sequences: list[RunningSequence] = []
        self.cache.clear()
        self.sampled = mx.zeros((0,), dtype=mx.uint32)
        self._shifts: list[mx.array] = []
        self._sampler = self._make_sampler(self._vocab_size)
        self._measured = MeasuredLogprobs()
        self._unpublished: list[SampledToken] = []

    def join(self, prompts: abc.Sequence[PendingPrompt], coming: int = 0) -> None:
        """Add the sequences of prompts that are processed. coming: number of sequences that are soon to join, too."""
        joining = [(sequence, prompt) for prompt in prompts for sequence in prompt.sequences]
        self.cache.join([prompt.cache for _, prompt in joining], coming)
        last_tokens = mx.array([sequence.tokens[-1] for sequence, _ in joining], dtype=mx.uint32)
        self._set_inputs(mx.concatenate([self.sampled, last_tokens]))
        self._sampler.extend([sequence for sequence, _ in joining])
        self.sequences += [
            RunningSequence(
                sequence,
                prompt.cached_tokens,
                prompt.started,
                prompt_logprobs=tuple(prompt.logprobs) if sequence.is_scored else None,
            )
            for sequence, prompt in joining
        ]
        self._set_shifts()

    def leave(self, leaving: abc.Sequence[int]) -> None:
        """Drop the sequences at these indices."""
        if len(leaving) == len(self.sequences):
            self.clear()
            return
        keep = _closed_up(len(self.sequences), leaving)
        self.sequences = [self.sequences[index] for index in keep]
        self.cache.keep(keep)
        self._set_inputs(self.sampled[mx.array(keep, dtype=mx.uint32)])
        self._sampler.filter(keep)
        self._set_shifts()

    def advance(self) -> list[SampledToken]:
        """Launch one step and return the tokens of the step before."""
        inputs, measured = self.sampled, self._measured
        if not any(running.num_sampled < running.sequence.max_tokens for running in self.sequences):
            return self._read(inputs, measured, is_fed=False)
        logits = self.cache.advance(inputs, self._shifts)
        if any(running.sequence.constraint for running in self.sequences):
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            self._unpublished = self._read(inputs, measured, is_fed=True)
            self._sample(logits)
        else:
            self._sample(logits)
            self._unpublished = self._read(inputs, measured, is_fed=True)
        return self.take()

    def take(self) -> list[SampledToken]:
        """The tokens that were read and not returned yet; there are some after a step that failed."""
        unpublished, self._unpublished = self._unpublished, []
        return unpublished

    def _set_inputs(self, inputs: mx.array) -> None:
        """Set the inputs of the next step. Computed along with that step, they would be read only when it is done."""
        mx.async_eval(inputs)  # type: ignore[no-untyped-call]
        self.sampled = inputs

    def _set_shifts(self) -> None:
        """Set what positions differ from offsets by, of sequences whose prompts have images."""
        shifts = [running.sequence.images.shift if running.sequence.images else 0 for running in self.sequences]
        self._shifts = [mx.array(shifts, dtype=mx.int32)] if any(shifts) else []

    def _sample(self, logits: mx.array) -> None:
        """Sample the next inputs from the logits of the step, [batch, vocab], and start computing them."""
        self.sampled = self._sampler(logits, self._allowed())
        self._measured = measure([running.sequence for running in self.sequences], logits, self.sampled)
        mx.async_eval(self.sampled, self._measured.arrays)  # type: ignore[no-untyped-call]
        for running in self.sequences:
            running.num_sampled += 1

    def _read(self, inputs: mx.array, measured: MeasuredLogprobs, is_fed: bool) -> list[SampledToken]:
        """Wait for the tokens of the step before and record them."""
        published = []
        logprobs = measured.read()
        for running, token in zip(self.sequences, cast(list[int], inputs.tolist()), strict=True):
            if is_fed:
                running.fed.append(token)
            if not running.is_fresh:
                if running.sequence.constraint:
                    running.sequence.constraint.accept(token)
                published.append(running.publish(token, logprobs.get(running.sequence.id)))
            running.is_fresh = False
        return published

    def _allowed(self) -> mx.array | None:
        """The tokens that the constraints allow, [batch, vocab] of bool; None while every token is."""
        constraints = (running.sequence.constraint for running in self.sequences)
        masks = [constraint.allowed() if constraint else None for constraint in constraints]
        if not any(masks):
            return None
        length = max(len(mask) for mask in masks if mask)
        every = b"\xff" * length
        packed = np.frombuffer(b"".join(mask or every for mask in masks), dtype=np.uint8).reshape(len(masks), length)
        bits = (mx.array(packed)[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & 1
        return bits.reshape(len(masks), -1)[:, : self._vocab_size].astype(mx.bool_)


def _closed_up(count: int, leaving: abc.Sequence[int]) -> list[int]:
    """The index that moves to each position once some have left `count`: the last ones fill the gaps."""
    gone = set(leaving)
    staying = count - len(gone)
    last = iter([index for index in range(staying, count) if index not in gone])
    return [next(last) if index in gone else index for index in range(staying)]
