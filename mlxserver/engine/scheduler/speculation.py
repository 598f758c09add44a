"""Speculation of one decode batch: its sequences draft tokens, and one step verifies them all.

A drafted token is kept only if it is the one that is sampled at its position, so that no text changes (Leviathan et al.
2023, arXiv:2211.17192, with a draft that is certain of its tokens).
"""

from __future__ import annotations

import functools
from collections import abc
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.loading import mtp
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.sampling.logprobs import measure
from mlxserver.engine.scheduler.drafter import Drafter, DraftModel
from mlxserver.engine.scheduler.drafts import Drafts
from mlxserver.engine.scheduler.hit_rates import HitRates
from mlxserver.engine.scheduler.mtp_drafter import SIZES, MtpDrafter, make_mtp_drafter
from mlxserver.engine.scheduler.prompt_lookup import PromptLookup
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation_controller import REHEARSED, SpeculationController
from mlxserver.engine.scheduler.step_costs import PLAIN, Plan
from mlxserver.engine.scheduler.step_times import StepTimes
from mlxserver.engine.scheduler.verifying_shapes import VerifyingShapes
from mlxserver.engine.sequence import Logprobs, Sequence

Setting = Literal["auto", "off", "always"]


class RewindingSampler(Protocol):
    """Samples the tokens of a batch, and takes tokens back."""

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> mx.array:
        """Logits [batch, vocab] -> token ids [batch], of those that are allowed. Nothing is evaluated.

        Logits of several positions of each sequence, [batch, n, vocab] -> [batch, n]; allowed: at the first one.
        """

    def rewind(self, sampled: mx.array, kept: abc.Sequence[int]) -> None:
        """Take the last n tokens back, but for the first `kept` of each sequence. sampled: these tokens, [batch, n]."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Outcome of a verifying step: the tokens that each sequence keeps, at least one, the last of which is the next
    input. logprobs: by position and sequence id.
    """

    tokens: abc.Sequence[abc.Sequence[int]]
    logprobs: abc.Sequence[abc.Mapping[int, Logprobs]]


class Speculation:
    """Drafts, verifying steps and their times.

    draft: key of the model that drafts, "mtp" for the model's own head; None by lookup alone.
    """

    def __init__(
        self,
        cache: SlotCache,
        policy: ExecutionPolicy,
        setting: Setting,
        controller: SpeculationController,
        drafter: Drafter | MtpDrafter | None = None,
        draft: str | None = None,
    ) -> None:
        self.controller = controller
        self.drafts = Drafts(self.controller, drafter, is_forced=setting == "always")
        self.times = StepTimes(self.controller)
        self.draft = draft
        self._cache = cache
        self._shapes = VerifyingShapes(cache, are_limited=policy.compile_steps and setting != "always")

    # -- what is drafted ------------------------------------------------------------------------------------------

    def promising(self, sequences: abc.Sequence[RunningSequence]) -> list[RunningSequence]:
        """Those whose drafts are worth a break of the pipeline: their last tokens are sampled and not read."""
        plan = self._plan(sequences, is_pending=True)
        return self.drafts.predicted(sequences) if plan.tokens > 1 else []

    def plan(self, sequences: abc.Sequence[RunningSequence], promising: abc.Sequence[RunningSequence] = ()) -> Plan:
        """Plan of the next step, once the last tokens are read. promising: those that the pipeline was broken for."""
        plan = self._plan(sequences, is_pending=False)
        if promising:
            self.drafts.note_break(promising, len(sequences))
        return plan

    def _plan(self, sequences: abc.Sequence[RunningSequence], *, is_pending: bool) -> Plan:
        if not self._shapes.has_any():
            return PLAIN  # at once: the lookups of many sequences would take time from each of their steps
        for running in sequences:
            self._follow(running)
        return self.drafts.plan(sequences, self._shapes.fits, is_pending=is_pending)

    def _follow(self, running: RunningSequence) -> None:
        """Add the tokens that were generated to a sequence's lookup, and measure its predictions."""
        if running.lookup is None:
            if not (lookup := self.lookup(running.sequence)):
                return
            running.lookup, running.hit_rates = lookup, HitRates(self.controller.rates)
            running.draft_rates = HitRates(self.controller.draft_rates)
        for token in running.known_from(len(running.lookup)):
            self.drafts.follow(running, token)

    def lookup(self, sequence: Sequence) -> PromptLookup | None:
        """Lookup of a sequence; None of one that drafts nothing."""
        return None if sequence.constraint or sequence.images else PromptLookup(sequence.tokens)

    def plans_to_rehearse(self) -> list[Plan]:
        """Plans of verifying steps that are not made before they are rehearsed: few, each of which costs time."""
        if not self._shapes.are_limited:
            return []
        by_head = SIZES if self.draft else ()
        return [Plan(tokens, tokens in by_head) for tokens in sorted({*REHEARSED, *by_head})]

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
        drafts, modelled = self.drafts.draft(sequences, plan)
        padded = [own + [0] * (tokens - 1 - len(own)) for own in drafts]
        logits = self._cache.verify(mx.concatenate([inputs[:, None], mx.array(padded, dtype=mx.uint32)], axis=1))
        is_finite = (logits < mx.inf).all()
        sampled = sampler(logits, allowed)
        own = [running.sequence for running in sequences]
        measured = [measure(own, logits[:, n], sampled[:, n]) for n in range(tokens)]
        mx.eval(sampled, is_finite, [step.arrays for step in measured])
        self._shapes.note(tokens)
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
        self.drafts.note(sequences, plan, drafts, accepted, modelled)
        kept_rows = [row[:count] for row, count in zip(rows, kept, strict=True)]
        return Verified(kept_rows, [step.read() for step in measured])


def is_possible(model: Any, setting: Setting, policy: ExecutionPolicy) -> bool:
    """Whether a decode batch of a model speculates: tokens can be verified and taken back, and it is not off."""
    can_be_verified = policy.verifies and policy.batch_cache == "slots" and caches.is_plain(model)
    return policy.may_speculate(setting) and can_be_verified


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
    make_controller = functools.partial(SpeculationController, metrics, always=setting == "always")
    weight_bytes = max(1, caches.weight_bytes(model))
    if draft and policy.may_draft_by_model(setting):
        drafter = Drafter(draft, cache, vocab_size, stall_target)
        controller = make_controller(draft_cost=draft.weight_bytes / weight_bytes)
        return Speculation(cache, policy, setting, controller, drafter, draft.key)
    if head := make_mtp_drafter(model, cache, policy):
        cost = mtp.head_bytes(model) / weight_bytes
        controller = make_controller(draft_cost=cost, draft_rates=head.rates(), draft_sizes=SIZES)
        return Speculation(cache, policy, setting, controller, head, "mtp")
    return Speculation(cache, policy, setting, make_controller())


def _num_alike(draft: list[int], sampled: list[int]) -> int:
    """Number of tokens up to the first that was drafted otherwise."""
    return next((n for n, token in enumerate(draft) if sampled[n] != token), len(draft))
