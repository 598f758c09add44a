"""Who has KV cache: prompts wait, start where the budget has room, leave, and are preempted where it has none.

Rule 1: waiting prompts start in the order of their arrival; those whose prefix comes from disk delay no others.
Rule 2: what a sequence or a prompt has in its KV cache goes to the prefix cache when it leaves, however it leaves.
"""

from __future__ import annotations

from collections import abc
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from mlxserver.engine.kv_cache import caches, checkpoints
from mlxserver.engine.kv_claims import Verdict
from mlxserver.engine.scheduler.decode import DecodeBatch
from mlxserver.engine.scheduler.kv_budget import KVBudget
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.sequence import Sequence

_RESTORE_WAIT = 0.01  # seconds for a prefix from disk, before the engine looks at its messages again


class Admission:
    """The prompts that wait and those that are processed, beside the running sequences of a batch.

    max_running: most sequences with a slot. checkpoint_interval: tokens between the checkpoints of a long prompt, None
    where none are taken.
    """

    def __init__(
        self,
        model: Any,
        running: DecodeBatch,
        budget: KVBudget,
        max_running: int,
        checkpoint_interval: int | None,
    ) -> None:
        self._model = model
        self._running = running
        self._budget = budget
        self._max_running = max_running
        self._checkpoint_interval = checkpoint_interval
        self.waiting: list[PendingPrompt] = []
        self.prefilling: list[PendingPrompt] = []

    def insert(self, sequences: abc.Sequence[Sequence], now: float) -> None:
        """Let sequences of one prompt wait: together, unless their KV cache does not fit all at once."""
        together = PendingPrompt(list(sequences), now)
        fit = self._budget.holds_together(together)
        restoring = None if together.is_scored else self._budget.restore_prefix(together.keys())
        prompts = [together] if fit else [PendingPrompt([sequence], now) for sequence in sequences]
        for prompt in prompts:
            prompt.restoring = restoring
        self.waiting += prompts

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences, whether they wait or run."""
        gone = set(sequence_ids)
        self.waiting = [prompt for prompt in self.waiting if not prompt.drop(gone)]
        for prompt in list(self.prefilling):
            keys = prompt.keys(prompt.done)
            if prompt.drop(gone):
                self.prefilling.remove(prompt)
                self._store_prefix(keys, prompt.cache)
        leaving = [index for index, running in enumerate(self._running.sequences) if running.sequence.id in gone]
        if leaving:
            self._leave(leaving)
        else:
            self._budget.settle(self.prefilling)
        if not self.waiting:
            self._budget.withdraw()

    def admit(self, now: float) -> None:
        """Give waiting prompts slots, as long as they fit."""
        restoring = [prompt.restoring for prompt in self.waiting if prompt.restoring and prompt.is_restoring]
        if restoring and len(restoring) == len(self.waiting) and not self.num_running:
            wait(restoring, _RESTORE_WAIT, FIRST_COMPLETED)  # there is nothing else to do, but new messages may come
        for prompt in [prompt for prompt in self.waiting if not prompt.is_restoring]:
            if not self._try_admit(prompt, now):
                break
            self.waiting = [other for other in self.waiting if other is not prompt]
            self.prefilling.append(prompt)

    def take_ready(self) -> list[PendingPrompt]:
        """Prompts that are processed, which are no longer among those that are prefilled."""
        ready = [prompt for prompt in self.prefilling if not prompt.remaining]
        if ready:
            self.prefilling = [prompt for prompt in self.prefilling if prompt.remaining]
        return ready

    def store_checkpoints(self) -> None:
        """Store checkpoints of the prompts that are at a stop."""
        for prompt in [prompt for prompt in self.prefilling if prompt.reach_stop()]:
            self._budget.store_checkpoint(prompt.keys(prompt.done), prompt.cache)
            self._budget.shrink_prefixes_beside(self._budget.tokens_of(self.prefilling), self.num_running)

    def make_room(self) -> bool:
        """Preempt the youngest until the next step is within the budget. False: it has to wait for other models."""
        while self._running.sequences or self.prefilling:
            kv_tokens = self._budget.compacted_tokens_of(self.prefilling)
            is_alone = len(self._running.sequences) + len(self.prefilling) <= 1
            if is_alone or self._budget.holds(kv_tokens):
                verdict = self._budget.grow(kv_tokens, self.prefilling)
                if verdict is not Verdict.PREEMPT:
                    self._budget.shrink_prefixes_beside(kv_tokens, self.num_running)
                    return verdict is Verdict.GRANTED
            self._preempt()
        return True

    def restart(self, staying: abc.Collection[int]) -> set[int]:
        """Drop all KV cache. The sequences that stay wait again, and resume where they were. Returns the ids of the
        others, which are removed.
        """
        begun = [PendingPrompt([running.resumed()], running.started) for running in self._running.sequences]
        begun += [PendingPrompt(prompt.sequences, prompt.arrived) for prompt in self.prefilling]
        all_ids = {sequence.id for prompt in [*begun, *self.waiting] for sequence in prompt.sequences}
        gone = all_ids - set(staying)
        again: list[PendingPrompt] = []
        for prompt in [*begun, *self.waiting]:
            if not prompt.drop(gone):
                again.append(prompt)
                gone |= {sequence.id for sequence in prompt.sequences}  # a call that failed halfway may have it twice
        self.waiting, self.prefilling = again, []
        self._running.clear()
        return gone - set(staying)

    @property
    def num_running(self) -> int:
        """Number of sequences that hold KV cache."""
        return len(self._running.sequences) + count(self.prefilling)

    def _try_admit(self, prompt: PendingPrompt, now: float) -> bool:
        """Start a prompt if there are slots and KV cache for all its sequences. The first of all is within any cap."""
        taken = self.num_running
        if taken + len(prompt.sequences) > self._max_running:
            return False
        with_prompt = [*self.prefilling, prompt]
        kv_tokens = self._budget.compacted_tokens_of(with_prompt)
        if taken and not self._budget.holds(kv_tokens):
            return False
        # Fetched before it may have to go for this very prompt; not at every try of one that waits for memory.
        may_fetch = self._budget.has_space(kv_tokens, with_prompt) and not prompt.is_scored
        cache, length = self._budget.fetch_prefix(prompt.keys()) if may_fetch else (None, 0)
        if not self._budget.start(kv_tokens, with_prompt, now):
            return False
        prompt.started = now
        self._budget.shrink_prefixes_beside(kv_tokens, taken + len(prompt.sequences))
        prompt.cache = cache or caches.new_cache(self._model)
        prompt.done = prompt.cached_tokens = length
        if self._checkpoint_interval:
            boundaries = prompt.sequences[0].boundaries
            stops = checkpoints.stops(boundaries, len(prompt.tokens), length, self._checkpoint_interval)
            prompt.stops = sorted({prompt.whole(length, stop) for stop in stops} - {length})
        prompt.report()
        return True

    def _leave(self, leaving: list[int]) -> None:
        """Take sequences out of the decode batch."""
        for index in leaving if self._budget.has_prefixes else ():
            if (running := self._running.sequences[index]).fed:
                self._budget.store_prefix(running.keys, self._running.cache.extract(index))
        self._running.store_draft_prefixes(leaving)
        self._running.leave(leaving)
        self._budget.settle(self.prefilling)  # only now: those that left need none any more

    def _store_prefix(self, tokens: abc.Sequence[int], cache: caches.Cache) -> None:
        self._budget.store_prefix(tokens, cache)
        self._budget.settle(self.prefilling)

    def _preempt(self) -> None:
        """Let the youngest wait again: a prompt, or else a sequence. Its KV cache may stay as a prefix."""
        if self.prefilling:
            prompt = self.prefilling.pop()
            self.waiting.insert(0, PendingPrompt(prompt.sequences, prompt.arrived))
            self._store_prefix(prompt.keys(prompt.done), prompt.cache)
        else:
            sequences = self._running.sequences
            index = max(range(len(sequences)), key=lambda index: sequences[index].started)
            self.waiting.insert(0, PendingPrompt([sequences[index].resumed()], sequences[index].started))
            self._leave([index])


def count(prompts: abc.Iterable[PendingPrompt]) -> int:
    """Number of sequences of some prompts."""
    return sum(len(prompt.sequences) for prompt in prompts)
