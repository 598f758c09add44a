"""The decode batch: the running sequences, one token per sequence and step.

Rule 1: a sequence joins with its last prompt token as input, so that its first token comes out of the step that
        advances all others. There is no separate first step.
Rule 2: a step is launched before the tokens of the one before it are read: the device works while Python publishes.
        Where a constraint must see those tokens first, the forward pass is launched and only the sampling waits.
Rule 3: where drafted tokens are verified (scheduler/speculation.py), the tokens of the step before are read first,
        which breaks this pipeline unless that was a verifying step, too. The tokens of each sequence, their
        log-probabilities and their order are the same as without.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from typing import Any, Protocol, cast

from mlxserver.engine.mlx import mx

import numpy as np

from mlxserver.engine.kv_cache.batched import make_batch_cache
from mlxserver.engine.kv_cache.sight import step_sights
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.logprobs import KnownLogprobs, MeasuredLogprobs, measure
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation import RewindingSampler, Setting, Speculation, Verified, make_speculation
from mlxserver.engine.scheduler.step_costs import Plan
from mlxserver.engine.sequence import Logprobs, SampledToken, Sequence


class Sampler(RewindingSampler, Protocol):
    """Samples the tokens of a batch (sampling/sampler.py)."""

    def extend(self, sequences: abc.Sequence[Sequence]) -> None:
        """Add sequences behind the present ones."""

    def filter(self, keep: abc.Sequence[int]) -> None:
        """Keep only the sequences at these indices, in this order."""


MakeSampler = Callable[[int], Sampler]  # from the size of the vocabulary


class DecodeBatch:
    """Running sequences of one model. `sampled`: token ids of the step under way, [batch], inputs of the next one.

    before_launch: called when a step is prepared, and before a wait for tokens alone (worker/batch.py).
    """

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
        draft: DraftModel | None = None,
        stall_target: float = 0.25,
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._make_sampler = make_sampler
        self.before_launch: Callable[[], None] = lambda: None
        self.cache = make_batch_cache(model, policy, is_shared=is_shared)
        setting: Setting = "off" if is_shared else speculation
        self._speculation = make_speculation(
            model, vocab_size, self.cache, setting, policy, metrics or ModelMetrics(""), draft, stall_target
        )
        self.clear()

    @property
    def speculates(self) -> bool:
        """Whether its sequences may draft tokens."""
        return self._speculation is not None

    @property
    def draft(self) -> str | None:
        """Key of the model that drafts for its sequences; "mtp" for a head of their own model, None for neither."""
        return self._speculation.draft if self._speculation else None

    def clear(self) -> None:
        """Drop all sequences."""
        self.sequences: list[RunningSequence] = []
        self.cache.clear()
        self.sampled = mx.zeros((0,), dtype=mx.uint32)
        self._sights: list[mx.array] = []
        self._sampler = self._make_sampler(self._vocab_size)
        self._measured: MeasuredLogprobs | KnownLogprobs = MeasuredLogprobs()
        self._unpublished: list[SampledToken] = []
        if self._speculation:
            self._speculation.drafts.keep(())
        self.pause()

    def pause(self) -> None:
        """Something else is computed before the next step, whose duration is no sample then."""
        if self._speculation:
            self._speculation.times.pause()

    def join(self, prompts: abc.Sequence[PendingPrompt], coming: int = 0) -> None:
        """Add the sequences of prompts that are processed. coming: number of sequences that are soon to join, too."""
        joining = [(sequence, prompt) for prompt in prompts for sequence in prompt.sequences]
        self.cache.join([prompt.cache for _, prompt in joining], coming)
        last_tokens = mx.array([sequence.tokens[-1] for sequence, _ in joining], dtype=mx.uint32)
        self._set_inputs(mx.concatenate([self.sampled, last_tokens]))
        self._sampler.extend([sequence for sequence, _ in joining])
        for sequence, prompt in joining:
            of_prompt = tuple(prompt.logprobs) if sequence.is_scored else None
            running = RunningSequence(sequence, prompt.cached_tokens, prompt.started, prompt_logprobs=of_prompt)
            self.sequences.append(running)
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
        if self._speculation:
            self._speculation.drafts.keep(self.sequences)
        self._set_inputs(self.sampled[mx.array(keep, dtype=mx.uint32)])
        self._sampler.filter(keep)
        self._set_sights()
        self.pause()

    def advance(self) -> list[SampledToken]:
        """Launch one step and return the tokens of the step before."""
        inputs, measured = self.sampled, self._measured
        if not any(running.num_sampled < running.sequence.max_tokens for running in self.sequences):
            self.before_launch()
            return self._read(inputs, measured, is_fed=False)
        if self._speculation and not self._sights:
            is_read = self._speculation.times.is_read
            promising = [] if is_read else self._speculation.promising(self.sequences)
            if is_read or promising:
                self._advance_by_drafts(self._speculation, promising, inputs, measured)
                return self.take()
        logits = self.cache.advance(inputs, self._sights)
        if any(running.sequence.constraint for running in self.sequences):
            self.before_launch()
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            self._unpublished = self._read(inputs, measured, is_fed=True)
            self._sample(logits)
        else:
            self._sample(logits)
            self._unpublished = self._read(inputs, measured, is_fed=True)
        if self._speculation:
            self._speculation.times.note_plain(len(self.sequences))
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
        self.before_launch()
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
                if running.sequence.constraint:
                    running.sequence.constraint.accept(token)
                published.append(running.publish(token, logprobs.get(running.sequence.id)))
            running.is_fresh = False
        return published

    def store_draft_prefixes(self, leaving: abc.Sequence[int]) -> None:
        """Store what a draft model has of the sequences at these indices."""
        if self._speculation:
            self._speculation.drafts.store([self.sequences[index] for index in leaving])

    def compact(self) -> None:
        """Give back KV cache that the present sequences do not need."""
        self.cache.compact()
        if self._speculation:
            self._speculation.drafts.compact()

    # -- speculation --------------------------------------------------------------------------------------------

    def readers(self, token_seconds: float) -> abc.Sequence[RunningSequence]:
        """Sequences that a draft model should read before the next step. token_seconds: of this model's prefill."""
        return self._speculation.drafts.readers(self.sequences, token_seconds) if self._speculation else ()

    def read(self, readers: abc.Sequence[RunningSequence], own_step_seconds: float, peer_step_seconds: float) -> None:
        """Have the draft model read on. The times are those of steps, which wait meanwhile."""
        if self._speculation:
            self.pause()
            self._speculation.drafts.read(readers, own_step_seconds, peer_step_seconds)

    def plans_to_rehearse(self) -> abc.Sequence[Plan]:
        """Plans of verifying steps that are not made before they are rehearsed."""
        return self._speculation.plans_to_rehearse() if self._speculation else ()

    def rehearse(self, plan: Plan) -> None:
        """Compute a verifying step of the present sequences, whose drafts and duration are of no account."""
        assert self._speculation
        inputs, measured = self.sampled, self._measured
        self._unpublished = self._read(inputs, measured, is_fed=True)
        self._verify(self._speculation, inputs, plan)
        self.pause()

    def _advance_by_drafts(
        self,
        speculation: Speculation,
        promising: abc.Sequence[RunningSequence],
        inputs: mx.array,
        measured: MeasuredLogprobs | KnownLogprobs,
    ) -> None:
        """Read the tokens of the step before, and verify what is drafted behind them, if that is still promising."""
        if promising:
            self.before_launch()  # the tokens are waited for
        with speculation.times.reading():
            self._unpublished = self._read(inputs, measured, is_fed=True)
        plan = speculation.plan(self.sequences, promising)
        if plan.tokens == 1:
            self._sample(self.cache.advance(inputs, self._sights))
            speculation.times.note_plain(len(self.sequences))
            return
        self.before_launch()
        self._verify(speculation, inputs, plan)
        speculation.times.note_verifying(len(self.sequences), plan)

    def _verify(self, speculation: Speculation, inputs: mx.array, plan: Plan) -> None:
        """Verify what is drafted, or make a plain step if that fails."""
        if verified := speculation.verify(self.sequences, inputs, plan, self._sampler, self._allowed()):
            self._accept(verified)
        else:
            self._sample(self.cache.advance(inputs, self._sights))

    def _accept(self, verified: Verified) -> None:
        """Record the tokens that were kept. The last of each sequence is the next input, and published then."""
        pending: dict[int, Logprobs] = {}
        for running, tokens in zip(self.sequences, verified.tokens, strict=True):
            id = running.sequence.id
            for token, logprobs in zip(tokens[:-1], verified.logprobs, strict=False):
                running.fed.append(token)
                self._unpublished.append(running.publish(token, logprobs.get(id)))
            running.num_sampled += len(tokens)
            if (last := verified.logprobs[len(tokens) - 1].get(id)) is not None:
                pending[id] = last
        self._set_inputs(mx.array([tokens[-1] for tokens in verified.tokens], dtype=mx.uint32))
        self._measured = KnownLogprobs(pending)

    def _allowed(self) -> mx.array | None:
        """The tokens that the constraints allow, as the sampler has them; None while every token is."""
        constraints = (running.sequence.constraint for running in self.sequences)
        masks = [constraint.allowed() if constraint else None for constraint in constraints]
        if not any(masks):
            return None
        length = max(len(mask) for mask in masks if mask)
        every = b"\xff" * length
        packed = np.frombuffer(b"".join(mask or every for mask in masks), dtype=np.uint8)
        return mx.array(packed.reshape(len(masks), length))


def _closed_up(count: int, leaving: abc.Sequence[int]) -> list[int]:
    """The index that moves to each position once some have left `count`: the last ones fill the gaps."""
    gone = set(leaving)
    staying = count - len(gone)
    last = iter([index for index in range(staying, count) if index not in gone])
    return [next(last) if index in gone else index for index in range(staying)]
