"""Drafter of a decode batch: a smaller model of the same vocabulary, whose likeliest tokens are the drafts.

Rule 1: of a sequence, its KV cache has a prefix: drafted tokens that proved wrong are taken back first.
Rule 2: its slots hold no more tokens than those of the batch that it drafts for, whose claims count both models. What
        can't be held is dropped: a sequence can do without drafts.
Rule 3: prompts are read in chunks between the steps, one at a time, into a cache of their own until they join.
"""

from __future__ import annotations

import logging
from collections import abc
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, cast

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import ModelIdentity, ModelPrefixes
from mlxserver.engine.kv_cache.slot_cache import SlotCache
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.scheduler.prefill import Prefill
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.running import RunningSequence

log = logging.getLogger("engine")

_MOST_BEHIND = 8  # tokens that are computed along with the first draft
_CATCH_UP_ROWS = 128  # logits of a pass that catches up, as many as a verifying step of eight sequences has


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A model that drafts for another one. context_length: in tokens. identity: under which its prefixes are cached,
    None for none. prefixes: opened ones.
    """

    key: str
    model: Any
    context_length: int
    weight_bytes: int
    policy: ExecutionPolicy
    identity: ModelIdentity | None = None
    prefixes: ModelPrefixes | None = None


@dataclass
class _Row:
    """A sequence in the drafter's KV cache. drafted: those of its tokens there that were drafted, behind all others."""

    running: RunningSequence
    drafted: list[int] = field(default_factory=list)


class Drafter:
    """Drafts tokens for the running sequences. target: the KV cache of their batch. vocab_size: of its model."""

    def __init__(self, draft: DraftModel, target: SlotCache, vocab_size: int, stall_target: float) -> None:
        policy = replace(draft.policy, compile_steps=False, async_chunks=False)
        self._draft = draft
        self._prefixes = draft.prefixes
        self._target = target
        self._cache = SlotCache(draft.model, policy, narrow=target.class_of, wide=target.class_of)
        self._prefill = Prefill(draft.model, stall_target, policy)
        own_size = int(draft.model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1])  # lazy: nothing is computed
        self._last_token = own_size - 1
        self._vocab_size = min(vocab_size, own_size)
        self._is_usable = True
        self._has_read = False
        self.clear()

    # -- sequences ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop all sequences."""
        self._cache.clear()
        self._rows: list[_Row] = []
        self._reading: PendingPrompt | None = None
        self._refused: set[int] = set()  # ids of sequences that it has no memory for
        self._cached: dict[int, int] = {}  # tokens of a prompt that it need not read, by id

    def store(self, leaving: abc.Sequence[RunningSequence]) -> None:
        """Store what it has of sequences that leave as prefixes."""
        if not self._prefixes:
            return
        self._take_back()
        for running in leaving:
            if (index := self._index(running)) is not None:
                self._prefixes.store(running.tokens[: self._cache.lengths[index]], self._cache.extract(index))

    def keep(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Drop all sequences but these, and what the batch has no memory for any more."""
        if not sequences:
            self.clear()
            return
        ids = {running.sequence.id for running in sequences}
        self._refused &= ids
        self._cached = {id: length for id, length in self._cached.items() if id in ids}
        if self._reading and self._reading.drop({one.id for one in self._reading.sequences} - ids):
            self._reading = None
        order = [index for index, row in enumerate(self._rows) if row.running.sequence.id in ids]
        if len(order) < len(self._rows):
            self._keep_rows(order)
        self.compact()

    def compact(self) -> None:
        """Give back what is not used, as the batch has done."""
        self._cache.compact()
        if not self._fits([*self._cache.lengths]):
            self._reading = None
            self._keep_rows([])

    def _keep_rows(self, order: list[int]) -> None:
        self._rows = [self._rows[index] for index in order]
        if order:
            self._cache.keep(order)
        else:
            self._cache.clear()

    def may_have(self, running: RunningSequence) -> bool:
        """Whether it could draft for a sequence, once it has read it."""
        return (
            self._is_usable
            and running.num_known + _MOST_BEHIND < self._draft.context_length
            and running.sequence.id not in self._refused
        )

    def num_behind(self, running: RunningSequence) -> int:
        """Tokens of a sequence that it has not read."""
        index = self._index(running)
        if index is not None:
            return running.num_known - self._confirmed(index)
        id = running.sequence.id
        if id not in self._cached:
            self._cached[id] = self._prefixes.length(running.sequence.tokens) if self._prefixes else 0
        return running.num_known - self._cached[id]

    def is_ready(self, running: RunningSequence) -> bool:
        """Whether it can draft for a sequence now."""
        index = self._index(running)
        is_near = index is not None and running.num_known - self._confirmed(index) <= _MOST_BEHIND
        return is_near and self.may_have(running)

    def _index(self, running: RunningSequence) -> int | None:
        return next((index for index, row in enumerate(self._rows) if row.running is running), None)

    def _confirmed(self, index: int) -> int:
        """Tokens in the KV cache that were not drafted."""
        return self._cache.lengths[index] - len(self._rows[index].drafted)

    # -- drafts ---------------------------------------------------------------------------------------------------

    def draft(
        self, sequences: abc.Sequence[RunningSequence], drafting: abc.Sequence[RunningSequence], count: int
    ) -> dict[int, list[int]]:
        """The next tokens of sequences that are ready, `count` of each, by id. Empty if there is no memory for them.

        sequences: of the batch, those that draft among them.
        """
        self._take_back()
        ids = {running.sequence.id for running in drafting}
        tails = [self._tail(index, _MOST_BEHIND + 1) if row.running.sequence.id in ids else []
                 for index, row in enumerate(self._rows)]  # fmt: skip
        if not any(tails) or not self._make_room(max(map(len, tails)) + count - 1):
            return {}
        logits = self._advance(tails)
        steps, are_finite = [self._likeliest(logits)], [mx.isfinite(logits).all()]
        for _ in range(count - 1):
            logits = self._cache.advance(steps[-1])
            steps.append(self._likeliest(logits))
            are_finite.append(mx.isfinite(logits).all())
        sampled, are_all_finite = mx.stack(steps, axis=1), mx.stack(are_finite)
        mx.eval(sampled, are_all_finite)
        if not self._check(are_all_finite):
            return {}
        drafts = cast(list[list[int]], sampled.tolist())
        self._cache.rewind([0 if tail else count - 1 for tail in tails])
        for row, tail, own in zip(self._rows, tails, drafts, strict=True):
            row.drafted = own[: count - 1] if tail else []
        return {row.running.sequence.id: own for row, tail, own in zip(self._rows, tails, drafts, strict=True) if tail}

    def _take_back(self) -> None:
        """Take drafted tokens back, but for those that were right."""
        counts = []
        for index, row in enumerate(self._rows):
            known = row.running.known_from(self._confirmed(index))
            right = next((n for n, (a, b) in enumerate(zip(row.drafted, known, strict=False)) if a != b), None)
            counts.append(len(row.drafted) - (min(len(row.drafted), len(known)) if right is None else right))
            row.drafted = []
        if any(counts):
            self._cache.rewind(counts)

    def _tail(self, index: int, most: int) -> list[int]:
        """Tokens of a sequence that its KV cache does not have yet, up to so many."""
        tokens = self._rows[index].running.known_from(self._cache.lengths[index])[:most]
        return [min(token, self._last_token) for token in tokens]

    def _advance(self, tails: abc.Sequence[abc.Sequence[int]]) -> mx.array:
        """Compute such tokens of each row, none of some. Logits behind the last of each, [rows, vocab]."""
        longest = max(map(len, tails))
        padded = mx.array([[*tail, *[0] * (longest - len(tail))] for tail in tails], dtype=mx.uint32)
        if longest == 1:
            logits = self._cache.advance(padded[:, 0])
        else:
            ends = mx.array([max(len(tail), 1) - 1 for tail in tails])
            logits = self._cache.verify(padded)[mx.arange(len(tails)), ends]
        if any(missing := [longest - len(tail) for tail in tails]):
            self._cache.rewind(missing)
        return logits

    def _likeliest(self, logits: mx.array) -> mx.array:
        return mx.argmax(logits[:, : self._vocab_size], axis=-1).astype(mx.uint32)

    def _check(self, are_finite: mx.array) -> bool:
        """Whether the logits are finite; drops all for good if they are not: what it has computed is of no use."""
        if not are_finite.all().item():
            log.warning("the draft model's logits are not finite: it drafts no more")
            self.clear()
            self._is_usable = False
        return self._is_usable

    def _make_room(self, tokens: int) -> bool:
        """Have room for so many more tokens of each row, if the batch's memory allows it; else drop all rows."""
        if not self._fits([length + tokens for length in self._cache.lengths]):
            self._refused |= {row.running.sequence.id for row in self._rows}
            self._keep_rows([])
            return False
        self._cache.make_room(tokens)
        return True

    def _fits(self, lengths: list[int]) -> bool:
        """Whether the batch's memory allows slots for rows of such lengths, and for the prompt that is read."""
        if self._reading:
            lengths = [*lengths, len(self._reading.tokens)]
        if self._cache.tokens_for(lengths) > self._target.held_tokens:
            self._cache.compact()
        return self._cache.tokens_for(lengths) <= self._target.held_tokens

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def token_seconds(self) -> float | None:
        """Seconds per token that it reads; None before it has read any."""
        return self._prefill.times.each if self._has_read else None

    def read(self, sequences: abc.Sequence[RunningSequence], own_step_seconds: float, peer_step_seconds: float) -> None:
        """Read on: a chunk of the prompt of one of these sequences, or tokens that were generated without drafts.

        The times are those of steps: streams of this model and of its peers wait meanwhile.
        """
        self._take_back()
        if any(self._index(running) is not None for running in sequences):
            self._catch_up(sequences)
            return
        if self._reading is None:
            self._begin([running for running in sequences if self._index(running) is None])
        if self._reading:
            self._prefill.advance([self._reading], self._prefill.budget(own_step_seconds, peer_step_seconds))
            self._has_read = True
            if not self._reading.remaining:
                self._join(sequences)

    def _catch_up(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Compute tokens that were generated without drafts."""
        most = max(1, min(2 * _MOST_BEHIND, _CATCH_UP_ROWS // len(self._rows)))
        wanted = {running.sequence.id for running in sequences}
        tails = [self._tail(index, most) if row.running.sequence.id in wanted else []
                 for index, row in enumerate(self._rows)]  # fmt: skip
        if any(tails) and self._make_room(max(map(len, tails))):
            self._check(mx.isfinite(self._advance(tails)))

    def _begin(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Begin to read the prompt of the first of these sequences, if there is memory for it."""
        for running in sequences:
            tokens = [min(token, self._last_token) for token in running.sequence.tokens]
            lengths = [*self._cache.lengths, len(tokens)]
            if not self._prefill.bytes_beyond(len(tokens)) and self._fits(lengths):
                same = [own.sequence for own in sequences if own.sequence.tokens == running.sequence.tokens]
                plain = [replace(own, tokens=tuple(tokens), progress=None, boundaries=(), prompt_logprobs=None)
                         for own in same]  # fmt: skip
                self._reading = PendingPrompt(plain, monotonic())
                cache, length = self._prefixes.fetch(running.sequence.tokens) if self._prefixes else (None, 0)
                self._reading.cache, self._reading.done = cache or caches.new_cache(self._draft.model), length
                return
            self._refused.add(running.sequence.id)

    def _join(self, sequences: abc.Sequence[RunningSequence]) -> None:
        """Have slots for the sequences whose prompt is read."""
        assert self._reading
        read, self._reading = self._reading, None
        ids = {own.id for own in read.sequences}
        joining = [running for running in sequences if running.sequence.id in ids]
        lengths = [*self._cache.lengths, *[read.done + 1] * len(joining)]
        if not self._fits(lengths):
            self._refused |= ids
        elif joining:
            self._cache.join([read.cache for _ in joining])
            self._rows += [_Row(running) for running in joining]
