"""Speculation of one decode batch: its sequences draft tokens, and one step verifies them all.

A drafted token is kept only if it is the one that is sampled at its position, so that no text changes (Leviathan et al.
2023, arXiv:2211.17192, with a draft that is certain of its tokens).

Rule: a sequence has a credit of few steps, which verifying steps take from by what they take longer, and give to by
      what they gain. Without credit it drafts nothing; each of its tokens adds a little. So drafts that are never right
      cost a sequence one step in a hundred at most, whatever was expected of them.
"""

from __future__ import annotations

import logging
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.sampling.logprobs import measure
from mlxserver.engine.scheduler.drafter import Drafter, DraftModel
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation_controller import (
    DraftingRow,
    EitherRow,
    HitRates,
    Plan,
    SpeculationController,
)
from mlxserver.engine.scheduler.verification_check import verifies
from mlxserver.engine.sequence import Logprobs, Sequence

log = logging.getLogger("engine")

Setting = Literal["auto", "off", "always"]

_MOST_CREDIT, _CREDIT_PER_TOKEN = 4.0, 0.01  # in plain steps


class RewindingSampler(Protocol):
    """Samples the tokens of a batch, and takes tokens back."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch], of those that are allowed. Nothing is evaluated."""

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last n calls back, but for the first `kept` of each sequence. sampled: their tokens, [batch, n]."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Outcome of a verifying step: the tokens that each sequence keeps, at least one, the last of which is the next
    input. logprobs: by position and sequence id.
    """

    tokens: abc.Sequence[abc.Sequence[int]]
    logprobs: abc.Sequence[abc.Mapping[int, Logprobs]]


class Speculation:
    """Drafts, verifying steps and their times. model, policy: to find out at the first draft whether it can be.
    drafter: None without a draft model. draft_cost: of its step, in plain steps, until it is measured.

    Steps are timed from the return of the tokens of one to that of the next.
    """

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        policy: ExecutionPolicy | None,
        setting: Setting,
        metrics: ModelMetrics,
        drafter: Drafter | None = None,
        draft_cost: float = 0.0,
    ) -> None:
        self._is_forced = setting == "always"
        self.controller = SpeculationController(metrics, always=self._is_forced, draft_cost=draft_cost)
        self.drafter = drafter
        self._model = model
        self._cache = cache
        self._policy = policy or current()
        self._is_right: bool | None = None
        self.pause()

    # -- what is drafted ------------------------------------------------------------------------------------------

    def prepare(self, running: RunningSequence) -> None:
        """Give a sequence that joins its lookup, if it may draft."""
        if lookup := self.lookup(running.sequence):
            running.lookup, running.hit_rates = lookup, HitRates(self.controller.rates)
            running.draft_rates = HitRates(self.controller.draft_rates)

    def lookup(self, sequence: Sequence) -> PromptLookup | None:
        """Lookup of a sequence that joins; None of one that drafts nothing."""
        if sequence.constraint or sequence.images or self._is_right is False:
            return None
        return PromptLookup(sequence.tokens)

    def is_right(self) -> bool:
        """Whether the model computes several tokens at once as it does one by one. Measured once."""
        if self._is_right is None:
            self._is_right = verifies(self._model, self._policy)
            if not self._is_right:
                log.info("no speculation: several tokens of a sequence at once change the model's logits")
        return self._is_right

    def note_generated(self, running: RunningSequence, token: int) -> None:
        """Add a token to a sequence's lookup, and measure its predictions."""
        running.credit = min(running.credit + _CREDIT_PER_TOKEN, _MOST_CREDIT)
        if running.lookup and running.hit_rates:
            streak = running.lookup.streak
            if (is_hit := running.lookup.append(token)) is not None:
                running.hit_rates.note(streak, is_hit)

    def plan(self, sequences: abc.Sequence[RunningSequence]) -> Plan:
        """Plan of the next step."""
        drafting = [running for running in sequences if self._may_draft(running)]
        rows = [row for running in drafting if (row := _lookup_row(running))]
        modelled = self._modelled(drafting)
        return self.controller.choose(len(sequences), rows, self._cache.fits, [*modelled.values()])

    def _may_draft(self, running: RunningSequence) -> bool:
        return running.lookup is not None and running.most_drafted > 0 and (self._is_forced or running.credit > 0)

    def _modelled(self, drafting: abc.Sequence[RunningSequence]) -> dict[int, EitherRow]:
        """What sequences may draft with the draft model, by id; empty if it is ready for none of them."""
        if not self.drafter:
            return {}
        rows = {
            running.sequence.id: EitherRow(
                _lookup_row(running), _model_row(running) if self.drafter.is_ready(running) else None
            )
            for running in drafting
        }
        return rows if any(row.model for row in rows.values()) else {}

    def _drafts(self, sequences: abc.Sequence[RunningSequence], plan: Plan) -> tuple[list[list[int]], set[int]]:
        """Drafted tokens of each sequence, and the ids of those whose tokens are a draft model's."""
        drafting = [running for running in sequences if self._may_draft(running)]
        by_model: dict[int, list[int]] = {}
        if plan.is_modelled and self.drafter:
            rows = self._modelled(drafting)
            chosen = [
                own for own in drafting if own.sequence.id in rows and rows[own.sequence.id].prefers_model(plan.tokens)
            ]
            by_model = self.drafter.draft(chosen, plan.tokens - 1)
        drafts: dict[int, list[int]] = {}
        for running in drafting:
            id, most = running.sequence.id, min(plan.tokens - 1, running.most_drafted)
            if id in by_model:
                drafts[id] = by_model[id][:most]
            elif running.lookup:
                drafts[id] = running.lookup.draft(most)
        return [drafts.get(running.sequence.id, []) for running in sequences], set(by_model)

    # -- the draft model ------------------------------------------------------------------------------------------

    def waits_for_reading(self, sequences: abc.Sequence[RunningSequence]) -> bool:
        """Whether the draft model should read on now, for a sequence to draft with it."""
        return bool(self.drafter) and bool(self._readers(sequences))

    def read(self, sequences: abc.Sequence[RunningSequence], own_step_seconds: float, peer_step_seconds: float) -> None:
        """Have the draft model read on. The times are those of steps, which wait meanwhile."""
        if self.drafter and (readers := self._readers(sequences)):
            self.drafter.read(readers, own_step_seconds, peer_step_seconds)

    def _readers(self, sequences: abc.Sequence[RunningSequence]) -> list[RunningSequence]:
        """Sequences that the draft model should read, if that pays."""
        if not (drafter := self.drafter):
            return []
        drafting = [own for own in sequences if self._may_draft(own) and drafter.may_have(own)]
        readers = [running for running in drafting if not drafter.is_ready(running)]
        if not readers:
            return []
        tokens = sum(drafter.num_behind(running) for running in readers)
        modelled = [EitherRow(None, _model_row(running)) for running in drafting]
        return readers if self.controller.may_read(len(sequences), modelled, tokens, drafter.token_seconds) else []

    def keep(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Keep only these sequences."""
        if self.drafter:
            self.drafter.keep(sequences)

    def compact(self) -> None:
        """Give back memory that is not used, as the batch has done."""
        if self.drafter:
            self.drafter.compact()

    # -- the verifying step ---------------------------------------------------------------------------------------

    def verify(
        self,
        sequences: abc.Sequence[RunningSequence],
        inputs: mx.array,
        plan: Plan,
        sampler: RewindingSampler,
        allowed: mx.array | None,
    ) -> Verified | None:
        """Draft, compute the tokens of each sequence, and keep those that are sampled as they were drafted.

        allowed: the tokens that the constraints allow at the first position. None: the logits were not finite, and
        nothing is kept; a rejected token may be why.
        """
        tokens = plan.tokens
        drafts, modelled = self._drafts(sequences, plan)
        padded = [own + [0] * (tokens - 1 - len(own)) for own in drafts]
        logits = self._cache.verify(mx.concatenate([inputs[:, None], mx.array(padded, dtype=mx.uint32)], axis=1))
        is_finite = (logits < mx.inf).all()
        steps, measured = [], []
        for n in range(tokens):
            steps.append(sampler(logits[:, n], None if n else allowed))
            measured.append(measure([running.sequence for running in sequences], logits[:, n], steps[n]))
        sampled = mx.stack(steps, axis=1)
        mx.eval(sampled, is_finite, [own.arrays for own in measured])
        if not is_finite.item():
            self._cache.rewind([tokens] * len(sequences), erases=True)
            sampler.rewind(sampled, [0] * len(sequences))
            self.controller.hold_off()
            return None
        rows = cast(list[list[int]], sampled.tolist())
        accepted = [_num_alike(draft, row) for draft, row in zip(drafts, rows, strict=True)]
        kept = [count + 1 for count in accepted]
        self._cache.rewind([tokens - count for count in kept])
        sampler.rewind(sampled, kept)
        self._note_drafts(sequences, plan, drafts, accepted, modelled)
        return Verified([row[:count] for row, count in zip(rows, kept, strict=True)], [own.read() for own in measured])

    def _note_drafts(
        self,
        sequences: abc.Sequence[RunningSequence],
        plan: Plan,
        drafts: abc.Sequence[abc.Sequence[int]],
        accepted: abc.Sequence[int],
        modelled: abc.Collection[int],
    ) -> None:
        """Measure what drafts were worth. modelled: ids of the sequences whose tokens were a draft model's."""
        self.controller.note_drafts(sum(map(len, drafts)), sum(accepted))
        num_drafting = sum(map(bool, drafts))
        for running, draft, right in zip(sequences, drafts, accepted, strict=True):
            if not draft:
                continue
            longer = (self.controller.cost(len(sequences), plan) - 1) * len(sequences) / num_drafting
            running.credit = min(running.credit + right - longer, _MOST_CREDIT)
            if running.sequence.id in modelled and running.draft_rates:
                for is_hit in [True] * right + [False] * (right < len(draft)):
                    running.draft_rates.note(running.draft_streak, is_hit)
                    running.draft_streak = running.draft_streak + 1 if is_hit else 0

    # -- times ----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Something else is computed before the next step, whose duration is no sample then."""
        self._is_pipelined = False  # the last step was launched before its tokens were read
        self._returned: float | None = None  # when the last step's tokens were returned, by perf_counter()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The block waits for the tokens of the step before, which is no part of the next step's duration."""
        started = perf_counter()
        yield
        if self._returned is not None:
            self._returned += perf_counter() - started
        self._is_pipelined = False

    def note_plain_step(self, sequences: int) -> None:
        """Measure a plain step of so many sequences, if the one before was plain, too."""
        now = perf_counter()
        if self._returned and self._is_pipelined:
            self.controller.note_plain(sequences, now - self._returned)
        self._returned, self._is_pipelined = now, True

    def note_verifying_step(self, sequences: int, plan: Plan) -> None:
        """Measure a verifying step of so many sequences, its drafts included."""
        now = perf_counter()
        seconds = now - self._returned if self._returned is not None else None
        self.controller.note_verified(sequences, plan, seconds)
        self._returned, self._is_pipelined = now, False


def is_possible(model: Any, setting: Setting, policy: ExecutionPolicy) -> bool:
    """Whether a decode batch of a model speculates: tokens can be taken back, and it is not off.

    "auto" is off where steps are compiled: the shapes of verifying steps would be, while requests wait for them.
    """
    if setting == "off" or (setting == "auto" and policy.compile_steps):
        return False
    return policy.batch_cache == "slots" and caches.is_plain(model)


def make_speculation(
    model: Any,
    vocab_size: int,
    cache: object,
    setting: Setting,
    policy: ExecutionPolicy | None,
    metrics: ModelMetrics,
    draft: DraftModel | None = None,
    stall_target: float = 0.25,
) -> Speculation | None:
    """Speculation of a decode batch with this cache; None where it does not speculate."""
    policy = policy or current()
    if not (is_possible(model, setting, policy) and isinstance(cache, SlotCache)):
        return None
    if draft is None:
        return Speculation(model, cache, policy, setting, metrics)
    drafter = Drafter(draft, cache, vocab_size, stall_target)
    cost = draft.weight_bytes / max(1, caches.weight_bytes(model))
    return Speculation(model, cache, policy, setting, metrics, drafter, cost)


def _lookup_row(running: RunningSequence) -> DraftingRow | None:
    """What a sequence may draft by lookup; None without a prediction."""
    if not (running.lookup and running.hit_rates and running.lookup.streak):
        return None
    return DraftingRow(running.lookup.streak, running.most_drafted, running.hit_rates)


def _model_row(running: RunningSequence) -> DraftingRow | None:
    """What a sequence may draft with a draft model."""
    if running.draft_rates is None:
        return None
    return DraftingRow(running.draft_streak, running.most_drafted, running.draft_rates)


def _num_alike(draft: list[int], sampled: list[int]) -> int:
    """Number of tokens up to the first that was drafted otherwise."""
    return next((n for n, token in enumerate(draft) if sampled[n] != token), len(draft))
