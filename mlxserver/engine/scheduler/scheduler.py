"""Continuous batching: rows join and leave a running batch at every step.

Rule 1: a row waits, then its prompt is processed (scheduler/prefill.py), then it generates (scheduler/decode.py).
Rule 2: what was computed for a row that leaves goes to the prefix cache, however it leaves.
Rule 3: what is held in keys and values stays within max_kv_tokens. Kept prefixes are given back first; then prompts
        wait; and when rows grow too long together, the youngest wait too, and go on later where they were.
Rule 4: what depends on the clock comes in through insert() and prefill(); the same calls make the same batch anywhere.
"""

from __future__ import annotations

import sys
import time
from collections import abc, deque
from collections.abc import Callable, Collection
from statistics import median
from typing import Any

from mlxserver.engine.mlx import mx

from mlxserver.engine.kv_cache import caches
from mlxserver.engine.kv_cache.prefix_cache import PrefixCache
from mlxserver.engine.metrics import ModelMetrics
from mlxserver.engine.platform import cpu_kernels
from mlxserver.engine.platform.policy import ExecutionPolicy
from mlxserver.engine.sampling.sampler import BatchSampler
from mlxserver.engine.scheduler.chunks import PendingPrompt
from mlxserver.engine.scheduler.decode import DecodeBatch, MakeSampler
from mlxserver.engine.scheduler.prefill import ChunkBudget, Prefill
from mlxserver.engine.sequence import SampledToken, Sequence

_STEPS_MEASURED = 15  # whose median is a step's time: some of them wait for a compilation


class Scheduler:
    """The batch of one model. All calls on one thread, inside that thread's MLX stream.

    stall_target: seconds that prefill may delay running streams. max_kv_tokens: most tokens in the KV cache, None
    for no limit; a single sequence may always go on. peer_step_seconds: gives the duration of a decode step of other
    models' streams, 0 without any. share_cores: called before every step. bytes_per_token: bytes of KV cache per token,
    None measures it.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running: int = 32,
        stall_target: float = 0.25,
        prefix_cache: PrefixCache | None = None,
        peer_step_seconds: Callable[[object], float] = lambda asking: 0.0,
        share_cores: Callable[[], None] = lambda: None,
        max_kv_tokens: int | None = None,
        metrics: ModelMetrics | None = None,
        make_sampler: MakeSampler = BatchSampler,
        bytes_per_token: int | None = None,
        policy: ExecutionPolicy | None = None,
    ) -> None:
        self._model = model
        self._max_running = max_running
        self._prefix_cache = prefix_cache
        self._peer_step_seconds = peer_step_seconds
        self._share_cores = share_cores
        self._max_kv_tokens = max_kv_tokens or sys.maxsize
        self._bytes_per_token = bytes_per_token or caches.bytes_per_token(model)
        self._metrics = metrics or ModelMetrics("")
        self.vocab_size: int = model(mx.zeros((1, 1), dtype=mx.uint32)).shape[-1]  # lazy: nothing is computed
        self._waiting: list[PendingPrompt] = []
        self._prompts: list[PendingPrompt] = []
        self._prefill = Prefill(model, stall_target, policy)
        self._decoding = DecodeBatch(model, self.vocab_size, make_sampler, policy)
        self._steps = deque([stall_target], maxlen=_STEPS_MEASURED)
        self._step_seconds = stall_target
        self._step_began: float | None = None  # of the step under way; by time.monotonic()
        self._step_ended = 0.0  # of the last one

    # -- the Batch protocol -------------------------------------------------------------------------------------

    def insert(self, rows: abc.Sequence[Sequence], now: float | None = None) -> None:
        """Queue rows that share one prompt of at least one token; they join at one of the next steps.

        They join together, unless there is not room for all of them at once.
        """
        now = now or time.monotonic()
        together = PendingPrompt(list(rows), now)
        is_possible = self._decoding.places.tokens_for(len(rows), together.length) <= self._max_kv_tokens
        self._waiting += [together] if is_possible else [PendingPrompt([row], now) for row in rows]

    def remove(self, sequence_ids: abc.Sequence[int]) -> None:
        """Forget rows, wherever they are; what was computed for them goes to the prefix cache."""
        gone = set(sequence_ids)
        self._waiting = [prompt for prompt in self._waiting if not prompt.drop(gone)]
        for prompt in list(self._prompts):
            tokens = prompt.tokens
            if prompt.drop(gone):
                self._prompts.remove(prompt)
                self._keep_prefix(tokens[: prompt.done], prompt.cache)
        leaving = [index for index, row in enumerate(self._decoding.rows) if row.row.id in gone]
        if leaving:
            self._leave(leaving)

    def decode(self) -> list[SampledToken]:
        """Launch one step for every decoding row and return the tokens of the step before."""
        self._share_cores()
        self._preempt_to_fit()
        if not self._decoding.rows:
            self._step_began = None
            return []
        self._metrics.batch_size.observe(len(self._decoding.rows))
        launched = time.monotonic()
        with cpu_kernels.layer_by_layer(self._peer_step_seconds(self) > 0):
            tokens = self._decoding.advance()
        self._note_step_end()
        self._step_began = max(launched, self._step_ended)
        return tokens

    def prefill(self, pace: ChunkBudget | None = None) -> None:
        """Process one chunk of the waiting prompts and let those that are ready join the batch."""
        pace = pace or self.pace()
        self._admit(pace.now)
        if self._prompts:
            mx.eval(self._decoding.running)  # the step's time is not the chunk's
            self._note_step_end()
        self._prefill.advance(self._prompts, pace)
        if ready := [prompt for prompt in self._prompts if not prompt.remaining]:
            self._prompts = [prompt for prompt in self._prompts if prompt.remaining]
            self._decoding.join(ready, coming=sum(len(prompt.rows) for prompt in self._prompts))

    def decoding(self) -> int:
        """How many rows generate."""
        return len(self._decoding.rows)

    def has_prompts(self) -> bool:
        """Whether a prompt waits or is being processed."""
        return bool(self._waiting or self._prompts)

    def warm_up(self) -> None:
        """Prepare what prompts need, before there is any."""
        self._prefill.warm_up()

    def is_empty(self) -> bool:
        """Whether no row is waiting or decoding."""
        return not (self._decoding.rows or self._prompts or self._waiting)

    def waiting(self) -> set[int]:
        """Ids of the rows that have no place yet."""
        return {row.id for prompt in self._waiting for row in prompt.rows}

    def restart(self, staying: Collection[int]) -> list[SampledToken]:
        """Drop all that was computed, after a call that failed. The rows that stay wait again, and go on from where
        they were; the others are forgotten. Gives the tokens that were read and not given before.
        """
        unpublished = self._decoding.take()
        begun = [PendingPrompt([row.resumed()], row.started) for row in self._decoding.rows]
        begun += [PendingPrompt(prompt.rows, prompt.arrived) for prompt in self._prompts]
        gone = {row.id for prompt in [*begun, *self._waiting] for row in prompt.rows} - set(staying)
        again: list[PendingPrompt] = []
        for prompt in [*begun, *self._waiting]:
            if not prompt.drop(gone):
                again.append(prompt)
                gone |= {row.id for row in prompt.rows}  # what failed halfway may have it in two places
        self._waiting, self._prompts = again, []
        self._decoding.clear()
        self.shrink_prefixes(0)
        return unpublished

    def pace(self) -> ChunkBudget:
        """The pace of the next chunk, as measured here."""
        return self._prefill.pace(self.running_step_seconds(), self._peer_step_seconds(self), self._waiting_ratio())

    def running_step_seconds(self) -> float:
        """Seconds that a step takes for those who stream; 0 while nobody does. May be asked from any thread."""
        return self._step_seconds if self._decoding.rows else 0.0

    def close(self) -> None:
        """Free what the batch holds."""
        self._waiting, self._prompts = [], []
        self._decoding.clear()
        self.shrink_prefixes(0)

    def shrink_prefixes(self, max_bytes: int) -> None:
        """Give the least recently used prefixes back until at most this many bytes are kept."""
        if self._prefix_cache:
            self._prefix_cache.shrink(max_bytes)

    def _waiting_ratio(self) -> float:
        """How many rows wait for each that streams, one at least.

        With one row streaming and fifteen waiting, chunks of a few of its short steps each would keep the fifteen
        waiting for long, and are the least efficient.
        """
        waiting = sum(len(prompt.rows) for prompt in (*self._prompts, *self._waiting))
        return max(1.0, waiting / max(1, len(self._decoding.rows)))

    def _note_step_end(self) -> None:
        """The tokens of the last step are there, now or since this was told."""
        if self._step_began is not None:
            self._step_ended = time.monotonic()
            self._steps.append(self._step_ended - self._step_began)
            self._step_seconds = median(self._steps)
            self._step_began = None

    # -- coming and going ---------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        """Give waiting prompts a place while there is one for all their rows."""
        taken = len(self._decoding.rows) + sum(len(prompt.rows) for prompt in self._prompts)
        while self._waiting and taken + len(self._waiting[0].rows) <= self._max_running and self._fits():
            prompt = self._waiting[0]
            prompt.started = now
            cache, length = self._prefix_cache.fetch(prompt.tokens) if self._prefix_cache else (None, 0)
            prompt.cache = cache or caches.new_cache(self._model)
            prompt.done = prompt.cached_tokens = length
            self._prompts.append(self._waiting.pop(0))
            taken += len(prompt.rows)

    def _leave(self, leaving: list[int]) -> None:
        """Take rows out of the decode batch."""
        rows = self._decoding.rows
        for index in leaving:
            if self._prefix_cache and rows[index].tokens:
                tokens = [*rows[index].row.tokens[:-1], *rows[index].tokens]
                self._prefix_cache.store(tokens, self._decoding.places.extract(index))
        self._decoding.leave(leaving)
        self._shrink_to(self._tokens_needed())  # only now: those who leave need no room any more

    def _keep_prefix(self, tokens: abc.Sequence[int], cache: caches.Cache) -> None:
        if self._prefix_cache:
            self._prefix_cache.store(tokens, cache)
            self._shrink_to(self._tokens_held())

    # -- room ---------------------------------------------------------------------------------------------------

    def _tokens_held(self, *joining: PendingPrompt) -> int:
        """Tokens of keys and values that are there when everybody at work, and those who join, come to decode together.

        A prompt counts twice: what is computed for it has a copy of its own until it has joined.
        """
        prompts = [*self._prompts, *joining]
        lengths = [row.length for row in self._decoding.rows] + [
            prompt.length for prompt in prompts for _ in prompt.rows
        ]
        own = sum(self._prefill.tokens_for(prompt) for prompt in prompts)
        return self._decoding.places.tokens_for(len(lengths), max(lengths)) + own if lengths else 0

    def _tokens_needed(self, *joining: PendingPrompt) -> int:
        """As _tokens_held(); if that is too many, what the decoding rows do not need is given back first."""
        if self._decoding.rows and self._tokens_held(*joining) > self._max_kv_tokens:
            self._decoding.places.compact()
        return self._tokens_held(*joining)

    def _fits(self) -> bool:
        """Whether the next waiting prompt can be taken. The first of all always can."""
        held = self._tokens_needed(self._waiting[0])
        if held > self._max_kv_tokens and (self._decoding.rows or self._prompts):
            return False
        self._shrink_to(held)
        return True

    def _preempt_to_fit(self) -> None:
        """Let the youngest wait again until the next step is within the limit."""
        while self._tokens_needed() > self._max_kv_tokens and len(self._decoding.rows) + len(self._prompts) > 1:
            self._preempt()
        self._shrink_to(self._tokens_needed())

    def _preempt(self) -> None:
        """Let the youngest wait again: a prompt, or else a row. What was computed for it may stay as a prefix."""
        if self._prompts:
            prompt = self._prompts.pop()
            self._waiting.insert(0, PendingPrompt(prompt.rows, prompt.arrived))
            self._keep_prefix(prompt.tokens[: prompt.done], prompt.cache)
            return
        index = max(range(len(self._decoding.rows)), key=lambda index: self._decoding.rows[index].started)
        row = self._decoding.rows[index]
        self._waiting.insert(0, PendingPrompt([row.resumed()], row.started))
        self._leave([index])

    def _shrink_to(self, held: int) -> None:
        """Leave to kept prefixes what the rows do not need."""
        if self._max_kv_tokens < sys.maxsize:
            self.shrink_prefixes(max(0, self._max_kv_tokens - held) * self._bytes_per_token)
