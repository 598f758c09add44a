"""Continuous batching: sequences join and leave a running batch at every step.

Rule 1: a sequence waits, then its prompt is prefilled (scheduler/prefill.py), then it runs (scheduler/decode.py).
Rule 2: KV cache and prefix cache together stay within max_kv_tokens, and within the pool of all models. Prefixes are
        dropped first; then prompts wait; and when the running sequences outgrow it, the youngest are preempted, and
        resume later where they were.
Rule 3: values that depend on the clock come in through insert() and prefill(), those that depend on other models
        through `peers`; the same calls make the same batch on every rank.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches, checkpoints
from mlxserver.engine.kv_cache.prefix_cache import ModelPrefixes
from mlxserver.engine.kv_pool import KVAccount
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import cpu_attention
from mlxserver.engine.platform.policy import ExecutionPolicy, current
from mlxserver.engine.requests import Execution
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.admission import Admission, count
from mlxserver.engine.scheduler.decode import DecodeBatch, MakeSampler
from mlxserver.engine.scheduler.drafter import DraftModel
from mlxserver.engine.scheduler.execution import execution
from mlxserver.engine.scheduler.kv_budget import KVBudget
from mlxserver.engine.scheduler.load_meter import LoadMeter
from mlxserver.engine.scheduler.peers import FixedPeers, Peers
from mlxserver.engine.scheduler.prefill import ChunkBudget, Prefill, waiting_ratio
from mlxserver.engine.scheduler.speculation import Setting
from mlxserver.engine.scheduler.warm_up import Shape, WarmUp
from mlxserver.engine.sequence import SampledToken, Sequence


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
            execution(model, self._policy),
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
        takes_checkpoints = prefixes is not None and checkpoints.needs_checkpoints(model)
        interval = checkpoint_interval if takes_checkpoints else None
        self._admission = Admission(model, self._running, self._budget, max_running, interval)

    # -- the Batch protocol -------------------------------------------------------------------------------------

    def insert(self, sequences: abc.Sequence[Sequence], now: float | None = None) -> None:
        """Queue the sequences of one request, which share one prompt of at least one token.

        They join together at one of the next steps, unless their KV cache does not fit all at once.
        """
        self._meter.insert(sequences)
        self._admission.insert(sequences, now or time.monotonic())

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Remove sequences, whether they wait or run; their KV cache goes to the prefix cache."""
        self._admission.remove(sequence_ids)
        self._meter.remove(sequence_ids)
        self._note_load()

    def decode(self) -> list[SampledToken]:
        """Launch one step for all running sequences and return the tokens of the step before. Without memory for the
        step, nothing is launched.
        """
        self._peer_step_seconds = self._peers.observe(self.load)
        before = self._admission.num_running
        self._is_held_up = not self._admission.make_room()
        if self._admission.num_running < before:  # some were preempted
            self._note_load()
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
        """Process one chunk of the waiting prompts and let those that are ready join the running sequences.

        A chunk that was launched and is not done yet is waited for: the step under way is behind it.
        """
        if self._prefill.settle():
            self._meter.delay_step()
            self._running.pause()
        budget, admission = budget or self.chunk_budget(), self._admission
        if not self._is_held_up:
            admission.admit(budget.now)
        if not admission.prefilling:
            if self._is_held_up or (admission.waiting and not self._running.sequences):
                self.before_launch()
                self._budget.wait()
            elif readers := self._running.readers(self._prefill.times.each):
                self.before_launch()
                mx.eval(self._running.sampled)  # the step's time is not the reading's
                self._meter.end_step()
                self._running.read(readers, self.load.step_seconds, self._peer_step_seconds)
            return
        self._note_load()
        self.before_launch()
        mx.eval(self._running.sampled)  # the step's time is not the chunk's
        self._meter.end_step()
        self._running.pause()
        self._prefill.advance(admission.prefilling, budget)
        admission.store_checkpoints()
        for prompt in admission.prefilling:
            prompt.report()
        if ready := admission.take_ready():
            self._running.join(ready, coming=count(admission.prefilling))
            self._note_load()

    def is_empty(self) -> bool:
        """Whether no sequence waits or runs."""
        return not (self._running.sequences or self.has_prompts())

    def waiting(self) -> set[int]:
        """Ids of the sequences without a slot."""
        return {sequence.id for prompt in self._admission.waiting for sequence in prompt.sequences}

    def restart(self, staying: abc.Collection[int]) -> list[SampledToken]:
        """Drop all KV cache, after a call that failed. The sequences that stay wait again and resume where they were;
        the others are removed. Returns the tokens that were read and not returned before.
        """
        unpublished = self._running.take()
        gone = self._admission.restart(staying)
        self._is_held_up = False
        self._prefill.forget()
        self.shrink_prefixes(0)
        self._budget.settle(())
        self._budget.withdraw()
        self._meter.remove(gone)
        self._note_load()
        return unpublished

    def close(self) -> None:
        """Free what the batch holds."""
        self.restart(())
        self._budget.close()
        if self._draft_prefixes:
            self._draft_prefixes.close()

    @property
    def before_launch(self) -> abc.Callable[[], None]:
        """Called when a step or a chunk is prepared, and before a wait."""
        return self._running.before_launch

    @before_launch.setter
    def before_launch(self, action: abc.Callable[[], None]) -> None:
        self._running.before_launch = action

    # -- for builder and ranks ----------------------------------------------------------------------------------

    @property
    def num_decoding(self) -> int:
        """Number of sequences that decode."""
        return len(self._running.sequences)

    def has_prompts(self) -> bool:
        """Whether a prompt waits or is prefilled."""
        return bool(self._admission.waiting or self._admission.prefilling)

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
        prompts = [*self._admission.prefilling, *self._admission.waiting]
        ratio = waiting_ratio(count(prompts), len(self._running.sequences))
        return self._prefill.budget(self.load.step_seconds, self._peer_step_seconds, ratio)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Drop the least recently used prefixes until at most this many bytes are left, of a draft model as well."""
        self._budget.shrink_prefixes(max_bytes)
        if self._draft_prefixes:
            self._draft_prefixes.shrink(max_bytes)

    def _note_load(self) -> None:
        decoding = [running.sequence.id for running in self._running.sequences]
        prefilling = [sequence.id for prompt in self._admission.prefilling for sequence in prompt.sequences]
        self._meter.update(decoding, prefilling, is_busy=not self.is_empty())
