"""The rows that generate, one token each a step.

Rule 1: a row joins with its last prompt token as input, so that its first token comes out of the step that advances
        everybody else. Nobody waits for a separate first step.
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
from mlxserver.engine.scheduler.chunks import PendingPrompt
from mlxserver.engine.sequence import SampledToken, Sequence


class Sampler(Protocol):
    """What chooses the tokens of the rows (sampling/sampler.py)."""

    def extend(self, rows: abc.Sequence[Sequence]) -> None:
        """Add rows behind the present ones."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the rows at these indices, in this order."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [rows, vocab] -> token ids [rows], of what is allowed. Nothing is evaluated."""


MakeSampler = Callable[[int], Sampler]  # from the size of the vocabulary


@dataclass
class RunningSequence:
    """A row that generates. `tokens` are those that were fed: what its keys and values hold."""

    row: Sequence
    cached_tokens: int
    started: float
    tokens: list[int] = field(default_factory=list)
    launched: int = 0  # tokens sampled for it, read or not
    is_fresh: bool = True  # its input is still the last prompt token, which is not for publishing

    @property
    def length(self) -> int:
        """Tokens that it needs room for, the next one included."""
        return len(self.row.tokens) + len(self.tokens) + 1

    def resumed(self) -> Sequence:
        """What goes on from where this row is."""
        said = len(self.tokens) - 1  # the first that was fed is the prompt's last
        if said < 1:
            return self.row
        tokens = (*self.row.tokens[:-1], *self.tokens)
        return replace(self.row, tokens=tokens, max_tokens=self.row.max_tokens - said, said=self.row.said + said)


class DecodeBatch:
    """The decode batch of one model. `running` is the result of the step under way, which the next one feeds."""

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        make_sampler: MakeSampler = BatchSampler,
        policy: ExecutionPolicy | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._make_sampler = make_sampler
        self.places = make_batch_cache(model, policy)
        self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self.rows: list[RunningSequence] = []
        self.places.clear()
        self.running = mx.zeros((0,), dtype=mx.uint32)
        self._sampler = self._make_sampler(self._vocab_size)
        self._measured = MeasuredLogprobs()
        self._unpublished: list[SampledToken] = []

    def join(self, prompts: abc.Sequence[PendingPrompt], coming: int = 0) -> None:
        """Take prompts that are done, each as many times as it has rows. coming: rows that are soon to join, too."""
        joining = [(row, prompt) for prompt in prompts for row in prompt.rows]
        self.places.join([prompt.cache for _, prompt in joining], coming)
        last_tokens = mx.array([row.tokens[-1] for row, _ in joining], dtype=mx.uint32)
        self._feed_next(mx.concatenate([self.running, last_tokens]))
        self._sampler.extend([row for row, _ in joining])
        self.rows += [RunningSequence(row, prompt.cached_tokens, prompt.started) for row, prompt in joining]

    def leave(self, leaving: abc.Sequence[int]) -> None:
        """Drop the rows at these indices."""
        if len(leaving) == len(self.rows):
            self.clear()
            return
        keep = _closed_up(len(self.rows), leaving)
        self.rows = [self.rows[index] for index in keep]
        self.places.keep(keep)
        self._feed_next(self.running[mx.array(keep, dtype=mx.uint32)])
        self._sampler.filter(keep)

    def advance(self) -> list[SampledToken]:
        """Launch one step and return the tokens of the step before."""
        inputs, measured = self.running, self._measured
        if not any(row.launched < row.row.max_tokens for row in self.rows):
            return self._read(inputs, measured, is_fed=False)
        logits = self.places.advance(inputs)
        if any(row.row.constraint for row in self.rows):
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            self._unpublished = self._read(inputs, measured, is_fed=True)
            self._sample(logits)
        else:
            self._sample(logits)
            self._unpublished = self._read(inputs, measured, is_fed=True)
        return self.take()

    def take(self) -> list[SampledToken]:
        """The tokens that were read and not given yet: there are some after a step that failed."""
        unpublished, self._unpublished = self._unpublished, []
        return unpublished

    def _feed_next(self, inputs: mx.array) -> None:
        """Let the next step feed these. Computed along with that step, they would be read only when it is done."""
        mx.async_eval(inputs)  # type: ignore[no-untyped-call]
        self.running = inputs

    def _sample(self, logits: mx.array) -> None:
        """Choose the next inputs from the logits of the step, [rows, vocab], and start computing them."""
        self.running = self._sampler(logits, self._allowed())
        self._measured = measure([row.row for row in self.rows], logits, self.running)
        mx.async_eval(self.running, self._measured.arrays)  # type: ignore[no-untyped-call]
        for row in self.rows:
            row.launched += 1

    def _read(self, inputs: mx.array, measured: MeasuredLogprobs, is_fed: bool) -> list[SampledToken]:
        """Wait for the tokens of the step before and note them."""
        published = []
        logprobs = measured.read()
        for row, token in zip(self.rows, cast(list[int], inputs.tolist()), strict=True):
            if is_fed:
                row.tokens.append(token)
            if not row.is_fresh:
                if row.row.constraint:
                    row.row.constraint.accept(token)
                id = row.row.id
                published.append(SampledToken(id, token, row.cached_tokens, logprobs.get(id), row.started))
            row.is_fresh = False
        return published

    def _allowed(self) -> mx.array | None:
        """The tokens that the rows' constraints allow, [rows, vocab] of bool; None while everything is."""
        masks = [row.row.constraint.allowed() if row.row.constraint else None for row in self.rows]
        if not any(masks):
            return None
        length = max(len(mask) for mask in masks if mask)
        every = b"\xff" * length
        packed = np.frombuffer(b"".join(mask or every for mask in masks), dtype=np.uint8).reshape(len(masks), length)
        bits = (mx.array(packed)[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & 1
        return bits.reshape(len(masks), -1)[:, : self._vocab_size].astype(mx.bool_)


def _closed_up(count: int, leaving: abc.Sequence[int]) -> list[int]:
    """Which of `count` rows comes to stand at each place once some have left: the last ones fill the gaps."""
    gone = set(leaving)
    staying = count - len(gone)
    last = iter([index for index in range(staying, count) if index not in gone])
    return [next(last) if index in gone else index for index in range(staying)]
