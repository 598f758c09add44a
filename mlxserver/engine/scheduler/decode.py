"""The decode batch: the running sequences, one token per sequence and step.

Rule 1: a sequence joins with its last prompt token as input, so that its first token comes out of the step that
        advances all others. There is no separate first step.
Rule 2: a step is launched before the tokens of the one before it are read: the device works while Python publishes.
        Where a constraint must see those tokens first, the forward pass is launched and only the sampling waits.
Rule 3: where drafted tokens are verified (scheduler/speculation.py), the tokens of the step before are read first. The
        tokens of each sequence, their log-probabilities and their order are the same as without.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol, cast

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.sight import StepRow, step_sights
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.logprobs import KnownLogprobs, MeasuredLogprobs, measure
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.speculation import DraftingRow, HitRates, Setting, make_speculation
from mlxserver.engine.sequence import Logprobs, SampledToken, Sequence


class Sampler(Protocol):
    """Samples the tokens of a batch (sampling/sampler.py)."""

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences behind the present ones."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch], of those that are allowed. Nothing is evaluated."""

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last n calls back, but for the first `kept` of each sequence. sampled: their tokens, [batch, n]."""


MakeSampler = Callable[[int], Sampler]  # from the size of the vocabulary


@dataclass
class RunningSequence:
    """A sequence that decodes. `fed`: its tokens in the KV cache behind the prompt's first ones, from the last prompt
    token on. num_sampled: tokens sampled for it, read or not. prompt_logprobs: to be published with its first token.
    lookup: predicts its tokens; None if it drafts none. hit_rates: how often it is right.
    """

    sequence: Sequence
    cached_tokens: int
    started: float
    fed: list[int] = field(default_factory=list)
    num_sampled: int = 0
    is_fresh: bool = True  # its input is still the last prompt token, which is not published
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    lookup: PromptLookup | None = None
    hit_rates: HitRates = field(default_factory=HitRates)

    @property
    def length(self) -> int:
        """Tokens of KV cache that it needs, the next one included."""
        return len(self.sequence.tokens) + len(self.fed) + 1

    @property
    def row(self) -> StepRow:
        """Its row of the next step."""
        offset = len(self.sequence.tokens) - 1 + len(self.fed)
        if not (images := self.sequence.images):
            return StepRow(offset)
        # A prompt may end in an image, and its last token is decoded.
        return StepRow(offset, images.shift, nullcontext() if self.num_sampled else images.showing(offset, offset + 1))

    @property
    def most_drafted(self) -> int:
        """Most tokens to draft: a verifying step samples one more."""
        return self.sequence.max_tokens - self.num_sampled - 1

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
        speculation: Setting = "off",
        metrics: ModelMetrics | None = None,
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._make_sampler = make_sampler
        self.cache = make_batch_cache(model, policy, is_shared=is_shared)
        setting: Setting = "off" if is_shared else speculation
        self._speculation = make_speculation(model, self.cache, setting, policy, metrics or ModelMetrics(""))
        self.clear()

    @property
    def speculates(self) -> bool:
        """Whether its sequences may draft tokens."""
        return self._speculation is not None

    def clear(self) -> None:
        """Drop all sequences."""
        self.sequences: list[RunningSequence] = []
        self.cache.clear()
        self.sampled = mx.zeros((0,), dtype=mx.uint32)
        self._sights: list[mx.array] = []
        self._sampler = self._make_sampler(self._vocab_size)
        self._measured: MeasuredLogprobs | KnownLogprobs = MeasuredLogprobs()
        self._unpublished: list[SampledToken] = []
        self.pause()

    def pause(self) -> None:
        """Something else is computed before the next step, whose duration is no sample then."""
        self._is_pipelined = False  # the last step was launched before its tokens were read
        self._returned: float | None = None  # when the last step's tokens were returned, by perf_counter()

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
                lookup=self._speculation.lookup(sequence) if self._speculation else None,
                hit_rates=HitRates(self._speculation.controller.rates if self._speculation else None),
            )
            for sequence, prompt in joining
        ]
        self._set_sights()
        self.pause()

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
        self._set_sights()
        self.pause()

    def advance(self) -> list[SampledToken]:
        """Launch one step and return the tokens of the step before."""
        inputs, measured = self.sampled, self._measured
        if not any(running.num_sampled < running.sequence.max_tokens for running in self.sequences):
            return self._read(inputs, measured, is_fed=False)
        if self._num_verified() > 1:
            self._advance_by_drafts(inputs, measured)
            return self.take()
        logits = self.cache.advance(inputs, self._sights)
        if any(running.sequence.constraint for running in self.sequences):
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            self._unpublished = self._read(inputs, measured, is_fed=True)
            self._sample(logits)
        else:
            self._sample(logits)
            self._unpublished = self._read(inputs, measured, is_fed=True)
        self._note_plain_step()
        return self.take()

    def take(self) -> list[SampledToken]:
        """The tokens that were read and not returned yet; there are some after a step that failed."""
        unpublished, self._unpublished = self._unpublished, []
        return unpublished

    def _set_inputs(self, inputs: mx.array) -> None:
        """Set the inputs of the next step. Computed along with that step, they would be read only when it is done."""
        mx.async_eval(inputs)  # type: ignore[no-untyped-call]
        self.sampled = inputs

    def _set_sights(self) -> None:
        """Set what the rows of the next step are given, of sequences whose prompts have images."""
        has_images = any(running.sequence.images for running in self.sequences)
        sight = getattr(self._model, "sight", None) if has_images else None
        self._sights = step_sights(sight, [running.row for running in self.sequences]) if sight else []

    def _sample(self, logits: mx.array) -> None:
        """Sample the next inputs from the logits of the step, [batch, vocab], and start computing them."""
        self.sampled = self._sampler(logits, self._allowed())
        self._measured = measure([running.sequence for running in self.sequences], logits, self.sampled)
        mx.async_eval(self.sampled, self._measured.arrays)  # type: ignore[no-untyped-call]
        for running in self.sequences:
            running.num_sampled += 1
        if len(self._sights) > 1:  # a prompt ended in an image, and no answer does
            self._set_sights()

    def _read(self, inputs: mx.array, measured: MeasuredLogprobs | KnownLogprobs, is_fed: bool) -> list[SampledToken]:
        """Wait for the tokens of the step before and record them."""
        published = []
        logprobs = measured.read()
        for running, token in zip(self.sequences, cast(list[int], inputs.tolist()), strict=True):
            if is_fed:
                running.fed.append(token)
            if not running.is_fresh:
                self._note_generated(running, token)
                if running.sequence.constraint:
                    running.sequence.constraint.accept(token)
                published.append(running.publish(token, logprobs.get(running.sequence.id)))
            running.is_fresh = False
        return published

    # -- speculation --------------------------------------------------------------------------------------------

    def _num_verified(self) -> int:
        """Tokens of each sequence in the next step: 1, or more if drafted ones are verified."""
        if not (speculation := self._speculation) or self._sights:
            return 1
        rows = [
            DraftingRow(running.lookup.streak, running.most_drafted, running.hit_rates)
            for running in self.sequences
            if running.lookup and running.lookup.streak and running.most_drafted > 0
        ]
        tokens = speculation.controller.choose(len(self.sequences), rows, cast(SlotCache, self.cache).fits)
        if tokens > 1 and not speculation.is_right():
            self._speculation = None
            return 1
        return tokens

    def _advance_by_drafts(self, inputs: mx.array, measured: MeasuredLogprobs | KnownLogprobs) -> None:
        """Read the tokens of the step before, and verify what is drafted behind them, if that is still promising."""
        before = perf_counter()
        gap = before - self._returned if self._returned else None
        self._unpublished = self._read(inputs, measured, is_fed=True)
        read = perf_counter()
        if (tokens := self._num_verified()) > 1:
            self._verify(inputs, tokens)
            if self._speculation:
                now = perf_counter()
                seconds = now - read + gap if gap is not None else None
                self._speculation.controller.note_verified(len(self.sequences), tokens, seconds)
                self._returned, self._is_pipelined = now, False
        else:
            self._sample(self.cache.advance(inputs, self._sights))
            self._returned, self._is_pipelined = perf_counter(), True

    def _verify(self, inputs: mx.array, tokens: int) -> None:
        """Compute so many tokens of each sequence, and keep those that are sampled as they were drafted."""
        cache = cast(SlotCache, self.cache)
        drafts = [r.lookup.draft(min(tokens - 1, r.most_drafted)) if r.lookup else [] for r in self.sequences]
        padded = [own + [0] * (tokens - 1 - len(own)) for own in drafts]
        logits = cache.verify(mx.concatenate([inputs[:, None], mx.array(padded, dtype=mx.uint32)], axis=1))
        is_finite = (logits < mx.inf).all()
        steps, measured = [], []
        for n in range(tokens):
            steps.append(self._sampler(logits[:, n], None if n else self._allowed()))
            measured.append(measure([running.sequence for running in self.sequences], logits[:, n], steps[n]))
        sampled = mx.stack(steps, axis=1)
        mx.eval(sampled, is_finite, [own.arrays for own in measured])
        if not is_finite.item():
            self._discard(inputs, sampled)
            return
        rows = cast(list[list[int]], sampled.tolist())
        kept = [_num_alike(draft, row) + 1 for draft, row in zip(drafts, rows, strict=True)]
        cache.rewind([tokens - count for count in kept])
        self._sampler.rewind(sampled, kept)
        self._accept(rows, kept, [own.read() for own in measured])
        if self._speculation:
            self._speculation.controller.note_drafts(sum(map(len, drafts)), sum(kept) - len(kept))

    def _discard(self, inputs: mx.array, sampled: mx.array) -> None:
        """Make a plain step in place of one whose logits were not finite: a rejected token may be why."""
        sequences, tokens = sampled.shape
        cast(SlotCache, self.cache).rewind([tokens] * sequences, erases=True)
        self._sampler.rewind(sampled, [0] * sequences)
        if self._speculation:
            self._speculation.controller.hold_off()
        self._sample(self.cache.advance(inputs, self._sights))

    def _accept(self, rows: list[list[int]], kept: list[int], logprobs: list[dict[int, Logprobs]]) -> None:
        """Record the first `kept` tokens of each sequence. The last of them is the next input, and published then."""
        pending: dict[int, Logprobs] = {}
        for running, row, count in zip(self.sequences, rows, kept, strict=True):
            id = running.sequence.id
            for token, own in zip(row[: count - 1], logprobs, strict=False):
                running.fed.append(token)
                self._note_generated(running, token)
                self._unpublished.append(running.publish(token, own.get(id)))
            running.num_sampled += count
            if (last := logprobs[count - 1].get(id)) is not None:
                pending[id] = last
        self._set_inputs(mx.array([row[count - 1] for row, count in zip(rows, kept, strict=True)], dtype=mx.uint32))
        self._measured = KnownLogprobs(pending)

    def _note_generated(self, running: RunningSequence, token: int) -> None:
        """Add a token to the sequence's lookup, and measure its predictions."""
        if self._speculation and running.lookup:
            streak = running.lookup.streak
            if (is_hit := running.lookup.append(token)) is not None:
                running.hit_rates.note(streak, is_hit)

    def _note_plain_step(self) -> None:
        """Measure a step: the time from the tokens of the step before to those of this one, if both were plain."""
        if self._speculation:
            now = perf_counter()
            if self._returned and self._is_pipelined:
                self._speculation.controller.note_plain(len(self.sequences), now - self._returned)
            self._returned, self._is_pipelined = now, True

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


def _num_alike(draft: list[int], sampled: list[int]) -> int:
    """Number of tokens up to the first that was drafted otherwise."""
    return next((n for n, token in enumerate(draft) if sampled[n] != token), len(draft))


def _closed_up(count: int, leaving: abc.Sequence[int]) -> list[int]:
    """The index that moves to each position once some have left `count`: the last ones fill the gaps."""
    gone = set(leaving)
    staying = count - len(gone)
    last = iter([index for index in range(staying, count) if index not in gone])
    return [next(last) if index in gone else index for index in range(staying)]
