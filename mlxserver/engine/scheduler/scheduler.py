"""Continuous batching: sequences join and leave a running batch at every step.

Rule 1: a sequence waits, then its prompt is prefilled (scheduler/prefill.py), then it runs (scheduler/decode.py).
Rule 2: the KV cache of a sequence that leaves goes to the prefix cache, however it leaves.
Rule 3: KV cache and prefix cache together stay within max_kv_tokens, and within the pool of all models. Prefixes are
        dropped first; then prompts wait; and when the running sequences outgrow it, the youngest are preempted, and
        resume later where they were.
Rule 4: values that depend on the clock come in through insert() and prefill(), those that depend on other models
        through `peers`; the same calls make the same batch on every rank.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches, checkpoints
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes
from mlxserver.engine.kv_claims import Verdict
from mlxserver.engine.kv_pool import KVAccount
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.requests import Execution
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.decode import DecodeBatch, MakeSampler
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.execution import execution
from mlxserver.engine.scheduler.kv_budget import KVBudget
from mlxserver.engine.scheduler.load_meter import LoadMeter
from mlxserver.engine.scheduler.peers import FixedPeers, Peers
from mlxserver.engine.scheduler.prefill import ChunkBudget, Prefill, waiting_ratio
from mlxserver.engine.scheduler.prompts import PendingPrompt
from mlxserver.engine.scheduler.speculation import Setting
from mlxserver.engine.scheduler.warm_up import Shape, WarmUp
from mlxserver.engine.sequence import SampledToken, Sequence

_RESTORE_WAIT = 0.01  # seconds for a prefix from disk, before the engine looks at its messages again


class Scheduler:
    """The batch of one model. All calls on one thread, inside that thread's MLX stream.

    max_running: most sequences with a slot. stall_target: seconds that prefill may delay running streams.
    max_kv_tokens: most tokens in KV cache and prefix cache, None for no limit; a single sequence may always go on.
    account: the model's in the pool of all models, None for no limit.
    sizes: of the KV cache, None measures them. checkpoint_interval: tokens between the checkpoints of a long prompt,
    where the KV cache can't be trimmed. speculation: whether tokens are drafted; ranks that share a model draft none.
    draft: a model that drafts tokens, too; its KV cache counts with that of the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running: int = 32,
        stall_target: float = 0.25,
        prefixes: ModelPrefixes | None = None,
        peers: Peers | None = None,
        max_kv_tokens: int | None = None,
        account: KVAccount | None = None,
        metrics: ModelMetrics | None = None,
        make_sampler: MakeSampler = BatchSampler,
        sizes: caches.CacheSizes | None = None,
        checkpoint_interval: int = 4096,
        policy: ExecutionPolicy | None = None,
        speculation: Setting = "off",
        draft: DraftModel | None = None,
    ) -> None:
        self.vocab_size: int = model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1]  # lazy: nothing is computed
        self._policy = policy or current()
        self.reserved_kv_bytes: int | None = account.floor if account else None
        self._model = model
        self._max_running = max_running
        self._peers = peers or FixedPeers()
        self._peer_step_seconds = 0.0
        self._metrics = metrics or ModelMetrics("")
        self._waiting: list[PendingPrompt] = []
        self._prefilling: list[PendingPrompt] = []
        is_shared = sizes is not None  # ranks have agreed on it
        self._running = DecodeBatch(
            model,
            self.vocab_size,
            make_sampler,
            policy,
            is_shared=is_shared,
            speculation=speculation,
            metrics=self._metrics,
            draft=draft,
            stall_target=stall_target,
        )
        self.execution: Execution | None = replace(
            execution(model, policy or current()),
            speculation=self._running.speculates,
            draft=self._running.draft,
        )
        self._prefill = Prefill(model, stall_target, policy)
        self._meter = LoadMeter(stall_target)
        self.load = self._meter.load
        sizes = sizes or caches.cache_sizes(model)
        self._draft_prefixes = draft.prefixes if draft else None
        if draft:
            sizes = sizes.with_draft(draft.model)
        self._budget = KVBudget(self._running, self._prefill, prefixes, max_kv_tokens, sizes, max_running, account)
        self._is_held_up = False  # the running sequences wait for memory
        self._takes_checkpoints = prefixes is not None and checkpoints.needs_checkpoints(model)
        self._checkpoint_interval = checkpoint_interval

    # -- the Batch protocol -------------------------------------------------------------------------------------

    def insert(self, sequences: abc.Sequence[Sequence], now: float | None = None) -> None:
        """Queue the sequences of one request, which share one prompt of at least one token.

        They join together at one of the next steps, unless their KV cache does not fit all at once.
        """
        now = now or time.monotonic()
        self._meter.insert(sequences)
        together = PendingPrompt(list(sequences), now)
        fit = self._budget.holds_together(together)
        restoring = None if together.is_scored else self._budget.restore_prefix(together.keys())
        prompts = [together] if fit else [PendingPrompt([sequence], now) for sequence in sequences]
        for prompt in prompts:
            prompt.restoring = restoring
        self._waiting += prompts

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences, whether they wait or run; their KV cache goes to the prefix cache."""
        gone = set(sequence_ids)
        self._waiting = [prompt for prompt in self._waiting if not prompt.drop(gone)]
        for prompt in list(self._prefilling):
            keys = prompt.keys(prompt.done)
            if prompt.drop(gone):
                self._prefilling.remove(prompt)
                self._store_prefix(keys, prompt.cache)
        leaving = [index for index, running in enumerate(self._running.sequences) if running.sequence.id in gone]
        if leaving:
            self._leave(leaving)
        else:
            self._budget.settle(self._prefilling)
        if not self._waiting:
            self._budget.withdraw()
        self._meter.remove(sequence_ids)
        self._note_load()

    def decode(self) -> list[SampledToken]:
        """Launch one step for all running sequences and return the tokens of the step before. Without memory for the
        step, nothing is launched.
        """
        self._peer_step_seconds = self._peers.observe(self.load)
        self._is_held_up = not self._preempt_to_fit()
        if self._is_held_up or not self._running.sequences:
            return []
        self._metrics.batch_size.observe(len(self._running.sequences))
        launched = time.monotonic()
        with cpu_attention.layer_by_layer(self._peer_step_seconds > 0):
            tokens = self._running.advance()
        self._meter.end_step()
        self._meter.begin_step(launched)
        return tokens

    def prefill(self, budget: ChunkBudget | None = None) -> None:
        """Process one chunk of the waiting prompts and let those that are ready join the running sequences."""
        budget = budget or self.chunk_budget()
        if not self._is_held_up:
            self._admit(budget.now)
        if not self._prefilling:
            if self._is_held_up or (self._waiting and not self._running.sequences):
                self._budget.wait()
            elif readers := self._running.readers(self._prefill.times.each):
                mx.eval(self._running.sampled)  # the step's time is not the reading's
                self._meter.end_step()
                self._running.read(readers, self.load.step_seconds, self._peer_step_seconds)
            return
        self._note_load()
        mx.eval(self._running.sampled)  # the step's time is not the chunk's
        self._meter.end_step()
        self._running.pause()
        self._prefill.advance(self._prefilling, budget)
        self._store_checkpoints()
        for prompt in self._prefilling:
            prompt.report()
        if ready := [prompt for prompt in self._prefilling if not prompt.remaining]:
            self._prefilling = [prompt for prompt in self._prefilling if prompt.remaining]
            self._running.join(ready, coming=_count(self._prefilling))
            self._note_load()

    def is_empty(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self._running.sequences or self._prefilling or self._waiting)

    def waiting(self) -> set[int]:
        """Ids of the sequences without a slot."""
        return {sequence.id for prompt in self._waiting for sequence in prompt.sequences}

    def restart(self, staying: abc.Collection[int]) -> list[SampledToken]:
        """Drop all KV cache, after a call that failed. The sequences that stay wait again and resume where they were;
        the others are removed. Returns the tokens that were read and not returned before.
        """
        unpublished = self._running.take()
        begun = [PendingPrompt([running.resumed()], running.started) for running in self._running.sequences]
        begun += [PendingPrompt(prompt.sequences, prompt.arrived) for prompt in self._prefilling]
        gone = {sequence.id for prompt in [*begun, *self._waiting] for sequence in prompt.sequences} - set(staying)
        again: list[PendingPrompt] = []
        for prompt in [*begun, *self._waiting]:
            if not prompt.drop(gone):
                again.append(prompt)
                gone |= {sequence.id for sequence in prompt.sequences}  # a call that failed halfway may have it twice
        self._waiting, self._prefilling = again, []
        self._running.clear()
        self._is_held_up = False
        self.shrink_prefixes(0)
        self._budget.settle(())
        self._budget.withdraw()
        self._meter.remove(gone - set(staying))
        self._note_load()
        return unpublished

    def close(self) -> None:
        """Free what the batch holds."""
        self.restart(())
        self._budget.close()
        if self._draft_prefixes:
            self._draft_prefixes.close()

    # -- for builder and ranks ----------------------------------------------------------------------------------

    @property
    def num_decoding(self) -> int:
        """Number of sequences that decode."""
        return len(self._running.sequences)

    def has_prompts(self) -> bool:
        """Whether a prompt waits or is prefilled."""
        return bool(self._waiting or self._prefilling)

    def longest(self, most: int) -> int:
        """Tokens of the longest sequence, of `most` at most, that could be served alone."""
        return self._budget.longest(most)

    def warm_up(self, longest: int, most_tokens: int | None = None) -> Generator[Shape, None, None]:
        """Compute shapes that requests will use, one per step of the iterator (scheduler/warm_up.py).

        longest: tokens of the longest sequence. most_tokens: of KV cache in a shape; None for as many as the pool has.
        """
        warm_up = WarmUp(self._model, self._running, self._prefill, self._budget, self._policy, self._max_running)
        return warm_up.steps(longest, most_tokens)

    def chunk_budget(self) -> ChunkBudget:
        """Budget of the next chunk, as measured here."""
        ratio = waiting_ratio(_count([*self._prefilling, *self._waiting]), len(self._running.sequences))
        return self._prefill.budget(self.load.step_seconds, self._peer_step_seconds, ratio)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Drop the least recently used prefixes until at most this many bytes are left, of a draft model as well."""
        self._budget.shrink_prefixes(max_bytes)
        if self._draft_prefixes:
            self._draft_prefixes.shrink(max_bytes)

    # -- joining and leaving ------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """Give waiting prompts slots, in order of arrival, as long as they fit. Prefixes from disk delay no others."""
        restoring = [prompt.restoring for prompt in self._waiting if prompt.restoring and prompt.is_restoring]
        if restoring and len(restoring) == len(self._waiting) and not self._num_running:
            wait(restoring, _RESTORE_WAIT, FIRST_COMPLETED)  # there is nothing else to do, but new messages may come
        for prompt in [prompt for prompt in self._waiting if not prompt.is_restoring]:
            if not self._try_admit(prompt, now):
                break
            self._waiting = [other for other in self._waiting if other is not prompt]
            self._prefilling.append(prompt)

    def _try_admit(self, prompt: PendingPrompt, now: float) -> bool:
        """Start a prompt if there are slots and KV cache for all its sequences. The first of all is within any cap."""
        taken = self._num_running
        if taken + len(prompt.sequences) > self._max_running:
            return False
        with_prompt = [*self._prefilling, prompt]
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
        if self._takes_checkpoints:
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
        self._budget.settle(self._prefilling)  # only now: those that left need none any more

    def _store_prefix(self, tokens: abc.Sequence[int], cache: caches.Cache) -> None:
        self._budget.store_prefix(tokens, cache)
        self._budget.settle(self._prefilling)

    def _store_checkpoints(self) -> None:
        """Store checkpoints of the prompts that are at a stop."""
        for prompt in [prompt for prompt in self._prefilling if prompt.reach_stop()]:
            self._budget.store_checkpoint(prompt.keys(prompt.done), prompt.cache)
            self._budget.shrink_prefixes_beside(self._budget.tokens_of(self._prefilling), self._num_running)

    @property
    def _num_running(self) -> int:
        """Number of sequences that hold KV cache."""
        return len(self._running.sequences) + _count(self._prefilling)

    def _note_load(self) -> None:
        decoding = [running.sequence.id for running in self._running.sequences]
        prefilling = [sequence.id for prompt in self._prefilling for sequence in prompt.sequences]
        self._meter.update(decoding, prefilling, is_busy=not self.is_empty())

    # -- preemption ---------------------------------------------------------------------------------------------

    def _preempt_to_fit(self) -> bool:
        """Preempt the youngest until the next step is within the budget. False: it has to wait for other models."""
        while self._running.sequences or self._prefilling:
            kv_tokens = self._budget.compacted_tokens_of(self._prefilling)
            is_alone = len(self._running.sequences) + len(self._prefilling) <= 1
            if is_alone or self._budget.holds(kv_tokens):
                verdict = self._budget.grow(kv_tokens, self._prefilling)
                if verdict is not Verdict.PREEMPT:
                    self._budget.shrink_prefixes_beside(kv_tokens, self._num_running)
                    return verdict is Verdict.GRANTED
            self._preempt()
        return True

    def _preempt(self) -> None:
        """Let the youngest wait again: a prompt, or else a sequence. Its KV cache may stay as a prefix."""
        if self._prefilling:
            prompt = self._prefilling.pop()
            self._waiting.insert(0, PendingPrompt(prompt.sequences, prompt.arrived))
            self._store_prefix(prompt.keys(prompt.done), prompt.cache)
        else:
            sequences = self._running.sequences
            index = max(range(len(sequences)), key=lambda index: sequences[index].started)
            self._waiting.insert(0, PendingPrompt([sequences[index].resumed()], sequences[index].started))
            self._leave([index])
        self._note_load()


def _count(prompts: abc.Iterable[PendingPrompt]) -> int:
    return sum(len(prompt.sequences) for prompt in prompts)
