"""Drafts of the sequences of a batch: by prompt lookup, by a draft model or a head of the model, and their worth.

Rule: a sequence has a credit of few steps. Verifying steps and breaks of the pipeline take from it by what they take
      longer, and verifying steps give to it by what they gain. Without credit it drafts nothing, and with little only a
      few tokens; each of its tokens adds some, and one that it copies more. So drafts that are never right cost a text
      that copies nothing the first ones and one step in two hundred, whatever was expected of them.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

from mlxserver.engine.scheduler.drafter import Drafter
from mlxserver.engine.scheduler.drafting_rows import DraftingRow, EitherRow
from mlxserver.engine.scheduler.mtp_drafter import MtpDrafter
from mlxserver.engine.scheduler.running import RunningSequence
from mlxserver.engine.scheduler.speculation_controller import SpeculationController
from mlxserver.engine.scheduler.step_costs import Plan

_MOST_CREDIT, _CREDIT_PER_TOKEN, _CREDIT_PER_COPIED = 6.0, 0.005, 0.1  # in plain steps
_LONG = 9  # tokens of a streak that a text which copies nothing seldom has


class Drafts:
    """What sequences draft. drafter: of a draft model, or of a head. is_forced: they draft whatever it costs."""

    def __init__(
        self, controller: SpeculationController, drafter: Drafter | MtpDrafter | None, *, is_forced: bool
    ) -> None:
        self._controller = controller
        self._drafter = drafter
        self._reader = drafter if isinstance(drafter, Drafter) else None  # it has a KV cache of its own
        self._is_forced = is_forced

    def plan(
        self, sequences: abc.Sequence[RunningSequence], fits: Callable[[int], bool], *, is_pending: bool = False
    ) -> Plan:
        """Plan of the next step. fits: whether so many tokens of each sequence have room. is_pending: their last tokens
        are not read, and to read them would break the pipeline.
        """
        drafting = [running for running in sequences if self._may_draft(running)]
        rows = [row for running in drafting if (row := _lookup_row(running, is_pending=is_pending))]
        modelled = self._modelled(drafting, is_pending=is_pending)
        credit = max((running.credit for running in drafting), default=0.0)
        most_cost = 1 + credit * len(drafting) / max(1, len(sequences))
        return self._controller.choose(len(sequences), rows, fits, [*modelled.values()], most_cost, breaks=is_pending)

    def predicted(self, sequences: abc.Sequence[RunningSequence]) -> list[RunningSequence]:
        """Those that may draft now, as far as they have a prediction or a draft model."""
        drafting = [running for running in sequences if self._may_draft(running)]
        modelled = self._modelled(drafting)
        return [own for own in drafting if _lookup_row(own) or own.sequence.id in modelled]

    def _may_draft(self, running: RunningSequence) -> bool:
        return running.lookup is not None and running.most_drafted > 0 and (self._is_forced or running.credit > 0)

    def _modelled(self, drafting: abc.Sequence[RunningSequence], *, is_pending: bool = False) -> dict[int, EitherRow]:
        """What sequences may draft with the draft model, by id; empty if it is ready for none of them."""
        if not self._drafter:
            return {}
        rows = {
            running.sequence.id: EitherRow(
                _lookup_row(running, is_pending=is_pending),
                _model_row(running) if self._drafter.is_ready(running) else None,
            )
            for running in drafting
        }
        return rows if any(row.model for row in rows.values()) else {}

    def draft(self, sequences: abc.Sequence[RunningSequence], plan: Plan) -> tuple[list[list[int]], set[int]]:
        """Drafted tokens of each sequence, and the ids of those whose tokens are a draft model's."""
        drafting = [running for running in sequences if self._may_draft(running)]
        by_model: dict[int, list[int]] = {}
        if plan.is_modelled and self._drafter:
            rows = self._modelled(drafting)
            chosen = [
                own for own in drafting if own.sequence.id in rows and rows[own.sequence.id].prefers_model(plan.tokens)
            ]
            by_model = self._drafter.draft(sequences, chosen, plan.tokens - 1)
        drafts: dict[int, list[int]] = {}
        for running in drafting:
            id, most = running.sequence.id, min(plan.tokens - 1, running.most_drafted)
            if id in by_model:
                drafts[id] = by_model[id][:most]
            elif running.lookup:
                drafts[id] = running.lookup.draft(most)
        return [drafts.get(running.sequence.id, []) for running in sequences], set(by_model)

    def note(
        self,
        sequences: abc.Sequence[RunningSequence],
        plan: Plan,
        drafts: abc.Sequence[abc.Sequence[int]],
        accepted: abc.Sequence[int],
        modelled: abc.Collection[int],
    ) -> None:
        """Measure what drafts were worth. modelled: ids of the sequences whose tokens were a draft model's."""
        self._controller.note_drafts(sum(map(len, drafts)), sum(accepted))
        num_drafting = sum(map(bool, drafts))
        for running, draft, right in zip(sequences, drafts, accepted, strict=True):
            if not draft:
                continue
            longer = (self._controller.cost(len(sequences), plan) - 1) * len(sequences) / num_drafting
            running.credit = min(running.credit + right - longer, _MOST_CREDIT)
            if running.sequence.id in modelled and running.draft_rates:
                for is_hit in [True] * right + [False] * (right < len(draft)):
                    running.draft_rates.note(running.draft_streak, is_hit)
                    running.draft_streak = running.draft_streak + 1 if is_hit else 0
                if not self._reader:
                    running.draft_streak = 0  # what matters of a head is how many drafts are before

    def note_break(self, promising: abc.Sequence[RunningSequence], sequences: int) -> None:
        """Charge sequences for a break of the pipeline. sequences: number of all in the batch."""
        longer = self._controller.costs(sequences).of_break * sequences / len(promising)
        for running in promising:
            running.credit -= longer

    def follow(self, running: RunningSequence, token: int) -> None:
        """Add a token that was generated to the lookup of its sequence, and measure what was predicted."""
        assert running.lookup and running.hit_rates
        streak = running.lookup.streak
        is_hit = running.lookup.append(token)
        if is_hit is not None:
            running.hit_rates.note(streak, is_hit)
        self.add_credit(running, is_copied=bool(is_hit) and streak >= _LONG)

    def add_credit(self, running: RunningSequence, *, is_copied: bool = False) -> None:
        """Count a token that was generated. is_copied: it was predicted behind a long streak."""
        earned = _CREDIT_PER_COPIED if is_copied else _CREDIT_PER_TOKEN
        running.credit = min(running.credit + earned, _MOST_CREDIT)

    # -- the draft model ------------------------------------------------------------------------------------------

    def readers(self, sequences: abc.Sequence[RunningSequence], token_seconds: float) -> list[RunningSequence]:
        """Sequences that the draft model should read, if that pays. token_seconds: of the prefill of their own."""
        if not (drafter := self._reader):
            return []
        drafting = [own for own in sequences if self._may_draft(own) and drafter.may_have(own)]
        readers = [running for running in drafting if not drafter.is_ready(running)]
        if not readers:
            return []
        tokens = sum(drafter.num_behind(running) for running in readers)
        modelled = [EitherRow(None, _model_row(running)) for running in drafting]
        seconds = drafter.token_seconds or token_seconds * self._controller.draft_cost
        return readers if self._controller.may_read(len(sequences), modelled, tokens, seconds) else []

    def read(self, readers: abc.Sequence[RunningSequence], own_step_seconds: float, peer_step_seconds: float) -> None:
        """Have the draft model read on. The times are those of steps, which wait meanwhile."""
        if self._reader:
            self._reader.read(readers, own_step_seconds, peer_step_seconds)

    def store(self, leaving: abc.Sequence[RunningSequence]) -> None:
        """Store what the draft model has of sequences that leave."""
        if self._reader:
            self._reader.store(leaving)

    def keep(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Keep only these sequences."""
        if self._reader:
            self._reader.keep(sequences)

    def compact(self) -> None:
        """Give back memory that is not used, as the batch has done."""
        if self._reader:
            self._reader.compact()


def _lookup_row(running: RunningSequence, *, is_pending: bool = False) -> DraftingRow | None:
    """What a sequence may draft by lookup; None without a prediction."""
    if not (running.lookup and running.hit_rates and running.lookup.streak):
        return None
    return DraftingRow(running.lookup.streak, running.most_drafted, running.hit_rates, is_pending)


def _model_row(running: RunningSequence) -> DraftingRow | None:
    """What a sequence may draft with a draft model."""
    if running.draft_rates is None:
        return None
    return DraftingRow(running.draft_streak, running.most_drafted, running.draft_rates)
